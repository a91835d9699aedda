// Coding agents, Codex CLI and OpenCode: long requests with many tools, streamed, marked caches.
import { spawnSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, name, question, run, url } from "./cases.mjs";

const home = mkdtempSync(join(tmpdir(), "agent-"));
const folders = ["HOME", "CODEX_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "PWD"];
const homes = Object.fromEntries(folders.map((folder) => [folder, home]));
const env = { ...process.env, ...homes, OPENCODE_DISABLE_MODELS_FETCH: "1" };

function agent(last, ...command) {
  const about = { cwd: home, env, encoding: "utf8", timeout: 240e3, stdio: ["ignore", "pipe", "pipe"] };
  const done = spawnSync(name, command, about);
  assert.equal(done.status, 0, done.stdout + done.stderr);
  const events = done.stdout.trim().split("\n").map((line) => JSON.parse(line));
  const types = events.map(({ type }) => type);
  assert(types.includes(last) && !types.includes("error"), done.stdout + done.stderr);
  return events.find(({ type }) => type === last);
}

const provider = { name: "slotmoe", base_url: `${url}/v1`, wire_api: "responses" };
const settings = { model_provider: "slotmoe", model_context_window: 32768, web_search: "disabled" };
const options = Object.entries(provider)
  .map(([key, value]) => [`model_providers.slotmoe.${key}`, value])
  .concat(Object.entries(settings))
  .flatMap(([key, value]) => ["-c", `${key}=${JSON.stringify(value)}`]);
const codex = (...words) =>
  agent("turn.completed", "exec", ...words, "--skip-git-repo-check", "--json", "-m", model, ...options);

const about = {
  options: { baseURL: `${url}/v1`, apiKey: "unused" },
  models: { [model]: { name: model, limit: { context: 32768, output: 60 } } },
};
const ways = {
  messages: { npm: "@ai-sdk/anthropic", name: "messages", ...about },
  chat: { npm: "@ai-sdk/openai-compatible", name: "chat", ...about },
};
const config = { provider: ways, autoupdate: false, share: "disabled" };
writeFileSync(join(home, "opencode.json"), JSON.stringify(config));
const opencode = (way) =>
  agent("step_finish", "run", "--format", "json", "-m", `${way}/${model}`, question);

const cases = {
  codex: {
    "a turn, and another one that reads only what is new": () => {
      const { input_tokens } = codex(question).usage;
      const { usage } = codex("resume", "--last", "And the queen?");
      assert(usage.cached_input_tokens >= input_tokens, JSON.stringify([input_tokens, usage]));
    },
  },
  opencode: {
    "a turn on Anthropic's API": () => opencode("messages"),
    "a turn on OpenAI's API": () => opencode("chat"),
  },
};
await run(cases[name]);
