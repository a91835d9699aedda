"""The measured run, and its figures as one JSON-able object, which ``profile.json`` holds."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live

from slotmoe import __version__
from slotmoe.errors import PlanError
from slotmoe.jsonfile import Json
from slotmoe.offload.machine import cache_folder, process_bytes
from slotmoe.offload.observe import measure
from slotmoe.offload.observe.memory_sampler import MemorySampler
from slotmoe.offload.observe.profiler import Profiler, attach
from slotmoe.offload.plan.memory import or_more_context
from slotmoe.offload.plan.speed import stored_bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study.calibrate import read_text
from slotmoe.signals import Stopping
from slotmoe.system import peak_rss
from slotmoe.tools.options import generation_arguments, open_runtime, prompt_text, say
from slotmoe.tools.profile.report import overview
from slotmoe.tools.profile.verdict import verdict
from slotmoe.tools.run import speeds
from slotmoe.tools.screen import show
from slotmoe.tools.tables import Console, byte_bars, step_progress

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
    model: str, prompt: str | None, text: Path | None, quiet: bool, options: Json
) -> tuple[Json, Stopping]:
    """The report, and what may have stopped the run."""
    report, stopping, lasting = _observed(model, prompt, text, quiet, options)
    # The model is closed by now, because measuring takes memory of its own.
    room = lasting.plan.budget - process_bytes() if lasting.plan.tier == "ram" else math.inf
    ram, disk = measure.ram_bandwidth(lasting.cpu, room), measure.drive_bandwidths(lasting.export)
    latency = measure.disk_latency(lasting.export)
    rates = {"ram": ram, "disk": sum(disk), **report["bandwidths"]}
    report["bandwidths"] = {**rates, "disk_latency": latency}
    known = stored_bandwidths(cache_folder() / "machine.json")
    setting = lasting.setting(known.updated("measured", latency=latency, **rates))
    tokens = [max(1, report["time"][kind]["tokens"]) for kind in ("prefill", "decode")]
    report["verdict"] = verdict(report, setting, lasting.kernels, *tokens)
    report["predicted"] = measure.predict(setting, *tokens)
    return report, stopping


def _observed(
    model: str, prompt: str | None, text: Path | None, quiet: bool, options: Json
) -> tuple[Json, Stopping, measure.Lasting]:
    """What was seen of the run, and what lasts when the model is closed."""
    live, warm, trace = (options.pop(name) for name in ("live", "warm", "trace"))
    arguments, words = generation_arguments(options), list[str]()
    most = arguments["max_new_tokens"]
    with (
        MemorySampler() as sampler,
        open_runtime(model, options, quiet=quiet) as runtime,
        sampler.watching(runtime.model),
    ):
        if warm:
            with byte_bars("Filling expert slots", quiet=quiet) as (progress,):
                runtime.warm(progress)
        given = _workload(runtime, prompt, text, most, arguments["chat"])
        if trace is not None:
            runtime.trace(trace)
        profiler, detach = attach(runtime, sampler.origin)

        def now() -> RenderableType:
            return overview(figures(runtime, profiler, sampler))

        stream = runtime.generate(given, **arguments)
        with (
            Stopping(lambda _: stream.close()) as stopping,
            _shown(now, most, live, quiet) as advance,
        ):
            for token in stream:
                words.append(token.text)
                advance()
        if stopping.number:
            so_far = f"stopped after {len(words)} of {most} tokens; writing the report so far"
            show("", f"slotmoe: {so_far}", err=True)
        detach()
        report: Json = {"model": model, "complete": not stopping.number}
        report |= measured(runtime, profiler, sampler)
        read = given if isinstance(given, str) else runtime.tokenizer.decode(given)
        lasting = measure.Lasting(runtime.model)
    workload = {"prompt": read, "text": "".join(words)}
    report["workload"] = {**workload, "new_tokens": len(words), "asked_tokens": most}
    asked = {key: value for key, value in options.items() if value is not None}
    report["settings"] = asked | report["settings"]
    return report, stopping, lasting


def _workload(
    runtime: Runtime, prompt: str | None, text: Path | None, max_new_tokens: int, chat: bool
) -> str | list[int]:
    """A text, or the ids of a text file's beginning where the whole would not fit."""
    if text is None:
        return DEFAULT_PROMPT if prompt is None else prompt_text(prompt)
    words = read_text(text, _TEXT_BYTES_PER_TOKEN * runtime.context)
    if chat:
        return words
    room = runtime.context - max_new_tokens
    if room < 1:
        problem = f"leaves no room for {text} in a context of {runtime.context} positions"
        advice = or_more_context("lower -n", runtime.config, runtime.context)
        raise PlanError(f"-n {max_new_tokens} {problem}: {advice}")
    ids = runtime.tokenizer.encode(words)
    if len(ids) > room:
        why = f"for --context {runtime.context} and -n {max_new_tokens}"
        say(f"{text}: the first {room} tokens are used, {why}")
    return ids[:room]


