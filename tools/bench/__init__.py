"""``slotmoe bench``: prefill and decode speed beside what the machine's memory allows.  The other
benchmarks are ``python -m slotmoe.tools.bench NAME``."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.plan.speed import store_bandwidths
from slotmoe.tools.options import JSON, count, flag, open_runtime, runtime_options
from slotmoe.tools.progress import byte_progress
from slotmoe.tools.tables import table

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime


@click.command(name="bench")
@click.argument("model", metavar="MODEL")
@count("--prompt-tokens", 512, "Tokens of one prefill.")
@count("--decode-tokens", 64, "Tokens of one decode run.")
@count("--depth", 0, "Tokens taken as cached already.", least=0)
@count("--repetitions", 5, "Runs; medians are reported.")
@flag("--calibrate", "Keep the bandwidths measured here for slotmoe plan.")
@runtime_options
@JSON
def command(
    model: str,
    prompt_tokens: int,
    decode_tokens: int,
    depth: int,
    repetitions: int,
    calibrate: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL with random token ids: prefill from an empty cache, then decode after --depth
    cached tokens.

    The ceiling of decode is the bytes that one token touches over the read bandwidth measured in
    the same run, with every expert in memory.  Expert slots are filled before the clock starts.  If
    the experts don't all fit, what decode reads from disk stands beside the disk's own speed: 8
    threads, 4 MiB direct reads, right after.

    \b
    Examples:
      slotmoe bench sample
      slotmoe bench lite-random --depth 8192 --context 9000 --threads 2
      slotmoe bench lite-random --ram 5GiB --prompt-tokens 64 --json
      slotmoe bench lite-random --calibrate          what slotmoe plan then reckons with
    """
    with open_runtime(model, options, quiet=as_json) as runtime:
        needed = max(prompt_tokens, depth + decode_tokens)
        if needed > runtime.context:
            raise click.UsageError(
                f"{needed} positions are needed, the context has {runtime.context}: raise --context"
            )
        with byte_progress("Filling expert slots", quiet=as_json) as progress:
            runtime.warm(progress)
        report = measure(runtime, prompt_tokens, decode_tokens, depth, repetitions)
        if calibrate:
            store_bandwidths(cache_folder() / "machine.json", **calibration(runtime, report))
        options["context"] = runtime.context
    given = {key: value for key, value in options.items() if value is not None}
    report["settings"] = {"model": model, **given, **report["settings"]}
    print(json.dumps(report)) if as_json else _print(report)


def calibration(runtime: Runtime, report: dict[str, Any]) -> dict[str, float]:
    """What ``slotmoe.offload.plan.speed.Bandwidths`` can know of this machine: what the report has,
    and the rest measured now."""
    disk = report["disk"]["bandwidth"] if report["disk"] is not None else runtime.disk_bandwidth()
    bandwidths = {"disk": disk, "latency": runtime.disk_latency()}
    fast = report["ceiling"]["read_bandwidth"]
    if (link := report["link"]) is None:
        return bandwidths | {"ram": fast}
    bandwidths |= {name: link[name] for name in ("pcie", "pcie_busy", "experts")}
    return bandwidths | {"gpu": fast, "ram": runtime.ram_bandwidth()}


