// Codex CLI, which asks for a long response with many tools, streamed.
import { spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { assert, model, question, run, url } from "./cases.mjs";

const home = mkdtempSync(join(tmpdir(), "codex-"));
const provider = { name: "slotmoe", base_url: `${url}/v1`, wire_api: "responses" };
const settings = { model_provider: "slotmoe", model_context_window: 32768, web_search: "disabled" };
const options = Object.entries(provider)
  .map(([name, value]) => [`model_providers.slotmoe.${name}`, value])
  .concat(Object.entries(settings))
  .flatMap(([name, value]) => ["-c", `${name}=${JSON.stringify(value)}`]);

function codex(...args) {
  const command = ["exec", ...args, "--skip-git-repo-check", "--json", "-m", model, ...options];
  const environment = { ...process.env, CODEX_HOME: home, HOME: home, PWD: home };
  const about = { cwd: home, env: environment, encoding: "utf8", timeout: 240e3, stdio: ["ignore", "pipe", "pipe"] };
  const done = spawnSync("codex", command, about);
  assert.equal(done.status, 0, done.stdout + done.stderr);
  const events = done.stdout.trim().split("\n").map((line) => JSON.parse(line));
  assert(events.some(({ type }) => type === "turn.completed"), done.stdout);
  return events;
}

await run({
  "a turn, and another one": () => {
    codex(question);
    codex("resume", "--last", "And the queen?");
  },
});
