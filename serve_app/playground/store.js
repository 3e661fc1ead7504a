// The history of this browser, in IndexedDB; in memory only where a browser keeps none.

const MOST = 80;
const MOST_BYTES = 250e6;
const ENDED = new Set(["completed", "failed"]);

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("imagen-playground", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("items", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = reject;
}).catch(() => null);

async function act(mode, work) {
  const database = await opened;
  if (!database) return undefined;
  return new Promise((resolve) => {
    const transaction = database.transaction("items", mode);
    const request = work(transaction.objectStore("items"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => resolve(undefined); // full, or gone: not kept
  });
}

/** Every item, newest first. */
export async function load() {
  const items = (await act("readonly", (store) => store.getAll())) ?? [];
  return items.sort((a, b) => b.at - a.at);
}

export const keep = (item) => act("readwrite", (store) => store.put(item));
export const forget = (id) => act("readwrite", (store) => store.delete(id));

/** Those of the items, newest first, for which there is no room. */
export function surplus(items) {
  let sum = 0;
  return items.filter((item, place) => {
    sum += (item.source?.size ?? 0) + (item.result?.size ?? 0);
    return ENDED.has(item.state) && place > 0 && (place >= MOST || sum > MOST_BYTES);
  });
}

/** A picture drawn anew, without its metadata: at `scaleOf(bitmap)` of its size, in another format. */
export async function drawn(source, type, quality = 0.92, scaleOf = () => 1) {
  const bitmap = await createImageBitmap(source);
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scaleOf(bitmap))));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  if (type === "image/jpeg") context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return canvas.convertToBlob({ type, quality });
}

/** A small picture for the list; null where the browser cannot draw it. */
export const thumbnail = (blob) =>
  drawn(blob, "image/webp", 0.8, ({ width, height }) => Math.min(1, 224 / Math.min(width, height))).catch(() => null);

const MARKS = /(imagen\0|ASCII\0\0\0)(?={)/g; // a PNG's text chunk; the EXIF comment of the others

/** What a result of Imagen says of itself: { task, parameters }; null for any other file. */
export async function metadataOf(blob) {
  if (blob.size > 64e6) return null;
  const text = new TextDecoder("latin1").decode(await blob.arrayBuffer());
  for (const { 0: mark, index } of text.matchAll(MARKS)) {
    try {
      const said = JSON.parse(balanced(text, index + mark.length));
      if (typeof said.task === "string" && said.parameters) return said;
    } catch {
      continue; // somebody else's
    }
  }
  return null;
}

/** The JSON object that begins at a place. */
function balanced(text, start) {
  let depth = 0;
  for (const part of text.slice(start, start + 65_000).matchAll(/"(?:[^"\\]|\\.)*"|[{}]/g)) {
    depth += { "{": 1, "}": -1 }[part[0]] ?? 0;
    if (depth === 0) return text.slice(start, start + part.index + 1);
  }
  return "";
}
