// Concepts: made of photos, listed, chosen and deleted.

import { call } from "./api.js";
import { forgetFace, keepFace, showFace } from "./faces.js";
import { Photos } from "./photos.js";
import { clearProblem, count, duration, showProblem } from "./words.js";

const HOUR_S = 3_600;
const DAY_S = 24 * HOUR_S;
const TIMES_S = [HOUR_S, DAY_S, 7 * DAY_S, 30 * DAY_S];

const template = document.getElementById("concept-template");
const element = (id) => document.getElementById(id);

export class Subjects {
  constructor({ class_nouns, limits, defaults }) {
    this.concepts = new Map();
    this.busy = false;
    this.list = element("concept-list");
    this.status = element("subject-status");
    this.box = element("subject-problem");
    this.photos = new Photos(limits, {
      onChange: () => this.#photosChanged(),
      onProblem: (problem) => showProblem(this.box, problem),
    });
    offerNouns(class_nouns);
    offerTimes(limits.max_concept_ttl_s, defaults.concept_ttl_s);
    element("maker").addEventListener("submit", () => this.#attempt(() => this.#make()));
    this.list.addEventListener("change", () => this.#changed());
    element("concepts-more").addEventListener("click", () => this.#attempt(() => this.load()));
  }

  /** The next page of the tenant's concepts; the first when there is none yet. */
  async load() {
    const after = this.last ? `&after=${encodeURIComponent(this.last)}` : "";
    const page = await (await call(`v1/concepts?limit=20${after}`)).json();
    for (const concept of page.data) this.list.append(this.#item(concept));
    this.last = page.last_id;
    element("concepts-more").hidden = !page.has_more;
    if (!this.chosen) this.choose(page.data[0]?.id);
    element("newcomer").open = this.concepts.size === 0 || this.#begun;
  }

  /** Whether a person is at the form: a list that comes late must not fold it away under their hands. */
  get #begun() {
    return this.photos.files.length > 0 || element("newcomer").contains(document.activeElement);
  }

  get chosen() {
    const input = this.list.querySelector("input:checked");
    return input ? this.concepts.get(input.value) : null;
  }

  /** Whether there is such a concept. */
  choose(conceptId) {
    const input = this.list.querySelector(`input[value="${conceptId}"]`);
    if (input) input.checked = true;
    this.#changed();
    return input !== null;
  }

  async #make() {
    if (this.busy) return;
    const { files } = this.photos;
    if (files.length === 0) {
      element("image").focus();
      this.status.textContent = "Add a photo first.";
      return;
    }
    this.#busy(true);
    this.status.textContent = `Making a concept of ${count(files.length, "photo")}…`;
    try {
      const concept = await this.#created(files);
      await keepFace(concept.id, files[0]);
      this.#made(concept);
    } catch (problem) {
      this.status.textContent = "";
      throw problem;
    } finally {
      this.#busy(false);
    }
  }

  async #created(files) {
    const form = new FormData(element("maker"));
    form.delete("name");
    if (element("name").value.trim()) form.set("name", element("name").value.trim());
    for (const file of files) form.append("image", file);
    const response = await call("v1/concepts", {
      method: "POST",
      body: form,
      onWait: (seconds) => (this.status.textContent = `The booth is busy. Trying again in ${seconds} s…`),
    });
    return response.json();
  }

  #made(concept) {
    const item = this.#item(concept);
    item.classList.add("fresh");
    this.list.prepend(item);
    this.choose(concept.id);
    this.photos.clear();
    element("name").value = "";
    element("newcomer").open = false;
    item.querySelector("input").focus();
    this.status.textContent = `${titleOf(concept)} is ready, made of ${count(concept.num_images, "photo")}. The photos were not kept.`;
  }

  #item(concept) {
    const item = template.content.cloneNode(true).firstElementChild;
    const [input, label, remove] = ["input", "label", ".delete"].map((selector) => item.querySelector(selector));
    const title = titleOf(concept);
    this.concepts.set(concept.id, concept);
    input.value = input.id = concept.id;
    label.htmlFor = concept.id;
    item.querySelector(".name").textContent = title;
    item.querySelector(".about").textContent = aboutOf(concept);
    showFace(item.querySelector(".face"), concept, title);
    remove.setAttribute("aria-label", `Delete ${title}`);
    remove.addEventListener("click", () => this.#attempt(() => this.#delete(concept)));
    return item;
  }

  async #delete(concept) {
    if (!(await confirmed(`Delete ${titleOf(concept)}?`))) return;
    await call(`v1/concepts/${concept.id}`, { method: "DELETE" }).catch((problem) => {
      // Expired or deleted elsewhere: what was wanted is so.
      if (problem.status !== 404) throw problem;
    });
    this.forget(concept.id);
    this.status.textContent = `${titleOf(concept)} is deleted.`;
    const next = this.list.querySelector("input:checked") ?? element("newcomer").querySelector("summary");
    next.focus();
  }

  /** Takes a concept that is gone off the list. */
  forget(conceptId) {
    this.list.querySelector(`input[value="${conceptId}"]`)?.closest("li").remove();
    this.concepts.delete(conceptId);
    forgetFace(conceptId);
    this.choose(this.chosen?.id ?? this.list.querySelector("input")?.value);
    if (this.concepts.size === 0) element("newcomer").open = true;
  }

  async #attempt(action) {
    clearProblem(this.box);
    try {
      await action();
    } catch (problem) {
      showProblem(this.box, problem);
    }
  }

  #photosChanged() {
    clearProblem(this.box);
    const { length } = this.photos.files;
    if (length) element("newcomer").open = true;
    this.status.textContent = length ? `${count(length, "photo")} to send.` : "";
  }

  #changed() {
    element("concepts").hidden = this.concepts.size === 0;
    element("subject-name").textContent = this.chosen ? subjectOf(this.chosen) : "your subject";
  }

  #busy(busy) {
    // A disabled button would lose the focus.
    this.busy = busy;
    element("maker").classList.toggle("busy", busy);
    element("make").setAttribute("aria-disabled", String(busy));
  }
}

/** The concept in the middle of a sentence. */
export function subjectOf(concept) {
  return concept.name ?? `a ${concept.class_noun}`;
}

function titleOf(concept) {
  return concept.name ?? `A ${concept.class_noun}`;
}

function aboutOf(concept) {
  const left = duration(concept.expires_at - Date.now() / 1000);
  return `${concept.class_noun}, ${count(concept.num_images, "photo")}, kept ${left} more`;
}

async function confirmed(question) {
  const dialog = element("delete-dialog");
  element("delete-title").textContent = question;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "delete";
}

function offerNouns(classNouns) {
  const groups = Object.entries(classNouns).map(([name, nouns]) => {
    const group = Object.assign(document.createElement("optgroup"), { label: name });
    group.append(...nouns.map((noun) => new Option(noun, noun)));
    return group;
  });
  element("class_noun").replaceChildren(...groups);
}

function offerTimes(longest, usual) {
  const times = [...new Set([...TIMES_S, usual, longest])].filter((time) => time <= longest).sort((a, b) => a - b);
  element("ttl_s").replaceChildren(
    ...times.map((time) => new Option(duration(time), time, time === usual, time === usual)),
  );
}
