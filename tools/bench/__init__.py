"""``slotmoe bench``: prefill and decode speed beside what the machine's memory allows."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import click

from slotmoe.tools.options import open_runtime, runtime_options

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime


@click.command(name="bench")
@click.argument("model", metavar="MODEL")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of one prefill.",
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens of one decode run.",
)
@click.option(
    "--depth",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens taken as cached already.",
)
@click.option(
    "--repetitions",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Runs; medians are reported.",
)
@click.option(
    "--calibrate", is_flag=True, help="Keep the bandwidths measured here for slotmoe plan."
)
@runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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
    from slotmoe.offload.machine import cache_folder
    from slotmoe.offload.plan.speed import store_bandwidths
    from slotmoe.tools.progress import byte_progress

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
    asked = {key: value for key, value in options.items() if value is not None}
    report["settings"] = {"model": model, **asked, **report["settings"]}
    print(json.dumps(report)) if as_json else _print(report)


def calibration(runtime: Runtime, report: dict[str, Any]) -> dict[str, float]:
    """What ``slotmoe.offload.plan.speed.Bandwidths`` can know of this machine: what the report has,
    and the rest measured now."""
    disk = report["disk"]["bandwidth"] if report["disk"] is not None else runtime.disk_bandwidth()
    known = {"disk": disk, "latency": runtime.disk_latency()}
    if (link := report["link"]) is None:
        return known | {"ram": report["ceiling"]["read_bandwidth"]}
    measured = {name: link[name] for name in ("pcie", "pcie_busy", "experts")}
    return (
        known
        | measured
        | {"gpu": report["ceiling"]["read_bandwidth"], "ram": runtime.ram_bandwidth()}
    )


def measure(
    runtime: Runtime, prompt_tokens: int, decode_tokens: int, depth: int, repetitions: int
) -> dict[str, Any]:
    """Medians of ``repetitions`` runs, the ceiling, and the settings that matter, as one JSON-able
    object."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(runtime.config.vocab_size, (count,), generator=generator).tolist()

    prefill, decode, bandwidth, moved = (
        [],
        [],
        [],
        defaultdict[str, float](float),
    )  # what decode moved, and its seconds and tokens
    runtime.start()(ids(8))  # first-use costs: thread pools, page faults of scratch memory
    for _ in range(repetitions):
        step, prompt = runtime.start(), ids(prompt_tokens)
        started = time.perf_counter()
        step(prompt)
        prefill.append(prompt_tokens / (time.perf_counter() - started))
        step, before = runtime.start(depth), _moved(runtime)
        started = time.perf_counter()
        for token in ids(decode_tokens):
            step([token])
        seconds_taken = time.perf_counter() - started
        for name, count in {
            **_moved(runtime),
            "seconds": seconds_taken,
            "tokens": decode_tokens,
        }.items():
            moved[name] += count - before.get(name, 0)
        decode.append(decode_tokens / seconds_taken)
        bandwidth.append(runtime.read_bandwidth())
    step, waited = runtime.start(depth), runtime.stats()["wait_seconds"]
    with runtime.kernel_timing() as seconds:
        started = time.perf_counter()
        for token in ids(decode_tokens):
            step([token])
        total = time.perf_counter() - started
    components = {
        name: 1000 * spent / decode_tokens
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    }
    components["waiting for disk"] = (
        1000 * (runtime.stats()["wait_seconds"] - waited) / decode_tokens
    )
    components["Python and torch"] = 1000 * total / decode_tokens - sum(components.values())
    touched = runtime.bytes_per_token(depth + decode_tokens // 2)
    limit = statistics.median(bandwidth) / sum(touched.values())
    speed = statistics.median(decode)
    stats = runtime.stats()
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": speed,
        "prefill_runs": prefill,
        "decode_runs": decode,
        "ceiling": {
            "bytes_per_token": touched,
            "read_bandwidth": statistics.median(bandwidth),
            "decode_tokens_per_second": limit,
            "decode_fraction": speed / limit,
        },
        "decode_milliseconds": components,
        "settings": {
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "depth": depth,
            "repetitions": repetitions,
            "kernels": stats["kernels"],
            "threads": runtime.threads,
            "device": stats["device"]["name"],
            **({"misses": stats["misses"]["mode"]} if "misses" in stats else {}),
        },
        "disk": _disk(runtime, moved),
        "link": _link(runtime, moved, speed),
        **{key: stats[key] for key in ("cache", "prefetch", "misses", "memory") if key in stats},
    }


