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
export class Offline extends Error {
  said = {
    fact: "The service cannot be reached.",
    remedy: "Check the connection, then try again. The picture and its settings are still here.",
  };
  passing = true;
}

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
  const said = await answer.json().catch(() => null);
  const unsaid = { fact: `The server answered ${answer.status} and no reason.`, remedy: "Try again." };
  throw new Problem(answer.status, said?.code ? said : unsaid, Number(answer.headers.get("retry-after")) || 0);
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
      const { value, done } = await Promise.race([reader.read(), silence()]);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const { data, ...event } of blocks.map(parse)) {
        if (data) yield { ...event, data: JSON.parse(data) };
      }
    }
  } catch (error) {
    throw signal.aborted ? error : new Offline();
  } finally {
    reader.cancel().catch(() => {});
  }
}

const parse = (block) => Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/)));

/** A connection that says nothing for long is lost, whatever the system thinks of it. */
const silence = () => new Promise((_, reject) => setTimeout(reject, SILENCE_MS, new Offline()));

/** Wait, or until somebody gives up, or the network is back. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    window.addEventListener("online", resolve, { once: true });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
