// One picture, large, with everything it was made of.

const dialog = document.getElementById("picture-dialog");
const image = dialog.querySelector("img");
const download = dialog.querySelector("a");

let close = null;

export function showPicture(picture, onReuse) {
  image.src = picture.source;
  image.alt = picture.alt;
  document.getElementById("picture-title").textContent = picture.alt;
  dialog
    .querySelector("dl")
    .replaceChildren(...facts(picture).flatMap(([name, value]) => [tag("dt", name), tag("dd", value)]));
  Object.assign(download, { href: picture.source, download: picture.file });
  close = () => onReuse(picture);
  dialog.showModal();
}

function facts({ prompt, subject, seed, parameters, size, weights, concept, timings }) {
  return [
    ["Prompt", prompt],
    ["Subject", subject],
    ["Seed", seed],
    ["Identity β", parameters.adapter_scale],
    ["Concept α", parameters.concept_scale],
    ["Guidance", parameters.guidance_scale],
    ["Steps", parameters.num_inference_steps],
    ["Sampler", parameters.sampler],
    ...(parameters.negative_prompt ? [["Stay away from", parameters.negative_prompt]] : []),
    ["Size", size.replace("x", " × ")],
    ["Time", `${timings.total_s.toFixed(1)} s, ${timings.queue_s.toFixed(1)} s of it waiting`],
    ["Concept", concept.digest.slice(0, 12)],
    ["Weights", weights.slice(0, 12)],
  ];
}

function tag(name, text) {
  return Object.assign(document.createElement(name), { textContent: text });
}

dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.querySelector(".reuse").addEventListener("click", () => {
  dialog.close();
  close();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
