"""``slotmoe serve`` and ``launch`` for coding agents: tools of Codex, pictures in results, prompts
that are too long or take long, a client that is started with its server; what
clients leave unsent or ask for too much of costs bounded memory, and no exit."""

import asyncio
import json
import os
import re
import select
import signal
import sys
import tracemalloc
from contextlib import ExitStack, suppress
from dataclasses import replace
from operator import sub

import pytest
from click.testing import CliRunner

from slotmoe.errors import ConfigError
from slotmoe.tools import serve
from slotmoe.tools.cli import cli
from slotmoe.tools.serve import guard as serve_guard
from slotmoe.tools.serve.answers import Answers, Scores
from slotmoe.tools.serve.formats import Reader
from slotmoe.tools.serve.openai import ChatRequest
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.apis import ASKED, CHAT, KING, MESSAGES, RESPONSES, TOOL, ask
from tests.support.forkserver import COMMAND_LINE, Forked
from tests.support.served import GREEDY, USER, Served, connect, is_weather, request, start, until

PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files."}
PATCH["format"] = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin" /.+/'}
NAMESPACE = {"type": "namespace", "name": "mcp__sky", "description": "", "tools": [TOOL]}
CODEX = [TOOL, PATCH, NAMESPACE, {"type": "web_search"}]


@pytest.fixture(scope="module")
def context():
    return 1024


def test_tools_of_codex_are_functions_of_the_model_and_come_back_as_they_were(openai_client):
    def call(kind, name):
        choice = {"type": kind, "name": name}
        options = {**GREEDY, "input": KING, "tools": CODEX, "tool_choice": choice}
        with openai_client.responses.stream(**options, max_output_tokens=60) as stream:
            types = [event.type for event in stream]
            return types, *stream.get_final_response().output

    types, patch = call("custom", "apply_patch")
    assert (patch.type, patch.name) == ("custom_tool_call", "apply_patch") and patch.input
    assert types.count("response.custom_tool_call_input.delta") == 1
    _, weather = call("function", "mcp__sky__weather")
    assert (weather.name, weather.namespace) == ("weather", "mcp__sky")
    assert is_weather(weather.arguments)
    results = [
        {"type": "function_call_output", "call_id": weather.call_id, "output": "Rain."},
        {"type": "custom_tool_call_output", "call_id": patch.call_id, "output": "Done."},
    ]
    items = [{"role": "user", "content": KING}, weather, patch, *results]
    said = openai_client.responses.with_raw_response.create(
        **{**GREEDY, "input": items, "tools": CODEX, "max_output_tokens": 2}
    )
    assert said.headers["x-slotmoe-relaxed"] == "tools: web_search is left out"


def test_a_call_of_another_name_keeps_it(served, monkeypatch):
    feed = Reader.feed

    def renamed(*given, **how):
        return [replace(delta, name=delta.name and "other") for delta in feed(*given, **how)]

    monkeypatch.setattr(Reader, "feed", renamed)
    must = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 60}
    assert ask(served, RESPONSES, **must)["output"][0]["name"] == "other"


