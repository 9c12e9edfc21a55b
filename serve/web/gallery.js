// The pictures: each run of the composer, its previews as they sharpen, and what each picture was made of.

import { showPicture } from "./details.js";
import { subjectOf } from "./subjects.js";

const NAME_CHARS = 60;
const MOST_COLUMNS = 3;

const runTemplate = document.getElementById("run-template");
const tileTemplate = document.getElementById("tile-template");

export class Gallery {
  /** `onReuse(picture)` is called where a picture's settings are wanted again. */
  constructor(onReuse) {
    this.onReuse = onReuse;
    this.runs = document.getElementById("runs");
  }

  /** A new run, on top of the others. */
  begin(asked, concept) {
    document.getElementById("empty").hidden = true;
    const run = new Run(asked, concept, this.onReuse);
    this.runs.prepend(run.element);
    run.element.scrollIntoView({ block: "start" });
    return run;
  }
}

class Run {
  constructor(asked, concept, onReuse) {
    this.subject = subjectOf(concept);
    this.element = runTemplate.content.cloneNode(true).firstElementChild;
    this.element.querySelector("h3").textContent = spoken(asked.prompt, this.subject);
    this.element.querySelector("p").textContent = new Date().toLocaleTimeString([], { timeStyle: "short" });
    this.tiles = Array.from({ length: asked.n }, () => new Tile(asked, this.subject, onReuse));
    const list = this.element.querySelector(".tiles");
    list.style.setProperty("--columns", asked.n === 4 ? 2 : Math.min(asked.n, MOST_COLUMNS));
    list.append(...this.tiles.map((tile) => tile.element));
  }

  get total() {
    return this.tiles.length;
  }

  get finished() {
    return this.tiles.filter((tile) => tile.picture).length;
  }

  get missing() {
    return this.total - this.finished;
  }

  /** Of all the steps, 0 to 1. */
  get share() {
    return this.tiles.reduce((sum, tile) => sum + tile.share, 0) / this.total;
  }

  heard(event) {
    const tile = this.tiles[event.image_index];
    const kind = event.type.split(".")[1];
    if (kind === "completed") tile.complete(event);
    else tile.step(event, kind === "partial_image" ? event.b64_json : null);
  }

  /** What is not finished now never will be. */
  end() {
    for (const tile of this.tiles) if (!tile.picture) tile.element.remove();
    if (this.finished === 0) this.element.remove();
  }
}

class Tile {
  constructor(asked, subject, onReuse) {
    Object.assign(this, { asked, subject, onReuse, picture: null, share: 0 });
    this.element = tileTemplate.content.cloneNode(true).firstElementChild;
    this.frame = this.element.querySelector(".frame");
    this.words = this.element.querySelector(".caption span");
    this.progress = this.element.querySelector("progress");
    this.frame.setAttribute("aria-label", "A picture in the making");
    this.progress.setAttribute("aria-label", "Steps of this picture");
  }

  step({ step, steps }, preview) {
    this.share = step / steps;
    this.progress.value = this.share;
    this.words.textContent = `Step ${step} of ${steps}`;
    if (preview) this.#show(`data:image/png;base64,${preview}`, "");
  }

  complete(event) {
    const { seed, parameters, concept, size, weights, timings } = event;
    const { prompt } = this.asked;
    const source = URL.createObjectURL(blobOf(event.b64_json, `image/${event.output_format}`));
    const alt = spoken(prompt, this.subject);
    const file = `${slug(alt)}-${seed}.${event.output_format}`;
    const { subject } = this;
    this.share = 1;
    this.picture = {
      source,
      alt,
      file,
      prompt,
      subject,
      seed,
      parameters,
      concept,
      size,
      weights,
      timings,
    };
    this.#show(source, alt);
    this.progress.remove();
    this.words.textContent = `Seed ${seed}`;
    this.#offer();
  }

  #offer() {
    const { picture } = this;
    const [reuse, download] = [".reuse", ".download"].map((selector) => this.element.querySelector(selector));
    this.frame.disabled = false;
    this.frame.setAttribute("aria-label", `Details of: ${picture.alt}, seed ${picture.seed}`);
    this.frame.addEventListener("click", () => showPicture(picture, this.onReuse));
    reuse.setAttribute("aria-label", `Use the settings of seed ${picture.seed}`);
    reuse.title = "Use these settings";
    reuse.addEventListener("click", () => this.onReuse(picture));
    download.setAttribute("aria-label", `Download seed ${picture.seed}`);
    Object.assign(download, { href: picture.source, download: picture.file, title: "Download" });
    reuse.hidden = download.hidden = false;
  }

  /** Lays a picture over the one before, which goes once the new one is seen. */
  #show(source, alt) {
    const image = Object.assign(new Image(), { src: source, alt });
    const before = [...this.frame.children];
    this.frame.append(image);
    setTimeout(() => before.forEach((each) => each.remove()), 700);
  }
}

/** The prompt with the subject's name in its place. */
function spoken(prompt, subject) {
  return prompt.replace(/(\ban?\s+)?\{subject\}/i, () => subject);
}

function slug(text) {
  return text
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, NAME_CHARS)
    .replace(/^-|-$/g, "");
}

function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}
