// Calls to the service. The page lies at <root>/playground/, so that it works below any prefix.

export const root = new URL("..", import.meta.url);

const KEY = "imagen-key";
const SILENCE_MS = 20_000; // the service says something every 5 s

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** What the service says is wrong; `passing` if it may be well again in a moment. */
export class Problem extends Error {
  constructor(status, said, retryAfterS) {
    super(said.fact ?? said.detail);
    this.said = { status, ...said };
    this.passing = !said.code || status === 429 || status === 503;
    this.retryAfterS = retryAfterS;
  }
}

/** The connection failed: nobody knows whether the service got the request. */
export class Offline extends Error {}

/** The answer to a call below the root, or one of the errors above. */
export async function call(path, { headers = {}, ...options } = {}) {
  const own = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let answer;
  try {
    answer = await fetch(new URL(path, root), { ...options, headers: { ...own, ...headers } });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Offline();
  }
  if (answer.ok) return answer;
  throw await problemOf(answer);
}

async function problemOf(answer) {
  const isProblem = answer.headers.get("content-type")?.startsWith("application/problem+json");
  const said = isProblem ? await answer.json().catch(() => ({})) : {};
  const fact = `The server answered ${answer.status} and no reason.`;
  const retryAfterS = Number(answer.headers.get("retry-after")) || 0;
  return new Problem(answer.status, said.code ? said : { fact, remedy: "Try again." }, retryAfterS);
}

/** Events of a job, from the one after `last`; ends with the stream. */
export async function* events(path, last, signal) {
  const headers = last ? { "Last-Event-ID": last } : {};
  const answer = await call(path, { headers, signal });
  if (answer.status === 204) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await soon(reader.read());
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event.data) yield { ...event, data: JSON.parse(event.data) };
      }
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Offline();
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = {};
  for (const line of block.split("\n")) {
    const [, field, value] = /^(\w+): ?(.*)$/.exec(line) ?? [];
    if (field) event[field] = value;
  }
  return event;
}

/** A connection that says nothing for long is lost, whatever the system thinks of it. */
function soon(reading) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Offline()), SILENCE_MS);
    reading.finally(() => clearTimeout(timer)).then(resolve, reject);
  });
}

/** Wait, or until somebody gives up, or the network is back. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const done = (end) => () => {
      clearTimeout(timer);
      window.removeEventListener("online", resume);
      end();
    };
    const resume = done(resolve);
    const timer = setTimeout(resume, ms);
    window.addEventListener("online", resume);
    signal?.addEventListener("abort", done(() => reject(signal.reason)), { once: true });
  });
}
