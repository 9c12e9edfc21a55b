// The prompt's sheet: it grows with its text, shows where the subject stands, and takes styles and scenes.

export const SUBJECT = "{subject}";

const OPENING = /^\s*(?:an?\s+)?(.*?)\s+of\s+(?:an?\s+)?(?=\{subject\})/i;

const sheet = document.getElementById("prompt");
const mirror = document.getElementById("prompt-mirror");
const styles = [...document.querySelectorAll("[data-style]")];
const scenes = [...document.querySelectorAll("[data-scene]")];

export function promptText() {
  return sheet.value.trim();
}

export function setPrompt(text) {
  sheet.value = text;
  sheet.dispatchEvent(new Event("input", { bubbles: true }));
}

/** The prompt with another style: its words before "of a {subject}". */
export function withStyle(prompt, style) {
  const rest = OPENING.test(prompt) ? prompt.replace(OPENING, "") : prompt.trim();
  return `a ${style} of a ${rest.includes(SUBJECT) ? rest : `${SUBJECT} ${rest}`.trim()}`;
}

/** The prompt's style in another scene: the words after "{subject}". */
export function withScene(prompt, scene) {
  const style = OPENING.exec(prompt)?.[1] ?? "photo";
  return `a ${style} of a ${SUBJECT} ${scene}`;
}

function reflect() {
  const parts = sheet.value.split(SUBJECT);
  const marks = parts.flatMap((part, index) => (index ? [marked(), part] : [part]));
  // A last line that is empty has no height without something in it.
  mirror.replaceChildren(...marks, "\u200b");
  const style = OPENING.exec(sheet.value)?.[1].toLowerCase();
  for (const chip of styles) chip.setAttribute("aria-pressed", String(chip.dataset.style === style));
  for (const chip of scenes)
    chip.setAttribute("aria-pressed", String(promptText().endsWith(`${SUBJECT} ${chip.dataset.scene}`)));
}

function marked() {
  const mark = document.createElement("mark");
  mark.textContent = SUBJECT;
  return mark;
}

for (const chip of styles) chip.addEventListener("click", () => setPrompt(withStyle(promptText(), chip.dataset.style)));
for (const chip of scenes) chip.addEventListener("click", () => setPrompt(withScene(promptText(), chip.dataset.scene)));
sheet.addEventListener("input", reflect);
reflect();
