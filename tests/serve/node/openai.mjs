// OpenAI's own client for Node, unmodified but for its address. It is called with the address and the
// files of a picture and a mask, and prints what it saw as JSON.

import { createReadStream } from "node:fs";

import OpenAI from "openai";

const [address, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "any", maxRetries: 0 });
const edited = (changes) =>
  client.images.edit({
    model: "comic",
    image: createReadStream(picture),
    prompt: "ink drawing",
    steps: 4, // the model's own parameters stand beside OpenAI's
    seed: 7,
    ...changes,
  });

async function outcome(call) {
  try {
    const made = await call();
    return { kind: "none", picture: made.data[0].b64_json };
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    const { status, code, type, param, message } = error;
    return { kind: error.constructor.name, status, code, type, param, message };
  }
}

async function all(pages) {
  const found = [];
  for await (const one of pages) found.push(one);
  return found;
}

const upscaled = await client.images.edit({
  model: "upscale",
  image: createReadStream(picture),
  prompt: "",
});
const masked = await edited({ mask: createReadStream(mask), n: 2, output_format: "png" });
const linked = await edited({ response_format: "url" });
const models = await all(client.models.list());
const events = await all(await edited({ stream: true, partial_images: 2 }));
console.log(
  JSON.stringify({
    models: models.map((model) => model.id),
    tasks: models.map((model) => model.task),
    model: (await client.models.retrieve("comic")).id,
    upscaled: upscaled.data[0].b64_json,
    masked: masked.data.map((one) => one.b64_json),
    seeds: masked.data.map((one) => one.imagen.seed),
    url: linked.data[0].url,
    events: events.map((event) => [event.type, event.b64_json]),
    drawn: await outcome(() => client.images.generate({ model: "generate", prompt: "a red ball" })),
    wrong: await outcome(() => edited({ steps: 0 })),
    nobody: await outcome(() => client.images.generate({ model: "gpt-image-1", prompt: "a ball" })),
    variation: await outcome(() =>
      client.images.createVariation({ image: createReadStream(picture) }),
    ),
  }),
);
