"""The measurements of ``slotmoe bench``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import fmean, median
from typing import Any, TypeVar

import torch

from slotmoe.offload.devices.pages import in_large_pages
from slotmoe.offload.experts.misses import expert_bandwidth
from slotmoe.offload.observe import measure as observed
from slotmoe.offload.observe.profiler import profiled
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.weight import Int8Weight
from slotmoe.quant.export.layout import RecordLayout

_TURNS = 25  # of each of a core's kernels: a second in all on two fast cores
T = TypeVar("T")
Ways = Mapping[str, Callable[[], T]]
Step = Callable[[], object]
_COUNTERS = ("cache", "prefetch", "drafts", "misses", "memory")


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def take_turns(
    ways: Ways[T], rounds: int, warm_up: bool = True, step: Step = lambda: None
) -> dict[str, list[T]]:
    """What each way returned in each round, ``step`` by step; with ``warm_up``, after a round that
    isn't counted."""
    names, results = list(ways), {name: list[T]() for name in ways}
    if warm_up:
        for way in ways.values():
            way()
    for number in range(rounds):
        for name in names[::-1] if number % 2 else names:
            results[name].append(ways[name]())
            step()
    return results


def prefill_seconds(runtime: Runtime, prompt: list[int]) -> float:
    """Seconds of a prompt, from an empty cache."""
    runtime.engine.empty()
    return seconds(lambda: runtime.engine.force(prompt))


def token_seconds(runtime: Runtime, ids: list[int], depth: int = 1) -> list[float]:
    """Seconds of each token, decoding ``ids`` after ``depth`` cached tokens.  Benchmarks call what
    a runtime decodes with here alone."""
    unknown = runtime.engine.empty(depth)
    started = time.perf_counter()
    forced = runtime.engine.force([*unknown, *ids[:1]], ids[1:])
    return [after - before for before, after in pairwise([started, *forced.moments])]


def calibration(closed: observed.Lasting, report: dict[str, Any]) -> dict[str, float]:
    """What ``slotmoe.offload.plan.speed.Bandwidths`` can know of this machine: what the report has,
    and the rest measured now."""
    export = closed.export
    bandwidths = {"disk": fmean(observed.drive_bandwidths(export))}
    bandwidths["latency"] = observed.disk_latency(export)
    cores, fast = core_rates(closed), report["ceiling"]["read_bandwidth"]
    if link := report["link"]:
        bandwidths |= link | {"gpu": fast}
    if link or fast is None:
        fast = observed.ram_bandwidth(closed.cpu)
    share = min(1.0, cores.pop("all_bytes") / fast) if cores else Bandwidths.share
    return bandwidths | cores | {"ram": fast, "share": share}


def core_rates(closed: observed.Lasting) -> dict[str, float]:
    """What a core's native kernels get through in a second, by the names of
    ``slotmoe.offload.plan.speed.CORE``: products with all threads at work, in V2-Lite's shapes and
    in the sample's, bytes with one; and the bytes of all threads."""
    backend, codecs = closed.cpu, closed.export.layout.codecs
    if backend.kind != "native":
        return {}
    layout = RecordLayout(2048, 1408, codecs)
    ways = _products(backend, "products", layout, 4096, 16, 512, 64)
    ways |= _products(backend, "small", RecordLayout(256, 64, codecs), 704, 8, 64, 16)
    spent = take_turns({name: partial(seconds, way) for name, (way, _) in ways.items()}, _TURNS)
    # The mean, since what other programs take of a core counts, but for the two worst: a turn is
    # shorter than the time slice that another program may get once.
    left_out = _TURNS // 12
    means = {name: fmean(sorted(times)[: _TURNS - left_out]) for name, times in spent.items()}
    rates = {name: count / means[name] / backend.threads for name, (_, count) in ways.items()}
    rates["all_bytes"] = expert_bandwidth(backend, layout, seconds=0.3)
    backend.run_on(replace(closed.placement, threads=1))
    rates["core_bytes"] = expert_bandwidth(backend, layout, seconds=0.3)
    backend.run_on(closed.placement)
    return rates


