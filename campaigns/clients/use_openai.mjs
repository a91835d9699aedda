// OpenAI's client for Node.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { assert, both, cities, model, parameters, question, run, system, url, weather } from "./cases.mjs";

const { chat, completions, responses } = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const messages = [{ role: "system", content: system }, { role: "user", content: question }];
const asked = { model, messages, temperature: 0, max_tokens: 200 };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const functions = [{ type: "function", name: "weather", parameters, strict: true }];
const calling = { tool_choice: "required", parallel_tool_calls: false };
const response = { model, input: question, temperature: 0, max_output_tokens: 200 };

async function answer(streams, body) {
  if (!streams) return (await chat.completions.create(body)).choices[0].message;
  const stream = chat.completions.stream(body);
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  const message = await stream.finalMessage();
  assert.equal(message.content ?? "", text);
  return message;
}

const respond = (streams, body) =>
  streams ? responses.stream(body).finalResponse() : responses.create(body);

await run({
  "text whole and streamed": both(async (streams) => (await answer(streams, asked)).content),
  "tools whole and streamed": both(async (streams) => {
    const message = await answer(streams, { ...asked, ...calling, tools });
    const [call] = message.tool_calls;
    const content = weather(JSON.parse(call.function.arguments));
    const result = { role: "tool", tool_call_id: call.id, content };
    assert(await answer(streams, { ...asked, tools, messages: [...messages, message, result] }));
    return content;
  }),
  structured: async () => {
    const format = zodResponseFormat(z.object({ city: z.enum(cities) }), "city");
    const { choices } = await chat.completions.parse({ ...asked, response_format: format });
    assert(cities.includes(choices[0].message.parsed.city));
  },
  "completions whole and streamed": both(async (stream) => {
    const body = { model, prompt: "Call me", temperature: 0, max_tokens: 12, stream };
    const found = await completions.create(body);
    if (!stream) return found.choices[0].text;
    let text = "";
    for await (const chunk of found) text += chunk.choices[0].text;
    return text;
  }),
  "responses whole and streamed": both(
    async (streams) => (await respond(streams, response)).output_text,
  ),
  "responses tools whole and streamed": both(async (streams) => {
    const { output } = await respond(streams, { ...response, ...calling, tools: functions });
    const told = weather(JSON.parse(output[0].arguments));
    const result = { type: "function_call_output", call_id: output[0].call_id, output: told };
    const input = [{ role: "user", content: response.input }, ...output, result];
    const more = { ...response, tools: functions, input };
    assert(await respond(streams, more));
    return told;
  }),
});