def test_what_the_model_reads_of_tools_and_histories(served):
    items = [
        {"type": "compaction", "encrypted_content": "slotmoe: They met."},
        {"type": "compaction", "encrypted_content": "gAAAA"},
        {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": 'a"b'},
        {**MADE, "namespace": "mcp__sky"},
    ]
    chat = ResponsesRequest(model="x", input=items, tools=CODEX).chat()
    first, second, said = chat.messages
    assert first.text.endswith("They met.") and "left out" in second.text
    made = [(made.name, made.arguments) for made in said.calls]
    assert made == [("apply_patch", '{"input": "a\\"b"}'), ("mcp__sky__weather", "{}")]
    about = {function.name: function.description for function in chat.policy.functions}
    assert [*about] == ["weather", "apply_patch", "mcp__sky__weather"]
    assert '*** Begin" /.+/' in about["apply_patch"]
    spaces = [{**NAMESPACE, "name": f"n{n}", "tools": [TOOL] * 1000} for n in range(2)]
    for tools in (spaces, [TOOL, TOOL], [{**NAMESPACE, "tools": [NAMESPACE, 5]}]):
        assert served.post(RESPONSES, **ASKED[RESPONSES], tools=tools)[0] == 400
    lacking = [{"type": "custom_tool_call", "call_id": "1", "name": "apply_patch"}]
    assert served.post(RESPONSES, **{**ASKED[RESPONSES], "input": lacking})[0] == 400


def test_a_conversation_is_compacted(served):
    tools = [{**TOOL, "parameters": {"type": "object"}}]
    before = ask(served, RESPONSES, tools=tools)
    found = ask(served, f"{RESPONSES}/compact", **ASKED[RESPONSES], tools=tools)
    user, summary = found["output"]
    assert user["content"][0]["text"] == KING
    assert re.fullmatch("slotmoe: .+", summary["encrypted_content"], re.DOTALL)
    cached = found["usage"]["input_tokens_details"]["cached_tokens"]  # with the functions
    assert cached > 0.8 * before["usage"]["input_tokens"]
    items = [*found["output"], {"role": "user", "content": "And?"}]
    assert ask(served, RESPONSES, input=items)["output"]


DATA = "data:image/png;base64,aGk="
FILE = {"source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
USE = {"type": "tool_use", "id": "x", "name": "weather", "input": {"city": "Rome", "days": 1}}
CALLED = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
MADE = {"type": "function_call", "call_id": "x", "name": "weather", "arguments": "{}"}
TEXT = {"type": "text", "text": "Seen: "}
PICTURES = {
    MESSAGES: {"messages": [*USER, {"role": "assistant", "content": [USE]}, {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [
            TEXT, {"type": "image", **FILE}, {"type": "document", **FILE}]}],
    }]},
    CHAT: {"messages": [*USER, {"role": "assistant", "tool_calls": [CALLED]}, {
        "role": "tool", "tool_call_id": "x",
        "content": [TEXT, {"type": "image_url", "image_url": {"url": DATA}}],
    }]},
    RESPONSES: {"input": [{"role": "user", "content": KING}, MADE, {
        "type": "function_call_output", "call_id": "x",
        "output": [{**TEXT, "type": "input_text"}, {"type": "input_image", "image_url": DATA}],
    }]},
}  # fmt: skip
TOO_LONG = {
    MESSAGES: r"prompt is too long: (\d+) tokens > 1024 maximum",
    CHAT: r"This model's maximum context length is 1024 tokens\. However, your messages resulted in"
    r" (\d+) tokens\. Please reduce the length of the messages\.",
    RESPONSES: r"Your input exceeds the context window of this model\. Please adjust your input and"
    r" try again\. It has (\d+) tokens, the context holds 1024\.",
}


@pytest.mark.parametrize("path", PICTURES)
def test_a_picture_in_a_result_is_left_out_and_said_so(served, texts, path):
    ask(served, path, **PICTURES[path])
    assert "Seen: [image left out: this model reads text]" in texts[0]
    assert ("[document left out: " in texts[0]) == (path == MESSAGES)


@pytest.mark.parametrize("path", TOO_LONG)
def test_prompts_that_are_too_long_are_refused_in_the_words_of_the_api(served, path):
    """The sample has no more positions than these, so none are advised."""
    for words in (1200, 200_000):  # which are counted, and which are too many for that
        said = [{"role": "user", "content": "word " * words}]
        asked = {**ASKED[path], "input" if path == RESPONSES else "messages": said}
        status, answer = served.post(path, **asked)
        found = re.fullmatch(TOO_LONG[path], answer["error"]["message"])
        assert status == 400 and found and int(found[1]) > 1024
        assert path == MESSAGES or answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.usefixtures("network", "processes")
def test_a_prompt_that_is_read_shows_in_the_log_and_in_figures(runtime, monkeypatch, capfd):
    passes, shown, lines = runtime.engine.batch.passes, [], []
    run = passes.run
    monkeypatch.setattr(serve_guard, "READING_SECONDS", (0.0, 0.01))

    def log():
        lines.append(capfd.readouterr().err)
        return "".join(lines)

    def later(rows):
        if not shown:
            shown.append(served.service.stats()["reading"])
            until(lambda: log().count("reads") > 2)
        return run(rows)

    monkeypatch.setattr(passes, "run", later)
    with Served(runtime, is_logged=True) as served:
        usage = ask(served, MESSAGES, messages=[{**USER[0], "content": "king " * 300}])["usage"]
        tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert shown == [{"prompts": 1, "tokens": tokens, "read": shown[0]["read"]}]
        assert served.service.stats()["reading"]["prompts"] == 0
        assert 'slotmoe_reading{kind="tokens"} 0.0' in served.ask("GET", "/metrics")[1]
    assert re.search(rf"POST /v1/messages reads, \d+ of {tokens} tokens so far, req_", log())


