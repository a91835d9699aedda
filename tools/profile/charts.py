"""The charts of ``slotmoe profile``, in colours of Okabe and Ito (the heat map: cividis), which
people with any kind of colour blindness can tell apart."""

import io
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slotmoe.jsonfile import Json
from slotmoe.sizes import format_size

BLUE, SKY, ORANGE, YELLOW, GREEN, RED, PURPLE, GREY = (
    "#0072B2 #56B4E9 #E69F00 #F0E442 #009E73 #D55E00 #CC79A7 #999999".split()
)
# Of what is in memory, of what takes time, and of what bytes come from.
_COLOURS = {"runtime": GREY, "resident weights": BLUE, "KV cache": PURPLE}
_COLOURS |= {"expert slots": ORANGE, "read buffers": YELLOW, "scratch and rest": GREEN}
_COLOURS |= {"attention": BLUE, "gate": PURPLE, "experts": ORANGE}
_COLOURS |= {"shared experts and dense layers": GREEN, "captured layers": "#004D40", "head": SKY}
_COLOURS |= {"cache and prefetch": YELLOW, "waiting for disk": RED, "waiting for RAM": "#8B3A00"}
_COLOURS |= {"sampling": GREY, "rest": "#DDDDDD"}
_COLOURS |= {"disk": RED, "RAM to the GPU": ORANGE}
_RATES = (
    ("hits, of what was needed", BLUE, "o-", "hits", ("hits", "misses")),
    ("already coming, of the misses", GREEN, "^-", "already_coming", ("misses",)),
    ("right, of the guesses", ORANGE, "s--", "right", ("guessed",)),
    ("used, of what was read ahead", RED, "D:", "used", ("used", "wasted")),
)
"""Of each line by layer: label, colour, style, the count that it shows, and those of the whole."""


