"""What watching costs: ``python -m tools.profile_bench EXPORT [--ram SIZE] [--decode-tokens N] [--repetitions N]``.

Decode of the same random tokens with and without the profiler of ``slotmoe profile`` (its laps, counters and memory thread),
in turn, each after the same prompt; medians of the repetitions and of the ratios of neighbours.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack

import click
import torch

from offload.profiler import MemorySampler
from offload.runtime import Runtime


def seconds(runtime: Runtime, ids: list[int], watched: bool) -> float:
    """Seconds a token, decoding ``ids`` after one token of prompt."""
    step = runtime.start()
    step([2])
    with ExitStack() as stack:
        if watched:
            sampler = stack.enter_context(MemorySampler())
            stack.enter_context(sampler.watching(runtime))
            runtime.profile(sampler.origin)
            stack.callback(runtime.stop_profile)
        started = time.perf_counter()
        for token in ids:
            step([token])
        return (time.perf_counter() - started) / len(ids)


def measure(runtime: Runtime, decode_tokens: int, repetitions: int) -> dict[str, float]:
    """Medians of milliseconds a token ``watched`` and ``plain``, and of their ratio."""
    ids = torch.randint(2, 1000, (decode_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    runtime.warm()
    seconds(runtime, ids, True), seconds(runtime, ids, False)
    pairs = []
    for number in range(repetitions):  # turns change, since on a busy machine whoever goes first is a little slower
        order = (True, False) if number % 2 else (False, True)
        found = {watched: 1000 * seconds(runtime, ids, watched) for watched in order}
        pairs.append((found[True], found[False]))
    watched, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"watched": watched, "plain": plain, "ratio": statistics.median(a / b for a, b in pairs)}


@click.command()
@click.argument("export")
@click.option("--ram", metavar="SIZE")
@click.option("--decode-tokens", type=int, default=64, show_default=True)
@click.option("--repetitions", type=int, default=7, show_default=True)
def main(export: str, ram: str | None, decode_tokens: int, repetitions: int) -> None:
    """Print the medians in milliseconds a token, and their ratio, as JSON."""
    with Runtime.open(export, ram=ram, context=1024) as runtime:
        print(json.dumps(measure(runtime, decode_tokens, repetitions)))


if __name__ == "__main__":
    main()