def test_deepseeks_own_fields(served):
    begun = [*USER, {"role": "assistant", "content": " I"}]
    wanted = served.choice(messages=begun, continue_final_message=True)
    prefixed = [*USER, {**begun[-1], "prefix": True}]
    assert served.choice(messages=prefixed) == wanted != served.choice(messages=begun)
    for kind, given, effort in (
        ("disabled", "max", "none"), ("enabled", None, "high"), ("enabled", "max", "max"),
        ("adaptive", "low", "low"),
    ):  # fmt: skip
        asked = ChatRequest(**ASKED[CHAT], thinking={"type": kind}, reasoning_effort=given)
        assert asked.conversation().effort == effort


def test_what_is_not_served_is_said(served):
    assert served.chat(model=None)[0] == 200  # the server has one
    for path, words in (
        ("/v1/embeddings", "no embeddings"), ("/api/embed", "no embeddings"),
        ("/v1/audio/speech", "reads and writes text"), ("/api/pull", "slotmoe run"),
        ("/v1/responses/resp_1/cancel", "nothing is stored"), ("/v1/nothing", "openapi.json"),
    ):  # fmt: skip
        status, answer = served.post(path, model="sample")
        assert status == 404 and path in str(answer["error"]) and words in str(answer["error"])


# Says what it was given and what the server answers, and ends with 7, or when it is told to.
CLIENT = f"""#!{sys.executable}
import json, os, signal, sys, time, urllib.request
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
    print(os.getpid(), flush=True)
    time.sleep(60)
told = os.environ
url = [it.partition("=")[2] for it in sys.argv if "base_url=" in it] + [told["ANTHROPIC_BASE_URL"]]
key = told.get("ANTHROPIC_AUTH_TOKEN") or told["SLOTMOE_API_KEY"]
url = url[0].removesuffix("/v1") + "/v1/models"
with urllib.request.urlopen(urllib.request.Request(url, headers={{"x-api-key": key}})) as answer:
    model = json.load(answer)["data"][0]
print(json.dumps([model["id"], model["max_model_len"], sys.argv[1:], dict(told)]))
sys.exit(7)
"""


@pytest.fixture
def launch(processes, sample_export, tmp_path):
    for name in ("claude", "codex"):
        (tmp_path / name).write_text(CLIENT)
        (tmp_path / name).chmod(0o755)
    own = {"PATH": str(tmp_path), "ANTHROPIC_API_KEY": "another", "ANTHROPIC_BASE_URL": "another"}

    def launch(client, *words, **more):
        options = "--context", 512, "--ram", "2GiB", "--served-model-name", "king"
        words, more["env"] = (*options, "--", *words), os.environ | own
        return Forked("launch", client, sample_export, *words, **more)

    return launch


def test_a_client_is_started_with_its_server(launch):
    with launch("claude", "-p", "Hi") as child:
        name, context, words, told = json.loads(child.communicate()[0])
        assert (child.wait(), words, told["ANTHROPIC_API_KEY"]) == (7, ["-p", "Hi"], "")
        assert told["ANTHROPIC_MODEL"] == told["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == name == "king"
        assert told["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(context) == "512"
    with launch("codex", "exec", "Hi") as child:
        _, _, words, _ = json.loads(child.communicate()[0])
        assert words[-2:] == ["exec", "Hi"] and "model_context_window=512" in words
        assert "model_providers.slotmoe.wire_api=responses" in words and child.wait() == 7


# A signal comes with the client.
EARLY = f"""
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, command, *given, **more):
        super().__init__(command, *given, **more)
        if "wait" in command:
            print(self.pid, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
{COMMAND_LINE}"""
# The server never ends.
STUCK = f"""
import time, uvicorn
from slotmoe.tools import serve
serve._GRACE_SECONDS, serve._LAST_SECONDS = 0, 1
uvicorn.Server.shutdown = lambda *given, **more: time.sleep(60)
{COMMAND_LINE}"""
ENDS = [("", COMMAND_LINE, 143), ("deaf", COMMAND_LINE, 137), ("", EARLY, 143), ("", STUCK, 143)]


@pytest.mark.parametrize(("how", "program", "code"), ENDS, ids=["usual", "deaf", "early", "stuck"])
def test_signals_end_a_client_and_its_server(launch, how, program, code):
    """But for Ctrl-C, which is the client's."""
    with launch("claude", "wait", how, program=program) as child:
        number = int(child.stdout.readline())
        child.send_signal(signal.SIGINT)
        child.terminate()
        assert child.wait() == code, child.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_client_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = CliRunner().invoke(cli, ["launch", "codex", "sample"]).exception
    assert isinstance(problem, ConfigError) and "npm install -g @openai/codex" in str(problem)


def test_an_export_is_served_under_its_name(sample_export, monkeypatch, tmp_path):
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path))
    (tmp_path / "owner--Model-Lite-0123456789ab-4").symlink_to(sample_export)
    folder = str(sample_export), sample_export.resolve().name
    for given, name in (("lite", "Model-Lite"), ("sample", "sample"), ("a/b", "a/b"), folder):
        assert serve._name(given) == name


