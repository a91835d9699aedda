// Ollama's client for Node.
import { Ollama } from "ollama";
import { assert, both, cities, model, parameters, question, run, system, url, weather } from "./cases.mjs";

const client = new Ollama({ host: url });
const messages = [{ role: "system", content: system }, { role: "user", content: question }];
const options = { temperature: 0, num_predict: 60, num_ctx: 4096 };
const tools = [{ type: "function", function: { name: "weather", description: "", parameters } }];

async function text(stream, body) {
  const answer = await client.chat({ model, messages, options, ...body, stream });
  if (!stream) return answer.message.content;
  let all = "", last;
  for await (last of answer) all += last.message.content;
  assert(last.done && last.done_reason);
  return all;
}

await run({
  "text whole and streamed": both((stream) => text(stream)),
  "tools whole and streamed": both(async (stream) => {
    const call = { function: { name: "weather", arguments: { city: cities[0] } } };
    const called = { role: "assistant", content: "", tool_calls: [call] };
    const told = { role: "tool", tool_name: "weather", content: weather(call.function.arguments) };
    await text(stream, { messages: [...messages, called, told], tools });
    return told.content;
  }),
  "structured whole and streamed": both(async (stream) => {
    const { city } = JSON.parse(await text(stream, { format: parameters }));
    assert(cities.includes(city), city);
    return city;
  }),
  "generate whole and streamed": both(async (stream) => {
    const answer = await client.generate({ model, prompt: question, options, stream });
    if (!stream) return answer.response;
    let all = "";
    for await (const part of answer) all += part.response;
    return all;
  }),
  models: async () => {
    const { models } = await client.list();
    assert.equal(models[0].name, `${model}:latest`);
    assert((await client.show({ model })).capabilities.includes("tools"));
  },
});
