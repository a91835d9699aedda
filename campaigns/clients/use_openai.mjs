// OpenAI's client for Node.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { assert, cities, model, parameters, question, run, system, url, weather } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const messages = [
  { role: "system", content: system },
  { role: "user", content: question },
];
const asked = { model, messages, temperature: 0, max_tokens: 200 };
const functions = [{ type: "function", function: { name: "weather", parameters } }];
const calling = { ...asked, tools: functions, tool_choice: "required", parallel_tool_calls: false };
const City = z.object({ city: z.enum(cities) });
const response = { model, input: question, temperature: 0, max_output_tokens: 200 };

async function goesOn(message) {
  const [call] = message.tool_calls;
  const content = weather(JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content };
  const history = [...messages, message, result];
  assert(await client.chat.completions.create({ ...asked, tools: functions, messages: history }));
}

await run({
  "text whole and streamed": async () => {
    const whole = await client.chat.completions.create(asked);
    const stream = client.chat.completions.stream(asked);
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
    assert.equal((await stream.finalMessage()).content, text);
  },
  tools: async () => {
    await goesOn((await client.chat.completions.create(calling)).choices[0].message);
  },
  "tools streamed": async () => {
    await goesOn(await client.chat.completions.stream(calling).finalMessage());
  },
  "structured": async () => {
    const format = { response_format: zodResponseFormat(City, "city") };
    const { choices } = await client.chat.completions.parse({ ...asked, ...format });
    assert(cities.includes(choices[0].message.parsed.city));
  },
  "completions whole and streamed": async () => {
    const body = { model, prompt: "Call me", temperature: 0, max_tokens: 12 };
    let text = "";
    const stream = await client.completions.create({ ...body, stream: true });
    for await (const chunk of stream) text += chunk.choices[0].text;
    assert.equal(text, (await client.completions.create(body)).choices[0].text);
  },
  "responses whole and streamed": async () => {
    const whole = await client.responses.create(response);
    const final = await client.responses.stream(response).finalResponse();
    assert.equal(final.output_text, whole.output_text);
  },
  "responses tools whole and streamed": async () => {
    const tools = [{ type: "function", name: "weather", parameters, strict: true }];
    const body = { ...response, tools, tool_choice: "required", parallel_tool_calls: false };
    const whole = await client.responses.create(body);
    const final = await client.responses.stream(body).finalResponse();
    for (const { id, output } of [whole, final]) {
      const result = { type: "function_call_output", call_id: output[0].call_id, output: "rain" };
      weather(JSON.parse(output[0].arguments));
      const more = { ...response, tools, input: [result], previous_response_id: id };
      assert(await client.responses.create(more));
    }
  },
});
