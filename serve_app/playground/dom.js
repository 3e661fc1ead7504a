// Small helpers. Text from elsewhere (file names, metadata, errors) only ever becomes text nodes.

/** An element with properties or attributes, and children. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name in node) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
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

export function randomId() {
  const some = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(some, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A picture; where the browser cannot draw it, its place stays and says so. */
export function image(src, props = {}) {
  const node = el("img", { alt: "", ...props });
  node.addEventListener("error", () => node.classList.add("broken"));
  node.addEventListener("load", () => node.classList.remove("broken"));
  if (src) node.src = src;
  return node;
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

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages without TLS have no clipboard; the older way needs a selection.
    const area = el("textarea", { value: text, className: "hidden-copy", "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied.");
}

/** Save a file as the browser does; the name is a suggestion. */
export function download(blob, name) {
  const link = el("a", { href: urlOf(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
