// Claude Code: a day with it, behind a proxy that notes what each request reads.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, question, run, watched } from "./cases.mjs";

const TURNS = 20;
const home = mkdtempSync(join(tmpdir(), "agent-"));
writeFileSync(join(home, "notes.txt"), "The king is old.\n");
// A pixel, as PNG.
const pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
writeFileSync(join(home, "king.png"), Buffer.from(pixel, "base64"));

const event = (type, more) => `event: ${type}\ndata: ${JSON.stringify({ type, ...more })}\n\n`;
// An answer that calls a tool with this input.
const calling = (name, input, number) => {
  const call = { type: "tool_use", id: `toolu_${number}`, name, input: {} };
  const usage = { input_tokens: 1, output_tokens: 1 };
  const about = { id: "msg_call", type: "message", role: "assistant", model, content: [], usage };
  const delta = { type: "input_json_delta", partial_json: JSON.stringify(input) };
  return [
    event("message_start", { message: { ...about, stop_reason: null, stop_sequence: null } }),
    event("content_block_start", { index: 0, content_block: call }),
    event("content_block_delta", { index: 0, delta }),
    event("content_block_stop", { index: 0 }),
    event("message_delta", { delta: { stop_reason: "tool_use", stop_sequence: null }, usage }),
    event("message_stop", {}),
  ].join("");
};
const inputs = {
  ToolSearch: { query: "select:WebFetch", max_results: 1 },
  Picture: { file_path: join(home, "king.png") },
};

let pictures = 0; // that requests had
const [base, read] = await watched((asked) => {
  pictures += JSON.stringify(asked.messages ?? "").split('"type":"image"').length - 1;
  if (!asked.tools) return asked;
  const last = asked.messages.filter(({ role }) => role !== "system").at(-1);
  const told = JSON.stringify(last.content);
  const name = told.includes("tool_result") ? null : told.match(/Please call (\w+)\./)?.[1];
  if (inputs[name]) return calling(name === "Picture" ? "Read" : name, inputs[name], read.length);
  return name ? { ...asked, tool_choice: { type: "tool", name } } : asked;
});

// What ``slotmoe launch`` would set, for the proxy.
const told = JSON.parse(readFileSync(join(import.meta.dirname, "clients.json"))).claude.variables;
const about = { url: base, key: "unused", model, context: 65536 };
const fill = (text) => text.replace(/\{(\w+)\}/g, (_, name) => about[name]);
const quiet = "DISABLE_TELEMETRY DISABLE_ERROR_REPORTING DISABLE_AUTOUPDATER";
const environment = (context) => ({
  ...process.env,
  ...Object.fromEntries(quiet.split(" ").map((name) => [name, "1"])),
  ...Object.fromEntries(Object.entries(told).map(([name, text]) => [name, fill(text)])),
  ...(context && { CLAUDE_CODE_MAX_CONTEXT_TOKENS: `${context}`, CLAUDE_CODE_AUTO_COMPACT_WINDOW: `${context}` }),
  ...{ HOME: home, CLAUDE_CONFIG_DIR: home },
});

async function ask(context, ...words) {
  const how = { cwd: home, env: environment(context), timeout: 900e3, stdio: ["ignore", "pipe", "inherit"] };
  const claude = spawn("claude", ["-p", ...words, "--output-format", "stream-json", "--verbose", "--max-turns", "4"], how);
  let text = "";
  claude.stdout.on("data", (part) => (text += part));
  await once(claude, "close");
  const events = text.trim().split("\n").map((line) => JSON.parse(line));
  assert.equal(events.at(-1).subtype, "success", text);
  return events;
}

const rows = (some) => some.map(({ prompt, cached }) => `${cached} of ${prompt}`).join(", ");
const grows = (some) => {
  for (const [index, { status, cached }] of some.entries()) {
    assert.equal(status, 200);
    // What began an answer is read again where that is empty: the client leaves it out.
    assert(!index || cached >= some[index - 1].prompt - 8, rows(some));
  }
};

await run({
  "a first request that is read once": async () => {
    await ask(0, question);
    assert.equal(read.length, 1, JSON.stringify(read));
    assert(read[0].prompt > 10_000);
  },
  [`${TURNS} turns that read only what is new`]: async () => {
    const said = [question, "Please call Read.", "Please call ToolSearch.", "Please call Picture."];
    for (let turn = 2; turn <= TURNS; turn++) await ask(0, "--continue", said[turn % 4]);
    grows(read);
    assert(pictures > 5);
    console.log(rows(read));
  },
  "a context of 32,000 tokens that is compacted, which alone is read again": async () => {
    const before = read.length;
    let compacted = null;
    for (let turn = 0; turn < 12 && !compacted; turn++) {
      const events = await ask(32_000, "--continue", `${question} ${"Of the king. ".repeat(200)}`);
      compacted = events.find(({ subtype }) => subtype === "compact_boundary");
    }
    const some = read.slice(before);
    console.log(JSON.stringify(compacted), rows(some));
    assert(compacted, "it was never compacted");
    assert(some.every(({ status }) => status === 200));
    await ask(32_000, "--continue", question);
    grows(read.slice(-2));
  },
  "another session that reads only what differs": async () => {
    await ask(0, "And the queen?");
    const { prompt, cached } = read.at(-1);
    assert(2 * cached > prompt, JSON.stringify(read.at(-1)));
  },
});
