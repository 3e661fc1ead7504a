// Carries one item from the form to its results, over lost connections and restarts of the server.

import { Problem, call, events, pause, root } from "./api.js";
import { ofRole } from "./tasks.js";

const SENDS = 4; // a picture is sent so often at most; the key makes one job of them all
const ENDED = new Set(["completed", "failed", "canceled"]);

/**
 * Run an item; resolves with its pictures: [{ blob, info }].
 *
 * `tell(changes)` gets what happens to it: state, position, steps, eta, preview, job, waiting.
 */
export async function carry(task, item, tell, signal) {
  if (!task.hasJobs) return [await pictureOf(await send(task, item, {}, tell, signal))];
  if (!item.job) {
    const headers = { Prefer: "respond-async", "Idempotency-Key": item.id };
    const answer = await send(task, item, headers, tell, signal);
    tell({ job: answer.headers.get("location"), state: "queued" });
  }
  const job = await follow(item.job, tell, signal);
  if (job.status === "canceled") throw new DOMException("Canceled.", "AbortError");
  if (job.status === "failed") throw new Problem(job.error.status, job.error, 0);
  tell({ state: "fetching", timings: job.timings_s });
  const headers = { Prefer: "return=representation" };
  const fetched = [];
  for (const { url } of job.results) {
    const read = async () => pictureOf(await call(url, { headers, signal }));
    fetched.push(await patiently(read, tell, signal));
  }
  return fetched;
}

async function send(task, item, headers, tell, signal) {
  const body = new FormData();
  if (task.picture) body.append(task.picture.name, item.source, item.name || "picture");
  for (const [name, value] of Object.entries(item.fields)) body.append(name, value);
  const count = ofRole(task, "count");
  if (count && item.count > 1) body.append(count.name, item.count);
  const preview = ofRole(task, "preview");
  if (preview && task.hasJobs) body.append(preview.name, "true");
  const post = () => call(task.url, { method: "POST", body, headers, signal });
  return task.hasJobs ? patiently(post, tell, signal, SENDS) : post();
}

/** The end of a job, whatever happens to the connection meanwhile. */
async function follow(job, tell, signal) {
  let last = "";
  let isQueued = true;
  const look = async () => {
    const now = await (await call(job, { signal })).json();
    tell({ state: now.status, position: now.position, eta: now.eta_s });
    return now;
  };
  const watch = async () => {
    for await (const { id, event, data } of events(`${job}/events`, last, signal)) {
      last = id ?? last;
      isQueued = event === "queued";
      if (ENDED.has(event)) return data;
      tell(event === "preview" ? { preview: data.image, waiting: "" } : progressOf(data));
    }
    // The stream has had its time, or the job ended long ago.
    return look();
  };
  const timer = setInterval(() => isQueued && look().catch(() => {}), 2000);
  try {
    for (;;) {
      const now = await patiently(watch, tell, signal);
      if (ENDED.has(now.status)) return now;
      await pause(500, signal);
    }
  } finally {
    clearInterval(timer);
  }
}

const progressOf = (data) => ({
  state: data.status, done: data.steps_done, steps: data.steps, eta: data.eta_s, waiting: "",
});

/** Try until it works, so many times at most, where the failure may pass; wait longer after each. */
async function patiently(work, tell, signal, tries = Infinity) {
  for (let n = 1; ; n += 1) {
    try {
      return await work();
    } catch (error) {
      if (n >= tries || signal.aborted || !error.passing) throw error;
      if (n > 1) tell({ waiting: `${error.said.fact} Trying again; nothing is lost.` });
      await pause(1000 * Math.max(error.retryAfterS ?? 0, Math.min(n, 5)), signal);
    }
  }
}

/** A picture and what its headers say. */
async function pictureOf(answer) {
  const said = (name) => answer.headers.get(name) ?? "";
  const notes = said("x-imagen-note").split(/, (?=[a-z_]+: )/).filter(Boolean);
  const stages = said("server-timing").split(", ").map((part) => part.split(";dur="));
  return {
    blob: await answer.blob(),
    info: {
      model: said("x-imagen-model"),
      seed: said("x-imagen-seed"),
      batch: said("x-imagen-batch-size"),
      size: said("x-imagen-size").replace("x", " × "),
      notes: notes.map((note) => note.replace(/^[a-z_]+: /, "")),
      timings: Object.fromEntries(stages.filter((one) => one[1]).map(([k, ms]) => [k, ms / 1000])),
    },
  };
}

/** Tell the service to stop a job; it may have ended already. */
export async function cancel(job) {
  await call(job, { method: "DELETE" }).catch((error) => {
    if (!(error instanceof Problem) || error.passing) throw error;
  });
}

export const openapi = async () => (await call("openapi.json")).json();

/** What is ready, also where the answer is 503. */
export async function readiness() {
  const answer = await fetch(new URL("readyz", root)).catch(() => null);
  return answer ? answer.json().catch(() => null) : null;
}
