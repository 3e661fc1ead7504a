// The right side of the page: what happens to an item, its result, facts, and the call for it.

import { $, bytes, download, el, seconds, urlOf, words } from "./dom.js";
import { curl, pythonCall } from "./calls.js";
import { ITEM } from "./pictures.js";
import { drawn } from "./store.js";
import { root } from "./api.js";

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
  const known = { sending: "Sending", queued: line, processing: step,
    fetching: "Fetching the result", failed: "Failed", canceled: "Canceled" };
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
  const others = (said.errors ?? []).slice(1).map((one) =>
    el("li", { textContent: `${one.fact} ${one.remedy}` }));
  $("problem").replaceChildren(...[
    el("strong", { textContent: said.fact }),
    said.value && el("p", {}, "Found: ", el("code", { textContent: said.value })),
    said.remedy && el("p", { textContent: said.remedy }),
    el("ul", {}, others),
    said.request_id && el("p", { className: "hint", textContent: `Request ${said.request_id}` }),
    el("div", { className: "row" }, acts),
  ].filter(Boolean));
}

/** One result, or one that is being made, of a run with several. */
export function tile(item, task, onOpen) {
  const text = item.state === "completed" && item.info.seed ? `seed ${item.info.seed}` : stateOf(item);
  const title = titleOf(item, task);
  return el("li", { className: item.state },
    el("button", { ariaLabel: `${title}, ${item.name ?? ""} ${text}`, onclick: onOpen },
      el("img", { alt: "" }), isRunning(item) && el("progress", { ariaLabel: "Progress" }),
      el("span", {}, el("b", { textContent: title }), el("small", { textContent: text }))));
}

/** What changes in a tile while it is made. */
export function updateTile(node, item) {
  const picture = item.result ?? item.source;
  const src = isRunning(item) && item.preview ? item.preview : picture ? urlOf(picture) : "";
  const [shown, bar] = [node.querySelector("img"), node.querySelector("progress")];
  shown.hidden = !src;
  if (src && shown.src !== src) shown.src = src;
  if (!bar) return;
  node.querySelector("small").textContent = stateOf(item);
  showSteps(bar, item);
}

export function historyEntry(item, task, isShown, onOpen, onDelete) {
  const when = new Date(item.at).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  const name = titleOf(item, task);
  const thumb = item.thumb ?? item.result;
  return el("li", { className: `${item.state} ${isShown ? "shown" : ""}` },
    el("button", { title: `${item.name}, ${when}`, onclick: onOpen,
      ariaLabel: `${name} of ${item.name || "no picture"}, ${when}`,
      draggable: true, ondragstart: ({ dataTransfer }) => dataTransfer.setData(ITEM, item.id) },
      thumb ? el("img", { src: urlOf(thumb), alt: "", draggable: false })
        : el("i", { textContent: isRunning(item) ? "…" : "!" }),
      el("span", { textContent: name })),
    el("button", { className: "delete", textContent: "×",
      ariaLabel: `Delete ${name}, ${when}`, onclick: onDelete }));
}

/** A list of terms and what they are, without those that are nothing. */
export const terms = (said) => Object.entries(said).filter(([, value]) => value).map(([name, value]) =>
  el("div", { className: String(value).length > 18 ? "wide" : "" },
    el("dt", { textContent: name }), el("dd", { textContent: value })));

export function showResult(item, task) {
  const { info, fields, timings } = item;
  const total = Object.values(timings).reduce((sum, one) => sum + one, 0);
  const given = Object.entries(fields).filter(([, value]) => String(value) !== info.seed);
  $("facts").replaceChildren(...terms({
    Task: titleOf(item, task),
    Seed: info.seed,
    Time: seconds(total),
    Size: `${info.size} px`,
    File: `${kindOf(item.result.type).toUpperCase()}, ${bytes(item.result.size)}`,
    Model: info.model,
    "Batch size": info.batch,
    ...Object.fromEntries(given.map(([name, value]) => [words(name), value.name ?? value])),
  }));
  showTimings(timings, total);
  $("notes").replaceChildren(...info.notes.map((note) => el("li", { textContent: note })));
  const gone = "This service no longer has the task.";
  $("curl").textContent = task ? curl(task, item) : gone;
  $("python").textContent = task ? pythonCall(task, item, root) : gone;
}

/** Where the time went, as one bar. */
function showTimings(timings, total) {
  const stages = Object.entries(timings).filter(([, s]) => s >= 0.0005 * Math.max(total, 0.1));
  const texts = stages.map(([stage, s]) => `${words(stage)} ${seconds(s)}`);
  const bar = el("div", { className: "bar-of-times", role: "img", ariaLabel: texts.join(", ") },
    stages.map(() => el("span")));
  stages.forEach(([, s], place) => (bar.children[place].style.flexGrow = (1000 * s) / total));
  $("timings").replaceChildren(bar, el("ul", { className: "legend", ariaHidden: "true" },
    texts.map((text) => el("li", {}, text))));
}

/** The entries of the two menus below the picture. */
export function showMenus(item, task, tasks, onSendOn) {
  const fillMenu = (menu, entries) => menu.replaceChildren(...entries.map(([act, ...said]) =>
    el("button", { popoverTargetElement: menu, popoverTargetAction: "hide", onclick: act }, said)));
  const own = item.result.type;
  const save = async (type) =>
    download(type === own ? item.result : await drawn(item.result, type), fileName(item, type));
  fillMenu($("download"), [...new Set([own, ...(task?.formats ?? [])])].map((type) => [() => save(type),
    kindOf(type).toUpperCase(),
    el("small", { textContent: type === own ? "as made, with its metadata" : "converted here, without metadata" })]));
  fillMenu($("send-on"), tasks.filter((one) => one.picture).map((one) => [() => onSendOn(one), one.title]));
}
