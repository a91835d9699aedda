"""A hundred clients of a server, for half an hour.  ``python -m tests.faults.clients`` runs it.

They ask, leave in the middle, send half requests and nonsense, as each one's seed says.  Greedy
answers must be those of a model that computes alone, and at the end the server has the places,
slots, descriptors, threads and children of the beginning, and 5% more memory at most.
"""

import argparse
import http.client
import json
import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from slotmoe.model.tokenizer import REPLACEMENT
from slotmoe.offload.runtime import Runtime
from tests.support.served import GREEDY, HALVES, PROMPTS, USER, start

LENGTH = 60  # tokens of the longest answer
TIMES = (1, 5, 20, 39)  # how often a prompt repeats its words
SETTLING = 25  # seconds after which a connection that says nothing is gone
GROWTH = 0.05
LAWFUL = {"200", "400", "404", "429", "None"}
# What the server may write: asyncio, of who has left.
SAID = {"WARNING:  Invalid HTTP request received.", "socket.send() raised exception."}


def texts_alone(export: Path) -> dict[str, list[str]]:
    """The greedy text of each prompt, token by token."""
    prompts = [prompt * times for prompt in PROMPTS for times in TIMES]
    with Runtime.open(export, context=512, ram="2GiB") as runtime:
        return {
            prompt: [token.text for token in runtime.generate(prompt, LENGTH)] for prompt in prompts
        }