def _products(
    backend: TorchBackend, size: str, layout: RecordLayout, wide: int, heads: int, R: int, P: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """By the names of ``CORE`` that end in ``size``: a call, and its multiply-adds."""
    H, rows, E = layout.hidden_size, 48, 8
    x_TH, weight_NH = torch.randn(512, H), torch.randint(-127, 128, (wide, H), dtype=torch.int8)
    int8 = backend.prepare("linear", Int8Weight(weight_NH, torch.ones(wide)))
    slab = in_large_pages((E, layout.record_bytes), torch.uint8).fill_(1)
    records, y_TED = Records(slab, layout, layout.levels()), torch.empty(rows, E, H)
    slots_E, all_TE = torch.arange(E).int(), torch.arange(E).expand(rows, E).contiguous()
    columns, dtype = backend.latent_row(R, P)
    rows_TX, q_THW = torch.empty(2048, columns, dtype=dtype), torch.randn(128, heads, R + P)
    backend.store_latents(torch.randn(2048, R + P), R, rows_TX)
    x_RH, scores = x_TH[:rows], 128 * 1984 * heads
    products = rows * E * 3 * H * layout.moe_intermediate_size
    return {
        f"int8_{size}": (lambda: backend.linear(x_TH, int8), 512 * H * wide),
        f"coded_{size}": (lambda: backend.experts(x_RH, records, slots_E, all_TE, y_TED), products),
        f"attention_{size}": (lambda: backend.mla(q_THW, rows_TX, R, 0.1), scores * (2 * R + P)),
    }


def measure(
    runtime: Runtime,
    prompt_tokens: int,
    decode_tokens: int,
    depth: int,
    repetitions: int,
    step: Step = lambda: None,
) -> dict[str, Any]:
    """Medians of ``repetitions`` runs, the ceiling, and the settings that matter, as one JSON-able
    object; ``step`` is called after each run of each of three kinds."""
    generator, moved = torch.Generator().manual_seed(0), Counter[str]()

    def ids(tokens: int) -> list[int]:
        return torch.randint(runtime.config.vocab_size, (tokens,), generator=generator).tolist()

    def prefill() -> float:
        return prompt_tokens / prefill_seconds(runtime, ids(prompt_tokens))

    def decode() -> float:
        before = runtime.stats()["io"]["disk"]["bytes"]
        seconds = sum(token_seconds(runtime, ids(decode_tokens), depth))
        read = runtime.stats()["io"]["disk"]["bytes"] - before
        moved.update({"disk": read, "seconds": seconds, "tokens": decode_tokens})
        return decode_tokens / seconds

    prefill_seconds(runtime, ids(8))  # first-use costs: thread pools, page faults of scratch memory
    ways: dict[str, Callable[[], float]] = {"prefill": prefill, "decode": decode}
    ways["bandwidth"] = partial(observed.read_bandwidth, runtime.model)
    runs = take_turns(ways, repetitions, warm_up=False, step=step)
    components = _components(runtime, ids(decode_tokens), depth)
    touched = observed.bytes_per_token(runtime.model, depth + decode_tokens // 2)
    # Vulkan's memory is not measured, so there is no ceiling.
    speed, bandwidth = median(runs["decode"]), median(runs["bandwidth"]) or None
    limit, stats = bandwidth and bandwidth / sum(touched.values()), runtime.stats()
    settings = {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "depth": depth}
    settings |= {"repetitions": repetitions, "kernels": stats["kernels"]}
    settings |= {"threads": runtime.threads, "device": stats["device"]["name"]}
    if "misses" in stats:
        settings["misses"] = stats["misses"]["mode"]
    return {
        "prefill_tokens_per_second": median(runs["prefill"]),
        "decode_tokens_per_second": speed,
        "prefill_runs": runs["prefill"],
        "decode_runs": runs["decode"],
        "ceiling": {
            "bytes_per_token": touched,
            "read_bandwidth": bandwidth,
            "decode_tokens_per_second": limit,
            "decode_fraction": limit and speed / limit,
        },
        "decode_milliseconds": components,
        "settings": settings,
        "disk": _disk(moved),
        "link": observed.link_bandwidths(runtime.model),
        **{key: stats[key] for key in _COUNTERS if key in stats},
    }


def _components(runtime: Runtime, ids: list[int], depth: int) -> dict[str, float]:
    """Milliseconds of a decoded token by the stages of ``slotmoe profile``, the longest first."""
    with profiled(runtime, time.perf_counter()) as profiler:
        token_seconds(runtime, ids, depth)
    spent, tokens = profiler.seconds("decode"), profiler.tokens("decode")
    longest = sorted(spent, key=spent.__getitem__, reverse=True)
    return {name: 1000 * spent[name] / tokens for name in longest}


def _disk(moved: Counter[str]) -> dict[str, float] | None:
    """What decoding read from disk, if anything."""
    if not moved["disk"]:
        return None
    rates = {"bytes_per_second": moved["disk"] / moved["seconds"]}
    return rates | {"bytes_per_token": moved["disk"] / moved["tokens"]}
