"""A ``slotmoe serve`` to test, in a thread of this process or in a process of its own, and the
least of clients."""

import http.client
import io
import json
import re
import socket
import threading

from slotmoe.tools.serve import _listen, make_server
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from tests.support.engine import until
from tests.support.forkserver import COMMAND_LINE, Forked
from tests.support.tiny import SAMPLE

GREEDY = {"model": "sample", "temperature": 0}
USER = [{"role": "user", "content": "Tell me of the king."}]
PROMPTS = ["My fellow citizens,", "It is a truth", "def main(", "Call me"]
PROMPTS += ["To be or not", "Once upon a time", "import os", "The law"]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ANTHROPIC_TOOL = {"name": "weather", "description": "The weather of a city"}
TOOLS = [
    {"type": "function", "function": {**ANTHROPIC_TOOL, "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
ANTHROPIC_TOOL["input_schema"] = WEATHER

# Requests that are not whole, or none.
HALVES = [
    b"",
    b"GE",
    b"POST /v1/completions HTTP/1.1\r\nHost: local",
    b"\x16\x03\x01",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n",
]

# For ``start``: steps of 10 ms, and a model that fails.
SLOW = f"""
import time
from slotmoe.offload.engine.passes import Passes
run = Passes.run
Passes.run = lambda *given: time.sleep(0.01) or run(*given)
{COMMAND_LINE}
"""
FAILING = f"""
from slotmoe.offload.engine.passes import Passes
Passes.run = lambda *_: 1 / 0
{COMMAND_LINE}
"""


def is_weather(arguments):
    """Whether they are what ``WEATHER`` demands."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    of = {"city": ("Paris", "Rome"), "days": range(1, 10)}
    return found.keys() == of.keys() and all(found[key] in of[key] for key in of)


def sample_without_last(count):
    """The sample's tokenizer without its last ``count`` tokens, and the first id that is free."""
    source = json.loads((SAMPLE / "tokenizer.json").read_text())
    vocab = source["model"]["vocab"]
    last = len(vocab) - count
    gone = {token for token, number in vocab.items() if number >= last}
    source["model"]["vocab"] = {token: vocab[token] for token in vocab.keys() - gone}
    pairs = [one if isinstance(one, list) else one.split(" ") for one in source["model"]["merges"]]
    source["model"]["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & gone]
    return source, last


def tokenizer_with(folder, marks, first, template=None, source=None):
    """``folder`` with the sample's tokenizer, or ``source``, and further tokens from the id
    ``first`` on, of which every second is special."""
    source = source or json.loads((SAMPLE / "tokenizer.json").read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, mark in enumerate(marks):
        about = {"id": first + number, "content": mark, "special": number % 2 == 1}
        source["added_tokens"].append({**plain, **about})
    (folder / "tokenizer.json").write_text(json.dumps(source))
    settings = json.loads((SAMPLE / "tokenizer_config.json").read_text())
    settings["chat_template"] = template or settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# Tokens of DeepSeek-V3.2 and V4; of two neighbours the second is special.
DEEPSEEK_TOKENS = ("<think>", "<｜begin▁of▁sentence｜>", "</think>", "<｜end▁of▁sentence｜>")  # noqa: RUF001
DEEPSEEK_TOKENS += ("<unused>", "<｜User｜>", "<mask>", "<｜Assistant｜>")  # noqa: RUF001
DEEPSEEK_TOKENS += ("<pad>", "<｜latest_reminder｜>", "<other>", "｜DSML｜")  # noqa: RUF001


def deepseek_files(folder):
    """``folder`` with the sample's tokenizer, DeepSeek-V4's tokens in place of its last ones, and
    no chat template."""
    source, last = sample_without_last(len(DEEPSEEK_TOKENS))
    tokenizer_with(folder, DEEPSEEK_TOKENS, last, source=source)
    found = json.loads((folder / "tokenizer_config.json").read_text())
    del found["chat_template"]
    found |= {"bos_token": DEEPSEEK_TOKENS[1], "eos_token": {"content": DEEPSEEK_TOKENS[3]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return folder


def passed(tokenizer, text, policy=None, wanted=None, is_thinking=None):
    """The beginning of ``text`` that a mask lets pass, and whether the answer may end there."""
    eos, dialect = tokenizer.token_id(tokenizer.eos_token), Dialect(tokenizer)
    mask = Grammars(tokenizer, (eos,), dialect).compile(wanted, policy, is_thinking)().mask()
    reasoning, through = tokenizer.reasoning, ""
    shown = {**dialect.shown, **(reasoning.shown if reasoning is not None else {})}
    for id_ in tokenizer.encode(text, add_bos=False):
        if not mask.allowed()[id_]:
            return through, False
        through += shown.get(id_) or tokenizer.decode([id_])
        if mask.consume(id_):
            return through, True
    return through, bool(mask.allowed()[eos])


def connect(port, data=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def request(body, **headers):
    fields = {"Host": "localhost", "Content-Type": "application/json", **headers}
    if "Transfer-Encoding" not in fields:
        fields.setdefault("Content-Length", len(body))
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode() + body


class Served:
    """A server in a thread of this process, and the least of clients."""

    def __init__(self, runtime, keys=(), *, waiting=16, max_body=1 << 20, sequences=8, **edge):
        names, hosts = edge.pop("names", ("sample",)), ("box.local", "Other.local:18094")
        self.listener = _listen("127.0.0.1", 0, bool(keys))
        self.port = self.listener.getsockname()[1]
        self.address, self.key = f"http://127.0.0.1:{self.port}", (*keys, "none")[0]
        given = names, sequences, waiting, keys, hosts, max_body
        self.server, self.service = make_server(runtime, *given, **edge)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)
        self.service.stop()
        self.idle()
        self.listener.close()

    def open(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, data, given)
        return connection, connection.getresponse()

    def ask(self, method, path, body=None, **headers):
        connection, response = self.open(method, path, body, **headers)
        data = response.read()
        connection.close()
        is_json = "json" in response.headers.get("content-type", "")
        return response.status, json.loads(data) if is_json else data.decode(), response.headers

    def post(self, path, **body):
        return self.ask("POST", path, body, x_api_key=self.key)[:2]

    def complete(self, prompt, **options):
        body = {**GREEDY, "prompt": prompt, **options}
        status, answer, _ = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def chat(self, **options):
        body = {**GREEDY, "messages": USER, "max_tokens": 8, **options}
        return self.ask("POST", "/v1/chat/completions", body)

    def choice(self, **options):
        """The only answer of a chat."""
        status, answer, _ = self.chat(**options)
        assert status == 200, answer
        return answer["choices"][0]

    def text(self, prompt="Call me", **options):
        return self.complete(prompt, **options)["choices"][0]["text"]

    def idle(self, seconds=30.0):
        """Wait until no answer runs or waits."""
        until(lambda: not (self.service.running or self.service.queued), seconds)


def start(export, *options, program=COMMAND_LINE):
    """A server in a process of its own, and its port, or the line that it said instead."""
    settings = "--port 0 --ram 2GiB --context 512 --served-model-name sample".split()
    child = Forked("serve", export, *settings, *options, program=program)
    child.stderr = io.TextIOWrapper(child.stderr)
    line = child.stderr.readline()
    return child, int(re.search(r":(\d+),", line)[1]) if "ready" in line else line
