// Anthropic's client for Node.
import Anthropic from "@anthropic-ai/sdk";
import { assert, both, model, parameters, question, run, system, url, weather } from "./cases.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "unused" });
const messages = [{ role: "user", content: question }];
const asked = { model, system, messages, max_tokens: 200, temperature: 0 };
const tools = [{ name: "weather", input_schema: parameters }];
const tool_choice = { type: "any", disable_parallel_tool_use: true };

const answer = (streams, body) =>
  streams ? client.messages.stream(body).finalMessage() : client.messages.create(body);

await run({
  "text whole and streamed": both(async (streams) => (await answer(streams, asked)).content[0].text),
  "text deltas": async () => {
    let text = "";
    const stream = client.messages.stream(asked).on("text", (delta) => (text += delta));
    assert.equal(await stream.finalText(), text);
  },
  "tools whole and streamed": both(async (streams) => {
    const { content, stop_reason } = await answer(streams, { ...asked, tools, tool_choice });
    assert.equal(stop_reason, "tool_use");
    const told = weather(content[0].input);
    const result = { type: "tool_result", tool_use_id: content[0].id, content: told };
    const turns = [{ role: "assistant", content }, { role: "user", content: [result] }];
    assert(await answer(streams, { ...asked, tools, messages: [...messages, ...turns] }));
    return told;
  }),
  "tool runner": async () => {
    const tool = { ...tools[0], type: "custom", run: weather, parse: (input) => input };
    const body = { ...asked, tools: [tool], tool_choice, max_iterations: 2 };
    for await (const message of client.beta.messages.toolRunner(body)) {
      assert.equal(message.content[0].type, "tool_use");
    }
  },
  "count tokens": async () => {
    const { input_tokens } = await client.messages.countTokens({ model, system, messages });
    assert(input_tokens > 0);
  },
});
