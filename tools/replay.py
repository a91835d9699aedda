"""``slotmoe replay``: hit rate against cache size for every policy, from recorded routing."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import click
from rich.text import Text

from slotmoe.errors import ConfigError, naming
from slotmoe.jsonfile import Json
from slotmoe.offload.observe.trace import read_trace
from slotmoe.offload.policy import DEFAULT_POLICY, POLICIES
from slotmoe.offload.study.replay import OPTIMUM, gate_choices, replay
from slotmoe.tools.options import EXISTING, JSON, NEW_FILE, option, require_extra
from slotmoe.tools.progress import step_progress
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import Console, table

Paths = tuple[Path, ...]
_SIZES_HELP = "Cache size, repeatable. [default: 5% to 100%]"
_POLICIES_HELP = "Policy to replay, repeatable. [default: all]"
SHARES = (5, 10, 15, 25, 35, 50, 75, 100)


@click.command(name="replay")
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...", type=EXISTING)
@option("--slots sizes", "N", _SIZES_HELP, type=click.IntRange(1), multiple=True)
@option("--policy policies", None, _POLICIES_HELP, type=click.Choice(POLICIES), multiple=True)
@option("-o --output", "CHART.png", "Draw a chart too.", type=NEW_FILE)
@JSON
def command(
    traces: Paths, sizes: Sequence[int], policies: Sequence[str], output: Path | None, as_json: bool
) -> None:
    """Replay the routing recorded in TRACE files under cache policies and sizes, without the model.

    Each token counts as one decode step, and the cache starts empty.  The optimum knows the future:
    no policy can do better without prefetching.  Several traces of one model show their mean.

    \b
    Examples:
      slotmoe run sample "It is a truth universally acknowledged, that" -n 500 --trace austen.trace
      slotmoe replay austen.trace
      slotmoe replay *.trace --policy lru -o hit-rate.png
      slotmoe replay austen.trace --slots 22 --slots 56 --json
    """
    if output is not None:
        if output.suffix != ".png":
            raise click.UsageError(f"-o {output}: expected a name that ends in .png")
        require_extra("plots", "matplotlib")  # before minutes of work, not after
    report = measure(traces, sizes, (*(policies or POLICIES), OPTIMUM), quiet=as_json)
    if output is not None:
        _draw(report, output)
    print(json_of(report)) if as_json else _print(report)


def measure(traces: Paths, slots: Sequence[int], policies: Sequence[str], quiet: bool) -> Json:
    """JSON, ``results``: hits, share of the optimum's, by policy, size.  Raises ``ConfigError``."""
    opened = [read_trace(path) for path in traces]
    geometry = opened[0][0]
    for path, (header, steps) in zip(traces, opened, strict=True):
        if not steps:
            raise ConfigError(f"{path}: holds no tokens, expected at least one; record longer")
        if header != geometry:
            raise ConfigError(f"{path}: is of another model than {traces[0]}; replay them apart")
    experts, top_k = geometry["n_routed_experts"], geometry["num_experts_per_tok"]
    total = experts * (layers := len(geometry["layers"]))
    if max(slots, default=0) > total:
        problem = f"the model of {traces[0]} has {total} experts, ask for at most that many"
        raise ConfigError(f"--slots {max(slots)}: {problem}")
    sizes = sorted(set(slots) or {max(top_k, round(share * total / 100)) for share in SHARES})
    choices = [gate_choices(steps, experts) for _, steps in opened]
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in product(policies, sizes)}
    with step_progress("Replaying", len(traces) * len(rates), quiet) as advance:
        for (policy, size), hit_rates in rates.items():
            for chosen, features in choices:
                hits = replay(chosen, features, policy, size, experts)
                hit_rates.append(hits / (len(chosen) * layers * top_k))
                advance()
    results = []
    for (policy, size), hit_rates in rates.items():
        pairs = zip(hit_rates, rates[OPTIMUM, size], strict=True)
        shares = [rate / best if best else 1.0 for rate, best in pairs]
        by_trace = {"hit_rate": hit_rates, "of_optimum": shares}
        means = {name: fmean(values) for name, values in by_trace.items()}
        results.append({"policy": policy, "slots": size, **means, "by_trace": by_trace})
    tokens = zip(traces, choices, strict=True)
    counted = [{"file": str(path), "tokens": len(chosen)} for path, (chosen, _) in tokens]
    return {"traces": counted, "experts": total, "default": DEFAULT_POLICY, "results": results}


def _print(report: Json) -> None:
    console = Console()
    tokens = sum(trace["tokens"] for trace in report["traces"])
    sizes = sorted({result["slots"] for result in report["results"]})
    columns = ["slots", *(f"{size}\n{100 * size / report['experts']:.0f}%" for size in sizes)]
    hits = f"Hits in % of the gates' choices: {tokens} tokens"
    for key, title in (("hit_rate", hits), ("of_optimum", "Hits in % of the optimum's")):
        rows: dict[str, list[Text]] = {}
        for result in report["results"]:
            policy, style = result["policy"], "bold" * (result["policy"] == report["default"])
            row = rows.setdefault(policy, [Text(policy, style)])
            row.append(Text(f"{100 * result[key]:.1f}", style))
        console.print(title)
        console.print(table(columns, rows.values()))


def _draw(report: Json, output: Path) -> None:
    from matplotlib.axes import Axes

    from slotmoe.tools.profile.charts import picture

    def fill(axes: Axes) -> str:
        for policy in dict.fromkeys(result["policy"] for result in report["results"]):
            points = [result for result in report["results"] if result["policy"] == policy]
            shares = [100 * point["slots"] / report["experts"] for point in points]
            hits = [100 * point["hit_rate"] for point in points]
            (line,) = axes.plot(shares, hits, marker="o", markersize=4, label=policy)
            line.set_linewidth(2.5 if policy == report["default"] else 1.2)
            if policy == OPTIMUM:
                line.set(color="black", linestyle="--")
        axes.set(xlabel="experts that have a slot (%)", ylabel="hits (% of the gates' choices)")
        axes.set(xlim=(0, 101), ylim=(0, 101))
        axes.grid(alpha=0.3)
        axes.legend()
        tokens, runs = sum(trace["tokens"] for trace in report["traces"]), len(report["traces"])
        counts = f"{report['experts']} experts, {tokens} tokens of {runs} recorded runs"
        return f"Expert cache by policy: {counts}"

    with naming(output):
        output.write_bytes(picture(fill)[1])
