"""A hundred clients of a server that keeps sessions, for half an hour.

Clients ask, go on with a text, leave in the middle, send half requests and nonsense, as each one's
seed says.  What anybody gets must be what a model says that computes alone, and so must be what
another process restores afterwards.  At the end the server has the places, slots, descriptors,
threads and children of its start, and 2% more memory at most.  Its start is what is there at rest
after a tenth of the time under the same load: then every kind of request has been answered often.

The other parts write into a field that the server compiles, renders or searches for what rules make
much of, beside eight clients: how long is the event loop held?  At last clients leave soon, and the
rest is what is computed after that.  Both are CPU time.
"""

import http.client
import json
import math
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import psutil

from campaigns.models import sample_export
from campaigns.runner import Attack
from slotmoe.model.tokenizer import REPLACEMENT
from slotmoe.offload.runtime import Runtime
from tests.support.forkserver import COMMAND_LINE
from tests.support.served import GREEDY, HALVES, PROMPTS, USER, start

LENGTH = 60  # tokens of the longest answer
TIMES = (1, 5, 20, 39)  # how often a prompt repeats its words
SETTLING = 6  # seconds after which an answered connection is gone
GROWTH = 0.02
LIMIT = 2 << 20  # bytes of sessions, a third of what the texts would take
OPEN = {"context": 512, "ram": "2GiB"}
IN_POOL = (os.cpu_count() or 1) + 4  # threads that asyncio starts on demand
LAWFUL = {"200", "400", "404", "429", "None"}
# What the server may write: asyncio, of clients that have left.
SAID = {"WARNING:  Invalid HTTP request received.", "socket.send() raised exception."}


def texts_alone(export):
    """The ids of each prompt, and what a model says that computes one at a time: the id, the
    log-probability and the text of each greedy token."""
    with Runtime.open(export, **OPEN) as runtime:
        for prompt in (prompt * times for prompt in PROMPTS for times in TIMES):
            runtime.engine.empty()
            said = [(it.id, it.logprob, it.text) for it in runtime.generate(prompt, LENGTH)]
            yield prompt, runtime.encode(prompt), said


def wanted_of(texts):
    """The texts of the tokens that a greedy answer has, of prompts and of ids that go on with the
    answer to one; a list of ids can't begin within a character."""
    wanted = {}
    for prompt, ids, tokens in texts:
        wanted[prompt] = said = [text for *_, text in tokens]
        for begun in (1, 20, 40) if "".join(said).isascii() else ():
            wanted[(*ids, *(id_ for id_, *_ in tokens[:begun]))] = said[begun:]
    return wanted


HELD, REST = 0.05, 1.0  # seconds
WATCHED = f"""
import asyncio, sys, time
run, held = asyncio.Handle._run, [0.0]
def timed(handle):
    began = time.thread_time()
    run(handle)
    if (took := time.thread_time() - began) > held[0]:
        held[0] = took
        print(took, file=sys.stderr, flush=True)
asyncio.Handle._run = timed
{COMMAND_LINE}"""
AN = '{"type": "'
RULES = {  # each name in brackets is one of its rules, too deep inside the first
    "n": ("2", "0", "9", "300", "9973", "20000", "99999"),
    "word": ("a", "", "ab" * 20, "ab" * 4000, "\u4e00" * 9000, "<|end_of_sentence|>"),
    "regex": ("[a-z ]", ".", "(?i:k)", "<word>", "<regex><regex>", "(<regex>|<regex>)",
        "(<regex>){<n>}", "(<regex>){0,<n>}", "(<regex>)*", "(<regex>)?<regex>"),
    "schema": (AN + 'string"}', '{"$ref": "#"}', '{"const": "<word>"}', '{"enum": [<n>, "<word>"]}',
        *(f'{{"{kind}": [<schema>, <schema>, <schema>]}}' for kind in ("allOf", "anyOf", "oneOf")),
        AN + 'object", "properties": {"a": <schema>, "<word>": <schema>}, "required": ["a"]}',
        AN + 'object", "patternProperties": {"<regex>": <schema>}, "minProperties": <n>}',
        AN + 'array", "items": <schema>, "minItems": <n>, "maxItems": <n>}',
        AN + 'string", "pattern": "<regex>", "minLength": <n>, "maxLength": <n>}',
        AN + 'number", "multipleOf": <n>, "minimum": -<n>}'),
    "lark": ("start: x\nx: <part> | <part>\nT: /<regex>/ & ~/<regex>/", "root ::= x\nx ::= <part>"),
    "part": ("/[a-z ]/", "x", "x", "T", '"<word>"', "<part> <part>", "(<part> | <part>)",
        "/<regex>/", "(<part>){<n>}", "(<part>)*", "%json <schema>"),
}  # fmt: skip
FIELDS = {  # what a part spells in a field
    "schema": lambda spell: {"json_schema": json.loads(spell("schema"))},
    "grammar": lambda spell: {"grammar": spell("lark")},
    "regex": lambda spell: {"structured_outputs": {"regex": spell("regex")}},
    "choice": lambda spell: {"structured_outputs": {"choice": [spell("word"), spell("word")]}},
    "template": lambda spell: {"chat_template_kwargs": {"x": [spell("schema")]}},
    "stop": lambda spell: {"stop": [spell("word")[:256] for _ in range(9)]},
}


