// The API key: asked for where the server wants one, and kept in this tab.

const STORED = "instantbooth-key";
const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
const opener = document.getElementById("key-open");

let asking = null;

export function storedKey() {
  return sessionStorage.getItem(STORED) ?? "";
}

/** Whether a key was given; several calls that lack one ask once. */
export function askForKey() {
  const reason = storedKey() ? "That key is not known here." : "This server gives pictures to those who have a key.";
  asking ??= ask(reason).finally(() => (asking = null));
  return asking;
}

function ask(reason) {
  opener.hidden = false;
  document.getElementById("key-reason").textContent = reason;
  field.value = storedKey();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(keep(dialog.returnValue === "use")), { once: true });
  });
}

function keep(given) {
  if (!given) return false;
  const key = field.value.trim();
  if (key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
  return key !== "";
}

document.getElementById("key-cancel").addEventListener("click", () => dialog.close(""));
opener.addEventListener("click", async () => {
  const before = storedKey();
  await ask("Each key has concepts of its own.");
  if (storedKey() !== before) location.reload();
});
opener.hidden = !storedKey();
