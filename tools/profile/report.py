"""The measured run of ``slotmoe profile``; its figures as one JSON-able object, which
``profile.json`` holds; and their report: tables for a terminal, and a folder of files."""

import base64
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.text import Text

from slotmoe import __version__
from slotmoe.errors import ConfigError, visible
from slotmoe.jsonfile import Json
from slotmoe.offload.machine import cache_folder, process_bytes
from slotmoe.offload.observe import measure
from slotmoe.offload.observe.profiler import MemorySampler, Profiler, profiled
from slotmoe.offload.plan.speed import Setting, stored_bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.writer import replace_file
from slotmoe.signals import Stopping
from slotmoe.sizes import format_size
from slotmoe.system import peak_rss
from slotmoe.tools import options
from slotmoe.tools.run import drafted, speeds
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import byte_bars, step_progress, table

CHARTS = ("memory-ram memory-vram time-decode time-prefill tokens expert-use layers bytes").split()
_SCRATCH = ("runtime", "prefill scratch", "logits", "scratch and rest")
_WEIGHTS = "attention,dense layers,embeddings,residual streams,router,shared experts"
_TOGETHER = dict.fromkeys(_SCRATCH, "runtime and scratch")
_TOGETHER |= dict.fromkeys(_WEIGHTS.split(","), "resident weights")
_PROMPT = Path(__file__).with_name("prompt.txt")
_CACHE = "hits misses hit_rate already_coming evictions bypassed slots".split()


def run(model: str, prompt: str | None, quiet: bool, given: Json) -> tuple[Json, Stopping]:
    """The report, and what may have stopped the run."""
    report, stopping, lasting = _observed(model, prompt, quiet, given)
    # The model is closed by now, because measuring takes memory of its own.
    room = lasting.plan.budget - process_bytes() if lasting.plan.tier == "ram" else math.inf
    ram, disk = measure.ram_bandwidth(lasting.cpu, room), measure.drive_bandwidths(lasting.export)
    latency = measure.disk_latency(lasting.export)
    rates = {"ram": ram, "disk": sum(disk), **report["bandwidths"]}
    report["bandwidths"] = {**rates, "disk_latency": latency}
    known = stored_bandwidths(cache_folder() / "machine.json", lasting.gpu)
    setting = lasting.setting(known.updated("measured", latency=latency, **rates))
    tokens = [max(1, report["time"][kind]["tokens"]) for kind in ("prefill", "decode")]
    report["verdict"] = verdict(report, setting)
    report["predicted"] = measure.predict(setting, *tokens)
    layers, misses = len(lasting.config.moe_layers), max(1, report["cache"]["misses"])
    if steps := [step for step in report.pop("routes") if len(step) == layers]:
        best = measure.best(setting, steps, report["cache"]["prefetch_wasted"] / misses)
        report["best"], speed = best, best["tokens_per_second"]
        told = f"Best for this text: {best['options']}, where {best['hit_rate']:.0%} hits"
        report["verdict"] += f" {told} and {speed:.1f} tokens/s are expected."
    return report, stopping


def _observed(
    model: str, prompt: str | None, quiet: bool, given: Json
) -> tuple[Json, Stopping, measure.Lasting]:
    """What was seen of the run, what may have stopped it, and what lasts of the closed model."""
    warm, trace = given.pop("warm"), given.pop("trace")
    arguments, words = options.generation_arguments(given), list[str]()
    most = arguments["max_new_tokens"]
    with (
        MemorySampler() as sampler,
        options.open_runtime(model, given, quiet=quiet) as runtime,
        sampler.watching(runtime.model),
    ):
        if warm:
            with byte_bars("Filling expert slots", quiet=quiet) as (progress,):
                runtime.warm(progress)
        text = options.prompt_text(prompt, _PROMPT if prompt is None else None)
        if trace is not None:
            runtime.trace(trace)
        with profiled(runtime, sampler.origin) as profiler:
            stream = runtime.generate(text, **arguments)
            with (
                Stopping(lambda _: stream.close()) as stopping,
                step_progress("Profiling, tokens", most, quiet) as advance,
            ):
                for token in stream:
                    words.append(token.text)
                    advance()
        if stopping.number:
            so_far = f"stopped after {len(words)} of {most} tokens; writing the report so far"
            show("", f"slotmoe: {so_far}", err=True)
        report: Json = {"model": model, "complete": not stopping.number}
        report |= _measured(runtime, profiler, sampler)
        lasting = measure.Lasting(runtime.model)
    workload = {"prompt": text, "text": "".join(words)}
    report["workload"] = {**workload, "new_tokens": len(words), "asked_tokens": most}
    asked = {key: value for key, value in given.items() if value is not None}
    report["settings"] = asked | report["settings"]
    return report, stopping, lasting


