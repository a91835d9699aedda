"""``slotmoe replay``: hit rate against cache size for every policy, from recorded routing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from slotmoe.offload.policy.cache import DEFAULT_POLICY, POLICIES

SHARES = (5, 10, 15, 25, 35, 50, 75, 100)


@click.command(name="replay")
@click.argument(
    "traces",
    nargs=-1,
    required=True,
    metavar="TRACE...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--slots",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Cache size, repeatable. [default: 5% to 100%]",
)
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    multiple=True,
    help="Policy to replay, repeatable. [default: all]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CHART.png",
    help="Draw a chart too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    traces: tuple[Path, ...],
    slots: tuple[int, ...],
    policy: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Replay the routing recorded in TRACE files under cache policies and sizes, without the model.

    Each token counts as one decode step, and the cache starts empty.  The optimum knows the future:
    no policy can do better without prefetching.  Of several traces (of one model) the mean is
    shown.

    \b
    Examples:
      slotmoe run sample "It is a truth universally acknowledged, that" -n 500 --trace austen.trace
      slotmoe replay austen.trace
      slotmoe replay *.trace --policy lru --policy layer-aware+bypass -o hit-rate.png
      slotmoe replay austen.trace --slots 22 --slots 56 --json
    """
    if output is not None:
        if output.suffix != ".png" or not output.absolute().parent.is_dir():
            raise click.UsageError(
                f"-o {output}: expected a name that ends in .png, in a folder that exists"
            )
    from slotmoe.offload.study.replay import OPTIMUM

    report = measure(traces, slots, (*(policy or POLICIES), OPTIMUM), quiet=as_json)
    if output is not None:
        _draw(report, output)
    print(json.dumps(report)) if as_json else _print(report)


def measure(
    traces: tuple[Path, ...], slots: tuple[int, ...], policies: tuple[str, ...], quiet: bool
) -> dict[str, Any]:
    """One JSON-able object: ``results`` has, for each policy and size, the hit rate and its share
    of the optimum's, both as ``by_trace`` and as their mean."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from slotmoe.errors import ConfigError
    from slotmoe.offload.observe.trace import read_trace
    from slotmoe.offload.study.replay import OPTIMUM, gate_choices, sweep

    opened = [read_trace(path) for path in traces]
    geometry = opened[0][0]
    for path, (header, steps) in zip(traces, opened, strict=True):
        if not steps:
            raise ConfigError(f"{path}: holds no tokens, expected at least one; record longer")
        if header != geometry:
            raise ConfigError(f"{path}: is of another model than {traces[0]}; replay them apart")
    experts, total = (
        geometry["n_routed_experts"],
        geometry["n_routed_experts"] * len(geometry["layers"]),
    )
    if max(slots, default=0) > total:
        raise ConfigError(
            f"--slots {max(slots)}: the model of {traces[0]} has {total} experts, ask for at most that many"
        )
    sizes = sorted(set(slots)) or sorted(
        {max(geometry["num_experts_per_tok"], round(share * total / 100)) for share in SHARES}
    )
    rates: dict[tuple[str, int], list[float]] = {}
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("Replaying", total=len(traces) * len(sizes) * len(policies))
        for _, steps in opened:
            choices = gate_choices(steps, experts)
            asked = len(choices) * len(choices[0]) * len(choices[0][0])
            for policy, size, hits in sweep(choices, policies, sizes, experts):
                rates.setdefault((policy, size), []).append(hits / asked)
                bar.advance(task)
    results = []
    for (policy, size), found in rates.items():
        shares = [
            rate / best if best else 1.0
            for rate, best in zip(found, rates[OPTIMUM, size], strict=True)
        ]
        result = {
            "policy": policy,
            "slots": size,
            "hit_rate": sum(found) / len(found),
            "of_optimum": sum(shares) / len(shares),
        }
        results.append(result | {"by_trace": {"hit_rate": found, "of_optimum": shares}})
    counted = [
        {"file": str(path), "tokens": sum(map(len, steps))}
        for path, (_, steps) in zip(traces, opened, strict=True)
    ]
    return {"traces": counted, "experts": total, "default": DEFAULT_POLICY, "results": results}


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    tokens = sum(trace["tokens"] for trace in report["traces"])
    for key, title in (
        ("hit_rate", f"Hits in % of the gates' choices: {tokens} tokens"),
        ("of_optimum", "Hits in % of the optimum's"),
    ):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("slots", no_wrap=True)
        rows: dict[str, list[str]] = {}
        for result in report["results"]:
            rows.setdefault(result["policy"], []).append(f"{100 * result[key]:.1f}")
        sizes = sorted({result["slots"] for result in report["results"]})
        for size in sizes:
            table.add_column(f"{size}\n{100 * size / report['experts']:.0f}%", justify="right")
        for policy, cells in rows.items():
            table.add_row(policy, *cells, style="bold" if policy == report["default"] else None)
        console.print(title)
        console.print(table)


def _draw(report: dict[str, Any], output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from slotmoe.offload.study.replay import OPTIMUM

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(result["policy"] for result in report["results"]):
        points = [
            (result["slots"], result["hit_rate"])
            for result in report["results"]
            if result["policy"] == policy
        ]
        style = (
            {"color": "black", "linestyle": "--"}
            if policy == OPTIMUM
            else {"linewidth": 2.5 if policy == report["default"] else 1.2}
        )
        axes.plot(
            [100 * size / report["experts"] for size, _ in points],
            [100 * rate for _, rate in points],
            "o",
            ls="-",
            ms=4,
        )
        axes.lines[-1].set(label=policy, **style)
    tokens = sum(trace["tokens"] for trace in report["traces"])
    axes.set(
        xlabel="experts that have a slot (%)",
        ylabel="hits (% of the gates' choices)",
        xlim=(0, 101),
        ylim=(0, 101),
    )
    axes.set_title(
        f"Expert cache by policy: {report['experts']} experts, {tokens} tokens of {len(report['traces'])} recorded runs"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(output)
