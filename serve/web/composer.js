// A prompt becomes pictures: the call, its progress, and what it ends in.

import { call, events, Problem } from "./api.js";
import { promptText, setPrompt, SUBJECT } from "./prompt.js";
import { clearProblem, count, showProblem } from "./words.js";

const element = (id) => document.getElementById(id);

export class Composer {
  constructor({ model, settings, subjects, gallery }) {
    Object.assign(this, { model, settings, subjects, gallery });
    this.box = element("composer-problem");
    this.status = element("composer-status");
    this.running = null;
    element("prompt").maxLength = model.limits.max_prompt_chars;
    element("composer").addEventListener("submit", () => this.#create());
    element("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#create();
    });
    element("stop").addEventListener("click", () => this.running?.abort());
  }

  /** Takes over what a picture was made of. */
  reuse(picture) {
    setPrompt(picture.prompt);
    this.settings.set({ ...picture.parameters, seed: picture.seed });
    const found = this.subjects.choose(picture.concept.id);
    element("settings").open = true;
    this.status.textContent = found ? "Settings taken over." : "Settings taken over; the concept is gone.";
    element("prompt").focus();
  }

  async #create() {
    if (this.running) return;
    clearProblem(this.box);
    try {
      await this.#run(this.#request());
    } catch (problem) {
      this.status.textContent = "";
      if (problem.status === 404) this.subjects.forget(this.asked.concept);
      showProblem(this.box, problem);
    }
  }

  /** The body of the call. A Problem where something is missing that the page can see itself. */
  #request() {
    const concept = this.subjects.chosen;
    if (!concept) {
      const message = "make a concept of a few photos first, or choose one";
      throw new Problem("There is nobody to picture yet.", message, { param: "image" });
    }
    const prompt = promptText();
    if (prompt.split(SUBJECT).length !== 2) {
      const message = `write ${SUBJECT} once, where ${concept.name ?? "the subject"} belongs`;
      throw new Problem("The prompt does not name its subject.", message, { param: "prompt" });
    }
    const partial_images = this.model.limits.max_partial_images;
    this.asked = { prompt, concept: concept.id, ...this.settings.values, stream: true, partial_images };
    return this.asked;
  }

  async #run(asked) {
    this.running = new AbortController();
    this.#busy(true);
    this.status.textContent = `Making ${count(asked.n, "picture")}…`;
    const run = this.gallery.begin(asked, this.subjects.chosen);
    const started = performance.now();
    try {
      const response = await call("v1/images/generations", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(asked),
        signal: this.running.signal,
        onWait: (seconds) => (this.status.textContent = `The booth is full. Trying again in ${seconds} s…`),
      });
      for await (const event of events(response)) this.#heard(event, run);
      if (run.missing) throw new Problem("The connection ended early.", "try again; finished pictures are kept");
      this.status.textContent = `Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`;
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.status.textContent = `Stopped; ${count(run.finished, "picture")} finished.`;
    } finally {
      run.end();
      this.running = null;
      this.#busy(false);
    }
  }

  #heard(event, run) {
    run.heard(event);
    element("work").value = run.share;
    if (event.type.endsWith(".completed") && run.missing) {
      this.status.textContent = `${run.finished} of ${count(run.total, "picture")} done…`;
    }
  }

  #busy(busy) {
    // Focus stays at the place of the button that was pressed.
    const [shown, gone] = busy ? ["stop", "create"] : ["create", "stop"];
    const focused = document.activeElement === element(gone);
    element("work").value = 0;
    element("work").hidden = !busy;
    element(shown).hidden = false;
    if (focused) element(shown).focus();
    element(gone).hidden = true;
  }
}
