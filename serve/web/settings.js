// The sliders: their ranges and defaults are the endpoint's.

const SCALES = ["adapter_scale", "concept_scale", "guidance_scale", "num_inference_steps"];
const DECIMALS = { adapter_scale: 2, concept_scale: 2, guidance_scale: 1 };

const field = (name) => document.getElementById(name);

export class Settings {
  constructor({ limits, defaults, samplers }) {
    this.defaults = defaults;
    for (const name of ["adapter_scale", "concept_scale", "guidance_scale"]) {
      [field(name).min, field(name).max] = limits[name];
    }
    [field("num_inference_steps").min, field("num_inference_steps").max] = [1, limits.max_steps];
    field("n").max = limits.max_images;
    field("negative_prompt").maxLength = limits.max_prompt_chars;
    field("sampler").replaceChildren(...samplers.map((name) => new Option(name, name)));
    for (const name of [...SCALES, "n"]) field(name).addEventListener("input", () => showValue(name));
    field("seed-random").addEventListener("change", () => this.#seedChanged());
    field("settings-reset").addEventListener("click", () => this.reset());
    field("settings").open = window.matchMedia("(min-width: 60rem)").matches;
    this.reset();
  }

  reset() {
    this.set({ ...this.defaults, n: field("n").defaultValue, negative_prompt: "", seed: null });
  }

  /** Takes over what is named; a seed of null stands for random ones. */
  set(values) {
    for (const name of [...SCALES, "n", "negative_prompt", "sampler"]) {
      if (name in values) field(name).value = values[name];
    }
    for (const name of [...SCALES, "n"]) showValue(name);
    if (values.seed !== null) field("seed").value = values.seed;
    field("seed-random").checked = values.seed === null;
    this.#seedChanged();
  }

  /** As POST /v1/images/generations takes them. */
  get values() {
    const numbers = [...SCALES, "n"].map((name) => [name, Number(field(name).value)]);
    const random = field("seed-random").checked || field("seed").value === "";
    return {
      ...Object.fromEntries(numbers),
      seed: random ? null : Number(field("seed").value),
      negative_prompt: field("negative_prompt").value.trim() || null,
      sampler: field("sampler").value,
    };
  }

  #seedChanged() {
    field("seed").disabled = field("seed-random").checked;
  }
}

function showValue(name) {
  const input = field(name);
  const shown = Number(input.value).toFixed(DECIMALS[name] ?? 0);
  document.querySelector(`output[for="${name}"]`).value = shown;
  input.style.setProperty("--filled", `${(100 * (input.value - input.min)) / (input.max - input.min)}%`);
}
