// The right side of the page: what happens to an item, its result, facts, and the call for it.

import { root } from "./api.js";
import { curl, pythonCall } from "./calls.js";
import { $, bytes, el, fill, seconds, terms, urlOf, words } from "./dom.js";
import { ITEM } from "./pictures.js";
import { drawn } from "./store.js";

export const isRunning = (item) => !["completed", "failed", "canceled"].includes(item.state);
export const titleOf = (item, task) => task?.title ?? words(item.task);
const kindOf = (type) => type.split("/")[1];

/** The name of a file with an item's result. */
export const fileName = (item, type = item.result.type) =>
  `${item.name?.replace(/\.\w+$/, "") || "picture"}-${item.task}.${kindOf(type)}`;

/** What happens to an item at present, in words. */
function stateOf(item) {
  if (item.waiting) return item.waiting;
  const line = item.position > 1 ? `Queued, number ${item.position} in line` : "Queued, next in line";
  const step = item.steps ? `Step ${item.done} of ${item.steps}` : "Working";
  const known = { sending: "Sending", queued: line, processing: step, fetching: "Fetching the result", failed: "Failed" };
  return known[item.state] ?? "";
}

/** Steps as far as they are known; otherwise the bar says that something goes on. */
function showSteps(bar, item) {
  if (item.steps && item.state === "processing") [bar.max, bar.value] = [item.steps, item.done];
  else bar.removeAttribute("value");
}

export function showProgress(item) {
  $("progress").hidden = !item || !isRunning(item);
  if ($("progress").hidden) return;
  const passed = seconds((Date.now() - item.at) / 1000);
  $("progress-text").textContent = stateOf(item);
  $("progress-time").textContent = item.eta ? `${passed}, about ${seconds(item.eta)} left` : passed;
  showSteps($("progress-bar"), item);
}

/** An error as the service says it: fact, what was found, remedy, request id. */
export function showProblem(item, acts) {
  const said = item?.problem;
  $("problem").hidden = !said;
  if (!said) return;
  const others = (said.errors ?? []).slice(1).map((one) => el("li", { textContent: `${one.fact} ${one.remedy}` }));
  fill($("problem"), item.id, () => [
    el("strong", { textContent: said.fact }),
    said.value && el("p", {}, "Found: ", el("code", { textContent: said.value })),
    said.remedy && el("p", { textContent: said.remedy }),
    el("ul", {}, others),
    said.request_id && el("p", { className: "hint", textContent: `Request ${said.request_id}` }),
    el("div", { className: "row" }, acts),
  ].filter(Boolean));
}

/** The results of a run side by side, also those that are being made. */
export function showGrid(items, taskOf, onOpen) {
  $("grid").hidden = !items.length;
  fill($("grid"), items.map(({ id, state }) => [id, state]), () => items.map((item) => {
    const title = titleOf(item, taskOf(item));
    const text = item.info?.seed ? `seed ${item.info.seed}` : stateOf(item) || item.name;
    return el("li", { className: item.state },
      el("button", { ariaLabel: `${title}, ${item.name} ${text}`, onclick: () => onOpen(item) },
        el("img", { alt: "" }), isRunning(item) && el("progress", { ariaLabel: "Progress" }),
        el("span", {}, el("b", { textContent: title }), el("small", { textContent: text }))));
  }));
  items.forEach((item, place) => {
    const find = (what) => $("grid").children[place].querySelector(what);
    const [image, bar, picture] = [find("img"), find("progress"), item.result ?? item.source];
    const src = (isRunning(item) && item.preview) || (picture ? urlOf(picture) : "");
    image.hidden = !src;
    if (src && image.src !== src) image.src = src;
    if (!bar) return;
    find("small").textContent = stateOf(item);
    showSteps(bar, item);
  });
}

