"""Comparisons of decode, by the milliseconds of a token: ``depth``, ``engine`` and ``profile``; and
``gap``, for which the link to a GPU idles."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from statistics import fmean, median, quantiles
from typing import Any
from unittest.mock import patch

import click
from torch import Tensor

from slotmoe.offload.devices.device import Download, Event
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.observe.memory_sampler import MemorySampler
from slotmoe.offload.observe.profiler import attach
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import turns
from slotmoe.tools.options import count


class _WithoutEngine:
    """A runtime's experts without the engine: every record is in its slot, and no cache, policy or
    prefetcher learns of its use."""

    def __init__(self, experts: Experts) -> None:
        self.slot_table = experts.slot_table
        assert self.slot_table().complete

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        raise AssertionError("a decode step computes all experts by the slot table")

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        pass


def _milliseconds(runtime: Runtime, ids: list[int], depth: int = 1) -> float:
    """Of one token.  The first isn't counted: what ran before has moved the memory it needs."""
    return 1e3 * fmean(turns.token_seconds(runtime, ids, depth)[1:])


@click.command()
@turns.EXPORT
@count("--depth", 8192, "Tokens cached before the long turns.")
@count("--against", 128, "Tokens cached before the short turns.")
@count("--decode-tokens", 9, "Tokens of one turn; the first is not counted.", least=2)
@turns.repetitions(15)
@turns.THREADS
def depth(
    export: str, depth: int, against: int, decode_tokens: int, repetitions: int, threads: int | None
) -> None:
    """What a longer context costs: the ratio is the speed at --depth over that at --against."""
    if against >= depth:
        raise click.UsageError(f"--against is {against}, expected less than --depth, {depth}")
    ids = turns.random_ids(decode_tokens)
    with Runtime.open(export, context=depth + decode_tokens, threads=threads) as runtime:
        runtime.warm()
        ways = {f"after {n}": partial(_milliseconds, runtime, ids, n) for n in (against, depth)}
        turns.finish(turns.compare(ways, repetitions, f"after {depth}", "milliseconds"))


@click.command()
@turns.EXPORT
@click.option("--slots", type=int, help="Also compare prefetch on and off with this many slots.")
@count("--decode-tokens", 32, "Tokens of one turn; the first is not counted.", least=2)
@turns.repetitions(7)
def engine(export: str, slots: int | None, decode_tokens: int, repetitions: int) -> None:
    """What the offload engine costs where every expert is in memory, and what prefetch gains where
    --slots are too few for that."""
    ids = turns.random_ids(decode_tokens)
    with Runtime.open(export, context=256) as runtime:
        runtime.warm()

        def without() -> float:
            experts = _WithoutEngine(runtime.model.quantized("compare"))
            with patch.object(runtime.model.network, "experts", experts):
                return _milliseconds(runtime, ids)

        ways = {"with the engine": lambda: _milliseconds(runtime, ids), "without it": without}
        rows = turns.compare(ways, repetitions, "with the engine", "milliseconds")
    if slots is not None:
        few = partial(Runtime.open, export, context=256, slots=slots)
        with few() as ahead, few(prefetch=False) as never:
            opened = {"with prefetch": ahead, "without prefetch": never}
            ways = {name: partial(_milliseconds, it, ids) for name, it in opened.items()}
            rows += turns.compare(ways, repetitions, "with prefetch", "milliseconds")
    turns.finish(rows)


@click.command()
@turns.EXPORT
@click.option("--ram", metavar="SIZE", help="RAM budget.")
@count("--decode-tokens", 8, "Tokens of one turn.")
@turns.repetitions(40)
def profile(export: str, ram: str | None, decode_tokens: int, repetitions: int) -> None:
    """What the profiler of slotmoe profile costs: its marks, counters and memory thread.

    Neighbours only ever make a token slower, so on a busy machine the lower quartile of all tokens
    is the figure to read.
    """
    ids = turns.random_ids(decode_tokens)
    with Runtime.open(export, ram=ram, context=1024) as runtime:
        runtime.warm()

        def watched() -> list[float]:
            with MemorySampler() as sampler, sampler.watching(runtime.model), ExitStack() as stack:
                stack.callback(attach(runtime, sampler.origin)[1])
                return turns.token_seconds(runtime, ids)

        ways = {"watched": watched, "plain": lambda: turns.token_seconds(runtime, ids)}
        spent = turns.take_turns(ways, repetitions)
    tokens = {way: [1e3 * token for turn in spent[way] for token in turn] for way in ways}
    rows = []
    for name, quartile in (("lower quartile", 0), ("median", 1)):
        row = {way: quantiles(values, n=4)[quartile] for way, values in tokens.items()}
        rows.append({"of": name, **row, "ratio": row["watched"] / row["plain"]})
    turns.finish(rows)


def gaps(runtime: Runtime, ids: list[int]) -> list[float]:
    """Decode ``ids``: the seconds of the thread's own time from when it can read a choice of
    experts to the first copy behind it, of each layer with such a copy.  All records that are
    missing have to be in RAM."""
    device, chosen, spent = runtime.model.device, None, list[float]()
    download, copy = device.download, device.copy

    def watched_download(*tensors: Tensor) -> Download:
        result = download(*tensors)
        get = result.get

        def watched() -> Tensor:
            nonlocal chosen
            vars(result).pop("get")  # else the two would keep each other, and page-locked RAM
            tensor = get()
            chosen = time.thread_time()
            return tensor

        result.get = watched  # type: ignore[method-assign]
        return result

    def watched_copy(*arguments: Any) -> Event:
        nonlocal chosen
        if chosen is not None:
            spent.append(time.thread_time() - chosen)
        chosen = None
        return copy(*arguments)

    with patch.multiple(device, download=watched_download, copy=watched_copy):
        turns.token_seconds(runtime, ids)
    return spent


@click.command()
@turns.EXPORT
@click.option("--slots", type=int, required=True, help="Expert slots, fewer than experts.")
@count("--decode-tokens", 64, "Tokens decoded.")
def gap(export: str, slots: int, decode_tokens: int) -> None:
    """Microseconds of Python from a gate's choice of experts to the first copy queued behind it.
    Meanwhile the link to the GPU idles."""
    few: dict[str, Any] = {"slots": slots, "misses": "fetch", "prefetch": False}
    with Runtime.open(export, device="cuda", context=decode_tokens + 1, **few) as runtime:
        runtime.warm()
        turns.finish([gap_row(runtime, decode_tokens)])


def gap_row(runtime: Runtime, decode_tokens: int) -> turns.Row:
    """Of a runtime whose slots and RAM are filled."""
    spent = [1e6 * seconds for seconds in gaps(runtime, turns.random_ids(decode_tokens))]
    if not spent:
        raise click.UsageError("no layer missed an expert that is in RAM; lower --slots")
    few, *_, many = quantiles(spent, n=20)
    return {"layers": len(spent), "microseconds": median(spent), "5 to 95%": [few, many]}
