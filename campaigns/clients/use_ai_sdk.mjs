// Vercel's AI SDK with its four providers' models.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { assert, both, cities, model, question, run, system, url, weather } from "./cases.mjs";

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
const choice = ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" });

async function answer(streams, options) {
  if (!streams) return generateText({ ...asked, ...options });
  const problems = [];
  const stream = streamText({ ...asked, ...options, onError: ({ error }) => problems.push(error) });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.deepEqual(problems, []);
  assert((await stream.totalUsage).outputTokens > 0);
  return { text, steps: await stream.steps, output: options.output && (await stream.output) };
}

const cases = {};
for (const [name, model] of Object.entries(models)) {
  cases[`${name}: text whole and streamed`] = both(
    async (streams) => (await answer(streams, { model })).text,
  );
  cases[`${name}: tools whole and streamed`] = both(async (streams) => {
    const calling = { model, tools, stopWhen: stepCountIs(2), prepareStep: choice };
    const { steps } = await answer(streams, calling);
    assert.equal(steps.length, 2);
    return steps[0].toolResults[0].output;
  });
  cases[`${name}: structured whole and streamed`] = both(async (streams) => {
    const output = Output.object({ schema: inputSchema });
    const { city } = (await answer(streams, { model, output })).output;
    return cities.includes(city) && city;
  });
}
await run(cases);
