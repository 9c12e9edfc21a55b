// The photos that are to become a concept: dropped, pasted or chosen, shown, and removable one by one.

import { Problem } from "./api.js";
import { count, megabytes } from "./words.js";

const template = document.getElementById("photo-template");

/** What a form takes beside its files. */
const FORM_BYTES = 10_000;

export class Photos {
  /** `onChange()` follows each change, `onProblem(problem)` what is refused. */
  constructor(limits, { onChange, onProblem }) {
    this.limits = limits;
    this.files = [];
    this.list = document.getElementById("photos");
    this.input = document.getElementById("image");
    this.onChange = onChange;
    this.onProblem = onProblem;
    this.input.addEventListener("change", () => {
      this.add([...this.input.files]);
      this.input.value = "";
    });
    this.input.addEventListener("keydown", (event) => {
      // Enter would send the form.
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.input.click();
    });
    document.addEventListener("paste", (event) => this.#pasted(event));
    listenForDrops((files) => this.add(files));
  }

  add(files) {
    const faults = [];
    for (const file of files) {
      const fault = this.#fault(file);
      if (fault) faults.push(`“${file.name}” ${fault}`);
      else this.#show(file);
    }
    this.onChange();
    if (faults.length) this.onProblem(new Problem("Not every photo was added.", faults.join("; ")));
  }

  clear() {
    for (const item of this.list.children) URL.revokeObjectURL(item.querySelector("img").src);
    this.files = [];
    this.list.replaceChildren();
    this.onChange();
  }

  #fault(file) {
    const { max_references, max_image_bytes, max_body_bytes } = this.limits;
    const together = this.files.reduce((sum, each) => sum + each.size, file.size);
    if (!file.type.startsWith("image/")) return "is not a picture";
    if (file.size > max_image_bytes)
      return `has ${megabytes(file.size)}, at most ${megabytes(max_image_bytes)} are taken`;
    if (together > max_body_bytes - FORM_BYTES) return `is too much: together ${megabytes(max_body_bytes)} are taken`;
    if (this.files.length >= max_references) return `is one too many: ${count(max_references, "photo")} are taken`;
    return null;
  }

  #show(file) {
    this.files.push(file);
    const item = template.content.cloneNode(true).firstElementChild;
    const image = item.querySelector("img");
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    const remove = item.querySelector(".remove");
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => this.#remove(file, item));
    this.list.append(item);
  }

  #remove(file, item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    this.files.splice(this.files.indexOf(file), 1);
    URL.revokeObjectURL(item.querySelector("img").src);
    item.remove();
    (next?.querySelector(".remove") ?? this.input).focus();
    this.onChange();
  }

  #pasted(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) {
      event.preventDefault();
      this.add(files);
    }
  }
}

/** Files may be dropped anywhere on the page: beside the field is no reason to leave the page for the file. */
function listenForDrops(onFiles) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (over) => document.body.classList.toggle("dropping", over);
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && mark(false));
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!hasFiles(event)) return;
    event.preventDefault();
    onFiles([...event.dataTransfer.files]);
  });
}
