// Anthropic's client for Node.
import Anthropic from "@anthropic-ai/sdk";
import { assert, model, parameters, question, run, system, url, weather } from "./cases.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "unused" });
const messages = [{ role: "user", content: question }];
const asked = { model, system, messages, max_tokens: 200 };
const tools = [{ name: "weather", input_schema: parameters }];
const tool_choice = { type: "any", disable_parallel_tool_use: true };
const calling = { ...asked, tools, tool_choice };

async function goesOn(message) {
  assert.equal(message.stop_reason, "tool_use");
  const [call] = message.content;
  const result = { type: "tool_result", tool_use_id: call.id, content: weather(call.input) };
  const turns = [
    { role: "assistant", content: message.content },
    { role: "user", content: [result] },
  ];
  assert(await client.messages.create({ ...asked, tools, messages: [...messages, ...turns] }));
}

await run({
  text: async () => assert((await client.messages.create(asked)).content[0].text),
  "text streamed": async () => {
    let text = "";
    const stream = client.messages.stream(asked).on("text", (delta) => (text += delta));
    assert.equal(await stream.finalText(), text);
  },
  tools: async () => goesOn(await client.messages.create(calling)),
  "tools streamed": async () => goesOn(await client.messages.stream(calling).finalMessage()),
  "tool runner": async () => {
    const tool = { ...tools[0], type: "custom", run: weather, parse: (input) => input };
    const body = { ...calling, tools: [tool], max_iterations: 2 };
    for await (const message of client.beta.messages.toolRunner(body)) {
      assert.equal(message.content[0].type, "tool_use");
    }
  },
  "count tokens": async () => {
    const { input_tokens } = await client.messages.countTokens({ model, system, messages });
    assert(input_tokens > 0);
  },
});
