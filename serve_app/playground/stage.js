// The right side of the page: what happens to an item, its result, facts, and the call for it.

import { $, bytes, copy, download, el, image, seconds, urlOf, words } from "./dom.js";
import { curl, pythonCall } from "./calls.js";
import { ITEM } from "./pictures.js";
import { converted } from "./store.js";
import { root } from "./api.js";

export const isRunning = (item) => !["completed", "failed", "canceled"].includes(item.state);

/** What happens to an item at present, in words. */
export function stateOf(item) {
  if (item.waiting) return item.waiting;
  const line = item.position > 1 ? `Queued, number ${item.position} in line` : "Queued, next in line";
  const step = item.steps ? `Step ${item.done} of ${item.steps}` : "Working";
  const known = { sending: "Sending", queued: line, processing: step,
    fetching: "Fetching the result", failed: "Failed", canceled: "Canceled" };
  return known[item.state] ?? "";
}

export function timesOf(item) {
  const passed = seconds((Date.now() - item.at) / 1000);
  return item.eta ? `${passed}, about ${seconds(item.eta)} left` : passed;
}

export function showProgress(item) {
  $("progress").hidden = !item || !isRunning(item);
  if ($("progress").hidden) return;
  if ($("progress-text").textContent !== stateOf(item)) $("progress-text").textContent = stateOf(item);
  $("progress-time").textContent = timesOf(item);
  const bar = $("progress-bar");
  if (item.steps && item.state === "processing") [bar.max, bar.value] = [item.steps, item.done];
  else bar.removeAttribute("value");
}

/** An error as the service says it: fact, what was found, remedy, request id. */
export function showProblem(item, acts) {
  const said = item?.problem;
  $("problem").hidden = !said;
  if (!said) return;
  const others = (said.errors ?? []).slice(1).map((one) =>
    el("li", { textContent: `${one.fact} ${one.remedy}` }));
  $("problem").replaceChildren(
    el("strong", { textContent: said.fact }),
    said.value ? el("p", {}, "Found: ", el("code", { textContent: said.value })) : "",
    said.remedy ? el("p", { textContent: said.remedy }) : "",
    others.length ? el("ul", {}, others) : "",
    said.request_id ? el("p", { className: "hint", textContent: `Request ${said.request_id}` }) : "",
    el("div", { className: "row" }, acts));
}

/** One result, or one that is being made, of a run with several. */
export function tile(item, task, onOpen) {
  const text = item.state === "completed" && item.info.seed ? `seed ${item.info.seed}` : stateOf(item);
  const title = task?.title ?? item.task;
  return el("li", { className: item.state },
    el("button", { type: "button", ariaLabel: `${title}, ${item.name ?? ""} ${text}`, onclick: onOpen },
      image(""), isRunning(item) ? el("progress", { ariaLabel: "Progress" }) : null,
      el("span", {}, el("b", { textContent: title }), el("small", { textContent: text }))));
}

/** What changes in a tile while it is made. */
export function updateTile(node, item) {
  const picture = item.result ?? item.source;
  const src = isRunning(item) && item.preview ? item.preview : picture ? urlOf(picture) : "";
  const [drawn, bar] = [node.querySelector("img"), node.querySelector("progress")];
  drawn.hidden = !src;
  if (src && drawn.src !== src) drawn.src = src;
  if (!bar) return;
  node.querySelector("small").textContent = stateOf(item);
  if (item.steps) [bar.max, bar.value] = [item.steps, item.done];
}

export function historyEntry(item, task, isShown, onOpen, onDelete) {
  const when = new Date(item.at).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  const name = task?.title ?? words(item.task);
  const thumb = item.thumb ?? item.result;
  const start = (event) => event.dataTransfer.setData(ITEM, item.id);
  return el("li", { className: `${item.state} ${isShown ? "shown" : ""}` },
    el("button", { type: "button", title: `${item.name}, ${when}`, draggable: true, ondragstart: start,
      ariaLabel: `${name} of ${item.name || "no picture"}, ${when}`, onclick: onOpen },
      thumb ? image(urlOf(thumb), { draggable: false })
        : el("i", { textContent: isRunning(item) ? "…" : "!" }),
      el("span", { textContent: name })),
    el("button", { type: "button", className: "delete", textContent: "×",
      ariaLabel: `Delete ${name}, ${when}`, onclick: onDelete }));
}

export function showResult(item, task, language) {
  const { info, fields, timings } = item;
  const total = Object.values(timings).reduce((sum, one) => sum + one, 0);
  const facts = {
    Task: task?.title ?? item.task,
    Seed: info.seed,
    Time: seconds(total),
    Size: `${info.size} px`,
    File: `${item.result.type.split("/")[1].toUpperCase()}, ${bytes(item.result.size)}`,
    Model: info.model,
    "Batch size": info.batch,
    ...Object.fromEntries(Object.entries(fields)
      .filter(([, value]) => String(value) !== info.seed)
      .map(([name, value]) => [words(name), value instanceof Blob ? value.name : value])),
  };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).map(([name, value]) =>
    el("div", { className: String(value).length > 18 ? "wide" : "" },
      el("dt", { textContent: name }), el("dd", { textContent: value }))));
  showTimings(timings, total);
  const notes = info.notes.map((note) => el("li", { textContent: note }));
  $("notes").replaceChildren(...notes);
  showCall(item, task, language);
}

/** Where the time went, as one bar. */
function showTimings(timings, total) {
  const stages = Object.entries(timings).filter(([, s]) => s >= 0.0005 * Math.max(total, 0.1));
  const bar = el("div", { className: "bar-of-times", role: "img",
    ariaLabel: stages.map(([stage, s]) => `${words(stage)} ${seconds(s)}`).join(", ") });
  const legend = el("ul", { className: "legend", ariaHidden: "true" });
  stages.forEach(([stage, s], place) => {
    const part = el("span", { className: `stage-${place % 6}` });
    part.style.flexGrow = (1000 * s) / total;
    bar.append(part);
    legend.append(el("li", {}, el("i", { className: `stage-${place % 6}` }), `${words(stage)} ${seconds(s)}`));
  });
  $("timings").replaceChildren(bar, legend);
}

export function showCall(item, task, language) {
  for (const name of ["curl", "python"]) {
    $(`tab-${name}`).setAttribute("aria-selected", String(name === language));
    $(`tab-${name}`).tabIndex = name === language ? 0 : -1;
  }
  $("code").setAttribute("aria-labelledby", `tab-${language}`);
  if (!task) $("code").textContent = "This service no longer has the task.";
  else $("code").textContent = language === "curl" ? curl(task, item) : pythonCall(task, item, root);
  $("copy").onclick = () => copy($("code").textContent);
}

/** The entries of the two menus below the picture. */
export function showMenus(item, task, tasks, onSendOn) {
  const own = item.result.type;
  const formats = [own, ...(task?.formats ?? []).filter((type) => type !== own)];
  const name = (type) => `${item.name?.replace(/\.\w+$/, "") || "picture"}-${item.task}.${type.split("/")[1]}`;
  const save = async (type) => download(type === own ? item.result : await converted(item.result, type), name(type));
  $("download").replaceChildren(...formats.map((type) =>
    el("button", { type: "button", onclick: () => save(type) }, type.split("/")[1].toUpperCase(),
      el("small", { textContent: type === own ? "as made, with its metadata" : "converted here, without metadata" }))));
  const next = tasks.filter((one) => one.picture);
  $("send-on").replaceChildren(...next.map((one) =>
    el("button", { type: "button", textContent: one.title, onclick: () => onSendOn(one) })));
}