def test_a_signal_ends_an_idle_server_at_once(processes, sample_export):
    """Python's own end takes as long as the model's memory is large."""
    late = f"import atexit, sys\natexit.register(print, 'late', file=sys.stderr)\n{COMMAND_LINE}"
    child, _ = start(sample_export, program=late)
    with child:
        child.terminate()
        assert (child.wait(), child.stderr.read()) == (143, "")


def test_help_is_a_command_too():
    wanted = CliRunner().invoke(cli, ["plan", "--help"]).output
    assert CliRunner().invoke(cli, ["help", "plan"]).output == wanted


# Memory

COMPLETIONS = "/v1/completions"


def test_bodies_that_lack_their_end_share_a_bounded_room(served, monkeypatch):
    """Of 8 of the largest; beyond it clients are told, small ones are served.  A room that was more
    than half full is given back."""
    body, given = b" " * ((1 << 20) - 9), []
    monkeypatch.setattr(serve_guard, "give_back_memory", lambda: given.append(1))
    with ExitStack() as stack:
        links = [stack.enter_context(connect(served.port)) for _ in range(20)]
        for link in links:
            with suppress(OSError):  # refused before its end
                link.sendall(request(body)[:-1])
        until(lambda: len(select.select(links, [], [], 0)[0]) >= 12 - 1)
        told = select.select(links, [], [], 0)[0]
        before = len(given)  # of another test's clients, which left just now
        assert {link.recv(12) for link in told} == {b"HTTP/1.1 429"}
        assert served.complete("Call me", max_tokens=1) and len(given) == before
    until(lambda: served.ask("POST", COMPLETIONS, b'"' + body)[0] == 400)
    until(lambda: len(given) > before)


def test_log_probabilities_are_kept_compact(runtime):
    """20 of them beside a token; as objects of Python they took three times that."""
    tokens = runtime.generate("Call me", 200, top_logprobs=20)
    first = next(tokens)
    tracemalloc.start()
    rest = [*tokens]
    kept = tracemalloc.get_traced_memory()[0] / len(rest)
    tracemalloc.stop()
    assert kept < 1500 and len(first.likeliest) == 20
    assert first.likeliest[0] == (first.id, first.logprob)


@pytest.mark.parametrize("count", [0, 1, 64, 1000])
def test_they_become_json_some_at_a_time(count):
    made = []
    scores = Scores(lambda number: made.append(number) or {"a": number}, range(count))

    async def read():
        response = Answers.respond({"x": [scores, "\u00e9"], "y": scores})
        return [(piece, len(made)) async for piece in response.body_iterator]

    pieces, numbers = zip(*asyncio.run(read()), strict=True)
    rows = [{"a": number} for number in range(count)]
    assert json.loads("".join(pieces)) == {"x": [rows, "\u00e9"], "y": rows}
    assert max(map(sub, numbers, (0, *numbers))) <= 64 and len(made) == 2 * count


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("where", "last"), [("offload.engine.passes.Passes.run", 0.1), ("tools.serve.guard.check", 600)]
)
def test_a_signal_ends_a_server_whose_thread_hangs(sample_export, where, last):
    """The engine's thread, and one that nobody waits for any more."""
    hanging = f"""
import sys, threading
from unittest.mock import patch
import slotmoe.tools.serve as serve
serve._GRACE_SECONDS, serve._LAST_SECONDS = 0.1, {last}
hang = lambda *_: print("came", file=sys.stderr) or threading.Event().wait()
patch("slotmoe.{where}", hang).start()
{COMMAND_LINE}"""
    child, port = start(sample_export, "--no-log", program=hanging)
    body = json.dumps({**GREEDY, "prompt": "x"}).encode() + b" " * 70_000
    with child, connect(port, request(body)):
        assert child.stderr.readline() == "came\n"
        child.terminate()
        assert child.wait() == 143
