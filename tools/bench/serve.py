"""Speed of ``slotmoe serve``: ``python -m slotmoe.tools.bench.serve EXPORT [--ram SIZE]``.

Three measurements, each in turn and repeated, on one runtime whose expert slots are filled first:

- What serving costs: the decode speed of one streaming client beside that of ``Runtime.generate`` for the same prompt, and
  beside ``slotmoe bench``'s loop, which feeds ids and ignores the logits.  All three run in this
  process, so that they share weights and warm slots (a second process would need the memory again);
  only the clients are processes of their own, as clients are.  Medians of the ratios within a
  round.
- Tokens a second of several clients that stream at once, counted while all of them decode.
- The time to the first token of a long prompt, cold and with its prefix cached.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import click

from slotmoe.tools.options import open_runtime, runtime_options

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime

_PROMPT = 16  # tokens


def stream(port: int, prompt: list[int], tokens: int, ends: list[int]) -> list[float]:
    """The moments at which the tokens of a greedy answer arrived; the first entry is when it was
    asked for.

    ``ends`` are never chosen, since random weights may say at once that the answer is over.
    """
    connection, moments = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=600),
        [time.perf_counter()],
    )
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    if ends:
        body["logit_bias"] = {str(one): -100 for one in ends}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while line := response.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    connection.close()
    assert len(moments) == tokens + 1, (len(moments), tokens)
    return moments


@contextmanager
def serving(runtime: Runtime, sequences: int) -> Iterator[int]:
    """The server in a thread of this process; its port."""
    from slotmoe.tools.serve import make_server

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server, batch = make_server(runtime, "bench", sequences, 32)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            batch.close()


def serving_cost(
    runtime: Runtime, clients: Executor, port: int, tokens: int, repetitions: int
) -> dict[str, Any]:
    """Decode speeds after the first token, tokens a second, and how much slower the client is than
    each of the others."""
    source = random.Random(0)
    made: list[Any] = []
    while len(made) < tokens:  # until an answer does not end before
        prompt = [source.randrange(10, runtime.tokenizer.size) for _ in range(_PROMPT)]
        made = list(runtime.generate(prompt, tokens))

    def bench() -> float:
        step = runtime.start()
        step(prompt)
        started = time.perf_counter()
        for token in made[1:]:
            step([token.id])
        return time.perf_counter() - started

    def generate() -> float:
        moments = [time.perf_counter() for _ in runtime.generate(prompt, tokens)]
        return moments[-1] - moments[0]

    def serve() -> float:
        moments = clients.submit(stream, port, prompt, tokens, []).result()
        return moments[-1] - moments[1]

    ways = {"bench": bench, "generate": generate, "serve": serve}
    for run in ways.values():
        run()
    rounds = [{name: run() for name, run in ways.items()} for _ in range(repetitions)]
    found: dict[str, Any] = {
        name: statistics.median((tokens - 1) / one[name] for one in rounds) for name in ways
    }
    for other in ("bench", "generate"):
        found[f"cost_beside_{other}"] = statistics.median(
            one["serve"] / one[other] - 1 for one in rounds
        )
    return found


def together(
    runtime: Runtime, clients: Executor, port: int, count: int, tokens: int, ends: list[int]
) -> dict[str, Any]:
    """Tokens a second of ``count`` clients, between the last one's first token and the first one's
    last."""
    source = random.Random(count)
    prompts = [
        [source.randrange(10, runtime.tokenizer.size) for _ in range(_PROMPT)] for _ in range(count)
    ]
    found = [
        one.result()
        for one in [clients.submit(stream, port, prompt, tokens, ends) for prompt in prompts]
    ]
    start, end = max(one[1] for one in found), min(one[-1] for one in found)
    counted = sum(start < moment <= end for one in found for moment in one)
    return {"clients": count, "tokens_per_second": counted / (end - start), "counted": counted}


def first_token(
    runtime: Runtime, clients: Executor, port: int, length: int, repetitions: int, ends: list[int]
) -> dict[str, Any]:
    """Medians of the seconds to the first token of ``length`` tokens that are new, and of the same
    again."""
    cold, cached = [], []
    for seed in range(repetitions):
        source = random.Random(seed)
        prompt = [source.randrange(10, runtime.tokenizer.size) for _ in range(length)]
        first, again = (clients.submit(stream, port, prompt, 2, ends).result() for _ in range(2))
        cold.append(first[1] - first[0])
        cached.append(again[1] - again[0])
    return {
        "tokens": length,
        "cold": statistics.median(cold),
        "cached": statistics.median(cached),
        "runs": {"cold": cold, "cached": cached},
    }


@click.command()
@click.argument("export")
@runtime_options
@click.option(
    "--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each answer."
)
@click.option(
    "--repetitions",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Rounds; medians are reported.",
)
@click.option(
    "--clients",
    default="1,4,8",
    show_default=True,
    help="How many stream at once; empty leaves it out.",
)
@click.option(
    "--long",
    "length",
    type=int,
    default=2000,
    show_default=True,
    help="Tokens of the long prompt; 0 leaves it out.",
)
@click.option(
    "--cost/--no-cost",
    default=True,
    show_default=True,
    help="Compare with Runtime.generate and slotmoe bench's loop.",
)
def main(
    export: str,
    tokens: int,
    repetitions: int,
    clients: str,
    length: int,
    cost: bool,
    **options: Any,
) -> None:
    """Measure the server on EXPORT and print one JSON object."""
    counts = [int(one) for one in clients.split(",") if one]
    most = max([1, *counts])
    found: dict[str, Any] = {}
    with (
        open_runtime(export, options, logits_rows=most, sequences=most) as runtime,
        ProcessPoolExecutor(most, get_context("spawn")) as pool,
        serving(runtime, most) as port,
    ):
        runtime.warm()
        ends = [one for one in runtime.eos_token_ids if one < runtime.tokenizer.size]
        list(pool.map(abs, range(most)))  # starts the processes
        if cost:
            found["serving"] = serving_cost(runtime, pool, port, tokens, repetitions)
        if counts:
            rounds = [
                [together(runtime, pool, port, count, tokens, ends) for count in counts]
                for _ in range(repetitions)
            ]
            found["decode"] = [
                sorted(one, key=lambda each: float(each["tokens_per_second"]))[repetitions // 2]
                for one in zip(*rounds, strict=True)
            ]
        if length:
            found["first_token_seconds"] = first_token(
                runtime, pool, port, length, repetitions, ends
            )
        stats = runtime.stats()
    print(
        json.dumps(
            {
                **found,
                "kernels": stats["kernels"],
                "threads": runtime.threads,
                "slots": stats.get("slots"),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
