"""``slotmoe bench``: prefill and decode speed beside what the machine's memory allows.  The other
benchmarks are ``python -m bench NAME``."""

from __future__ import annotations

from typing import Any

import click

from slotmoe.errors import one_line
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.plan.memory import DEFAULT_CONTEXT, or_more_context
from slotmoe.offload.plan.speed import store_bandwidths
from slotmoe.tools.options import JSON, MODEL, Command, count, flag, open_options, open_runtime
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import Console, byte_bars, step_progress, table

_COUNTS = ("prompt_tokens", "decode_tokens", "depth", "repetitions")


@click.command(name="bench", cls=Command)
@MODEL
@count("--prompt-tokens", 512, "Tokens of one prefill.")
@count("--decode-tokens", 64, "Tokens of one decode run.")
@count("--depth", 0, "Tokens taken as cached already.", least=0)
@count("--repetitions", 5, "Runs; medians are reported.")
@flag("--calibrate", "Keep bandwidths and a core's speed, measured here, for slotmoe plan.")
@open_options
@JSON
def command(model: str, calibrate: bool, as_json: bool, **options: Any) -> None:
    """Measure MODEL with random token ids: prefill from an empty cache, then decode after --depth
    cached tokens.

    The ceiling of decode is the bytes that one token touches over the read bandwidth measured in
    the same run, with every expert in memory.  Expert slots are filled before the clock starts.

    \b
    Examples:
      slotmoe bench sample
      slotmoe bench lite-random --depth 8192 --context 9000 --threads 2
      slotmoe bench lite-random --ram 5GiB --prompt-tokens 64 --json
      slotmoe bench lite-random --calibrate          what slotmoe plan then reckons with
    """
    from slotmoe.offload.observe.measure import Lasting
    from slotmoe.tools.bench.speed import calibration, measure

    counts = {name: options.pop(name) for name in _COUNTS}
    needed = max(counts["prompt_tokens"], counts["depth"] + counts["decode_tokens"])
    less = "lower --prompt-tokens, --depth or --decode-tokens"

    def check(context: int, advice: str) -> None:
        if needed > context:
            raise click.UsageError(f"{needed} positions are needed, not {context}: {advice}")

    check(options["context"] or DEFAULT_CONTEXT, f"{less}, or raise --context")
    with open_runtime(model, options, quiet=as_json) as runtime:
        check(runtime.context, or_more_context(less, runtime.config, runtime.context))
        with byte_bars("Filling expert slots", quiet=as_json) as (progress,):
            runtime.warm(progress)
        steps = 3 * counts["repetitions"]
        with step_progress(f"Measuring {model}", steps, quiet=as_json) as step:
            report, closed = measure(runtime, **counts, step=step), Lasting(runtime.model)
        options["context"] = runtime.context
    if calibrate:
        figures = calibration(closed, report)
        (path := cache_folder() / "machine.json").unlink(missing_ok=True)  # of another day
        gpu = report["settings"]["device"] if report["link"] else None
        store_bandwidths(path, gpu, **figures)
    given = {key: value for key, value in options.items() if value is not None}
    report["settings"] = {"model": model, **given, **report["settings"]}
    print(json_of(report)) if as_json else _print(report)


def _print(report: dict[str, Any]) -> None:
    settings, ceiling = report["settings"], report["ceiling"]
    most, share = ceiling["decode_tokens_per_second"], ceiling["decode_fraction"]
    limit = (f"{most:.1f}", f"{share:.0%}") if most else ("", "")
    rows = []
    labels = f"prefill {settings['prompt_tokens']}", f"decode after {settings['depth']}"
    for label, limits in zip(labels, (("", ""), limit), strict=True):
        kind = label.split()[0]
        runs, speed = report[f"{kind}_runs"], report[f"{kind}_tokens_per_second"]
        rows.append((label, f"{speed:.2f}", f"{min(runs):.2f}-{max(runs):.2f}", *limits))
    columns = ("", "median tokens/s", "range", "ceiling", "of ceiling")
    machine = f"{settings['kernels']} kernels, {settings['threads']} threads"
    title = one_line(f"{settings['model']} on {settings['device']}: {machine}")
    Console().print(table(columns, rows, title), *_sentences(report), sep="\n")


def _sentences(report: dict[str, Any]) -> list[str]:
    ceiling, link, disk = report["ceiling"], report["link"], report["disk"]
    stages = report["decode_milliseconds"].items()
    spent = [f"{name} {ms:.1f} ms" for name, ms in stages if ms >= 0.05]
    touched = [f"{name} {size / 1e6:.0f} MB" for name, size in ceiling["bytes_per_token"].items()]
    lines = [f"One token by stage: {', '.join(spent)}.", f"A token touches {', '.join(touched)}."]
    if ceiling["read_bandwidth"]:
        lines.append(f"Memory reads at {ceiling['read_bandwidth'] / 1e9:.1f} GB/s.")
    if link:
        pcie, busy, experts = (
            f"{link[name] / 1e9:.1f}" for name in ("pcie", "pcie_busy", "experts")
        )
        both = f"{busy} while the CPU computes experts at {experts}"
        lines.append(f"The link to the GPU gives {pcie} GB/s, {both}.")
    if disk is not None:
        lines.append(
            f"Decoding read {disk['bytes_per_token'] / 1e6:.0f} MB a token from disk, "
            f"{disk['bytes_per_second'] / 1e9:.2f} GB/s."
        )
    return lines
