// Small helpers. Text from elsewhere (file names, metadata, errors) only ever becomes text nodes.

export const $ = (id) => document.getElementById(id);

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

/** Fill a list, if what it shows has changed; whoever stood in it stands in it again. */
export function fill(list, signature, make) {
  const text = JSON.stringify(signature);
  if (list.dataset.shown === text) return;
  list.dataset.shown = text;
  const controls = () => [...list.querySelectorAll("button, input, summary")];
  const place = controls().indexOf(document.activeElement);
  list.replaceChildren(...make());
  if (place >= 0) controls().at(place)?.focus({ preventScroll: true });
}

/** A list of terms and what they are, without those that are nothing. */
export const terms = (said) => Object.entries(said).filter(([, value]) => value).map(([name, value]) =>
  el("div", { className: String(value).length > 18 ? "wide" : "" },
    el("dt", { textContent: name }), el("dd", { textContent: value })));

/** "guidance_scale" as "Guidance scale", "deadline_s" as "Deadline, s", "vae" as "VAE". */
export function words(name) {
  const text = name.replace(/_(px|s)$/, ", $1").replaceAll("_", " ").trim();
  const loud = text.replace(/\b(vae|png|jpeg|webp|rgba)\b/g, (short) => short.toUpperCase());
  return loud.charAt(0).toUpperCase() + loud.slice(1);
}

export function seconds(s) {
  if (s < 0.1) return `${Math.round(s * 1000)} ms`;
  if (s >= 100) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${s.toFixed(s < 10 ? 1 : 0)} s`;
}

export const bytes = (n) => (n < 1e6 ? `${Math.max(1, Math.round(n / 1e3))} kB` : `${(n / 1e6).toFixed(1)} MB`);

export const randomId = () => crypto.getRandomValues(new BigUint64Array(2)).join("-");

// Where the browser cannot draw a picture, its place stays and says so.
for (const kind of ["error", "load"]) {
  document.addEventListener(kind, ({ target }) => target.classList?.toggle("broken", kind === "error"), true);
}

/** One URL for each blob, until it is released. */
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
/** Say something in passing, to everybody; "" ends it. */
export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toastTimer);
  if (text) toastTimer = setTimeout(toast, 5000, "");
}

/** Copy what an element shows. Pages without TLS have no clipboard, so that a selection does it for all. */
export function copy(node) {
  getSelection().selectAllChildren(node);
  document.execCommand("copy");
  toast("Copied.");
}
