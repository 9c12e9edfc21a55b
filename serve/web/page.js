// The page as a whole: asks what the endpoint can do, then brings its parts together.

import { call } from "./api.js";
import { Composer } from "./composer.js";
import { Gallery } from "./gallery.js";
import { Settings } from "./settings.js";
import { Subjects } from "./subjects.js";
import { showProblem } from "./words.js";

const status = document.getElementById("model");

async function describedModel() {
  const response = await call("v1/models", {
    onWait: (seconds) => (status.textContent = `Warming up; asking again in ${seconds} s`),
  });
  return (await response.json()).data[0];
}

async function start() {
  const model = await describedModel();
  const settings = new Settings(model);
  const subjects = new Subjects(model);
  const gallery = new Gallery((picture) => composer.reuse(picture));
  const composer = new Composer({ model, settings, subjects, gallery });
  await subjects.load();
  status.textContent = `${model.base}, ${model.defaults.size.replace("x", " × ")}`;
}

// Scripts send what forms hold, never the forms themselves: not even before the endpoint has answered.
for (const id of ["maker", "composer"]) {
  document.getElementById(id).addEventListener("submit", (event) => event.preventDefault());
}

start().catch((problem) => {
  status.textContent = "Not connected";
  showProblem(document.getElementById("subject-problem"), problem);
});