def spelled(chance, name, depth=9):
    rule = chance.choice(RULES[name]) if depth else RULES[name][0]
    return re.sub("<([a-z]+)>", lambda it: spelled(chance, it[1], depth - 1), rule)


class Clients:
    """What clients of a server at ``port`` do; ``wanted`` is what ``wanted_of`` gives, ``wrong`` is
    what was not as it should be."""

    def __init__(self, port, wanted):
        self.port, self.wanted, self.wrong = port, wanted, []
        self._lock = threading.Lock()
        self.begin()

    def begin(self):
        """Count from now on."""
        self.kinds, self.requests, self.compared = Counter(), 0, 0

    def play(self, chance, goes_on):
        """One client; ``kinds`` counts how often each action had which status."""
        actions = [
            *(self.answer, self.stream, self.leave, self.abort, self.nonsense),
            *(self.page, self.half, self.converse),
        ]
        prompts = [*self.wanted]
        while goes_on():
            time.sleep(chance.random())
            action, prompt = chance.choice(actions), chance.choice(prompts)
            body = {
                **GREEDY,
                "prompt": prompt,
                "max_tokens": chance.randint(1, len(self.wanted[prompt])),
                "n": chance.choice([1, 1, 2]),
            }
            kind = f"{action.__name__} {action(chance, body)}"
            with self._lock:
                self.kinds[kind] += 1
                self.requests += 1

    def _open(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes) else json.dumps(body)
        kind = {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, data or None, kind)
        return connection

    def whole(self, path, body=b""):
        """Status and text of an answer."""
        connection = self._open(path, body)
        response = connection.getresponse()
        data = response.read().decode()
        connection.close()
        return response.status, data

    def check(self, body, texts):
        """Whether the ``texts`` are what the model says alone."""
        wanted = "".join(self.wanted[body["prompt"]][: body["max_tokens"]])
        self.compared += len(texts)
        for text in texts:
            # The last token may be a part of a character.
            if text.rstrip(REPLACEMENT) != wanted.rstrip(REPLACEMENT):
                self.wrong.append(f"{body}: {text!r}, and alone {wanted!r}")
        if len(texts) != body["n"]:
            self.wrong.append(f"{body}: {len(texts)} answers")

    def answer(self, chance, body):
        status, data = self.whole("/v1/completions", body)
        if status == 200:
            self.check(body, [choice["text"] for choice in json.loads(data)["choices"]])
        return status

    def stream(self, chance, body):
        status, data = self.whole("/v1/completions", {**body, "stream": True})
        if status == 200:
            lines, texts = data.split("\n\n"), {}
            if lines[-2:] != ["data: [DONE]", ""]:
                self.wrong.append(f"{body}: the stream ends with {data[-200:]!r}")
            for line in lines[:-2]:
                if line.startswith(":"):  # a ping, while the model is busy with others
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    at = choice["index"]
                    texts[at] = texts.get(at, "") + choice["text"]
            self.check(body, [*texts.values()])
        return status

    def leave(self, chance, body):
        """In the middle of an answer."""
        connection = self._open("/v1/completions", {**body, "stream": True})
        connection.getresponse().read(chance.randrange(1, 400))
        connection.close()

    def abort(self, chance, body):
        """Anywhere, most likely while the prompt is read."""
        connection = self._open("/v1/completions", {**body, "stream": chance.random() < 0.5})
        time.sleep(chance.random() * 0.05)
        connection.close()

    def nonsense(self, chance, body):
        return self.whole("/v1/completions", chance.randbytes(chance.randrange(1, 2000)))[0]

    def page(self, chance, body):
        return self.whole(chance.choice(["/", "/metrics", "/stats", "/health", "/nowhere"]))[0]

    def half(self, chance, body):
        """No whole request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=300) as half:
            half.sendall(chance.choice([*HALVES, chance.randbytes(80)]))

    def converse(self, chance, body):
        """On other routes."""
        schema = {"type": chance.choice(["integer", "string", "nonsense"]), "maxLength": 9}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        routes = {"/v1/messages": {}, "/v1/chat/completions": {"response_format": form}}
        path, more = chance.choice([*routes.items()])
        return self.whole(path, {**GREEDY, "messages": USER, "max_tokens": 20, **more})[0]

    def settled(self, process):
        """Figures of the server once nobody is served and all connections are gone."""
        time.sleep(SETTLING)
        stats = json.loads(self.whole("/stats")[1])
        time.sleep(1)
        assert (stats["running"], stats["queued"]) == (0, 0)
        return {
            "descriptors": process.num_fds(),
            "children": len(process.children()),
            "slots": stats["memory"]["ram"]["parts"]["expert slots"],
            "threads": process.num_threads(),
            "bytes": process.memory_info().rss,
        }


def restored(export, folder, texts):
    """What is wrong with what another process restores of the ``texts``, and how much that is."""
    wrong = []
    with Runtime.open(export, **OPEN) as runtime:
        runtime.keep_in(folder, LIMIT, wrong.append)
        for _, prompt, tokens in texts:
            ids = [*prompt, *(id_ for id_, *_ in tokens[:40])]
            found = [(token.id, token.logprob) for token in runtime.generate(ids, LENGTH - 40)]
            if found != [token[:2] for token in tokens[40:]]:
                wrong.append(f"restored {ids}: {found}")
            runtime.engine.empty()
        return wrong, runtime.stats()["sessions"]["restored_tokens"]


def changed(before, after):
    """What there is more or less of than there may be, and by how much memory grew."""
    more = {"descriptors": 0, "children": 0, "slots": 0, "threads": IN_POOL}
    wrong = [
        f"{before[name]} {name}, then {after[name]}"
        for name, most in more.items()
        if not 0 <= after[name] - before[name] <= most
    ]
    growth = round(after["bytes"] / before["bytes"] - 1, 4)
    if growth > GROWTH:
        wrong.append(f"memory grew by {growth:.1%}")
    return wrong, growth


def attack(folder, part, aim):
    """One field, as ``part`` says."""
    export, options = sample_export(folder), ("--max-sequences", "9", "--no-log")
    child, port = start(export, *options, program=WATCHED)
    clients, process, ends = Clients(port, {}), psutil.Process(child.pid), Counter()
    rest, over, done = 0.0, threading.Event(), 0

    def body():
        field = FIELDS[part](partial(spelled, aim.chance))
        return "/v1/chat/completions", {**GREEDY, "messages": USER, "max_tokens": 20, **field}

    def talk(_):
        while not over.is_set():
            clients.whole("/v1/completions", {**GREEDY, "prompt": "Call me", "max_tokens": 40})

    def used():
        alive = [it.cpu_times()[:2] for it in process.children()]
        return sum(map(sum, (*alive, process.cpu_times()[:4])))

    try:
        with ThreadPoolExecutor(8) as pool:
            pool.map(talk, range(8))
            aim.begin()
            while aim.goes_on(done):
                done += 1
                ends[clients.whole(*body())[0]] += 1
            over.set()
        for _ in range(-(-done // 10)):
            with closing(clients._open(*body())):
                time.sleep(0.05)
            before, now = used(), math.inf
            while now != (now := used()):
                rest = max(rest, now - before)
                time.sleep(0.05)
    finally:
        over.set()
        child.terminate()
        child.wait(60)
    held = float(child.stderr.read().split()[-1])
    wrong = [f"status {status}" for status in ends.keys() - {200, 400, 413}]
    wrong += ["held"] * (held > HELD) + ["rest"] * (rest > REST)
    return {"cases": done, "ends": {**ends}, "held": held, "rest": rest, "wrong": wrong}


def run(folder, part, aim):
    if part in FIELDS:
        return attack(folder, part, aim)
    export, count = sample_export(folder), aim.given.clients
    texts = [*texts_alone(export)]
    options = ("--max-sequences", "8", "--max-queue", str(count // 2), "--no-log")
    options += ("--session-dir", folder / "kept", "--session-limit", LIMIT)
    child, port = start(export, *options)
    process, log = psutil.Process(child.pid), set()
    clients = Clients(port, wanted_of(texts))
    reader = threading.Thread(target=lambda: log.update(line.strip() for line in child.stderr))
    reader.start()
    warm = time.monotonic() + max(20, aim.given.seconds / 10)
    try:
        with ThreadPoolExecutor(count) as pool:

            def play(goes_on):
                chances = [random.Random(aim.chance.random()) for _ in range(count)]
                list(pool.map(lambda chance: clients.play(chance, goes_on), chances))

            play(lambda: time.monotonic() < warm)
            before = clients.settled(process)
            clients.begin()
            aim.begin()
            play(lambda: aim.goes_on(clients.requests))
        after = clients.settled(process)
        assert clients.whole("/v1/completions", {**GREEDY, "prompt": "Call me"})[0] == 200
    finally:
        child.terminate()
        child.wait(60)
        reader.join()
        child.stderr.close()
    kinds = dict(sorted(clients.kinds.items()))
    figures = {"requests": clients.requests, "compared": clients.compared}
    wrong, figures["restored tokens"] = restored(export, folder / "kept", texts)
    wrong += [f"no {name}" for name, figure in figures.items() if not figure]
    more, growth = changed(before, after)
    wrong += clients.wrong + more + [f"said {line!r}" for line in log - SAID]
    wrong += [f"status {status}" for status in {kind.split()[1] for kind in kinds} - LAWFUL]
    figures |= {"growth": growth, "kinds": kinds, "before": before, "after": after}
    return {"clients": count, **figures, "wrong": [text[:500] for text in wrong[:50]]}


OPTIONS = {"clients": {"type": int, "default": 100, "help": "at once [100]"}}
ATTACK = Attack(run, ("requests", *FIELDS), "requests", 1_000_000, seconds=1800, options=OPTIONS)
