// Vercel's AI SDK with its four providers' models.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { assert, cities, model, question, run, system, url, weather } from "./cases.mjs";

const about = { baseURL: `${url}/v1`, apiKey: "unused" };
const openai = createOpenAI(about);
const more = { name: "slotmoe", includeUsage: true, supportsStructuredOutputs: true };
const models = {
  responses: openai(model),
  chat: openai.chat(model),
  compatible: createOpenAICompatible({ ...about, ...more })(model),
  anthropic: createAnthropic(about)(model),
};
const asked = { system, prompt: question, temperature: 0, maxOutputTokens: 400, maxRetries: 0 };
const inputSchema = z.object({ city: z.enum(cities) });
const tools = { weather: tool({ description: "The weather.", inputSchema, execute: weather }) };
const calling = { ...asked, tools, stopWhen: stepCountIs(2) };
const choice = ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" });
const problems = [];
const onError = ({ error }) => problems.push(error);

const cases = {};
for (const [name, model] of Object.entries(models)) {
  cases[`${name}: text whole and streamed`] = async () => {
    const { text } = await generateText({ ...asked, model });
    const stream = streamText({ ...asked, model, onError });
    let streamed = "";
    for await (const part of stream.textStream) streamed += part;
    assert.deepEqual(problems, []);
    assert.equal(streamed, text);
    assert((await stream.usage).outputTokens > 0);
  };
  cases[`${name}: tools whole and streamed`] = async () => {
    const whole = await generateText({ ...calling, model, prepareStep: choice });
    const stream = streamText({ ...calling, model, prepareStep: choice, onError });
    await stream.consumeStream();
    assert.deepEqual(problems, []);
    for (const steps of [whole.steps, await stream.steps]) {
      assert.equal(steps.length, 2);
      assert(steps[0].toolResults[0].output.startsWith("It rains"));
    }
  };
  cases[`${name}: structured whole and streamed`] = async () => {
    const output = Output.object({ schema: inputSchema });
    const whole = await generateText({ ...asked, model, output });
    const stream = streamText({ ...asked, model, output, onError });
    await stream.consumeStream();
    assert.deepEqual(problems, []);
    for (const found of [whole.output, await stream.output]) assert(cities.includes(found.city));
  };
}
await run(cases);
