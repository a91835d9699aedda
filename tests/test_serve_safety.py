"""``slotmoe serve`` under strangers: clients that stop half-way, keys that must not see each other, a model that dies, a soak."""

import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.served import GREEDY, PROMPTS, USER, start

SOAK_SECONDS = float(os.environ.get("SLOTMOE_SOAK_SECONDS", "60"))
HALVES = [b"", b"GE", b"POST /v1/completions HTTP/1.1\r\nHost: local", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nHost: localhost\r\n"]


class Soak:
    """Clients of a server at ``port``: what each does is drawn from its seed."""

    def __init__(self, port):
        self.port = port

    def open(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST" if body else "GET", path, data or None, {"Content-Type": "application/json"})
        return connection

    def whole(self, path, body=b""):
        connection = self.open(path, body)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status

    def client(self, seed, end):
        source, kinds = random.Random(seed), Counter()
        actions = [self.answer, self.stream, self.leave, self.abort, self.nonsense, self.page, self.half, self.chat, self.schema]
        while time.monotonic() < end:
            time.sleep(source.random())
            action = source.choice(actions)
            body = {
                **GREEDY,
                "prompt": source.choice(PROMPTS) * source.randrange(1, 40),
                "max_tokens": source.randrange(1, 60),
                "n": source.choice([1, 1, 2]),
            }
            kinds[f"{action.__name__} {action(source, body)}"] += 1
        return kinds

    def answer(self, source, body):
        return self.whole("/v1/completions", body)

    def stream(self, source, body):
        return self.whole("/v1/completions", {**body, "stream": True})

    def leave(self, source, body):
        """In the middle of an answer."""
        connection = self.open("/v1/completions", {**body, "stream": True})
        connection.getresponse().read(source.randrange(1, 400))
        connection.close()

    def abort(self, source, body):
        """Anywhere, most likely while the prompt is read."""
        connection = self.open("/v1/completions", {**body, "stream": source.random() < 0.5})
        time.sleep(source.random() * 0.05)
        connection.close()

    def nonsense(self, source, body):
        return self.whole("/v1/completions", source.randbytes(source.randrange(1, 2000)))

    def page(self, source, body):
        return self.whole(source.choice(["/", "/metrics", "/stats", "/health", "/nowhere"]))

    def half(self, source, body):
        """No whole request; some of them wait until the server has had enough."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as half:
            half.sendall(source.choice([*HALVES, source.randbytes(80)]))
            if source.random() < 0.02:
                half.recv(1)

    def chat(self, source, body):
        return self.whole("/v1/messages", {"model": "sample", "messages": USER, "max_tokens": body["max_tokens"]})

    def schema(self, source, body):
        kind = source.choice(["integer", "string", "nonsense"])
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": kind, "maxLength": 9}}}
        return self.whole("/v1/chat/completions", {**GREEDY, "messages": USER, "max_tokens": 20, "response_format": form})


@pytest.mark.slow
def test_soak(sample_export):
    """Clients that ask, leave and send nonsense end with the places, slots, descriptors, threads and memory of the start.

    A minute; ``SLOTMOE_SOAK_SECONDS`` is another duration.
    """
    child, port = start(sample_export, "--max-sequences", "8", "--max-queue", "4")
    process, soak, log = psutil.Process(child.pid), Soak(port), Counter()
    reader = threading.Thread(target=lambda: log.update(line.strip() for line in child.stderr))
    reader.start()

    def settled():
        """Figures of the server once nobody is served and all connections are gone."""
        time.sleep(25)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /stats HTTP/1.0\r\nHost: localhost\r\n\r\n")
            stats = json.loads(connection.makefile("rb").read().partition(b"\r\n\r\n")[2])
        time.sleep(1)
        assert (stats["running"], stats["queued"]) == (0, 0)
        return {
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "children": len(process.children()),
            "slots": stats["memory"]["ram"]["parts"]["expert slots"],
            "bytes": process.memory_info().rss,
        }

    try:
        with ThreadPoolExecutor(13) as pool:
            list(pool.map(lambda seed: soak.client(seed, time.monotonic() + 10 + SOAK_SECONDS / 60), range(12)))
            before, end = settled(), time.monotonic() + SOAK_SECONDS
            clients = [pool.submit(soak.client, seed, end) for seed in range(12, 24)]
            while time.monotonic() < end:
                time.sleep(min(60, max(0, end - time.monotonic())))
                left, memory = end - time.monotonic(), process.memory_info().rss
                print(
                    f"{left:.0f} s left: {process.num_fds()} descriptors, {process.num_threads()} threads, {memory >> 20} MiB", flush=True
                )
            kinds = sum((one.result() for one in clients), Counter())
        after = settled()
        print(json.dumps({"before": before, "after": after, "requests": sum(kinds.values()), "kinds": dict(sorted(kinds.items()))}))
        growth = after.pop("bytes") - before.pop("bytes")
        assert after == before
        assert growth < 32 << 20
        statuses = {one.split()[1] for one in kinds}
        assert statuses <= {"200", "400", "404", "429", "None"}
        assert soak.whole("/v1/completions", {**GREEDY, "prompt": "Call me"}) == 200
    finally:
        child.terminate()
        child.wait(10)
        reader.join()
        child.stderr.close()
    assert set(log) <= {"WARNING:  Invalid HTTP request received."}
