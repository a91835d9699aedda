"""What watching costs: ``python -m slotmoe.tools.bench.profile EXPORT [--ram SIZE] [--decode-tokens
N] [--repetitions N]``.

Decode of the same random tokens with and without the profiler of ``slotmoe profile`` (its laps,
counters and memory thread), in turn, each after the same prompt.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack

import click
import torch

from slotmoe.offload.observe.profiler import MemorySampler
from slotmoe.offload.runtime import Runtime


def times(runtime: Runtime, ids: list[int], watched: bool) -> list[float]:
    """Milliseconds of each token, decoding ``ids`` after one token of prompt."""
    step = runtime.start()
    found: list[float] = []
    step([2])
    with ExitStack() as stack:
        if watched:
            sampler = stack.enter_context(MemorySampler())
            stack.enter_context(sampler.watching(runtime))
            runtime.profile(sampler.origin)
            stack.callback(runtime.stop_profile)
        for token in ids:
            started = time.perf_counter()
            step([token])
            found.append(1000 * (time.perf_counter() - started))
    return found


def measure(runtime: Runtime, decode_tokens: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds a token, ``watched``, ``plain`` and their ``ratio``: the lower quartile of all
    tokens, and the median.

    Neighbours only ever make a token slower, so on a busy machine the lower quartile is the one
    that tells.
    """
    ids = torch.randint(
        2, 1000, (decode_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    runtime.warm()
    times(runtime, ids, True), times(runtime, ids, False)
    watched: list[float] = []
    plain: list[float] = []
    for number in range(
        repetitions
    ):  # turns change, since on a busy machine whoever goes first is a little slower
        for is_watched in [True, False] if number % 2 else [False, True]:
            (watched if is_watched else plain).extend(times(runtime, ids, is_watched))
    report: dict[str, dict[str, float]] = {}
    for name, place in (("lower_quartile", 0), ("median", 1)):
        a, b = (statistics.quantiles(found, n=4)[place] for found in (watched, plain))
        report[name] = {"watched": a, "plain": b, "ratio": a / b}
    return report


@click.command()
@click.argument("export")
@click.option("--ram", metavar="SIZE")
@click.option("--decode-tokens", type=int, default=8, show_default=True)
@click.option("--repetitions", type=int, default=40, show_default=True)
def main(export: str, ram: str | None, decode_tokens: int, repetitions: int) -> None:
    """Print quartiles and medians in milliseconds a token, and their ratios, as JSON."""
    with Runtime.open(export, ram=ram, context=1024) as runtime:
        print(json.dumps(measure(runtime, decode_tokens, repetitions)))


if __name__ == "__main__":
    main()