def draw(report: Json) -> dict[str, tuple[str, bytes]]:
    """File name -> (title, PNG).  What has nothing to show is left out."""
    fills: dict[str, Callable[[Axes], str]] = {}  # each draws one and gives its title
    for tier in report["memory"]:
        fills[f"memory-{tier}"] = partial(_memory, report=report, tier=tier)
    for kind, time in report["time"].items():
        if time["milliseconds_per_token"]:
            fills[f"time-{kind}"] = partial(_time, kind=kind, time=time)
    if steps := [step for step in report["steps"] if step["kind"] == "decode"]:
        fills["bytes"] = partial(_bytes, report=report, steps=steps)
    if len(steps) > 1:
        fills["tokens"] = partial(_tokens, steps=steps)
    if any(any(layer["uses"]) for layer in report["layers"]):
        fills["expert-use"] = partial(_uses, layers=report["layers"])
        fills["layers"] = partial(_rates, layers=report["layers"], cache=report["cache"])
    images = dict[str, tuple[str, bytes]]()
    for name, fill in fills.items():
        figure, png = Figure(figsize=(9, 4.5), dpi=130, layout="constrained"), io.BytesIO()
        axes = figure.subplots()
        title = fill(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        FigureCanvasAgg(figure).print_png(png)
        images[name] = title, png.getvalue()
    return images


def _legend(axes: Axes) -> None:
    """Beside the chart, in the order of the stack."""
    beside = (1.0, 0.5)
    axes.legend(reverse=True, loc="center left", bbox_to_anchor=beside, frameon=False, fontsize=9)


def _stack(axes: Axes, x: Sequence[float], layers: dict[str, list[float]]) -> None:
    colours = [_COLOURS[name] for name in layers]
    axes.stackplot(x, [*layers.values()], labels=[*layers], colors=colours, linewidth=0)
    axes.margins(x=0)


def _bars(axes: Axes, values: dict[str, float], labels: list[str], what: str) -> None:
    colours = [_COLOURS.get(name, BLUE) for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set(xlim=(0, 1.2 * max(values.values()) or 1), xlabel=what)


def _memory(axes: Axes, report: Json, tier: str) -> str:
    series, most = report["memory"][tier], report["peak"][tier]
    unit, scale = ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20)
    budget, peak = report["budget"][tier] / scale, report["peak"][tier] / scale
    seconds, total = series["seconds"], [size / scale for size in series["bytes"]]
    parts = series["components"].items()
    _stack(axes, seconds, {name: [size / scale for size in sizes] for name, sizes in parts})
    axes.plot(seconds, total, color="black", linewidth=0.8, label="all of it")
    near = budget < 2 * peak  # else the chart would be empty below its line
    if near:
        axes.axhline(budget, color="black", linestyle="--", linewidth=1.5, label="budget")
    at = report["peak_seconds"][tier]
    axes.plot([at], [peak], "v", color="black", markersize=8, label="peak")
    axes.set(xlabel="time since the start (s)", ylabel=f"{tier} in use ({unit})")
    axes.set(ylim=(0, 1.1 * max(peak, budget if near else 0)))
    begins = {step["kind"]: step["began"] for step in reversed(report["steps"])}
    for kind, began in begins.items():  # a line where each phase begins
        axes.axvline(began, color="black", linestyle=":", linewidth=1)
        axes.text(began, 1, f" {kind}", transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    _legend(axes)
    most, allowed = (format_size(report[name][tier]) for name in ("peak", "budget"))
    return f"Memory ({tier}) by component over time: peak {most}, budget {allowed}"


def _time(axes: Axes, kind: str, time: Json) -> str:
    stages = dict(sorted(time["milliseconds_per_token"].items(), key=lambda item: item[1]))
    total = sum(stages.values())
    labels = [f"{ms:.2f} ms, {ms / total:.0%}" for ms in stages.values()]
    _bars(axes, stages, labels, "time per token (ms)")
    return f"Time of a token by component, {kind}: {total:.1f} ms, mean of {time['tokens']}"


def _tokens(axes: Axes, steps: list[Json]) -> str:
    spent = [step["seconds"] for step in steps]
    names = [name for name in _COLOURS if any(name in token for token in spent)]
    times = {name: [1000 * token.get(name, 0.0) for token in spent] for name in names}
    _stack(axes, range(1, len(spent) + 1), times)
    axes.set(xlabel="pass of decode", ylabel="time (ms)")
    _legend(axes)
    return "Time of each pass of decode by component"


def _uses(axes: Axes, layers: list[Json]) -> str:
    uses = [layer["uses"] for layer in layers]
    image = axes.imshow(uses, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    shown = range(0, len(layers), -(-len(layers) // 15))
    axes.set_yticks(shown, [str(layers[index]["layer"]) for index in shown])
    axes.set(xlabel="expert", ylabel="layer")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="tokens")
    return "Expert use by layer: tokens that each expert computed"


def _rates(axes: Axes, layers: list[Json], cache: Json) -> str:
    for label, colour, style, part, whole in _RATES:
        shares = {}
        for layer in layers:
            counts = layer | (layer["prefetch"] or {})
            if total := sum(counts.get(name, 0) for name in whole):
                shares[layer["layer"]] = 100 * counts[part] / total
        if shares:
            axes.plot(list(shares), list(shares.values()), style, label=label, color=colour, ms=5)
    axes.set(xlabel="layer", ylabel="share (%)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    _legend(axes)
    title, used = f"Cache hits by layer: {cache['hit_rate']:.0%} in all", cache["prefetch_used"]
    read = used + cache["prefetch_wasted"]
    return f"{title}; of what was read ahead {used / read:.0%} was used" if read else title


def _bytes(axes: Axes, report: Json, steps: list[Json]) -> str:
    """MB that a decoded token read from memory and from each slower tier, on average."""
    moved = {f"memory: {name}": size / 1e6 for name, size in report["touched_per_token"].items()}
    for tier, name in (("disk", "disk"), ("host", "RAM to the GPU")):
        if tier in report["io"]:
            moved[name] = sum(step["moved"][tier] for step in steps) / len(steps) / 1e6
    moved = dict(reversed(moved.items()))
    _bars(axes, moved, [f"{size:,.1f} MB" for size in moved.values()], "bytes per token (MB)")
    return "Bytes by tier: what a decoded token took, mean"
