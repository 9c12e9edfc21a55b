// What the page says: problems, dates, sizes.

/** Shows a problem in a box of role alert, and marks the field at fault where there is one. */
export function showProblem(box, problem) {
  const title = document.createElement("strong");
  title.textContent = problem.title ?? "That did not work.";
  box.replaceChildren(title, ` ${sentence(problem.message)}`);
  if (problem.status >= 500 && problem.requestId) box.append(` Request ${problem.requestId}.`);
  box.hidden = false;
  const field = problem.param && document.getElementById(problem.param);
  if (!field) return;
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.addEventListener("input", () => clearProblem(box), { once: true });
  field.focus();
}

export function clearProblem(box) {
  box.hidden = true;
  box.replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

export function sentence(text) {
  const trimmed = text.trim();
  return `${trimmed.charAt(0).toUpperCase()}${trimmed.slice(1)}${/[.!?…]$/.test(trimmed) ? "" : "."}`;
}

export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

export function megabytes(bytes) {
  return `${Math.round(bytes / 100_000) / 10} MB`;
}

/** A span of time in its largest fitting unit. */
export function duration(seconds) {
  for (const [unit, length] of [
    ["day", 86_400],
    ["hour", 3_600],
    ["minute", 60],
  ]) {
    if (seconds >= length) return count(Math.round(seconds / length), unit);
  }
  return count(Math.max(0, Math.round(seconds)), "second");
}
