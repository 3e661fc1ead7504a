// The page: what was chosen, what runs, what is shown.

import { Offline, key, root } from "./api.js";
import { $, announce, copy, el, fill, randomId, release, toast, urlOf, words } from "./dom.js";
import { settings, taskList } from "./form.js";
import { listen } from "./pictures.js";
import { cancel, carry, openapi, readiness } from "./run.js";
import { fileName, historyEntry, isRunning, showGrid, showProblem, showProgress, showResult, titleOf } from "./stage.js";
import { showStatus } from "./status.js";
import { forget, keep, load, metadataOf, surplus, thumbnail } from "./store.js";
import { ofRole, tasksOf, toSend } from "./tasks.js";
import { Viewer } from "./viewer.js";

let tasks = [];
let service = null; // what it last said of itself
let chosen = new Set(); // ids of tasks
const values = {}; // changed fields, by task
const forms = {}; // settings, by task
let sources = []; // { blob, name }
let picked = 0; // which source is shown
let items = []; // newest first
let shown = []; // ids of the run that is shown
let focus = null; // id of the item that is shown alone
const controllers = new Map(); // of what runs, by item
const viewer = new Viewer();

const taskOf = (item) => tasks.find((task) => task.id === item.task);
const itemOf = (id) => items.find((item) => item.id === id);
const chosenTasks = () => tasks.filter((task) => chosen.has(task.id));
const valuesOf = (task) => (values[task.id] ??= { ...task.examples });

// --- what to make ---

async function addFiles(files, isSample = false) {
  const said = files.length === 1 ? await metadataOf(files[0]) : null;
  const known = said && tasks.find((task) => task.id === said.task);
  toast("");
  if (known) {
    // Whoever made the file wrote them. They may say how a picture looks, but not where a job reports.
    const lost = restoreValues(known, said.parameters, known.fields.filter((field) => field.group !== "job"));
    const but = lost.length ? ` It had a file as well, which is not in it: ${lost.join(", ")}.` : "";
    toast(`The settings of ${files[0].name} are back in the form.${but}`);
  }
  if (!known || !sources.length) {
    // Whoever brings a picture of their own has done with the sample.
    const kept = sources.filter((source) => !source.isSample);
    sources = [...kept, ...files.map((blob) => ({ blob, name: blob.name, isSample }))];
  }
  pick(sources.length - 1);
  if (!known) $("run").focus({ preventScroll: true });
}

/** Show a source alone. */
function pick(place) {
  [picked, shown, focus] = [place, [], null];
  show();
}

/** Show a result, or another item, alone. */
function openItem(item) {
  if (!shown.includes(item.id)) shown = [item.id];
  focus = item.id;
  show();
}

/** Put settings into the form; returns the files that they only name. Fields other than these keep their values. */
function restoreValues(task, parameters, fields = task.fields) {
  chosen = new Set([task.id]);
  const into = valuesOf(task);
  const lost = [];
  for (const field of fields) {
    delete into[field.name];
    const value = parameters[field.name];
    if (value instanceof Blob) into[field.name] = value;
    else if (value === undefined || value === null || String(value) === field.value) continue;
    else if (field.isOnlyFile || value === field.fileWord) lost.push(words(field.name));
    else into[field.name] = String(value);
  }
  return lost;
}

function again(item) {
  const task = taskOf(item);
  if (!task) return toast("This service no longer has the task.");
  restoreValues(task, item.fields);
  if (item.source) sources = [{ blob: item.source, name: item.name }];
  picked = 0;
  $("count").value = 1;
  show();
  $("settings").querySelector("textarea, input, summary")?.focus();
  $("settings").scrollIntoView({ block: "nearest" });
  toast("The settings are back in the form. Change what you like, then press Run.");
}

function sendOn(item, task) {
  sources = [{ blob: item.result, name: fileName(item) }];
  chosen = new Set([task.id]);
  pick(0);
  $("run").focus({ preventScroll: true });
  toast(`The result is the picture now. Press Run for ${task.title}.`);
}

function submit(event) {
  event.preventDefault();
  const wanted = chosenTasks();
  if (!wanted.length) return toast("The service has not said yet what it can do.");
  if (!sources.length && wanted.some((task) => task.picture)) {
    $("files").focus();
    return toast("Choose a picture first.");
  }
  if (wanted.some((task) => task.needsKey) && !key.get()) return askKey();
  const made = wanted.flatMap((task) =>
    (task.picture ? sources : [{ blob: null, name: "" }]).map(({ blob, name }) => ({
      id: randomId(), at: Date.now(), task: task.id, name, source: blob,
      fields: toSend(task, valuesOf(task)), state: "sending",
      count: ofRole(task, "count") ? Number($("count").value) : 1,
    })));
  begin(made);
}

