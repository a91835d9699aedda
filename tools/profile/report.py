"""The report of ``slotmoe profile``: tables for a terminal, and a folder of files."""

import base64
from collections import Counter
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.text import Text

from slotmoe.errors import ConfigError, visible
from slotmoe.jsonfile import Json
from slotmoe.quant.export.writer import replace_file
from slotmoe.sizes import format_size
from slotmoe.tools.options import require_extra, say
from slotmoe.tools.run import drafted
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import table

CHARTS = (
    "memory-ram memory-vram time-decode time-prefill tokens expert-use layers bytes predicted"
).split()
_SCRATCH = ("runtime", "prefill scratch", "logits", "scratch and rest")
_WEIGHTS = "attention,dense layers,embeddings,predictor,residual streams,router,shared experts"
_TOGETHER = dict.fromkeys(_SCRATCH, "runtime and scratch")
_TOGETHER |= dict.fromkeys(_WEIGHTS.split(","), "resident weights")


def write_report(report: Json, folder: Path) -> None:
    """Write charts, ``profile.json`` and ``report.html`` into ``folder``, each replaced whole or
    not at all.  Charts of an earlier report that this one does not have are removed.  Without
    matplotlib there are no charts, and a line on stderr names the extra."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    images: dict[str, tuple[str, bytes]] = {}
    rows = compared(report)
    try:
        require_extra("plots", "matplotlib")
    except ConfigError as problem:
        say(f"the report has no charts: it {problem}")
    else:
        from slotmoe.tools.profile.charts import draw

        images = draw(report, rows)
    files = {f"{name}.png": png for name, (_, png) in images.items()}
    files["profile.json"] = json_of(report).encode()
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.finalize = lambda value: visible(value) if type(value) is str else value
    environment.filters |= {"size": format_size, "base64": lambda d: base64.b64encode(d).decode()}
    page = environment.get_template("report.html").render(**report, images=images, compared=rows)
    files["report.html"] = page.encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name in {f"{chart}.png" for chart in CHARTS} - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        replace_file(folder / name, data)


def compared(report: Json) -> list[Json]:
    """Predicted beside measured, in bytes or tokens a second."""
    rows, predicted = list[tuple[str, str, float, float]](), report["predicted"]
    for tier, peak in report["peak"].items():
        plan, actual = (_by_name(figures["components"], tier) for figures in (predicted, report))
        for name in dict.fromkeys([*plan, *actual]):
            rows.append((name, tier, plan.get(name, 0), actual.get(name, 0)))
        rows.append((f"all of {tier}", tier, predicted["peak"][tier], peak))
    for kind in ("prefill", "decode"):
        speeds = [part[f"{kind}_tokens_per_second"] for part in (predicted, report)]
        if None not in speeds:
            rows.append((f"{kind} speed", "tokens/s", *speeds))
    return [dict(zip(("name", "unit", "predicted", "measured"), row, strict=True)) for row in rows]


def _by_name(components: dict[str, dict[str, int]], tier: str) -> dict[str, int]:
    """Bytes in ``tier`` by component, where the process and its temporaries are together."""
    sums = Counter[str]()
    for name, sizes in components.items():
        sums[_TOGETHER.get(name, name)] += sizes.get(tier, 0)
    return {name: size for name, size in sums.items() if size}


def overview(report: Json) -> RenderableType:
    """The figures as tables for a terminal."""
    tables = []
    for tier, peak in report["peak"].items():
        latest, budget = (format_size(report[name][tier]) for name in ("latest", "budget"))
        sizes = {name: by_tier.get(tier, 0) for name, by_tier in report["components"].items()}
        rows = [(n, format_size(size), f"{size / peak:.0%}") for n, size in sizes.items() if size]
        title = f"{tier}: peak {format_size(peak)}, now {latest}, budget {budget}"
        tables.append(table(("at the peak", "size", "share"), rows, title))
    spent = [report["time"][kind]["milliseconds_per_token"] for kind in ("prefill", "decode")]
    rows = []
    for part in dict.fromkeys([*spent[1], *spent[0]]):
        share = f"{spent[1][part] / sum(spent[1].values()):.0%}" if part in spent[1] else ""
        times = [f"{kind[part]:.2f}" if part in kind else "" for kind in spent]
        rows.append((part, *times, share))
    counts = [f"{k} ({t['tokens']})" if t["tokens"] else k for k, t in report["time"].items()]
    tables.append(table(("", *counts, "of decode"), rows, "Time of a token in ms"))
    lines = [Text(", ".join(_sentences(report)) + ".")]
    if "verdict" in report:
        lines.insert(0, Text(report["verdict"]["text"], style="bold"))
    elif not report["time"]["prefill"]["tokens"]:
        lines = [Text("reading the prompt…")]
    return Group(*lines, Columns(tables))


def _sentences(report: Json) -> list[str]:
    cache, facts = report["cache"], []
    for kind in ("prefill", "decode"):
        if speed := report[f"{kind}_tokens_per_second"]:
            facts.append(f"{kind} {speed:.1f} tokens/s")
    if cache["hit_rate"] is not None:
        facts.append(f"{cache['hit_rate']:.1%} hits in {cache['slots']} slots")
    if cache["prefetch_used"]:
        ahead = cache["already_coming"] / cache["misses"]
        facts.append(f"{ahead:.0%} of the misses on their way when the gate asked")
    facts += drafted(report["drafts"])
    for tier, moved in report["io"].items():
        facts.append(f"{format_size(moved['bytes'])} from {tier} in {moved['seconds']:.1f} s")
    return facts