def _moved(runtime: Runtime) -> dict[str, float]:
    """Bytes that have come from disk, been copied to a card (in how many seconds) and been computed
    with by the CPU instead, and bytes of all experts that were in no slot when a gate chose
    them."""
    stats = runtime.stats()
    host = stats["io"].get("host", {"bytes": 0, "seconds": 0.0, "lent_bytes": 0})
    missing = stats["cache"]["misses"] * runtime.plan.record_bytes
    counts = {"disk": stats["io"]["disk"]["bytes"], "missing": missing, "copied": host["bytes"]}
    return {**counts, "copying": host["seconds"], "computed": host["lent_bytes"]}


def _disk(runtime: Runtime, moved: dict[str, float]) -> dict[str, float] | None:
    """What decoding read from disk, beside what the disk gives alone; None if it read nothing."""
    if not moved["disk"]:
        return None
    alone, rate = runtime.disk_bandwidth(), moved["disk"] / moved["seconds"]
    return {
        "bytes_per_token": moved["disk"] / moved["tokens"],
        "bytes_per_second": rate,
        "bandwidth": alone,
        "fraction": rate / alone,
    }


def _link(runtime: Runtime, moved: dict[str, float], speed: float) -> dict[str, float] | None:
    """What decoding sent over the link to a card, beside the link's own speed, and the bound that
    it sets: every missing byte, copied.  None without a card."""
    rates = runtime.link_bandwidths()
    if not rates:
        return None
    told = {name: moved[name] / moved["tokens"] for name in ("missing", "copied", "computed")}
    found = {f"{name}_bytes_per_token": size for name, size in told.items()}
    found |= {"copy_seconds_per_token": moved["copying"] / moved["tokens"], **rates}
    if told["missing"]:
        bound = rates["pcie"] / told["missing"]
        found |= {"decode_tokens_per_second": bound, "decode_fraction": speed / bound}
    return found


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings, ceiling = report["settings"], report["ceiling"]
    table = Table(
        title=f"{settings['model']} on {settings['device']}: {settings['kernels']} kernels, {settings['threads']} threads"
    )
    for column in ("", "median tokens/s", "range", "ceiling", "of ceiling"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, label in (
        ("prefill", f"prefill {settings['prompt_tokens']}"),
        ("decode", f"decode after {settings['depth']}"),
    ):
        runs = report[f"{kind}_runs"]
        limits = (
            [f"{ceiling['decode_tokens_per_second']:.1f}", f"{ceiling['decode_fraction']:.0%}"]
            if kind == "decode"
            else ["", ""]
        )
        table.add_row(
            label,
            f"{report[f'{kind}_tokens_per_second']:.2f}",
            f"{min(runs):.2f}-{max(runs):.2f}",
            *limits,
        )
    console = Console(file=sys.stdout)
    console.print(table)
    parts = ", ".join(
        f"{name} {size / 1e6:.0f} MB" for name, size in ceiling["bytes_per_token"].items()
    )
    spent = report["decode_milliseconds"]
    console.print(
        "One token by kernel: "
        + ", ".join(f"{name} {ms:.1f} ms" for name, ms in spent.items() if ms >= 0.05)
        + "."
    )
    console.print(
        f"A token touches {parts}; memory reads at {ceiling['read_bandwidth'] / 1e9:.1f} GB/s."
    )
    if (link := report["link"]) is not None:
        console.print(
            f"The link to the GPU gives {link['pcie'] / 1e9:.1f} GB/s, {link['pcie_busy'] / 1e9:.1f} while the CPU computes experts at "
            f"{link['experts'] / 1e9:.1f}. A token misses {link['missing_bytes_per_token'] / 1e6:.0f} MB; "
            f"{link['copied_bytes_per_token'] / 1e6:.0f} were copied and {link['computed_bytes_per_token'] / 1e6:.0f} computed by the CPU."
        )
        if "decode_fraction" in link:
            bound = link["decode_tokens_per_second"]
            console.print(
                f"Copying all that is missing allows {bound:.1f} tokens/s: {link['decode_fraction']:.0%} of that."
            )
    if (disk := report["disk"]) is not None:
        share = f"{disk['bytes_per_second'] / 1e9:.2f} of the {disk['bandwidth'] / 1e9:.2f} GB/s that the disk gives ({disk['fraction']:.0%})"
        console.print(
            f"Decoding read {disk['bytes_per_token'] / 1e6:.0f} MB a token from disk at {share}."
        )