def measure(
    runtime: Runtime, prompt_tokens: int, decode_tokens: int, depth: int, repetitions: int
) -> dict[str, Any]:
    """Medians of ``repetitions`` runs, the ceiling, and the settings that matter, as one JSON-able
    object."""
    import torch

    from slotmoe.tools.bench.turns import start, take_turns, token_seconds

    generator, moved = torch.Generator().manual_seed(0), Counter[str]()

    def ids(tokens: int) -> list[int]:
        return torch.randint(runtime.config.vocab_size, (tokens,), generator=generator).tolist()

    def prefill() -> float:
        step, prompt = start(runtime), ids(prompt_tokens)
        started = time.perf_counter()
        step(prompt)
        return prompt_tokens / (time.perf_counter() - started)

    def decode() -> float:
        before = _moved(runtime)
        seconds = sum(token_seconds(runtime, ids(decode_tokens), depth))
        moved.update({name: size - before[name] for name, size in _moved(runtime).items()})
        moved.update({"seconds": seconds, "tokens": decode_tokens})
        return decode_tokens / seconds

    start(runtime)(ids(8))  # first-use costs: thread pools, page faults of scratch memory
    ways = {"prefill": prefill, "decode": decode, "bandwidth": runtime.read_bandwidth}
    runs = take_turns(ways, repetitions, warm_up=False)
    components = _components(runtime, ids(decode_tokens), depth)
    touched = runtime.bytes_per_token(depth + decode_tokens // 2)
    speed, bandwidth = median(runs["decode"]), median(runs["bandwidth"])
    limit, stats = bandwidth / sum(touched.values()), runtime.stats()
    settings = {
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "depth": depth,
        "repetitions": repetitions,
        "kernels": stats["kernels"],
        "threads": runtime.threads,
        "device": stats["device"]["name"],
    }
    return {
        "prefill_tokens_per_second": median(runs["prefill"]),
        "decode_tokens_per_second": speed,
        "prefill_runs": runs["prefill"],
        "decode_runs": runs["decode"],
        "ceiling": {
            "bytes_per_token": touched,
            "read_bandwidth": bandwidth,
            "decode_tokens_per_second": limit,
            "decode_fraction": speed / limit,
        },
        "decode_milliseconds": components,
        "settings": settings | ({"misses": stats["misses"]["mode"]} if "misses" in stats else {}),
        "disk": _disk(runtime, moved),
        "link": _link(runtime, moved, speed),
        **{key: stats[key] for key in ("cache", "prefetch", "misses", "memory") if key in stats},
    }


def _components(runtime: Runtime, ids: list[int], depth: int) -> dict[str, float]:
    """Milliseconds of a decoded token by kernel, the longest first, and by what remains."""
    from slotmoe.tools.bench.turns import token_seconds

    waited = runtime.stats()["wait_seconds"]
    with runtime.kernel_timing() as seconds:
        total = sum(token_seconds(runtime, ids, depth))
    spent = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    spent["waiting for disk"] = runtime.stats()["wait_seconds"] - waited
    spent["Python and torch"] = total - sum(spent.values())
    return {name: 1000 * part / len(ids) for name, part in spent.items()}


def _moved(runtime: Runtime) -> dict[str, Any]:
    """Bytes that have come from disk, been copied to a GPU (in how many seconds) and been computed
    with by the CPU instead, and bytes of all experts that were in no slot when a gate chose
    them."""
    stats = runtime.stats()
    host = stats["io"].get("host", {"bytes": 0, "seconds": 0.0, "lent_bytes": 0})
    missing = stats["cache"]["misses"] * runtime.plan.record_bytes
    counts = {"disk": stats["io"]["disk"]["bytes"], "missing": missing, "copied": host["bytes"]}
    return {**counts, "copying": host["seconds"], "computed": host["lent_bytes"]}


def _disk(runtime: Runtime, moved: Counter[str]) -> dict[str, float] | None:
    """What decoding read from disk, beside what the disk gives alone; None if it read nothing."""
    if not moved["disk"]:
        return None
    alone, rate = runtime.disk_bandwidth(), moved["disk"] / moved["seconds"]
    per_token = moved["disk"] / moved["tokens"]
    rates = {"bytes_per_second": rate, "bandwidth": alone, "fraction": rate / alone}
    return {"bytes_per_token": per_token, **rates}


def _link(runtime: Runtime, moved: Counter[str], speed: float) -> dict[str, float] | None:
    """What decoding sent over the link to a GPU, beside the link's own speed, and the bound that it
    sets: every missing byte, copied.  None without a GPU."""
    rates = runtime.link_bandwidths()
    if not rates:
        return None
    sizes = {name: moved[name] / moved["tokens"] for name in ("missing", "copied", "computed")}
    link = {f"{name}_bytes_per_token": size for name, size in sizes.items()}
    link |= {"copy_seconds_per_token": moved["copying"] / moved["tokens"], **rates}
    if sizes["missing"]:
        bound = rates["pcie"] / sizes["missing"]
        link |= {"decode_tokens_per_second": bound, "decode_fraction": speed / bound}
    return link


def _print(report: dict[str, Any]) -> None:

    settings, ceiling = report["settings"], report["ceiling"]
    limit = (f"{ceiling['decode_tokens_per_second']:.1f}", f"{ceiling['decode_fraction']:.0%}")
    rows = []
    for kind, label, limits in (
        ("prefill", f"prefill {settings['prompt_tokens']}", ("", "")),
        ("decode", f"decode after {settings['depth']}", limit),
    ):
        runs, speed = report[f"{kind}_runs"], report[f"{kind}_tokens_per_second"]
        rows.append((label, f"{speed:.2f}", f"{min(runs):.2f}-{max(runs):.2f}", *limits))
    console = Console(file=sys.stdout)
    columns = ("", "median tokens/s", "range", "ceiling", "of ceiling")
    machine = f"{settings['kernels']} kernels, {settings['threads']} threads"
    title = f"{settings['model']} on {settings['device']}: {machine}"
    console.print(table(columns, rows, title))
    for line in _sentences(report):
        console.print(line)


def _sentences(report: dict[str, Any]) -> list[str]:
    ceiling, link, disk = report["ceiling"], report["link"], report["disk"]
    spent = [
        f"{name} {ms:.1f} ms" for name, ms in report["decode_milliseconds"].items() if ms >= 0.05
    ]
    touched = [f"{name} {size / 1e6:.0f} MB" for name, size in ceiling["bytes_per_token"].items()]
    lines = [
        f"One token by kernel: {', '.join(spent)}.",
        f"A token touches {', '.join(touched)}; "
        f"memory reads at {ceiling['read_bandwidth'] / 1e9:.1f} GB/s.",
    ]
    if link is not None:
        missing, copied, computed = (
            f"{link[f'{name}_bytes_per_token'] / 1e6:.0f}"
            for name in ("missing", "copied", "computed")
        )
        lines.append(
            f"The link to the GPU gives {link['pcie'] / 1e9:.1f} GB/s, "
            f"{link['pcie_busy'] / 1e9:.1f} while the CPU computes experts at "
            f"{link['experts'] / 1e9:.1f}. A token misses {missing} MB; "
            f"{copied} were copied and {computed} computed by the CPU."
        )
        if "decode_fraction" in link:
            lines.append(
                f"Copying all that is missing allows {link['decode_tokens_per_second']:.1f} "
                f"tokens/s: {link['decode_fraction']:.0%} of that."
            )
    if disk is not None:
        lines.append(
            f"Decoding read {disk['bytes_per_token'] / 1e6:.0f} MB a token from disk at "
            f"{disk['bytes_per_second'] / 1e9:.2f} of the {disk['bandwidth'] / 1e9:.2f} GB/s "
            f"that the disk gives ({disk['fraction']:.0%})."
        )
    return lines
