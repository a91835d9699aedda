"""``slotmoe profile``: where a run's memory and time go, as a report that opens offline, charts,
and numbers."""

from __future__ import annotations

import codecs
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slotmoe import __version__
from slotmoe.errors import ConfigError, PlanError
from slotmoe.tools.options import generation_options, open_runtime, prompt_text, runtime_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slotmoe.offload.observe.profiler import MemorySampler, Profiler, Sample
    from slotmoe.offload.runtime import Runtime

DEFAULT_PROMPT = (
    "The harbour master kept three ledgers. In the first he wrote the ships that lay at the quay, in the second those that "
    "were expected before the tide turned, and in the third all the others, which were somewhere at sea. There was never "
    "room for every ship at once, so each morning he asked himself the same question: which of them would be wanted next? "
    "If he guessed well, the cranes stood ready when the bell rang. If he guessed badly, forty men sat on their crates and "
    "waited, and he wrote down for how long, because what is not written down is argued about afterwards."
)
_TEXT_BYTES_PER_TOKEN = 64  # of a text file no more than this times the context is read


@click.command(name="profile")
@click.argument("model", metavar="MODEL")
@click.argument("prompt", required=False)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Take the prompt from a UTF-8 file.",
)
@generation_options
@runtime_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("slotmoe-profile"),
    show_default=True,
    metavar="DIR",
    help="Folder of the report; an earlier report there is replaced.",
)
@click.option(
    "--warm",
    is_flag=True,
    help="Fill the expert slots first, as after a long run; predictions are for that state.",
)
@click.option("--live", is_flag=True, help="Show the figures in the terminal while the model runs.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: what profile.json holds."
)
def command(
    model: str,
    prompt: str | None,
    text: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    chat: bool,
    trace: str | None,
    output: Path,
    warm: bool,
    live: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run MODEL on PROMPT, a text file or a built-in text, and report memory and time by component.

    The folder gets report.html (one file, opens offline), its charts as PNG, and profile.json:
    memory over time against the budget, the time of a token by component, expert use, hit rate and
    prefetch accuracy by layer, bytes by tier, and the plan's prediction beside what was measured.
    Of a text longer than the context, the beginning is used.  Ctrl-C ends the run early; what was
    measured until then is still written.

    \b
    Examples:
      slotmoe profile sample
      slotmoe profile lite-export --ram 5GiB -n 64 -o lite-5gib --live
      slotmoe profile lite-export --ram 5GiB --warm --json > steady.json
      slotmoe profile lite-export --text notes.txt --context 8192 --json > profile.json
    """
    from slotmoe.offload.observe.profiler import MemorySampler
    from slotmoe.tools.progress import byte_progress

    if prompt is not None and text is not None:
        raise click.UsageError("PROMPT and --text are both given: choose one")
    with _report_folder(output):
        import slotmoe.offload.runtime  # torch's own memory belongs to the baseline, not to the model

        with (
            MemorySampler() as sampler,
            open_runtime(model, options, quiet=as_json) as runtime,
            sampler.watching(runtime),
        ):
            if warm:
                with byte_progress("Filling expert slots", as_json) as progress:
                    runtime.warm(progress)
            given = _workload(runtime, prompt, text, max_new_tokens, chat)
            if trace is not None:
                runtime.trace(trace)
            profiler = runtime.profile(sampler.origin)
            tokens = runtime.generate(given, max_new_tokens, temperature, top_p, top_k, seed, chat)
            words: list[str] = []
            stopped = None
            try:
                with _shown(runtime, profiler, sampler, max_new_tokens, live, as_json) as advance:
                    for token in tokens:
                        words.append(token.text)
                        advance()
            except (KeyboardInterrupt, SystemExit) as stop:
                click.echo(
                    f"\nslotmoe: stopped after {len(words)} of {max_new_tokens} tokens; writing the report so far",
                    err=True,
                )
                stopped = stop
            profiler.between_steps()
            runtime.stop_profile()
            report = {
                "model": model,
                "complete": stopped is None,
                **measured(runtime, profiler, sampler),
            }
            report["workload"] = {
                "prompt": given if isinstance(given, str) else runtime.tokenizer.decode(given),
                "text": "".join(words),
                "new_tokens": len(words),
                "asked_tokens": max_new_tokens,
            }
            report["settings"] = {
                key: value for key, value in options.items() if value is not None
            } | report["settings"]
        _finish(report, output, as_json, stopped)


def _finish(
    report: dict[str, Any], output: Path, as_json: bool, stopped: BaseException | None
) -> None:
    """Write the folder and tell about it; raises ``stopped`` then, if the run was stopped."""
    from slotmoe.tools.profile.report import write_report

    with _uninterrupted():
        write_report(report, output)
    if stopped is not None:
        click.echo(
            f"slotmoe: {output / 'report.html'} has what was measured until then, and says so",
            err=True,
        )
        raise stopped
    if as_json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        console = Console(file=sys.stdout)
        console.print(overview(report))
        console.print(
            f"Report: {output / 'report.html'}", soft_wrap=True, highlight=False, markup=False
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this: who presses it twice still gets the report."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _report_folder(folder: Path) -> Iterator[None]:
    """Make sure before the work that ``folder`` can be written; one made here goes again if nothing
    came into it."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise ConfigError(
            f"{folder}: can't write a report there ({problem.strerror}); choose another folder with -o"
        ) from None
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty, as it should be
                folder.rmdir()


