"""The folder that ``slotmoe profile`` writes: charts as PNG, ``profile.json``, and ``report.html``,
which holds all of it.

Colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart;
the heat map uses cividis.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmoe.offload.plan.memory import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, SKY, ORANGE, YELLOW, GREEN, RED, PURPLE, GREY = (
    "#0072B2 #56B4E9 #E69F00 #F0E442 #009E73 #D55E00 #CC79A7 #999999".split()
)
_COLOURS = {
    "runtime": GREY,
    "resident weights": BLUE,
    "latent KV cache": PURPLE,
    "expert slots": ORANGE,
    "read buffers": YELLOW,
    "scratch and rest": GREEN,
    "attention": BLUE,
    "gate": PURPLE,
    "experts": ORANGE,
    "shared experts and dense layers": GREEN,
    "head": SKY,
    "cache and prefetch": YELLOW,
    "waiting for disk": RED,
    "waiting for RAM": "#8B3A00",
    "sampling": GREY,
    "rest": "#DDDDDD",
}
CHARTS = "memory-ram memory-vram time-decode time-prefill tokens expert-use layers bytes predicted".split()


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write charts, ``profile.json`` and ``report.html`` into ``folder``, each replaced whole or
    not at all.  Charts of an earlier report that this one does not have are removed."""
    images = {name: (title, _png(title, draw)) for name, (title, draw) in _charts(report).items()}
    page = _html(report, images)
    for name in CHARTS:
        if name in images:
            _replace(folder / f"{name}.png", images[name][1])
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    _replace(folder / "profile.json", json.dumps(report).encode())
    _replace(folder / "report.html", page.encode())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _html(report: dict[str, Any], images: dict[str, tuple[str, bytes]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["size"] = format_size
    embedded = {
        name: (title, base64.b64encode(data).decode()) for name, (title, data) in images.items()
    }
    moments = {tier: moment(report, seconds) for tier, seconds in report["peak_seconds"].items()}
    return environment.get_template("report.html").render(
        **report, images=embedded, compared=compared(report), moments=moments
    )


def moment(report: dict[str, Any], seconds: float) -> str:
    """What the run was doing at that time."""
    name = "while the model was loaded"
    for number, step in enumerate(report["steps"]):
        if step["began"] <= seconds:
            name = (
                f"in the prefill of {step['tokens']} tokens"
                if step["kind"] == "prefill"
                else f"while token {number + 1} was made"
            )
    return name


def compared(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of predicted beside measured, in bytes or tokens a second: ``name``, ``unit``,
    ``predicted``, ``measured``."""
    rows: list[dict[str, Any]] = []
    foreseen = report["predicted"]
    for tier, peak in report["peak"].items():
        planned, found = (
            _by_name(foreseen["components"], tier),
            _by_name(report["components"], tier),
        )
        for name in dict.fromkeys([*planned, *found]):
            rows.append(
                {
                    "name": name,
                    "unit": tier,
                    "predicted": planned.get(name, 0),
                    "measured": found.get(name, 0),
                }
            )
        rows.append(
            {
                "name": f"all of {tier}",
                "unit": tier,
                "predicted": foreseen["peak"][tier],
                "measured": peak,
            }
        )
    for kind in ("prefill", "decode"):
        key = f"{kind}_tokens_per_second"
        if foreseen[key] is not None and report[key] is not None:
            rows.append(
                {
                    "name": f"{kind} speed",
                    "unit": "tokens/s",
                    "predicted": foreseen[key],
                    "measured": report[key],
                }
            )
    return rows


_TOGETHER = dict.fromkeys(
    ("runtime", "prefill scratch", "logits", "scratch and rest"), "runtime and scratch"
)
_TOGETHER |= dict.fromkeys(
    ("attention", "dense layers", "embeddings", "predictor", "router", "shared experts"),
    "resident weights",
)


def _by_name(components: dict[str, dict[str, int]], tier: str) -> dict[str, int]:
    """Bytes in ``tier`` by component.  The process and its temporaries can't be told apart from
    outside, so they are one."""
    sums: dict[str, int] = {}
    for name, sizes in components.items():
        shown = _TOGETHER.get(name, name)
        sums[shown] = sums.get(shown, 0) + sizes.get(tier, 0)
    return {name: size for name, size in sums.items() if size}


Draw = Callable[["Axes"], None]


def _charts(report: dict[str, Any]) -> dict[str, tuple[str, Draw]]:
    """File name -> (title, what draws it).  What has nothing to show is left out."""
    charts: dict[str, tuple[str, Draw]] = {}
    for tier, series in report["memory"].items():
        peak, budget = format_size(report["peak"][tier]), format_size(report["budget"][tier])
        title = f"Memory ({tier}) by component over time: peak {peak}, budget {budget}"
        charts[f"memory-{tier}"] = (
            title,
            partial(_draw_memory, report=report, tier=tier, series=series),
        )
    for kind in ("decode", "prefill"):
        spent = report["time"][kind]["milliseconds_per_token"]
        if spent:
            title = f"Time of a token by component, {kind}: {sum(spent.values()):.1f} ms, mean of {report['time'][kind]['tokens']}"
            charts[f"time-{kind}"] = title, partial(_draw_time, spent=spent)
    steps = [step for step in report["steps"] if step["kind"] == "decode"]
    if steps:
        charts["bytes"] = (
            "Bytes by tier: what a decoded token took, mean",
            partial(_draw_bytes, moved=_moved(report)),
        )
    if len(steps) > 1:
        charts["tokens"] = (
            "Time of each decoded token by component",
            partial(_draw_tokens, steps=steps),
        )
    uses = [layer["uses"] for layer in report["layers"]]
    if any(map(any, uses)):
        charts["expert-use"] = (
            "Expert use by layer: tokens that each expert computed",
            partial(_draw_uses, layers=report["layers"]),
        )
        charts["layers"] = _rates_title(report), partial(_draw_rates, layers=report["layers"])
    charts["predicted"] = (
        "Memory: the plan beside what was measured at the peak",
        partial(_draw_predicted, rows=compared(report)),
    )
    return charts


def _png(title: str, draw: Draw) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _unit(most: int) -> tuple[str, int]:
    """A unit for an axis that reaches ``most`` bytes, and its bytes."""
    return ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20)


def _legend(axes: Axes) -> None:
    """Beside the chart, in the order of the stack."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
    )


def _draw_memory(axes: Axes, report: dict[str, Any], tier: str, series: dict[str, Any]) -> None:
    parts, (unit, scale) = series["components"], _unit(report["peak"][tier])
    budget, peak = report["budget"][tier] / scale, report["peak"][tier] / scale
    stack = [[size / scale for size in sizes] for sizes in parts.values()]
    axes.stackplot(
        series["seconds"],
        stack,
        labels=list(parts),
        colors=[_COLOURS[name] for name in parts],
        linewidth=0,
    )
    axes.plot(
        series["seconds"],
        [size / scale for size in series["bytes"]],
        color="black",
        linewidth=0.8,
        label="all of it",
    )
    if budget < 2 * peak:  # else the chart would be empty below its line
        axes.axhline(budget, color="black", linestyle="--", linewidth=1.5, label="budget")
    at = report["peak_seconds"][tier]
    axes.plot([at], [peak], "v", color="black", markersize=8, label="peak")
    axes.set(
        xlabel="time since the start (s)",
        ylabel=f"{tier} in use ({unit})",
        ylim=(0, 1.1 * max(peak, budget if budget < 2 * peak else 0)),
    )
    for kind in ("prefill", "decode"):  # a line where each phase begins
        began = [step["began"] for step in report["steps"] if step["kind"] == kind]
        if began:
            axes.axvline(began[0], color="black", linestyle=":", linewidth=1)
            axes.annotate(
                kind,
                (began[0], 1),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=9,
            )
    axes.margins(x=0)
    _legend(axes)


def _draw_time(axes: Axes, spent: dict[str, float]) -> None:
    total = sum(spent.values())
    parts = sorted(spent.items(), key=lambda item: item[1])
    bars = axes.barh(
        [name for name, _ in parts],
        [ms for _, ms in parts],
        color=[_COLOURS[name] for name, _ in parts],
    )
    axes.bar_label(
        bars, [f"{ms:.2f} ms, {ms / total:.0%}" for _, ms in parts], padding=4, fontsize=9
    )
    axes.set(xlabel="time per token (ms)", xlim=(0, 1.2 * parts[-1][1]))


def _draw_tokens(axes: Axes, steps: list[dict[str, Any]]) -> None:
    parts = [part for part in _COLOURS if any(part in step["seconds"] for step in steps)]
    stack = [[1000 * step["seconds"].get(part, 0.0) for step in steps] for part in parts]
    axes.stackplot(
        range(1, len(steps) + 1),
        stack,
        labels=parts,
        colors=[_COLOURS[part] for part in parts],
        linewidth=0,
    )
    axes.set(xlabel="decoded token", ylabel="time (ms)")
    axes.margins(x=0)
    _legend(axes)


def _draw_uses(axes: Axes, layers: list[dict[str, Any]]) -> None:
    uses = [layer["uses"] for layer in layers]
    image = axes.imshow(uses, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    every = -(-len(layers) // 15)
    axes.set_yticks(
        range(0, len(layers), every), [str(layer["layer"]) for layer in layers[::every]]
    )
    axes.set(xlabel="expert", ylabel="layer")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="tokens")


def _rates_title(report: dict[str, Any]) -> str:
    cache = report["cache"]
    title = f"Cache hits by layer: {cache['hit_rate']:.0%} in all"
    if cache["prefetch_used"] + cache["prefetch_wasted"]:
        title += f"; of what was read ahead {cache['prefetch_used'] / (cache['prefetch_used'] + cache['prefetch_wasted']):.0%} was used"
    return title


def _draw_rates(axes: Axes, layers: list[dict[str, Any]]) -> None:
    def line(
        label: str,
        colour: str,
        marker: str,
        style: str,
        rate: Callable[[dict[str, Any]], tuple[int, int]],
    ) -> None:
        points = [(layer["layer"], *rate(layer)) for layer in layers]
        shown = [(number, 100 * part / whole) for number, part, whole in points if whole]
        if shown:
            axes.plot(
                *zip(*shown, strict=True),
                label=label,
                color=colour,
                marker=marker,
                linestyle=style,
                markersize=5,
            )

    line(
        "hits, of what was needed",
        BLUE,
        "o",
        "-",
        lambda one: (one["hits"], one["hits"] + one["misses"]),
    )
    line(
        "already coming, of the misses",
        GREEN,
        "^",
        "-",
        lambda one: (one["already_coming"], one["misses"]),
    )
    if layers[0]["prefetch"] is not None:
        line(
            "right, of the guesses",
            ORANGE,
            "s",
            "--",
            lambda one: (one["prefetch"]["right"], one["prefetch"]["guessed"]),
        )
        line(
            "used, of what was read ahead",
            RED,
            "D",
            ":",
            lambda one: (one["prefetch"]["used"], _fates(one["prefetch"])),
        )
    axes.set(xlabel="layer", ylabel="share (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    _legend(axes)


def _fates(guesses: dict[str, int]) -> int:
    return guesses["used"] + guesses["wasted"]


def _moved(report: dict[str, Any]) -> dict[str, float]:
    """MB a decoded token by what gave them: what is read from memory, and what came from the slower
    tiers, on average."""
    moved = {f"memory: {name}": size / 1e6 for name, size in report["touched_per_token"].items()}
    steps = [step["moved"] for step in report["steps"] if step["kind"] == "decode"]
    names = {"host": "RAM to the GPU", "disk": "disk"}
    return moved | {
        names[tier]: sum(step[tier] for step in steps) / len(steps) / 1e6 for tier in report["io"]
    }


def _draw_bytes(axes: Axes, moved: dict[str, float]) -> None:
    names = list(moved)[::-1]
    colours = [
        BLUE if name.startswith("memory") else RED if name.startswith("disk") else ORANGE
        for name in names
    ]
    bars = axes.barh(names, [moved[name] for name in names], color=colours)
    axes.bar_label(bars, [f"{moved[name]:,.1f} MB" for name in names], padding=4, fontsize=9)
    axes.set(xlabel="bytes per token (MB)", xlim=(0, 1.2 * max(moved.values()) or 1))


def _draw_predicted(axes: Axes, rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row["unit"] in ("ram", "vram")][::-1]
    places, most = (
        range(len(shown)),
        max(row[key] for row in shown for key in ("predicted", "measured")),
    )
    unit, scale = _unit(most)
    for key, offset, colour in (("predicted", 0.2, SKY), ("measured", -0.2, BLUE)):
        bars = axes.barh(
            [place + offset for place in places],
            [row[key] / scale for row in shown],
            0.38,
            color=colour,
            label=key,
        )
        axes.bar_label(bars, [format_size(row[key]) for row in shown], padding=4, fontsize=8)
    axes.set_yticks(list(places), [row["name"] for row in shown])
    axes.set(xlabel=f"memory ({unit})", xlim=(0, 1.2 * most / scale))
    _legend(axes)