function begin(made) {
  items = [...made, ...items];
  shown = made.map((item) => item.id);
  focus = made.length === 1 ? made[0].id : null;
  toast("");
  announce(made.length > 1 ? `${made.length} runs have begun.` : "The run has begun.");
  for (const item of made) start(item);
  show();
  clearTimeout(looking);
  looking = setTimeout(watchService, 1_000);
  $("hero").scrollIntoView({ block: matchMedia("(max-width: 800px)").matches ? "start" : "nearest" });
}

// --- what runs ---

async function start(item) {
  const controller = new AbortController();
  controllers.set(item.id, controller);
  await keep(item);
  const tell = (changes) => {
    Object.assign(item, changes);
    if (changes.job) keep(item);
    if (changes.job && item.isStopping) stop(item);
    showSoon();
  };
  try {
    finish(item, await carry(taskOf(item), item, tell, controller.signal));
  } catch (error) {
    await fail(item, error);
  }
  controllers.delete(item.id);
  for (const one of items.filter(({ id, job }) => id === item.id || (job && job === item.job))) {
    if (one.result) one.thumb = await thumbnail(one.result);
    await keep(one);
  }
  for (const one of surplus(items)) await remove(one.id);
  show();
}

/** An item for each picture, with the seed that made it. */
function finish(item, pictures) {
  const seed = ofRole(taskOf(item), "seed");
  const { total, ...whole } = item.timings ?? {};
  const made = pictures.map(({ blob, info }, k) => {
    const fields = seed && info.seed ? { ...item.fields, [seed.name]: info.seed } : item.fields;
    const timings = Object.keys(whole).length ? whole : info.timings;
    const own = { state: "completed", result: blob, info, fields, timings, count: 1, preview: "", waiting: "" };
    return k ? { ...item, ...own, id: `${item.id}-${k}` } : Object.assign(item, own);
  });
  items = items.flatMap((one) => (one.id === item.id ? made : [one]));
  shown = shown.flatMap((id) => (id === item.id ? made.map((one) => one.id) : [id]));
  if (focus === item.id && made.length > 1) focus = null;
  announce(made.length > 1 ? `${made.length} results are ready.` : `${taskOf(item).title} is ready.`);
}

function fail(item, error) {
  if (error.name === "AbortError") {
    toast("Canceled.");
    return remove(item.id);
  }
  const said = error.said ?? { fact: "Something went wrong on this page.", value: error.message, remedy: "Reload it." };
  const isLocked = said.status === 401;
  Object.assign(item, { state: "failed", problem: said, waiting: "", job: isLocked ? item.job : "" });
  if (isLocked) askKey(said);
}

async function stop(item) {
  if (taskOf(item)?.hasJobs && !item.job && !item.isStopping) {
    // Its job may be made at this moment, and would go on if nobody knew its name.
    Object.assign(item, { isStopping: true, waiting: "Canceling" });
    return show();
  }
  try {
    if (item.job) await cancel(item.job);
    controllers.get(item.id)?.abort(new DOMException("Canceled.", "AbortError"));
  } catch {
    toast("The service could not be told. Try again.");
  }
}

async function remove(id) {
  for (const blob of [itemOf(id)?.result, itemOf(id)?.thumb]) release(blob);
  items = items.filter((item) => item.id !== id);
  shown = shown.filter((one) => one !== id);
  if (focus === id) focus = null;
  await forget(id);
}

/** A job that goes on is followed again; all else is sent anew. */
function tryAgain(item) {
  const { task, name, source, fields, count, job } = item;
  remove(item.id);
  begin([{ id: randomId(), at: Date.now(), task, name, source, fields, count, job, state: "sending" }]);
}

// --- what is shown ---

let pending = 0;
const showSoon = () => (pending ||= requestAnimationFrame(() => ((pending = 0), show())));

function show() {
  showForm();
  showStage();
  showHistory();
  showStatus(service, tasks);
}