def _workload(
    runtime: Runtime, prompt: str | None, text: Path | None, max_new_tokens: int, chat: bool
) -> str | list[int]:
    """What to generate from: a text, or the ids of a text file's beginning where the whole would
    not fit."""
    if text is None:
        return DEFAULT_PROMPT if prompt is None else prompt_text(prompt)
    words = _read_text(text, _TEXT_BYTES_PER_TOKEN * runtime.context)
    if chat:
        return words
    room = runtime.context - max_new_tokens
    if room < 1:
        raise PlanError(
            f"-n {max_new_tokens} leaves no room for {text} in a context of {runtime.context} positions: lower -n or raise --context"
        )
    ids = runtime.tokenizer.encode(words)
    if len(ids) > room:
        click.echo(
            f"slotmoe: {text}: the first {room} tokens are used, for --context {runtime.context} and -n {max_new_tokens}",
            err=True,
        )
    return ids[:room]


def _read_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file, at most its first ``limit`` bytes.  Raises ``ConfigError``."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    try:
        words = codecs.getincrementaldecoder("utf-8")().decode(
            data[:limit], final=len(data) <= limit
        )
    except UnicodeDecodeError as problem:
        raise ConfigError(
            f"{path}: not valid UTF-8 text (byte {problem.start} is 0x{problem.object[problem.start]:02x}); convert it, "
            f"for example: iconv -f latin1 -t utf-8 {path} > utf8.txt"
        ) from None
    if not words:
        raise ConfigError(f"{path}: the text is empty; give a file with at least one character")
    return words


@contextlib.contextmanager
def _shown(
    runtime: Runtime,
    profiler: Profiler,
    sampler: MemorySampler,
    total: int,
    live: bool,
    quiet: bool,
) -> Iterator[Callable[[], None]]:
    """What the terminal shows meanwhile, on stderr: the figures (``live``) or a progress bar.  Call
    what this gives after each token.  Two refreshes a second, since drawing them takes time from
    the model."""
    from rich.console import Console
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if live and not console.is_terminal:
        click.echo("slotmoe: --live needs a terminal on stderr; running without", err=True)
    if live and console.is_terminal:
        with Live(
            get_renderable=lambda: overview(figures(runtime, profiler, sampler)),
            console=console,
            refresh_per_second=2,
            transient=True,
        ):
            yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        disable=quiet or not console.is_terminal,
        refresh_per_second=2,
        transient=True,
    ) as bar:
        task = bar.add_task("Profiling, tokens", total=total)
        yield lambda: bar.advance(task)