@contextlib.contextmanager
def _shown(
    overview: Callable[[], RenderableType], total: int, live: bool, quiet: bool
) -> Iterator[Callable[[], None]]:
    """Meanwhile stderr shows the figures (``live``) or a bar.  Call what it gives at each token."""
    console = Console(stderr=True)
    if live and console.is_terminal:  # drawing takes time from the model
        with Live(get_renderable=overview, console=console, refresh_per_second=2, transient=True):
            yield lambda: None
        return
    if live:
        say("--live needs a terminal on stderr; running without")
    with step_progress("Profiling, tokens", total, quiet) as advance:
        yield advance


def figures(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> Json:
    """All figures so far that fit a terminal."""
    stats, plan, latest = runtime.stats(), runtime.plan, sampler.samples[-1].total
    peak = {tier: sampler.highest[tier].total[tier] for tier in latest}
    if peak_rss() > sampler.earlier_peak:  # else this process held more before the profile
        peak["ram"] = max(peak["ram"], peak_rss())
    if "vram" in peak:
        peak["vram"] = max(peak["vram"], stats["memory"]["peak_vram"])
    components: dict[str, dict[str, int]] = {}
    for tier, most in peak.items():
        sample = sampler.highest[tier]
        sizes = Counter(sample.components[tier])
        # What came and went between two samples was no weight, slot or buffer.
        sizes["scratch and rest"] += most - sample.total[tier]
        for name, size in sizes.items():
            components.setdefault(name, {})[tier] = size
    host = {"ram": sum(plan.host.values())} if plan.host else {}
    report: Json = {"peak": peak, "latest": latest, "budget": {plan.tier: plan.budget} | host}
    report |= {"components": components, "time": {}, **speeds(stats)}
    for kind in ("prefill", "decode"):
        tokens, spent = profiler.tokens(kind), profiler.seconds(kind)
        each_token = {part: 1000 * seconds / tokens for part, seconds in spent.items() if tokens}
        times = {"tokens": tokens, "seconds": sum(spent.values())}
        report["time"][kind] = {**times, "milliseconds_per_token": each_token}
    report["cache"] = {name: stats["cache"][name] for name in _CACHE}
    for fate in ("used", "wasted", "cancelled"):
        counts = [guesses[fate] for guesses in stats.get("prefetch", {}).values()]
        report["cache"][f"prefetch_{fate}"] = sum(counts)
    return report | {"io": stats["io"], "drafts": stats["drafts"]}


def measured(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> Json:
    """``figures``, all series and settings, and what the link to a GPU gives."""
    model, tiers = runtime.model, sampler.samples[-1].total
    prompt, new = profiler.tokens("prefill"), profiler.tokens("decode")
    settings = {"slotmoe": __version__, "device": str(runtime.device), "threads": runtime.threads}
    settings |= {"kernels": runtime.stats()["kernels"], "context": runtime.context}
    report = figures(runtime, profiler, sampler) | {
        "memory": {tier: _series(sampler, tier) for tier in tiers},
        "peak_seconds": {tier: sampler.highest[tier].seconds for tier in tiers},
        "steps": [asdict(step) for step in profiler.passes],
        "layers": _layers(runtime, profiler),
        "touched_per_token": measure.bytes_per_token(model, prompt + new // 2),
        "settings": settings,
    }
    link = measure.link_bandwidths(model)
    report["bandwidths"] = {**link, "gpu": measure.read_bandwidth(model)} if link else {}
    return report


def _layers(runtime: Runtime, profiler: Profiler) -> list[Json]:
    lookahead = runtime.model.quantized("profile").lookahead
    guesses = lookahead.by_layer() if lookahead is not None else []
    layers = []
    for index, layer in enumerate(runtime.config.moe_layers):
        hits, misses = profiler.hits[index], profiler.misses[index]
        counts = {"hits": hits, "misses": misses, "already_coming": profiler.coming[index]}
        rate = hits / (hits + misses) if hits + misses else None
        prefetch = guesses[index] if guesses else None
        shares = {"hit_rate": rate, "uses": profiler.uses[index], "prefetch": prefetch}
        layers.append({"layer": layer, **counts, **shares})
    return layers


def _series(sampler: MemorySampler, tier: str) -> Json:
    """Memory of one tier as columns: ``seconds``, ``bytes``, and bytes by component."""
    samples = [sample for sample in sampler.samples if tier in sample.total]
    names = dict.fromkeys(name for sample in samples for name in sample.components[tier])
    sizes = {name: [s.components[tier].get(name, 0) for s in samples] for name in names}
    seconds = [round(sample.seconds, 3) for sample in samples]
    total = [sample.total[tier] for sample in samples]
    return {"seconds": seconds, "bytes": total, "components": sizes}