class Clients:
    """What clients of a server at ``port`` do; ``wanted`` are the texts of the tokens that greedy
    answers to prompts have, ``wrong`` is what was not as it should be."""

    def __init__(self, port: int, wanted: dict[str, list[str]]):
        self.port, self.wanted, self.wrong = port, wanted, list[str]()

    def play(self, seed: int, end: float) -> Counter[str]:
        """One client until then; how often each action had which status."""
        source, kinds = random.Random(seed), Counter[str]()
        actions = [
            *(self.answer, self.stream, self.leave, self.abort, self.nonsense),
            *(self.page, self.half, self.chat, self.schema),
        ]
        while time.monotonic() < end:
            time.sleep(source.random())
            action = source.choice(actions)
            body = {
                **GREEDY,
                "prompt": source.choice(PROMPTS) * source.choice(TIMES),
                "max_tokens": source.randrange(1, LENGTH),
                "n": source.choice([1, 1, 2]),
            }
            kinds[f"{action.__name__} {action(source, body)}"] += 1
        return kinds

    def _open(self, path: str, body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, bytes) else json.dumps(body)
        kind = {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, data or None, kind)
        return connection

    def whole(self, path: str, body: Any = b"") -> tuple[int, str]:
        """Status and text of an answer."""
        connection = self._open(path, body)
        response = connection.getresponse()
        data = response.read().decode()
        connection.close()
        return response.status, data

    def check(self, body: dict[str, Any], texts: list[str]) -> None:
        """Whether the ``texts`` are what the model says alone."""
        wanted = "".join(self.wanted[body["prompt"]][: body["max_tokens"]])
        for text in texts:
            # The last token may be a part of a character.
            if text.rstrip(REPLACEMENT) != wanted.rstrip(REPLACEMENT):
                self.wrong.append(f"{body}: {text!r}, and alone {wanted!r}")
        if len(texts) != body["n"]:
            self.wrong.append(f"{body}: {len(texts)} answers")

    def answer(self, source: random.Random, body: dict[str, Any]) -> int:
        status, data = self.whole("/v1/completions", body)
        if status == 200:
            self.check(body, [choice["text"] for choice in json.loads(data)["choices"]])
        return status

    def stream(self, source: random.Random, body: dict[str, Any]) -> int:
        status, data = self.whole("/v1/completions", {**body, "stream": True})
        if status == 200:
            lines = data.split("\n\n")
            if lines[-2:] != ["data: [DONE]", ""]:
                self.wrong.append(f"{body}: the stream ends with {data[-200:]!r}")
            texts = dict[int, str]()
            for line in lines[:-2]:
                if line.startswith(":"):  # a ping, while the model is busy with others
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    at = choice["index"]
                    texts[at] = texts.get(at, "") + choice["text"]
            self.check(body, [*texts.values()])
        return status

    def leave(self, source: random.Random, body: dict[str, Any]) -> None:
        """In the middle of an answer."""
        connection = self._open("/v1/completions", {**body, "stream": True})
        connection.getresponse().read(source.randrange(1, 400))
        connection.close()

    def abort(self, source: random.Random, body: dict[str, Any]) -> None:
        """Anywhere, most likely while the prompt is read."""
        connection = self._open("/v1/completions", {**body, "stream": source.random() < 0.5})
        time.sleep(source.random() * 0.05)
        connection.close()

    def nonsense(self, source: random.Random, body: dict[str, Any]) -> int:
        return self.whole("/v1/completions", source.randbytes(source.randrange(1, 2000)))[0]

    def page(self, source: random.Random, body: dict[str, Any]) -> int:
        return self.whole(source.choice(["/", "/metrics", "/stats", "/health", "/nowhere"]))[0]

    def half(self, source: random.Random, body: dict[str, Any]) -> None:
        """No whole request; some of them wait until the server has had enough."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=300) as half:
            half.sendall(source.choice([*HALVES, source.randbytes(80)]))
            if source.random() < 0.02:
                half.recv(1)

    def chat(self, source: random.Random, body: dict[str, Any]) -> int:
        request = {"model": "sample", "messages": USER, "max_tokens": body["max_tokens"]}
        status, data = self.whole("/v1/messages", request)
        if status == 400:
            self.wrong.append(f"{request}: {data}")
        return status

    def schema(self, source: random.Random, body: dict[str, Any]) -> int:
        kind = source.choice(["integer", "string", "nonsense"])
        schema = {"name": "x", "schema": {"type": kind, "maxLength": 9}}
        form = {"type": "json_schema", "json_schema": schema}
        request = {**GREEDY, "messages": USER, "max_tokens": 20, "response_format": form}
        return self.whole("/v1/chat/completions", request)[0]


def _settled(process: psutil.Process, clients: Clients) -> dict[str, Any]:
    """Figures of the server once nobody is served and all connections are gone."""
    time.sleep(SETTLING)
    stats = json.loads(clients.whole("/stats")[1])
    time.sleep(1)
    assert (stats["running"], stats["queued"]) == (0, 0)
    return {
        "descriptors": process.num_fds(),
        "children": len(process.children()),
        "slots": stats["memory"]["ram"]["parts"]["expert slots"],
        "threads": process.num_threads(),
        "bytes": process.memory_info().rss,
    }


def attacked(export: Path, count: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """``count`` clients for so long, after a sixtieth of that and 10 seconds to become warm; what
    the server held ``before`` and ``after``, what was asked, and what was ``wrong``."""
    wanted = texts_alone(export)
    options = ("--max-sequences", "8", "--max-queue", str(count // 2), "--no-log")
    child, port = start(export, *options)
    process, clients, log = psutil.Process(child.pid), Clients(port, wanted), set[str]()
    reader = threading.Thread(target=lambda: log.update(line.strip() for line in child.stderr))
    reader.start()
    try:
        with ThreadPoolExecutor(count) as pool:

            def play(seconds: float, seed: int) -> Counter[str]:
                end, seeds = time.monotonic() + seconds, range(seed, seed + count)
                found = pool.map(partial(clients.play, end=end), seeds)
                return sum(found, Counter[str]())

            play(10 + seconds / 60, seed)
            before = _settled(process, clients)
            kinds = play(seconds, seed + count)
        after = _settled(process, clients)
        assert clients.whole("/v1/completions", {**GREEDY, "prompt": "Call me"})[0] == 200
    finally:
        child.terminate()
        child.wait(60)
        reader.join()
        child.stderr.close()
    wrong = clients.wrong + [f"said {line!r}" for line in log - SAID]
    wrong += [f"status {status}" for status in {kind.split()[1] for kind in kinds} - LAWFUL]
    same = ("descriptors", "children", "slots")
    wrong += [
        f"{before[key]} {key}, then {after[key]}" for key in same if before[key] != after[key]
    ]
    # asyncio's pool fills on demand.
    if after["threads"] > before["threads"] + (os.cpu_count() or 1) + 4:
        wrong.append(f"{before['threads']} threads, then {after['threads']}")
    growth = after["bytes"] / before["bytes"] - 1
    if growth > GROWTH:
        wrong.append(f"memory grew by {growth:.1%}")
    return {
        "clients": count,
        "requests": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items())),
        "before": before,
        "after": after,
        "growth": round(growth, 4),
        "wrong": wrong,
    }


def main() -> None:
    from slotmoe.offload.ingest.quantize import quantize
    from tests.support.tiny import SAMPLE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        quantize(SAMPLE, export)
        found = attacked(export, given.clients, given.seconds, given.seed)
    print(json.dumps(found), flush=True)
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
