// Claude Code: a day with it, behind a proxy that notes what each request reads.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, question, run, url } from "./cases.mjs";

const TURNS = 20;
const home = mkdtempSync(join(tmpdir(), "agent-"));
writeFileSync(join(home, "notes.txt"), "The king is old.\n");
const read = []; // by request: its status, its prompt's tokens, and those of them that were cached

// The sample calls tools by chance only, so what is asked for decides.
const chosen = (body) => {
  const last = body.messages.filter(({ role }) => role !== "system").at(-1);
  const told = JSON.stringify(last.content);
  return told.includes("tool_result") ? null : told.match(/call (\w+)/)?.[1];
};

const event = (type, more) => `event: ${type}\ndata: ${JSON.stringify({ type, ...more })}\n\n`;
// An answer that looks for a tool which the first request has only named.
const search = () => {
  const call = { type: "tool_use", id: `toolu_${read.length}`, name: "ToolSearch", input: {} };
  const usage = { input_tokens: 1, output_tokens: 1 };
  const about = { id: "msg_search", type: "message", role: "assistant", model, content: [], usage };
  const partial_json = JSON.stringify({ query: "select:WebFetch", max_results: 1 });
  return [
    event("message_start", { message: { ...about, stop_reason: null, stop_sequence: null } }),
    event("content_block_start", { index: 0, content_block: call }),
    event("content_block_delta", { index: 0, delta: { type: "input_json_delta", partial_json } }),
    event("content_block_stop", { index: 0 }),
    event("message_delta", { delta: { stop_reason: "tool_use", stop_sequence: null }, usage }),
    event("message_stop", {}),
  ].join("");
};

const proxy = createServer(async (request, response) => {
  const parts = [];
  for await (const part of request) parts.push(part);
  let body = Buffer.concat(parts).toString();
  const asked = body ? JSON.parse(body) : {};
  const name = asked.tools && chosen(asked);
  if (name === "ToolSearch") {
    response.writeHead(200, { "content-type": "text/event-stream" }).end(search());
    return;
  }
  if (name) body = JSON.stringify({ ...asked, tool_choice: { type: "tool", name } });
  const { authorization = "", ...rest } = request.headers;
  const headers = { authorization, "content-type": rest["content-type"] ?? "application/json" };
  const answer = await fetch(url + request.url, { method: request.method, headers, body: body || undefined });
  response.writeHead(answer.status, { "content-type": answer.headers.get("content-type") });
  let text = "";
  for await (const part of answer.body.pipeThrough(new TextDecoderStream())) {
    text += part;
    response.write(part);
  }
  response.end();
  const usages = [...text.matchAll(/"usage":(\{[^{}]*\})/g)].map(([, usage]) => JSON.parse(usage));
  const { input_tokens: fresh = 0, cache_read_input_tokens: cached = 0 } = usages.at(-1) ?? {};
  read.push({ path: request.url, status: answer.status, prompt: fresh + cached, cached });
});
proxy.listen(0, "127.0.0.1");
await once(proxy, "listening");

const models = ["", "_SMALL_FAST", "_DEFAULT_HAIKU", "_DEFAULT_SONNET", "_DEFAULT_OPUS"];
const quiet = "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC DISABLE_TELEMETRY DISABLE_ERROR_REPORTING DISABLE_AUTOUPDATER";
const env = {
  ...process.env,
  ...Object.fromEntries(models.map((kind) => [`ANTHROPIC${kind}_MODEL`, model])),
  ...Object.fromEntries(quiet.split(" ").map((name) => [name, "1"])),
  ...{ HOME: home, CLAUDE_CONFIG_DIR: home, ANTHROPIC_AUTH_TOKEN: "unused" },
  ANTHROPIC_BASE_URL: `http://127.0.0.1:${proxy.address().port}`,
};
delete env.ANTHROPIC_API_KEY;

async function ask(...words) {
  const about = { cwd: home, env, timeout: 900e3, stdio: ["ignore", "pipe", "inherit"] };
  const claude = spawn("claude", ["-p", ...words, "--output-format", "json", "--max-turns", "4"], about);
  let text = "";
  claude.stdout.on("data", (part) => (text += part));
  await once(claude, "close");
  assert.equal(JSON.parse(text).subtype, "success", text);
}

await run({
  "a first request that is read once": async () => {
    await ask(question);
    assert.equal(read.length, 1, JSON.stringify(read));
    assert(read[0].prompt > 10_000);
  },
  [`${TURNS} turns that read only what is new`]: async () => {
    for (let turn = 2; turn <= TURNS; turn++) {
      await ask("--continue", [question, "Please call Read.", "Please call ToolSearch."][turn % 3]);
    }
    for (const [index, { status, cached }] of read.entries()) {
      assert.equal(status, 200);
      assert(!index || cached >= read[index - 1].prompt, JSON.stringify(read));
    }
    console.log(read.map(({ prompt, cached }) => `${cached} of ${prompt}`).join(", "));
  },
  "another session that reads only what differs": async () => {
    await ask("And the queen?");
    const { prompt, cached } = read.at(-1);
    assert(2 * cached > prompt, JSON.stringify(read.at(-1)));
  },
});