def _measured(runtime: Runtime, profiler: Profiler, sampler: MemorySampler) -> Json:
    """Figures, series and settings, and what the link to a GPU gives."""
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
    cache = {name: stats["cache"][name] for name in _CACHE}
    for fate in ("used", "wasted", "cancelled"):
        counts = [guesses[fate] for guesses in stats.get("prefetch", {}).values()]
        cache[f"prefetch_{fate}"] = sum(counts)
    time = {kind: _time(profiler, kind) for kind in ("prefill", "decode")}
    touched = time["prefill"]["tokens"] + time["decode"]["tokens"] // 2
    settings = {"slotmoe": __version__, "device": str(runtime.device), "threads": runtime.threads}
    settings |= {"kernels": stats["kernels"], "context": runtime.context}
    settings["cache_policy"] = runtime.model.quantized("profile").slots.cache.policy
    link = measure.link_bandwidths(runtime.model)
    return {
        **{"peak": peak, "latest": latest, "budget": {plan.tier: plan.budget} | host},
        **{"components": components, "time": time, **speeds(stats)},
        **{"cache": cache, "io": stats["io"], "drafts": stats["drafts"]},
        "memory": {tier: _series(sampler, tier) for tier in latest},
        "peak_seconds": {tier: sampler.highest[tier].seconds for tier in latest},
        "steps": [asdict(step) for step in profiler.passes],
        "layers": _layers(runtime, profiler),
        "routes": [*profiler.routes],
        "touched_per_token": measure.bytes_per_token(runtime.model, touched),
        "settings": settings,
        "bandwidths": {**link, "gpu": measure.read_bandwidth(runtime.model)} if link else {},
    }


def _time(profiler: Profiler, kind: str) -> Json:
    tokens, spent = profiler.tokens(kind), profiler.seconds(kind)
    each_token = {part: 1000 * seconds / tokens for part, seconds in spent.items() if tokens}
    times = {"tokens": tokens, "seconds": sum(spent.values())}
    return {**times, "milliseconds_per_token": each_token}


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


def verdict(report: Json, setting: Setting) -> str:
    """A sentence or two on what bounds the speed."""
    spent = report["time"]["decode"]["milliseconds_per_token"]
    speed = report["decode_tokens_per_second"]
    if not spent or not speed:
        return "Too few tokens were decoded to say what bounds the speed."
    slowest = max(spent, key=spent.__getitem__)
    share = spent[slowest] / sum(spent.values())
    text = f"Decode makes {speed:.1f} tokens/s; {share:.0%} of a token's time is {slowest}."
    plan, config = setting.plan, setting.config
    if plan.slots < len(config.moe_layers) * config.n_routed_experts:
        return f"{text} slotmoe plan says what another --{plan.tier} would give."
    return f"{text} Every expert has a slot, so more --{plan.tier} makes it no faster."


def write_report(report: Json, folder: Path) -> None:
    """Write charts, ``profile.json`` and ``report.html`` into ``folder``, each replaced whole or
    not at all.  Charts of an earlier report that this one does not have are removed.  Without
    matplotlib there are no charts, and a line on stderr names the extra."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    images: dict[str, tuple[str, bytes]] = {}
    rows = compared(report)
    try:
        options.require_extra("plots")
    except ConfigError as problem:
        options.say(f"the report has no charts: it {problem}")
    else:
        from slotmoe.tools.profile.charts import draw

        images = draw(report)
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
    lines.insert(0, Text(report["verdict"], style="bold"))
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
