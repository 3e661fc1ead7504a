// The strip at the top: models, what is loaded, and what everybody together has at work and waiting.

import { $, fill, terms } from "./dom.js";

/** Show what the service last said of itself; null if it could not be reached. */
export function showStatus(service, tasks) {
  const models = Object.entries(service?.models ?? {});
  const ready = models.filter(([, state]) => state === "ready" || state === "idle").length;
  const loads = Object.entries(service?.pulling_percent ?? {});
  const loading = loads.length ? `, loading ${Math.round(Math.min(...loads.map(([, percent]) => percent)))} %` : "";
  const all = ready === models.length ? ready : `${ready} of ${models.length}`;
  $("status-text").textContent = service ? `${all} models ready${loading}${busy(service)}` : "No connection to the service";
  $("status").className = `status quiet ${!service ? "lost" : ready === models.length ? "ready" : "waiting"}`;
  fill($("status-list"), [service, tasks.length], () => terms(Object.fromEntries([
    ...models.map(([name, state]) => {
      const replicas = service.replicas?.[name]?.length ?? 0;
      const title = tasks.find((task) => task.id === name)?.title ?? name;
      return [title, `${state}, ${replicas} ${replicas === 1 ? "replica" : "replicas"}${busy(service, name)}`];
    }),
    ...loads.map(([name, percent]) => [`Loading ${name}`, `${percent} %`]),
  ])));
}

/** What a model, or all of them, has at work, and what waits for it. */
function busy(service, task) {
  const of = (all) => (task ? [all?.[task] ?? []] : Object.values(all ?? {})).flat();
  const working = of(service.replicas).reduce((sum, replica) => sum + (replica.requests ?? 0), 0);
  const waiting = of(service.jobs_waiting).reduce((sum, one) => sum + one, 0);
  return (working ? `, ${working} at work` : "") + (waiting ? `, ${waiting} waiting` : "");
}
