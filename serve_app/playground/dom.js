// Small helpers. Text from elsewhere (file names, metadata, errors) only ever becomes text nodes.

/** An element with properties or attributes, and children; none for a child that is null or false. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  if (tag === "button") node.type = "button";
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(Boolean));
  return node;
}

export const $ = (id) => document.getElementById(id);

const SHORT = /\b(vae|png|jpeg|webp|rgba)\b/g;

/** "guidance_scale" as "Guidance scale", "deadline_s" as "Deadline, s", "vae" as "VAE". */
export function words(name) {
  const text = name.replace(/_(px|s)$/, ", $1").replaceAll("_", " ").trim().replace(SHORT, (short) => short.toUpperCase());
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function seconds(s) {
  if (s < 0.1) return `${Math.round(s * 1000)} ms`;
  if (s >= 100) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${s.toFixed(s < 10 ? 1 : 0)} s`;
}

export function bytes(n) {
  return n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} kB` : `${(n / 1e6).toFixed(1)} MB`;
}

export const randomId = () => crypto.getRandomValues(new BigUint64Array(2)).join("-");

// Where the browser cannot draw a picture, its place stays and says so.
for (const kind of ["error", "load"]) {
  document.addEventListener(kind, ({ target }) => target.classList?.toggle("broken", kind === "error"), true);
}

/** One URL for each blob, for as long as the page lives. */
const urls = new WeakMap();
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Let go of what a blob holds, once nothing shows it. */
export function release(blob) {
  if (urls.has(blob)) URL.revokeObjectURL(urls.get(blob));
  urls.delete(blob);
}

/** Say something to screen readers alone, because eyes see it. */
export const announce = (text) => ($("said").textContent = text);

let toastTimer;
/** Say something in passing, to everybody. */
export function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hideToast, 5000);
}

/** What was said in passing is over. */
export const hideToast = () => $("toast").classList.remove("shown");

/** Copy what an element shows. */
export async function copy(node) {
  try {
    await navigator.clipboard.writeText(node.innerText);
  } catch {
    // Pages without TLS have no clipboard; the older way needs a selection.
    getSelection().selectAllChildren(node);
    document.execCommand("copy");
  }
  toast("Copied.");
}

/** Save a file as the browser does; the name is a suggestion. */
export const download = (blob, name) => el("a", { href: urlOf(blob), download: name }).click();