export function historyEntry(item, task, isShown, onOpen, onDelete) {
  const when = new Date(item.at).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  const name = titleOf(item, task);
  const changed = Object.entries(item.fields).map(([field, value]) => `${words(field)} ${value.name ?? value}`).join(", ");
  const about = changed || item.name;
  const thumb = item.thumb ?? item.result;
  return el("li", { className: `${item.state} ${isShown ? "shown" : ""}` },
    el("button", { title: [item.name, changed, when].filter(Boolean).join(", "), onclick: onOpen,
      ariaLabel: `${name} of ${item.name || "no picture"}, ${when}, ${changed}`,
      draggable: true, ondragstart: ({ dataTransfer }) => dataTransfer.setData(ITEM, item.id) },
      thumb ? el("img", { src: urlOf(thumb), alt: "", draggable: false })
        : el("i", { textContent: isRunning(item) ? "…" : "!" }),
      el("span", { textContent: name }), el("small", { textContent: about })),
    el("button", { className: "delete", textContent: "×", ariaLabel: `Delete ${name}, ${when}`, onclick: onDelete }));
}

export function showResult(item, tasks, onSendOn) {
  if ($("result").dataset.shown === item.id) return;
  $("result").dataset.shown = item.id;
  const { info, fields, timings, result } = item;
  const task = tasks.find((one) => one.id === item.task);
  const total = Object.values(timings).reduce((sum, one) => sum + one, 0);
  const given = Object.entries(fields).filter(([, value]) => String(value) !== info.seed);
  $("again").textContent = info.seed ? "Again with this seed" : "Again with these settings";
  $("facts").replaceChildren(...terms({
    Task: titleOf(item, task),
    Seed: info.seed,
    Time: seconds(total),
    Size: `${info.size} px`,
    File: `${kindOf(result.type).toUpperCase()}, ${bytes(result.size)}`,
    Model: info.model,
    "Batch size": info.batch,
    ...Object.fromEntries(given.map(([name, value]) => [words(name), value.name ?? value])),
  }));
  showTimings(timings, total);
  $("notes").replaceChildren(...info.notes.map((note) => el("li", { textContent: note })));
  const gone = "This service no longer has the task.";
  $("curl").textContent = task ? curl(task, item) : gone;
  $("python").textContent = task ? pythonCall(task, item, root) : gone;
  const kinds = [...new Set([result.type, ...(task?.formats ?? [])])];
  fillMenu($("download"), kinds.map((type) => [() => save(item, type), kindOf(type).toUpperCase(),
    el("small", { textContent: type === result.type ? "as made, with its metadata" : "converted here, without metadata" })]));
  fillMenu($("send-on"), tasks.filter((one) => one.picture).map((one) => [() => onSendOn(one), one.title]));
}

/** Where the time went, as one bar. */
function showTimings(timings, total) {
  const stages = Object.entries(timings).filter(([, s]) => s >= 0.0005 * Math.max(total, 0.1));
  const texts = stages.map(([stage, s]) => `${words(stage)} ${seconds(s)}`);
  const bar = el("div", { className: "bar-of-times", role: "img", ariaLabel: texts.join(", ") },
    stages.map(([stage]) => el("span", { "data-stage": stage })));
  stages.forEach(([, s], place) => (bar.children[place].style.flexGrow = (1000 * s) / total));
  $("timings").replaceChildren(bar, el("ul", { className: "legend", ariaHidden: "true" },
    texts.map((text, place) => el("li", { "data-stage": stages[place][0] }, text))));
}

/** The entries of a menu below the picture: what each does, and its words. */
const fillMenu = (menu, entries) => menu.replaceChildren(...entries.map(([onclick, ...said]) =>
  el("button", { popoverTargetElement: menu, popoverTargetAction: "hide", onclick }, said)));

/** Save a result as the browser does. */
async function save(item, type) {
  const file = type === item.result.type ? item.result : await drawn(item.result, type);
  el("a", { href: urlOf(file), download: fileName(item, type) }).click();
}