def figures(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> dict[str, Any]:
    """All that fits a terminal, so far: peak, budget, components at the peak, time by part, cache,
    io, speeds."""
    from slotmoe.offload.machine import peak_rss

    stats, latest = runtime.stats(), sampler.latest
    peak = {tier: sampler.highest(tier).total[tier] for tier in latest.total}
    if (
        peak_rss() > sampler.earlier_peak
    ):  # else the largest moment lies before the profile, as in a process with a history
        peak["ram"] = max(peak["ram"], peak_rss())
    if "vram" in peak:
        peak["vram"] = max(peak["vram"], stats["memory"]["peak_vram"])
    components: dict[str, dict[str, int]] = {}
    for tier, most in peak.items():
        sample = sampler.highest(tier)
        for name, size in sample.components[tier].items():
            # What came and went between two samples was no weight, slot or buffer.
            unseen = most - sample.total[tier] if name == "scratch and rest" else 0
            components.setdefault(name, {})[tier] = size + unseen
    report: dict[str, Any] = {
        "peak": peak,
        "latest": latest.total,
        "budget": _budgets(runtime),
        "components": components,
        "time": {},
    }
    for kind in ("prefill", "decode"):
        count, spent = profiler.tokens(kind), profiler.seconds(kind)
        per_token = (
            {part: 1000 * seconds / count for part, seconds in spent.items()} if count else {}
        )
        report["time"][kind] = {
            "tokens": count,
            "seconds": sum(spent.values()),
            "milliseconds_per_token": per_token,
        }
        counted = stats["tokens"]
        seconds = counted[f"{kind}_seconds"]
        report[f"{kind}_tokens_per_second"] = (
            counted[f"{kind}_tokens"] / seconds if seconds else None
        )
    cache, guesses = stats["cache"], stats.get("prefetch", {}).values()
    report["cache"] = {
        key: cache[key]
        for key in (
            "hits",
            "misses",
            "hit_rate",
            "already_coming",
            "evictions",
            "bypassed",
            "slots",
        )
    }
    report["cache"] |= {
        f"prefetch_{fate}": sum(one[fate] for one in guesses)
        for fate in ("used", "wasted", "cancelled")
    }
    return report | {"io": stats["io"]}


def _budgets(runtime: Runtime) -> dict[str, int]:
    budgets = {runtime.plan.tier: runtime.plan.budget}
    return budgets | ({"ram": sum(runtime.plan.host.values())} if runtime.plan.host else {})


def measured(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> dict[str, Any]:
    """``figures`` and all series: memory over time, each step, each layer, expert use, predictions
    and settings."""
    from slotmoe.offload.plan.speed import Bandwidths

    layers, guesses = [], runtime.prefetch_by_layer()
    for row, layer in enumerate(runtime.config.moe_layers):
        hits, misses = profiler.hits[row], profiler.misses[row]
        entry: dict[str, Any] = {
            "layer": layer,
            "hits": hits,
            "misses": misses,
            "already_coming": profiler.coming[row],
        }
        entry["hit_rate"] = hits / (hits + misses) if hits + misses else None
        entry["uses"] = profiler.uses[row]
        entry["prefetch"] = asdict(guesses[row]) if guesses else None
        layers.append(entry)
    tiers = sampler.latest.total
    prompt, new = profiler.tokens("prefill"), profiler.tokens("decode")
    report = figures(runtime, profiler, sampler) | {
        "memory": {
            tier: _series([sample for sample in sampler.samples if tier in sample.total], tier)
            for tier in tiers
        },
        "peak_seconds": {tier: sampler.highest(tier).seconds for tier in tiers},
        "steps": [asdict(one) for one in profiler.passes],
        "layers": layers,
        "touched_per_token": runtime.bytes_per_token(prompt + new // 2),
        "settings": {
            "slotmoe": __version__,
            "device": str(runtime.device),
            "kernels": runtime.stats()["kernels"],
            "threads": runtime.threads,
            "context": runtime.context,
        },
    }
    # Last, because measuring takes memory of its own.
    link = runtime.link_bandwidths()
    fast = {**link, "gpu": runtime.read_bandwidth()} if link else {}
    rates = Bandwidths().updated(
        "measured",
        ram=runtime.ram_bandwidth(),
        disk=runtime.disk_bandwidth(),
        latency=runtime.disk_latency(),
        **fast,
    )
    report["bandwidths"] = {
        "ram": rates.ram,
        "disk": rates.disk,
        "disk_latency": rates.latency,
        **fast,
    }
    return report | {"predicted": runtime.predict(max(prompt, 1), max(new, 1), rates)}


def _series(samples: list[Sample], tier: str) -> dict[str, Any]:
    """Memory of one tier as columns: ``seconds``, ``bytes``, and bytes by component."""
    names = dict.fromkeys(name for sample in samples for name in sample.components[tier])
    return {
        "seconds": [round(sample.seconds, 3) for sample in samples],
        "bytes": [sample.total[tier] for sample in samples],
        "components": {
            name: [sample.components[tier].get(name, 0) for sample in samples] for name in names
        },
    }


def overview(report: dict[str, Any]) -> RenderableType:
    """The figures as tables for a terminal."""
    from rich import box
    from rich.columns import Columns
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from slotmoe.offload.plan.memory import format_size

    def table(title: str, *columns: str) -> Table:
        made = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            min_width=44,
        )
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left", no_wrap=True)
        return made

    tables: list[RenderableType] = []
    for tier, peak in report["peak"].items():
        latest, budget = format_size(report["latest"][tier]), format_size(report["budget"][tier])
        parts = table(
            f"{tier}: peak {format_size(peak)}, now {latest}, budget {budget}",
            "at the peak",
            "size",
            "share",
        )
        for name, sizes in report["components"].items():
            if sizes.get(tier):
                parts.add_row(name, format_size(sizes[tier]), f"{sizes[tier] / peak:.0%}")
        tables.append(parts)
    times = table(
        "Time of a token in ms",
        "",
        *(f"{kind} ({report['time'][kind]['tokens']})" for kind in ("prefill", "decode")),
        "of decode",
    )
    prefill, decode = (
        report["time"][kind]["milliseconds_per_token"] for kind in ("prefill", "decode")
    )
    for part in dict.fromkeys([*decode, *prefill]):
        share = f"{decode[part] / sum(decode.values()):.0%}" if part in decode else ""
        times.add_row(
            part,
            *(f"{spent[part]:.2f}" if part in spent else "" for spent in (prefill, decode)),
            share,
        )
    tables.append(times)
    return Group(Text(", ".join(_sentences(report)) + "."), Columns(tables))


def _sentences(report: dict[str, Any]) -> list[str]:
    """Speeds, hits and bytes in few words."""
    from slotmoe.offload.plan.memory import format_size

    parts = [
        f"{kind} {speed:.1f} tokens/s"
        for kind in ("prefill", "decode")
        if (speed := report[f"{kind}_tokens_per_second"])
    ]
    cache = report["cache"]
    if cache["hit_rate"] is not None:
        parts.append(f"{cache['hit_rate']:.1%} hits in {cache['slots']} slots")
    if cache["prefetch_used"]:
        parts.append(
            f"{cache['already_coming'] / cache['misses']:.0%} of the misses on their way when the gate asked"
        )
    parts += [
        f"{format_size(moved['bytes'])} from {tier} in {moved['seconds']:.1f} s"
        for tier, moved in report["io"].items()
    ]
    return parts
