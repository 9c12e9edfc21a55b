// A small picture of each concept made in this tab. The server keeps no photo; they go with the tab.

const SIDE = 96;
const keyOf = (conceptId) => `instantbooth-face-${conceptId}`;

export async function keepFace(conceptId, file) {
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    const side = Math.min(bitmap.width, bitmap.height);
    const [x, y] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
    canvas.getContext("2d").drawImage(bitmap, x, y, side, side, 0, 0, SIDE, SIDE);
    sessionStorage.setItem(keyOf(conceptId), canvas.toDataURL("image/webp", 0.85));
  } catch {
    // A format that the browser cannot show, or a full storage: the initial stands for it.
  }
}

export function forgetFace(conceptId) {
  sessionStorage.removeItem(keyOf(conceptId));
}

/** Fills `holder` with the concept's small picture, or with an initial in a colour of its own. */
export function showFace(holder, concept, title) {
  const source = sessionStorage.getItem(keyOf(concept.id));
  if (source) {
    holder.replaceChildren(Object.assign(new Image(), { src: source, alt: "" }));
  } else {
    holder.textContent = title.charAt(0).toUpperCase();
    holder.style.setProperty("--hue", parseInt(concept.digest.slice(0, 4), 16) % 360);
  }
}
