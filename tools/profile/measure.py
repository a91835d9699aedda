"""The measured run: what it reads, what the terminal shows meanwhile, and its figures as one
JSON-able object, which ``profile.json`` holds."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.live import Live

from slotmoe import __version__
from slotmoe.errors import ConfigError, PlanError
from slotmoe.offload.machine import peak_rss
from slotmoe.offload.observe import measure
from slotmoe.offload.observe.memory import MemorySampler
from slotmoe.offload.observe.profiler import Profiler, attach
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.options import generation_arguments, open_runtime, prompt_text
from slotmoe.tools.profile.report import overview
from slotmoe.tools.progress import byte_progress, step_progress

_CACHE = "hits misses hit_rate already_coming evictions bypassed slots".split()
DEFAULT_PROMPT = (
    "The harbour master kept three ledgers. In the first he wrote the ships that lay at the quay, "
    "in the second those that were expected before the tide turned, and in the third all the "
    "others, which were somewhere at sea. There was never room for every ship at once, so each "
    "morning he asked himself the same question: which of them would be wanted next? If he guessed "
    "well, the cranes stood ready when the bell rang. If he guessed badly, forty men sat on their "
    "crates and waited, and he wrote down for how long, because what is not written down is argued "
    "about afterwards."
)
_TEXT_BYTES_PER_TOKEN = 64  # of a text file no more than this times the context is read


def run(
    model: str, prompt: str | None, text: Path | None, quiet: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], BaseException | None]:
    """The report, and what stopped the run."""
    live, warm, trace = (options.pop(name) for name in ("live", "warm", "trace"))
    arguments, words, stopped = generation_arguments(options), list[str](), None
    most = arguments["max_new_tokens"]
    with (
        MemorySampler() as sampler,
        open_runtime(model, options, quiet=quiet) as runtime,
        sampler.watching(runtime.model),
    ):
        if warm:
            with byte_progress("Filling expert slots", quiet) as progress:
                runtime.warm(progress)
        given = _workload(runtime, prompt, text, most, arguments["chat"])
        if trace is not None:
            runtime.trace(trace)
        profiler, detach = attach(runtime, sampler.origin)
        tokens = runtime.generate(given, **arguments)

        def now() -> RenderableType:
            return overview(figures(runtime, profiler, sampler))

        try:
            with _shown(now, most, live, quiet) as advance:
                for token in tokens:
                    words.append(token.text)
                    advance()
        except (KeyboardInterrupt, SystemExit) as stop:
            stopped = stop
            so_far = f"stopped after {len(words)} of {most} tokens; writing the report so far"
            click.echo(f"\nslotmoe: {so_far}", err=True)
        profiler.between_steps()
        detach()
        report: dict[str, Any] = {"model": model, "complete": stopped is None}
        report |= measured(runtime, profiler, sampler)
        report["workload"] = {
            "prompt": given if isinstance(given, str) else runtime.tokenizer.decode(given),
            "text": "".join(words),
            "new_tokens": len(words),
            "asked_tokens": most,
        }
    asked = {key: value for key, value in options.items() if value is not None}
    report["settings"] = asked | report["settings"]
    return report, stopped


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
            f"-n {max_new_tokens} leaves no room for {text} in a context of {runtime.context} "
            "positions: lower -n or raise --context"
        )
    ids = runtime.tokenizer.encode(words)
    if len(ids) > room:
        click.echo(
            f"slotmoe: {text}: the first {room} tokens are used, "
            f"for --context {runtime.context} and -n {max_new_tokens}",
            err=True,
        )
    return ids[:room]


def _read_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file, at most its first ``limit`` bytes.  Raises ``ConfigError``."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        words = decoder.decode(data[:limit], final=len(data) <= limit)
    except UnicodeDecodeError as problem:
        raise ConfigError(
            f"{path}: not valid UTF-8 text (byte {problem.start} is "
            f"0x{problem.object[problem.start]:02x}); convert it, for example: "
            f"iconv -f latin1 -t utf-8 {path} > utf8.txt"
        ) from None
    if not words:
        raise ConfigError(f"{path}: the text is empty; give a file with at least one character")
    return words


@contextlib.contextmanager
def _shown(
    overview: Callable[[], RenderableType], total: int, live: bool, quiet: bool
) -> Iterator[Callable[[], None]]:
    """What the terminal shows meanwhile, on stderr: the figures (``live``) or a progress bar.  Call
    what this gives after each token."""
    console = Console(stderr=True)
    if live and console.is_terminal:  # drawing takes time from the model
        options: dict[str, Any] = {"refresh_per_second": 2, "transient": True}
        with Live(get_renderable=overview, console=console, **options):
            yield lambda: None
        return
    if live:
        click.echo("slotmoe: --live needs a terminal on stderr; running without", err=True)
    with step_progress("Profiling, tokens", total, quiet) as advance:
        yield advance


def figures(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> dict[str, Any]:
    """All that fits a terminal, so far: peak, budget, components at the peak, time by part, cache,
    io, speeds."""
    stats, plan, latest = runtime.stats(), runtime.plan, sampler.latest.total
    peak = {tier: sampler.highest(tier).total[tier] for tier in latest}
    if peak_rss() > sampler.earlier_peak:  # else this process held more before the profile
        peak["ram"] = max(peak["ram"], peak_rss())
    if "vram" in peak:
        peak["vram"] = max(peak["vram"], stats["memory"]["peak_vram"])
    components: dict[str, dict[str, int]] = {}
    for tier, most in peak.items():
        sample = sampler.highest(tier)
        parts = dict(sample.components[tier])
        # What came and went between two samples was no weight, slot or buffer.
        unseen = most - sample.total[tier]
        parts["scratch and rest"] = parts.get("scratch and rest", 0) + unseen
        for name, size in parts.items():
            components.setdefault(name, {})[tier] = size
    host = {"ram": sum(plan.host.values())} if plan.host else {}
    report: dict[str, Any] = {
        "peak": peak,
        "latest": latest,
        "budget": {plan.tier: plan.budget} | host,
        "components": components,
        "time": {},
    }
    for kind in ("prefill", "decode"):
        tokens, spent = profiler.tokens(kind), profiler.seconds(kind)
        report["time"][kind] = {
            "tokens": tokens,
            "seconds": sum(spent.values()),
            "milliseconds_per_token": {
                part: 1000 * seconds / tokens for part, seconds in spent.items() if tokens
            },
        }
        counted, seconds = stats["tokens"][f"{kind}_tokens"], stats["tokens"][f"{kind}_seconds"]
        report[f"{kind}_tokens_per_second"] = counted / seconds if seconds else None
    guesses = list(stats.get("prefetch", {}).values())
    report["cache"] = {name: stats["cache"][name] for name in _CACHE}
    for fate in ("used", "wasted", "cancelled"):
        report["cache"][f"prefetch_{fate}"] = sum(kind[fate] for kind in guesses)
    return report | {"io": stats["io"]}


def measured(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> dict[str, Any]:
    """``figures`` and all series: memory over time, each step, each layer, expert use, predictions
    and settings."""
    prompt, new = profiler.tokens("prefill"), profiler.tokens("decode")
    report = figures(runtime, profiler, sampler) | {
        "memory": {tier: _series(sampler, tier) for tier in sampler.latest.total},
        "peak_seconds": {tier: sampler.highest(tier).seconds for tier in sampler.latest.total},
        "steps": [asdict(step) for step in profiler.passes],
        "layers": _layers(runtime, profiler),
        "touched_per_token": measure.bytes_per_token(runtime.model, prompt + new // 2),
        "settings": {
            "slotmoe": __version__,
            "device": str(runtime.device),
            "kernels": runtime.stats()["kernels"],
            "threads": runtime.threads,
            "context": runtime.context,
        },
    }
    # Last, because measuring takes memory of its own.
    model, export = runtime.model, runtime.model.export
    link = measure.link_bandwidths(model)
    fast = {**link, "gpu": measure.read_bandwidth(model)} if link else {}
    ram, disk = measure.ram_bandwidth(model), measure.disk_bandwidth(export)
    latency = measure.disk_latency(export)
    rates = Bandwidths().updated("measured", ram=ram, disk=disk, latency=latency, **fast)
    report["bandwidths"] = {"ram": ram, "disk": disk, "disk_latency": latency, **fast}
    return report | {"predicted": measure.predict(model, max(prompt, 1), max(new, 1), rates)}


def _layers(runtime: Runtime, profiler: Profiler) -> list[dict[str, Any]]:
    lookahead = runtime.model.quantized("profile").lookahead
    layers, guesses = [], lookahead.by_layer() if lookahead is not None else []
    for index, layer in enumerate(runtime.config.moe_layers):
        hits, misses = profiler.hits[index], profiler.misses[index]
        layers.append(
            {
                "layer": layer,
                "hits": hits,
                "misses": misses,
                "already_coming": profiler.coming[index],
                "hit_rate": hits / (hits + misses) if hits + misses else None,
                "uses": profiler.uses[index],
                "prefetch": asdict(guesses[index]) if guesses else None,
            }
        )
    return layers


def _series(sampler: MemorySampler, tier: str) -> dict[str, Any]:
    """Memory of one tier as columns: ``seconds``, ``bytes``, and bytes by component."""
    samples = [sample for sample in sampler.samples if tier in sample.total]
    names = dict.fromkeys(name for sample in samples for name in sample.components[tier])
    return {
        "seconds": [round(sample.seconds, 3) for sample in samples],
        "bytes": [sample.total[tier] for sample in samples],
        "components": {
            name: [sample.components[tier].get(name, 0) for sample in samples] for name in names
        },
    }
