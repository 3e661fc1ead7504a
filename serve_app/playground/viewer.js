// The picture: before and after, and zoom to real pixels. The browser scrolls it, and slides the line.

import { $ } from "./dom.js";

const MOST_FIT = 4; // a small picture is enlarged so far at most
const MOST_ZOOM = 16;

export class Viewer {
  constructor() {
    [this.frame, this.box, this.layer] = ["viewer", "scroll", "layer"].map($);
    [this.before, this.after, this.split] = ["before", "after", "split"].map($);
    [this.size, this.scale] = [[0, 0], 1];
    const [fit, real] = [() => this.#fit(), () => this.#zoomTo(this.#realScale)];
    const by = (factor) => () => this.#zoomTo(this.scale * factor);
    const acts = { "+": by(1.5), "-": by(1 / 1.5), 0: fit, 1: real };
    for (const button of $("zoom-buttons").children) button.onclick = acts[button.value];
    this.box.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey) acts[event.key]?.();
    });
    this.box.addEventListener("dblclick", () => (this.isFit ? real() : fit()));
    this.box.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.box.addEventListener("pointermove", ({ buttons, pointerType, target, movementX, movementY }) => {
      // Fingers scroll by themselves.
      if (buttons === 1 && pointerType !== "touch" && target !== this.split) this.box.scrollBy(-movementX, -movementY);
    });
    this.split.addEventListener("input", () => this.#divide());
    new ResizeObserver(() => this.isFit && fit()).observe(this.box);
  }

  /**
   * Show a picture, and before it what it was made from; URLs, or "" for none. A preview is small,
   * and is shown at the size of the first.
   */
  async show(before, after, alt, isPreview) {
    const token = (this.token = {});
    const load = (image, url) => {
      if (!url) return image.removeAttribute("src");
      if (image.src !== url) image.src = url;
      return image.decode().catch(() => image.removeAttribute("src"));
    };
    await Promise.all([load(this.before, before), load(this.after, after)]);
    if (token !== this.token) return;
    const [hasBefore, hasAfter] = [this.before, this.after].map((image) => image.hasAttribute("src"));
    const shown = hasAfter && !(isPreview && hasBefore) ? this.after : this.before;
    const size = [shown.naturalWidth, shown.naturalHeight];
    const other = [this.before.naturalWidth, this.before.naturalHeight];
    const isSameShape = Math.abs(size[0] * other[1] - size[1] * other[0]) < 0.03 * size[0] * other[1];
    const canCompare = !isPreview && hasAfter && hasBefore && isSameShape;
    this.frame.classList.toggle("compares", canCompare);
    this.frame.classList.toggle("no-picture", !size[0]);
    this.after.hidden = !hasAfter;
    this.before.hidden = !hasBefore || (!canCompare && !isPreview && hasAfter);
    shown.alt = alt;
    if (after !== this.last) this.split.value = 50;
    this.last = after;
    this.#divide();
    if (String(size) === String(this.size)) return;
    this.size = size;
    this.frame.style.setProperty("--shape", `${size[0] || 3} / ${size[1] || 2}`);
    this.#fit();
  }

  get #fitScale() {
    const [width, height] = this.size;
    return Math.min(this.box.clientWidth / width, this.box.clientHeight / height, MOST_FIT) || 1;
  }

  get #realScale() {
    return 1 / window.devicePixelRatio;
  }

  #fit() {
    this.isFit = true;
    this.#draw(this.#fitScale);
  }

  /** Enlarge to so many CSS px for each of the picture's; a place of the box keeps what it shows. */
  #zoomTo(scale, [x, y] = [this.box.clientWidth / 2, this.box.clientHeight / 2]) {
    const { scrollLeft, scrollTop } = this.box;
    const { offsetLeft, offsetTop } = this.layer;
    const next = Math.min(Math.max(scale, Math.min(this.#fitScale, this.#realScale)), MOST_ZOOM);
    const grown = next / this.scale;
    this.isFit = false;
    this.#draw(next);
    this.box.scrollTo((scrollLeft + x - offsetLeft) * grown - x, (scrollTop + y - offsetTop) * grown - y);
  }

  #draw(scale) {
    this.scale = scale;
    const real = scale / this.#realScale;
    const [width, height] = this.size.map((side) => side * scale);
    Object.assign(this.layer.style, { width: `${width}px`, height: `${height}px` });
    this.layer.classList.toggle("pixels", real >= 3);
    this.frame.classList.toggle("zoomed", width > this.box.clientWidth + 1 || height > this.box.clientHeight + 1);
    $("zoom").textContent = width ? `${Math.round(real * 100)} %` : "";
  }

  #divide() {
    const { value } = this.split;
    this.layer.style.setProperty("--split", `${value}%`);
    // A side that is nearly gone needs no name.
    this.frame.classList.toggle("all-after", value < 5);
    this.frame.classList.toggle("all-before", value > 95);
  }

  #wheel(event) {
    // A page that scrolls keeps its wheel until somebody has clicked into the picture.
    if (!event.ctrlKey && !this.box.contains(document.activeElement)) return;
    event.preventDefault();
    const { left, top } = this.box.getBoundingClientRect();
    const factor = Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002));
    this.#zoomTo(this.scale * factor, [event.clientX - left, event.clientY - top]);
  }
}
