"""Speed of ``slotmoe serve``, on one runtime whose expert slots are filled first.

- What serving costs: the decode speed of one streaming client beside that of ``Runtime.generate``
  for the same prompt, and beside ``slotmoe bench``'s loop, which feeds ids and ignores the logits.
  All three run in this process, so that they share weights and slots; only the clients are
  processes of their own, as clients are.
- Tokens a second of several clients that stream at once, counted while all of them decode.
- The time to the first token of a long prompt, cold and with its prefix cached.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from multiprocessing import get_context
from statistics import median
from typing import Any

import click

from bench import turns
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import speed
from slotmoe.tools.options import count, open_runtime, option, runtime_options
from slotmoe.tools.serve import make_server


def stream(port: int, prompt: list[int], tokens: int, never: list[int]) -> list[float]:
    """The moments at which the tokens of a greedy answer arrived; the first entry is the request's.
    Ids in ``never`` are never chosen: random weights may end an answer at once."""
    connection, moments = HTTPConnection("127.0.0.1", port, timeout=600), [time.perf_counter()]
    body: dict[str, Any] = {"model": "bench", "prompt": prompt, "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True, "logit_bias": {str(id): -100 for id in never}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while line := response.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    connection.close()
    assert len(moments) == tokens + 1, (len(moments), tokens)
    return moments


@contextmanager
def _serving(runtime: Runtime, sequences: int) -> Iterator[int]:
    """The server in a thread of this process; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server, _ = make_server(runtime, ["bench"], sequences, 32)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@dataclass(frozen=True)
class _Clients:
    """Client processes of the server on ``port``."""

    runtime: Runtime
    pool: ProcessPoolExecutor
    port: int

    def prompt(self, length: int, seed: int) -> list[int]:
        source = random.Random(seed)
        size = min(self.runtime.tokenizer.size, self.runtime.config.vocab_size)
        return [source.randrange(10, size) for _ in range(length)]

    def moments(
        self, prompts: list[list[int]], tokens: int, may_end: bool = False
    ) -> list[list[float]]:
        """Of each client's tokens, when all stream at once."""
        ends = [id for id in self.runtime.eos_token_ids if id < self.runtime.tokenizer.size]
        ask = partial(stream, self.port, tokens=tokens, never=[] if may_end else ends)
        return list(self.pool.map(ask, prompts))

    def cost(self, tokens: int, rounds: int) -> list[turns.Row]:
        """Seconds of each way from the first token on."""
        seeds = (self.prompt(16, seed) for seed in range(1 << 30))
        made = ((ids, [t.id for t in self.runtime.generate(ids, tokens)]) for ids in seeds)
        prompt, ids = next((p, ids) for p, ids in made if len(ids) == tokens)

        def bench() -> float:
            self.runtime.engine.empty()
            moments = self.runtime.engine.force(prompt, ids[:-1]).moments
            return moments[-1] - moments[0]

        def generate() -> float:
            moments = [time.perf_counter() for _ in self.runtime.generate(prompt, tokens)]
            return moments[-1] - moments[0]

        def serve() -> float:
            moments = self.moments([prompt], tokens, may_end=True)[0]
            return moments[-1] - moments[1]

        ways = {"bench": bench, "generate": generate, "serve": serve}
        rows = turns.compare(ways, rounds, "bench", "seconds")
        for row in rows:
            row["tokens_per_second"] = (tokens - 1) / row["seconds"]
        return rows

    def together(self, clients: int, tokens: int) -> turns.Row:
        """Tokens a second between the last client's first token and the first client's last."""
        answers = self.moments([self.prompt(16, seed) for seed in range(clients)], tokens)
        return {"clients": clients, **_rate([moments[1:] for moments in answers])}

    def first_token(self, length: int, rounds: int) -> turns.Row:
        """Seconds to the first token of ``length`` tokens that are new, and of the same again."""
        seconds: dict[str, list[float]] = {"cold": [], "cached": []}
        for seed in range(rounds):
            prompt = self.prompt(length, seed)
            for values in seconds.values():
                asked, first, _ = self.moments([prompt], 2)[0]
                values.append(first - asked)
        return {"first token of": length, **{way: median(runs) for way, runs in seconds.items()}}


def _rate(answers: list[list[float]]) -> turns.Row:
    """Tokens a second, by the moments of each answer's."""
    start, end = max(moments[0] for moments in answers), min(m[-1] for m in answers)
    counted = sum(start < moment <= end for moments in answers for moment in moments)
    return {"tokens_per_second": counted / (end - start), "counted": counted}


@click.command()
@turns.EXPORT
@runtime_options
@count("--tokens", 64, "Tokens of each answer.", least=2)
@turns.repetitions(5)
@option("--clients", "N,N", "How many stream at once; empty leaves it out.", default="1,4,8")
@count("--long", 2000, "Tokens of a long prompt; 0 leaves it out.", least=0)
@click.option("--cost/--no-cost", default=True, help="Compare with generate and slotmoe bench.")
def serve(
    export: str, tokens: int, repetitions: int, clients: str, long: int, cost: bool, **options: Any
) -> None:
    """What serving costs, the speed of several clients, and the time to the first token."""
    counts = [int(number) for number in clients.split(",") if number]
    most, rows = max([1, *counts]), list[turns.Row]()
    with (
        open_runtime(export, options, logits_rows=most, sequences=most) as runtime,
        ProcessPoolExecutor(most, get_context("spawn")) as pool,
        _serving(runtime, most) as port,
    ):
        runtime.warm()
        list(pool.map(abs, range(most)))  # starts the processes
        measuring = _Clients(runtime, pool, port)
        if cost:
            rows += measuring.cost(tokens, repetitions)
        ways = {f"{n} clients": partial(measuring.together, n, tokens) for n in counts}
        for runs in speed.take_turns(ways, repetitions, warm_up=False).values():
            runs.sort(key=lambda run: float(run["tokens_per_second"]))
            rows.append(runs[repetitions // 2])
        if long:
            rows.append(measuring.first_token(long, repetitions))
        stats, threads = runtime.stats(), runtime.threads
    turns.finish(rows, kernels=stats["kernels"], threads=threads, slots=stats.get("slots"))
