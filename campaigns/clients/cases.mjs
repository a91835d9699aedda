// What the scripts for Node share: where the server is, the questions, a line for each case.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";

export { assert };
export const [url, model, folder, python, name] = process.argv.slice(2);
export const system = "Be brief.";
export const question = "Tell me of the king.";
export const cities = ["Paris", "Rome"];
export const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: cities } },
  required: ["city"],
  additionalProperties: false,
};
export const weather = ({ city }) => {
  assert(cities.includes(city), city);
  return `It rains in ${city}.`;
};

/** A case that is done whole and then streamed; what it returns is the same, and not nothing. */
export const both = (action) => async () => {
  const whole = await action(false);
  assert(whole);
  assert.deepEqual(await action(true), whole);
};

/** A proxy's URL, and what each request through it read: its path and status, its prompt's tokens,
 *  those of them that were cached. `change` gets a request's body and may give another one, or the
 *  text of an answer: the sample calls tools by chance only, so what is asked for decides. */
export async function watched(change) {
  const read = [];
  const proxy = createServer(async (request, response) => {
    const parts = [];
    for await (const part of request) parts.push(part);
    const body = Buffer.concat(parts).toString();
    const changed = body ? change(JSON.parse(body), read) : null;
    if (typeof changed === "string") {
      response.writeHead(200, { "content-type": "text/event-stream" }).end(changed);
      return;
    }
    const { authorization = "", ...rest } = request.headers;
    const headers = { authorization, "content-type": rest["content-type"] ?? "application/json" };
    const about = { method: request.method, headers, body: changed ? JSON.stringify(changed) : undefined };
    const answer = await fetch(url + request.url, about);
    response.writeHead(answer.status, { "content-type": answer.headers.get("content-type") });
    let text = "";
    for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
      text += part;
      response.write(part);
    }
    response.end();
    const last = (name) => Number([...text.matchAll(new RegExp(`"${name}":(\\d+)`, "g"))].at(-1)?.[1] ?? 0);
    const kept = last("cache_read_input_tokens");
    const [prompt, cached] = [last("input_tokens") + kept, kept || last("cached_tokens")];
    read.push({ path: request.url, status: answer.status, prompt, cached });
    if (answer.status >= 400) console.log(text.slice(0, 500));
  });
  proxy.listen(0, "127.0.0.1");
  await once(proxy, "listening");
  return [`http://127.0.0.1:${proxy.address().port}`, read];
}

/** Runs an object's functions in turn; exits with 1 if one failed. */
export async function run(cases) {
  for (const [name, check] of Object.entries(cases)) {
    try {
      await check();
      console.log(`ok - ${name}`);
    } catch (problem) {
      process.exitCode = 1;
      console.log(problem);
      console.log(`not ok - ${name}`);
    }
  }
  process.exit();
}
