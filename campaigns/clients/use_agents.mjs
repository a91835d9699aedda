// Coding agents, Codex CLI and OpenCode: long requests with many tools, streamed, marked caches.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, name, question, run, url, watched } from "./cases.mjs";

const home = mkdtempSync(join(tmpdir(), "agent-"));
const folders = ["HOME", "CODEX_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "PWD"];
const homes = Object.fromEntries(folders.map((folder) => [folder, home]));
const env = { ...process.env, ...homes, OPENCODE_DISABLE_MODELS_FETCH: "1" };

async function agent(last, ...command) {
  const about = { cwd: home, env, timeout: 600e3, stdio: ["ignore", "pipe", "inherit"] };
  const child = spawn(name, command, about);
  let text = "";
  child.stdout.on("data", (part) => (text += part));
  const [status] = await once(child, "close");
  assert.equal(status, 0, text);
  const events = text.trim().split("\n").map((line) => JSON.parse(line));
  const types = events.map(({ type }) => type);
  assert(types.includes(last) && !types.includes("error"), text);
  return events;
}

// Codex, with a tool that takes text and an MCP server.  What ``slotmoe launch`` would set.
const mcp = `
const tool = { name: "age", description: "A king's age.", inputSchema: ${JSON.stringify({
  type: "object", properties: { who: { enum: ["Lear", "Henry"] } }, required: ["who"], additionalProperties: false,
})} };
const answers = {
  initialize: ({ protocolVersion }) => ({ protocolVersion, capabilities: { tools: {} }, serverInfo: { name: "king", version: "1" } }),
  "tools/list": () => ({ tools: [tool] }),
  "tools/call": () => ({ content: [{ type: "text", text: "He is eighty." }] }),
};
require("node:readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const { id, method, params } = JSON.parse(line);
  if (id !== undefined) console.log(JSON.stringify({ jsonrpc: "2.0", id, result: (answers[method] ?? (() => ({})))(params) }));
});
`;
const known = {
  slug: model, display_name: model, supported_reasoning_levels: [], shell_type: "shell_command", visibility: "list",
  supported_in_api: true, priority: 1, base_instructions: "You are Codex, a coding agent.", apply_patch_tool_type: "freeform",
  truncation_policy: { mode: "tokens", limit: 10000 }, supports_parallel_tool_calls: true, support_verbosity: false,
  experimental_supported_tools: [], input_modalities: ["text"], context_window: 65536,
};
writeFileSync(join(home, "mcp.cjs"), mcp);
writeFileSync(join(home, "models.json"), JSON.stringify({ models: [known] }));
const choices = {
  apply_patch: { type: "custom", name: "apply_patch" },
  mcp__king__age: { type: "function", name: "mcp__king__age" },
};
const [base, read] = await watched((asked) => {
  const last = asked.input?.at(-1);
  const tool = last?.role === "user" && JSON.stringify(last.content).match(/call (\w+)/)?.[1];
  return choices[tool] ? { ...asked, tool_choice: choices[tool], max_output_tokens: 200 } : asked;
});
const told = { url: base, key: "unused", model, context: 65536 };
const given = JSON.parse(readFileSync(join(import.meta.dirname, "clients.json"))).codex;
const settings = Object.entries({
  ...given.settings, model_catalog_json: join(home, "models.json"), "mcp_servers.king.command": "node",
}).map(([key, value]) => `${key}=${value.replace(/\{(\w+)\}/g, (_, name) => told[name])}`);
settings.push(`mcp_servers.king.args=["${join(home, "mcp.cjs")}"]`);
const options = settings.flatMap((setting) => ["-c", setting]);
env.SLOTMOE_API_KEY = "unused";
const codex = (...words) =>
  agent("turn.completed", ...options, "exec", ...words, "--skip-git-repo-check", "--json",
    "--dangerously-bypass-approvals-and-sandbox");
const rows = (some) => some.map(({ prompt, cached }) => `${cached} of ${prompt}`).join(", ");
const turn = async (words, ...more) => {
  const before = read.length;
  const events = await codex(...(before ? ["resume", "--last", ...more, words] : [words]));
  assert(read.every(({ status }) => status === 200), JSON.stringify(read));
  return [events, read.slice(before)];
};

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
    "a day with apply_patch and an MCP server that reads only what is new": async () => {
      const said = ["And the queen?", "Please call apply_patch.", "Please call mcp__king__age."];
      const items = [];
      for (let number = 0; number < 12; number++) {
        const [events] = await turn(number ? said[number % 3] : question);
        items.push(...events.flatMap(({ item }) => (item ? [item.type] : [])));
      }
      console.log(items.join(", "), rows(read));
      assert(items.includes("mcp_tool_call"));
      for (const [index, { cached }] of read.entries()) {
        assert(!index || cached >= read[index - 1].prompt - 1, rows(read));
      }
    },
    "a compaction, which alone is read again": async () => {
      const [, some] = await turn(question, "-c", "model_auto_compact_token_limit=2000");
      console.log(rows(some));
      assert(some.length > 1, "it was never compacted");
      const [, [next]] = await turn("And the queen?");
      assert(next.cached >= some.at(-1).prompt - 1, JSON.stringify([some, next]));
    },
  },
  opencode: {
    "a turn on Anthropic's API": () => opencode("messages"),
    "a turn on OpenAI's API": () => opencode("chat"),
  },
};
await run(cases[name]);
