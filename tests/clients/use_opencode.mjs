// OpenCode, a coding agent, on Anthropic's API and on OpenAI's: large sets of tools, marked caches.
import { spawnSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, question, run, url } from "./cases.mjs";

const home = mkdtempSync(join(tmpdir(), "opencode-"));
const models = { [model]: { name: model, limit: { context: 32768, output: 60 } } };
const options = { baseURL: `${url}/v1`, apiKey: "unused" };
const provider = {
  messages: { npm: "@ai-sdk/anthropic", name: "messages", options, models },
  chat: { npm: "@ai-sdk/openai-compatible", name: "chat", options, models },
};
const settings = { provider, autoupdate: false, share: "disabled" };
writeFileSync(join(home, "opencode.json"), JSON.stringify(settings));

function opencode(way) {
  const names = { HOME: home, XDG_DATA_HOME: home, XDG_CONFIG_HOME: home, XDG_CACHE_HOME: home };
  const env = { ...process.env, ...names, PWD: home, OPENCODE_DISABLE_MODELS_FETCH: "1" };
  const about = { cwd: home, env, encoding: "utf8", timeout: 240e3, stdio: ["ignore", "pipe", "pipe"] };
  const command = ["run", "--format", "json", "-m", `${way}/${model}`, question];
  const done = spawnSync("opencode", command, about);
  assert.equal(done.status, 0, done.stdout + done.stderr);
  const events = done.stdout.trim().split("\n").map((line) => JSON.parse(line));
  assert(events.some(({ type }) => type === "step_finish"), done.stdout + done.stderr);
  assert(!events.some(({ type }) => type === "error"), done.stdout);
}

await run({
  "a turn on Anthropic's API": () => opencode("messages"),
  "a turn on OpenAI's API": () => opencode("chat"),
});
