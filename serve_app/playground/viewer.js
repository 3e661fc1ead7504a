// The picture: before and after, zoom to real pixels, pan. Positions are CSS px within the box.

import { $ } from "./dom.js";

const GRIP_PX = 28;
const MOST_FIT = 4; // a small picture is enlarged so far at most
const MOST_ZOOM = 16;

export class Viewer {
  constructor() {
    this.box = $("viewer");
    this.layer = $("layer");
    this.before = $("before");
    this.after = $("after");
    this.split = $("split");
    this.handle = $("handle");
    this.size = [0, 0];
    this.pointers = new Map();
    new ResizeObserver(() => this.#fit()).observe(this.box);
    this.split.addEventListener("input", () => this.#draw());
    this.box.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("dblclick", () => (this.isFit ? this.real() : this.fit()));
    for (const kind of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
      this.box.addEventListener(kind, (event) => this.#pointer(kind, event));
    }
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
    const shown = this.after.src && !(isPreview && this.before.src) ? this.after : this.before;
    const size = [shown.naturalWidth, shown.naturalHeight];
    const other = [this.before.naturalWidth, this.before.naturalHeight];
    const sameShape = Math.abs(size[0] * other[1] - size[1] * other[0]) < 0.03 * size[0] * other[1];
    this.canCompare = Boolean(!isPreview && this.after.src && this.before.src && sameShape);
    this.box.classList.toggle("compares", this.canCompare);
    this.box.classList.toggle("no-picture", !size[0]);
    this.after.hidden = !this.after.src;
    this.before.hidden = !this.before.src || (!this.canCompare && !isPreview && Boolean(this.after.src));
    shown.alt = alt;
    if (String(size) !== String(this.size)) this.isFit = true;
    this.size = size;
    this.box.style.setProperty("--shape", `${size[0] || 3} / ${size[1] || 2}`);
    if (after !== this.last) this.split.value = 50;
    this.last = after;
    this.#fit();
  }

  get #fitScale() {
    const { clientWidth, clientHeight } = this.box;
    const [width, height] = this.size;
    return Math.min(clientWidth / width, clientHeight / height, MOST_FIT) || 1;
  }

  get #realScale() {
    return 1 / (window.devicePixelRatio || 1);
  }

  fit() {
    this.isFit = true;
    this.#fit();
  }

  real() {
    this.#zoomTo(this.#realScale);
  }

  zoom(factor) {
    this.#zoomTo(this.scale * factor);
  }

  #fit() {
    if (this.isFit !== false) {
      this.scale = this.#fitScale;
      this.x = (this.box.clientWidth - this.size[0] * this.scale) / 2;
      this.y = (this.box.clientHeight - this.size[1] * this.scale) / 2;
    }
    this.#draw();
  }

  #zoomTo(scale, [x, y] = [this.box.clientWidth / 2, this.box.clientHeight / 2]) {
    const least = Math.min(this.#fitScale, this.#realScale);
    const next = Math.min(Math.max(scale, least), MOST_ZOOM);
    this.x = x - ((x - this.x) * next) / this.scale;
    this.y = y - ((y - this.y) * next) / this.scale;
    this.scale = next;
    this.isFit = false;
    this.#draw();
  }

  /** Keep a picture that is larger than the box over all of it, and a smaller one in the middle. */
  #within(place, room, length) {
    return length <= room ? (room - length) / 2 : Math.min(0, Math.max(room - length, place));
  }

  #draw() {
    const [width, height] = this.size.map((side) => side * this.scale);
    this.x = this.#within(this.x, this.box.clientWidth, width);
    this.y = this.#within(this.y, this.box.clientHeight, height);
    const style = this.layer.style;
    style.width = `${this.size[0]}px`;
    style.height = `${this.size[1]}px`;
    style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    style.setProperty("--tile", `${20 / this.scale}px`);
    const part = this.split.value / 100;
    this.after.style.clipPath = this.canCompare ? `inset(0 0 0 ${part * 100}%)` : "none";
    this.before.style.clipPath = this.canCompare ? `inset(0 ${(1 - part) * 100}% 0 0)` : "none";
    this.handle.style.left = `${this.x + part * width}px`;
    this.layer.classList.toggle("pixels", this.scale / this.#realScale >= 3);
    this.box.classList.toggle("zoomed", width > this.box.clientWidth + 1 || height > this.box.clientHeight + 1);
    $("zoom").textContent = this.size[0] ? `${Math.round((this.scale / this.#realScale) * 100)} %` : "";
  }

  #at(event) {
    const box = this.box.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  #wheel(event) {
    // A page that scrolls keeps its wheel until somebody has clicked into the picture.
    if (!this.size[0] || !(event.ctrlKey || this.box.contains(document.activeElement))) return;
    event.preventDefault();
    this.#zoomTo(this.scale * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), this.#at(event));
  }

  #pointer(kind, event) {
    const place = this.#at(event);
    if (kind === "pointerdown") {
      if (event.button || event.target.closest("button")) return;
      const isNear = Math.abs(place[0] - parseFloat(this.handle.style.left)) < GRIP_PX;
      const isZoomed = this.box.classList.contains("zoomed");
      this.moves = this.canCompare && (isNear || !isZoomed) ? "split" : "pan";
      this.pointers.set(event.pointerId, place);
      this.box.setPointerCapture(event.pointerId);
    } else if (kind === "pointermove" && this.pointers.has(event.pointerId)) {
      this.#drag(event.pointerId, place);
    } else if (kind !== "pointermove") {
      this.pointers.delete(event.pointerId);
    }
    if (this.pointers.size === 1 && this.moves === "split" && kind !== "pointerup") this.#splitAt(place[0]);
  }

  #splitAt(x) {
    this.split.value = ((x - this.x) / (this.size[0] * this.scale)) * 100;
    this.#draw();
  }

  #drag(id, place) {
    const last = this.pointers.get(id);
    if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([key]) => key !== id)[1];
      const far = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      this.#zoomTo((this.scale * far(place)) / far(last), other);
    } else if (this.moves === "pan" && this.box.classList.contains("zoomed")) {
      this.x += place[0] - last[0];
      this.y += place[1] - last[1];
      this.isFit = false;
      this.#draw();
    }
    this.pointers.set(id, place);
  }

  #key(event) {
    if (event.target !== this.box || event.ctrlKey || event.metaKey) return;
    const step = 60;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    const acts = { "+": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(), 1: () => this.real() };
    if (moves[event.key]) {
      this.x += moves[event.key][0];
      this.y += moves[event.key][1];
      this.isFit = false;
      this.#draw();
    } else if (acts[event.key]) {
      acts[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  }
}