function showForm() {
  fill($("tray"), [sources.map(({ blob }) => urlOf(blob)), picked], () => sources.map(({ blob, name }, place) => el("li", {},
    el("button", { ariaPressed: String(place === picked), title: name, ariaLabel: `Show ${name}`,
      onclick: () => pick(place) }, el("img", { src: urlOf(blob), alt: "" })),
    el("button", { className: "delete", textContent: "×", ariaLabel: `Leave out ${name}`,
      onclick: () => { sources.splice(place, 1); pick(0); } }))));
  $("choose").classList.toggle("primary", !sources.length);
  const states = service?.models ?? {};
  fill($("tasks"), [[...chosen], states, tasks.length], () =>
    taskList(tasks, chosen, states, (next) => { chosen = next; show(); }));
  const wanted = chosenTasks().map((task) => (forms[task.id] ??= settings(task, valuesOf(task))));
  for (const form of wanted) form.refresh();
  fill($("settings"), [...chosen], () => wanted.map(({ node }, place) => {
    node.open = place === 0 || !node.querySelector(".settings-body > .quiet").hidden;
    return node;
  }));
  const count = chosenTasks().map((task) => ofRole(task, "count")).find(Boolean);
  $("count-label").hidden = !count;
  if (count) $("count").max = count.max;
}

function showStage() {
  const group = shown.map(itemOf).filter(Boolean);
  const item = itemOf(focus);
  const isGrid = !item && group.length > 0;
  const source = sources[picked];
  $("empty").hidden = Boolean(item || isGrid || source);
  $("viewer").hidden = isGrid || !$("empty").hidden;
  showGrid(isGrid ? group : [], taskOf, openItem);
  if (!isGrid) showPicture(item, source);
  showProgress(item);
  showProblem(item, item ? [
    el("button", { className: "primary", textContent: "Try again", onclick: () => tryAgain(item) }),
    el("button", { className: "button", textContent: "Change the settings", onclick: () => again(item) }),
  ] : []);
  const isDone = item?.state === "completed";
  $("tools").hidden = $("viewer").hidden;
  $("acts").hidden = !isDone;
  $("all").hidden = !item || group.length < 2;
  $("all").textContent = `‹ All ${group.length}`;
  $("result").hidden = !isDone;
  if (isDone) showResult(item, tasks, (next) => sendOn(item, next));
}

function showPicture(item, source) {
  const from = item ? item.source : source?.blob;
  const made = item?.result;
  const after = made ? urlOf(made) : (item && isRunning(item) && item.preview) || "";
  const name = (item ?? source)?.name || "no picture";
  const alt = made ? `${titleOf(item, taskOf(item))} of ${name}` : name;
  $("viewer").classList.toggle("waits", Boolean(item && !from && !made));
  viewer.show(from ? urlOf(from) : "", after, alt, !made);
}

function showHistory() {
  fill($("history"), items.map((item) => [item.id, item.state, !item.thumb, item.id === focus]), () => items.map((item) =>
    historyEntry(item, taskOf(item), item.id === focus,
      () => { openItem(item); $("hero").scrollIntoView({ block: "nearest" }); },
      async () => { await discard(item); show(); })));
  $("history-empty").hidden = items.length > 0;
  $("clear").hidden = items.length === 0;
}

async function discard(item) {
  if (isRunning(item)) await stop(item);
  await remove(item.id);
}

// --- the service ---

let looking;
async function watchService() {
  service = await readiness();
  if (service && !tasks.length) await loadTasks();
  showForm();
  showStatus(service, tasks);
  const isQuiet = service?.status === "ready" && tasks.length && !items.some(isRunning);
  clearTimeout(looking);
  looking = setTimeout(watchService, document.hidden ? 60_000 : isQuiet ? 10_000 : 2_000);
}

async function loadTasks() {
  try {
    tasks = tasksOf(await openapi(), root);
  } catch {
    return; // the status says so, and the next look tries again
  }
  if (tasks.length) chosen = new Set([tasks[0].id]);
  $("key-button").hidden = !tasks.some((task) => task.needsKey);
  for (const item of items.filter(isRunning)) {
    if (taskOf(item)?.hasJobs) start(item);
    else fail(item, new Offline());
  }
  show();
}

function askKey(said) {
  if (said) $("key-why").textContent = `${said.fact} Found: ${said.value}. ${said.remedy}`;
  $("key").value = key.get();
  $("key-dialog").returnValue = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// --- wiring ---

$("panel").addEventListener("submit", submit);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
});
const onClick = (id, act) => $(id).addEventListener("click", act);
onClick("key-button", () => askKey());
onClick("cancel", () => stop(itemOf(focus)));
onClick("all", () => { focus = null; show(); });
onClick("again", () => again(itemOf(focus)));
onClick("copy", () => copy($("code")));
onClick("clear", async () => {
  if (!confirm("Delete everything that this browser keeps of the playground?")) return;
  for (const item of items) await discard(item);
  show();
});
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue === "use") key.set($("key").value.trim());
});
listen(addFiles, (files) => { sources = []; addFiles(files, true); }, (id) => again(itemOf(id)));
setInterval(() => {
  if (items.some(isRunning)) showProgress(itemOf(focus));
}, 500);
items = await load();
show();
watchService();
