"""What the offload engine costs: ``python -m slotmoe.tools.bench.engine EXPORT [--slots N]
[--decode-tokens N] [--repetitions N]``.

In turn, on the same random tokens, medians of the repetitions: decode with all experts in memory
through the engine and past it (straight from the slots, no cache, no policy, no prefetcher), and,
with ``--slots``, decode with and without prefetch.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch
from torch import Tensor

from slotmoe.offload.experts import OffloadedExperts
from slotmoe.offload.runtime import Runtime


class Past:
    """The same experts without an engine: every record is known to be in its slot, and nobody is
    told of its use."""

    def __init__(self, experts: OffloadedExperts) -> None:
        self._engine, self.here = experts, experts.here

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        engine, slots = self._engine, self._engine._slots
        first = engine._rows[layer] * engine._experts
        records = [
            slots._table.slab[slots.slot(first + expert)] for expert in indices_TK[0].tolist()
        ]
        return engine._ops.experts(x_TD[0], records, weights_TK[0], engine._layout, engine._levels)[
            None
        ]

    def used(self, layer: int, indices_NK: Tensor) -> None:
        pass


def seconds(runtime: Runtime, ids: list[int]) -> float:
    step = runtime.start(1)
    started = time.perf_counter()
    for token in ids:
        step([token])
    return (time.perf_counter() - started) / len(ids)


@click.command()
@click.argument("export")
@click.option("--slots", type=int, help="Also compare prefetch on and off with this many slots.")
@click.option("--decode-tokens", type=int, default=32, show_default=True)
@click.option("--repetitions", type=int, default=7, show_default=True)
def main(export: str, slots: int | None, decode_tokens: int, repetitions: int) -> None:
    """Print the medians and their ratio."""
    ids = torch.randint(
        2, 1000, (decode_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def compare(names: tuple[str, str], one: Any, other: Any) -> None:
        one(), other()
        # Turns change, since on a busy machine whoever goes first is a little slower.
        times = [
            (one(), other()) if number % 2 else (other(), one())[::-1]
            for number in range(repetitions)
        ]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{names[0]} {1e3 * a:.2f} ms a token, {names[1]} {1e3 * b:.2f}: {b / a:.3f} times the speed of {names[1]}",
            flush=True,
        )

    with Runtime.open(export, context=256) as runtime:
        runtime.warm()
        engine, network = runtime._experts, runtime._network
        assert isinstance(engine, OffloadedExperts)
        direct: Any = Past(engine)

        def without() -> float:
            network.experts, runtime._experts = direct, direct
            try:
                return seconds(runtime, ids)
            finally:
                network.experts, runtime._experts = engine, engine

        compare(("all cached, with the engine", "without"), lambda: seconds(runtime, ids), without)
    if slots is not None:
        with (
            Runtime.open(export, context=256, slots=slots) as ahead,
            Runtime.open(export, context=256, slots=slots, prefetch=False) as plain,
        ):
            compare(
                ("with prefetch", "without"),
                lambda: seconds(ahead, ids),
                lambda: seconds(plain, ids),
            )


if __name__ == "__main__":
    main()
