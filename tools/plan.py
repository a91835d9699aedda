"""``slotmoe plan``: what goes where and how fast it will be, before a byte is downloaded."""

import math
import shlex
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from slotmoe.errors import DownloadError, PlanError, SlotmoeError, one_line
from slotmoe.jsonfile import Json
from slotmoe.model.config import read_config
from slotmoe.offload import machine
from slotmoe.offload.model_cache import is_hub_id, library, locate
from slotmoe.offload.plan import advice
from slotmoe.offload.plan.advice import Machine, Model
from slotmoe.offload.plan.memory import IMPORT_BYTES, choose_context, or_more_context, share_of
from slotmoe.offload.plan.precision import brief, check_vulkan
from slotmoe.offload.plan.speed import Bandwidths, stored_bandwidths
from slotmoe.quant.codecs.codec import DEFAULT_CODEC
from slotmoe.sizes import format_size, parse_size
from slotmoe.system import MAX_THREADS, choose_placement, cores
from slotmoe.tools import options
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import Console, table

_NAMES = {"vram": "GPU memory", "ram": "RAM", "disk": "disk"}
_LOSS = "KL: nats a token the sample loses; with text: by --calibrate. More: --verbose."
_CHOICES = ("codec", "bits", "resident", "export", "in memory", "tokens/s", "KL", "with text")
# What describes a machine: with one of them it may be another than this.
_MACHINE = "gpu ram_bandwidth disk_bandwidth pcie_bandwidth gpu_bandwidth".split()
# What the command of an export, or of the sample, takes over.
_RUN = "device ram vram context threads slots misses experts_dirs draft no_prefetch".split()
# The rows of memory without --verbose, and their components; what is in none is the last row.
GROUPS = {
    "resident weights": "embeddings, attention, dense layers, router, shared experts, "
    "residual streams",
    "KV cache": "KV cache",
    "experts": "expert slots, read buffers, all experts",
    "everything else": "",
}
_GPU_HELP = "Plan for this GPU, like rtx-4090 or rtx-3060."
_PROMPT_HELP = "Tokens of the prompt. [default: 512, or what the context has room for]"


@click.command(name="plan", cls=options.Command)
@options.MODEL
@options.option("--gpu", "NAME", _GPU_HELP, shell_complete=options.completing(lambda: advice.GPUS))
@options.precision_options
@options.count("--prompt-tokens", None, _PROMPT_HELP)
@options.count("-n --max-new-tokens", 128, "Tokens to generate.")
@options.option("--ram-bandwidth", "SIZE", "Bytes a second of RAM, like 40GB.")
@options.option("--disk-bandwidth", "SIZE", "Bytes a second of a drive, like 3.5GB.")
@options.option("--pcie-bandwidth", "SIZE", "Bytes a second to the GPU, like 25GB.")
@options.option("--gpu-bandwidth", "SIZE", "Bytes a second of GPU memory, like 1008GB.")
@options.plan_options
@options.flag("--verbose", "Show each component, each choice, and what the speeds rest on.")
@options.JSON
def command(
    model: str, prompt_tokens: int | None, max_new_tokens: int, as_json: bool, **given: Any
) -> int:
    """Say whether MODEL fits, what goes to which tier, and how fast it will be, without weights.

    MODEL is a geometry (v2-lite, v3, glm-5, gpt-oss-20b and others, which an unknown name lists),
    an export, a checkpoint folder, a GGUF file, the path of a config.json, or a hub id, of which
    the config alone is fetched. Speeds come from bandwidths: those given here, those that slotmoe
    bench --calibrate has measured on this machine, or assumptions; the report says which.

    If the model does not fit, the exit code is 1, and the report names the shortfall and the
    cheapest ways out.  If it fits, the last line is the command to type next.  Without options for
    another machine (--gpu, bandwidths, more --ram or --threads than here) the free disk of the
    cache folder counts too.

    \b
    Examples:
      slotmoe plan v2 --gpu rtx-4090 --ram 64GiB --disk-bandwidth 5GB
      slotmoe plan v2-lite --ram 5GiB
      slotmoe plan DeepSeek-V2-Lite-Chat --ram 8GiB --context 32768 --json
    """
    planned, target = _model(model, given["revision"]), _machine(given)
    if given["draft"] == "mtp":
        planned = planned.with_mtp()
    context = choose_context(planned.config, given["context"])
    if prompt_tokens is None:
        prompt_tokens = min(512, max(1, context - max_new_tokens))
    if prompt_tokens >= context:
        problem = f"a prompt of {prompt_tokens} tokens does not fit the context of {context}"
        less = or_more_context("lower --prompt-tokens", planned.config, context)
        raise PlanError(f"{problem}: {less}")
    given |= {"codecs": options.expert_codecs(given), "for_gpu": target.vram is not None}
    how = options.precision(given, planned.config, quiet=as_json)
    resident, why, codecs = planned.coded(**how)
    scenario = advice.Scenario(
        planned,
        target,
        resident,
        codecs,
        context,
        slots=given["slots"],
        misses=given["misses"],
        drafts=given["draft"] == "mtp" or target.vram is None,
        prefetch=not given["no_prefetch"],
    )
    if given["threads"] is None and _is_here(given):  # fewer where the plan fits one processor
        plan = scenario.plan
        size = plan.total if target.vram is None else sum(plan.host.values())
        target = replace(target, threads=choose_placement(size).threads)
        scenario = replace(scenario, machine=target)
    if target.vulkan:
        check_vulkan(planned.config)
    report = scenario.report(prompt_tokens, max_new_tokens)
    report |= {
        "resident": {"precision": resident, "why": why},
        "choices": scenario.choices(prompt_tokens, max_new_tokens),
        "command": _next(planned, target.vram is not None) if report["fits"] else None,
    }
    print(json_of(report)) if as_json else _print(report, given["verbose"])
    return int(not report["fits"])


def _model(name: str, revision: str | None) -> Model:
    """What MODEL is, from its config and an export's manifest; on the hub from the config there, or
    in huggingface_hub's cache.  Raises ``ConfigError`` or ``DownloadError``."""
    is_here = Path(name).exists()
    if is_here or revision is not None:
        locate(name, revision, options.say)  # says what may surprise, or refuses
    if is_here or not is_hub_id(name):
        place = name if is_here or name in advice.GEOMETRIES else library().get(name, name)
        return replace(Model.read(str(place)), name=name)
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    revision, offline = revision or "main", False
    try:
        try:  # hf_hub_download alone would ask a network that is not there for half a minute
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
        except (errors.HTTPError, OSError) as failure:  # type: ignore[attr-defined]
            if isinstance(failure, errors.HfHubHTTPError):
                raise
            offline = True
        path = hf_hub_download(name, "config.json", revision=revision, local_files_only=offline)
    except errors.LocalEntryNotFoundError:
        reason = "the hub can't be reached and its config.json is not in huggingface_hub's cache"
        raise DownloadError(f"{name}: {reason}") from None
    except Exception as problem:
        # Imports torch, for the few who have an error to be told.
        from slotmoe.offload.ingest.repository import explained

        told = explained(name, revision, problem)
        raise told if isinstance(told, SlotmoeError) else DownloadError(f"{name}: {told}") from None
    return Model(name, read_config(Path(path)))


def _machine(given: Json) -> Machine:
    """The budgets and bandwidths to plan for: as asked, or this machine's."""
    vram, name, device = given["vram"] and parse_size(given["vram"]), given["gpu"], given["device"]
    if device == "cpu" and (name or vram):
        raise PlanError("--device cpu is given together with --gpu or --vram: drop one")
    known, unused = advice.gpu_named(name) if name else None, list[str]()
    if known is not None:
        vram = vram or known.budget
    elif vram is not None:
        name = (gpu := machine.visible_gpu(0)) and gpu.name
    elif device != "cpu":
        name, vram, unused = _gpu(device)
    for option in ("misses", "pcie_bandwidth", "gpu_bandwidth") if vram is None else ():
        if given[option] not in (None, "auto"):
            problem = "is given and no GPU is planned for, without which the CPU computes all"
            raise PlanError(f"--{option.replace('_', '-')} {given[option]} {problem}: drop it")
    threads = given["threads"] or cores()
    if not 1 <= threads <= MAX_THREADS:
        raise PlanError(f"threads is {threads}, expected 1 to {MAX_THREADS}")
    # What run would find free, once it has imported its libraries.
    free_ram = share_of(machine.available_memory(), vram is not None)
    free_ram += IMPORT_BYTES - machine.process_bytes()
    free_disk = shutil.disk_usage(machine.cache_disk()).free if _is_here(given) else None
    rates, ram = _bandwidths(given, name, known), parse_size(given["ram"] or free_ram)
    if vram == 0:  # the GPU's memory is RAM
        own = rates.gpu if known is not None else rates.ram
        vram, rates = ram, rates.updated("without a link", gpu=own, pcie=0.0, pcie_busy=0.0)
    vulkan = device.startswith("vulkan") or (known is not None and known.vulkan)
    return Machine(ram, vram, threads, rates, free_disk, name, unused, vulkan)


def _bandwidths(given: Json, gpu: str | None, known: advice.KnownGpu | None) -> Bandwidths:
    """As given, else of the ``known`` GPU, else as measured here, of that ``gpu``, else assumed."""
    rates = stored_bandwidths(machine.cache_folder() / "machine.json", gpu)
    with suppress(OSError, AttributeError):  # kernels that do not load
        rates = rates.assumed_for(machine.instruction_set() or "portable")
    if known is not None:
        of_gpu = {"gpu": known.bandwidth, "gpu_products": known.operations / 2}
        of_gpu |= {"pcie": known.pcie, "pcie_busy": known.pcie}
        rates = rates.updated(f"of {gpu}", **of_gpu)
    asked = {tier: given[f"{tier}_bandwidth"] for tier in ("ram", "disk", "pcie", "gpu")}
    asked["pcie_busy"] = asked["pcie"]
    sizes = {tier: float(parse_size(rate)) for tier, rate in asked.items() if rate is not None}
    rates = rates.updated("given", **sizes)
    if "ram" in sizes:  # what the CPU computes beside a GPU follows from it
        rates = rates.updated("by RAM", experts=0.0)
    if (drives := 1 + len(given["experts_dirs"])) > 1:
        origin = f"{rates.origin_of('disk')}, times {drives} drives"
        rates = rates.updated(origin, disk=drives * rates.disk)
    return rates


def _gpu(device: str) -> tuple[str | None, int | None, list[str]]:
    """The GPU here that ``run --device`` would take and its budget, and a remark on one that it
    would not.  Raises ``PlanError``."""
    index = machine.device_index(device)
    if device.startswith("vulkan"):
        if reason := (asked := machine.ask_gpu(index, "vulkan"))["reason"]:
            raise PlanError(f"--device {device}: {reason}")
        return asked["name"], 0 if asked["unified"] else share_of(asked["free"]), []
    if (gpu := machine.visible_gpu(index)) is None:
        if device == "auto":
            return None, None, []
        problem = f"--device {device}: no such GPU is found on this machine"
        raise PlanError(f"{problem}; give --gpu NAME or --vram SIZE")
    asked = machine.ask_gpu(index)
    if not asked["reason"]:
        return asked["name"], share_of(asked["free"]), []
    told = f"{gpu.name} is not used: {asked['reason']}; {asked['mend']}"
    if device != "auto":
        raise PlanError(f"--device {device}: {told}")
    return None, None, [told]


def _is_here(given: Json) -> bool:
    """Whether this machine is planned for: nothing is given that it may not have."""
    most = machine.total_memory() if given["ram"] is None else parse_size(given["ram"])
    has = most <= machine.total_memory() and (given["threads"] or 1) <= cores()
    return has and all(given[name] is None for name in _MACHINE)


def _next(model: Model, on_gpu: bool) -> str:
    """The command to type once it is planned: what makes the export, or runs it."""
    ctx, hub = click.get_current_context(), advice.HUB.get(advice.geometry_key(model.name))
    source, names = model.name, ["resident", "codec", "bits", "fit", "kl", "revision"]
    is_fitted = bool(ctx.params["fit"] or ctx.params["kl"])
    if model.resident is not None or (source == "sample" and not is_fitted):
        verb, names = "run", _RUN
    elif model.is_here or source == "sample" or hub or is_hub_id(source):
        verb, source = "quantize", source if model.is_here else hub or source
    else:  # of a config.json
        verb = "synth"
    words = ["slotmoe", verb, shlex.quote(source), *(['"Your prompt"'] if verb == "run" else [])]
    for option in ctx.command.params:
        value = ctx.params[str(option.name)]
        if option.name in names and value not in (option.default, None, ()):
            for each in value if isinstance(value, tuple) else [value]:
                words += [option.opts[0], *([] if each is True else [shlex.quote(str(each))])]
    keeps = verb != "run" and ctx.params["draft"] == "mtp"
    return " ".join([*words, *["--for-gpu"] * (is_fitted and on_gpu), *["--keep-mtp"] * keeps])


def _print(report: Json, verbose: bool) -> None:
    """At most 24 lines of 80 columns unless ``verbose``, the verdict last."""
    console = Console()
    console.print(_memory(report, verbose), _choices(report, verbose), sep="\n\n")
    lines = [_LOSS, *(f"{note[0].upper()}{note[1:]}." for note in report["notes"])]
    if report["fits"]:
        lines += [*_summary(report), *(_reckoning(report) if verbose else [])]
    ways = report["ways_out"]
    lines += [f"Way out: {way}." for way in ways if len(ways) == 1]
    if len(ways) > 1:
        lines.append("Ways out, the cheapest first:")
        lines += [f"  {number}. {way}" for number, way in enumerate(ways, 1)]
    for line in lines:
        console.print(Text(one_line(line)))
    for line in _verdict(report):
        console.print(Text(one_line(line)), style="bold", soft_wrap=True)


def _memory(report: Json, verbose: bool) -> Table:
    parts = report["components"]
    tiers = [tier for tier in _NAMES if tier in report["total"]]
    if not verbose:
        groups = {part: name for name, of in GROUPS.items() for part in of.split(", ")}
        grouped: dict[str, Counter[str]] = {name: Counter() for name in GROUPS}
        for part, sizes in parts.items():
            grouped[groups.get(part, "everything else")].update(sizes)
        parts = grouped

    def row(name: str, sizes: dict[str, int]) -> list[str]:
        return [name, *(format_size(sizes[tier]) if sizes.get(tier) else "" for tier in tiers)]

    rows = [row(*item) for item in parts.items() if any(item[1].values())]
    rows += [row(name, report[name]) for name in ("total", "budget")]
    return table(["", *(_NAMES[tier] for tier in tiers)], rows)


def _choices(report: Json, verbose: bool) -> Table:
    """A row for each choice, or for those that are close to what is planned, and the smallest."""
    rows, choices = [], report["choices"]
    planned = next((choice for choice in choices if choice["planned"]), choices[0])
    smallest = min(choices, key=lambda choice: choice["export"])
    for choice in choices:
        codec, bits, resident = (choice[key] == planned[key] for key in _CHOICES[:3])
        is_near = (codec and bits) or (choice["codec"] == DEFAULT_CODEC and resident)
        is_near &= float(choice["bits"]) <= max(4, float(planned["bits"]))
        if verbose or is_near or choice is smallest:
            speed = choice["decode_tokens_per_second"]
            share = min(1, max(choice["slots"], choice["host_slots"]) / report["experts"])
            gains = (f"{share:.0%}", figure(speed, 2)) if speed else ("-", "-")
            shown = (f"{choice[key]:.4f}" for key in ("kl_divergence", "kl_divergence_calibrated"))
            names = choice["codec"], choice["bits"], brief(choice["resident"])
            rows.append([*names, format_size(choice["export"]), *gains, *shown])
    return table(_CHOICES, rows, left=range(3))


def _verdict(report: Json) -> list[str]:
    """Whether it fits, how fast it is and the command to type next, or what is missing."""
    name, disk = report["model"], report["disk"]
    export, download = (format_size(disk[name]) for name in ("export", "download"))
    free, found = "", report.get("found_in_memory")
    if disk["free"] is not None:
        free = f", {format_size(disk['free'])} are free in {machine.cache_folder()}"
    if missing := report["shortfall_by_tier"].items():
        short = [f"{format_size(size)} of {_NAMES[tier]}" for tier, size in missing]
        return [f"{name} does not fit: {' and '.join(short)} short."]
    if not disk["fits"]:
        return [f"{name} does not fit: its export takes {export}{free}."]
    lines = [f"Disk: the export takes {export}{free}."] if disk["export"] else []
    about = "an estimated" if report["estimated"] else "about"
    share = "all experts" if found == 1 else f"{found:.0%} hits"
    lines.append(f"{name} fits: {about} {_speed(report, 'decode')}, {share} in memory.")
    loads = f"  # downloads {download}" if disk["download"] else ""
    return [*lines, report["command"] + loads]


def _speed(report: Json, kind: str) -> str:
    speeds = report[f"{kind}_tokens_per_second"], *report[f"{kind}_range"]
    return "{} tokens/s ({} to {})".format(*(figure(speed, 2) for speed in speeds))


def figure(number: float, significant: int = 3) -> str:
    """So many significant digits, or all before the point, and no exponent."""
    if number >= 10 ** (significant - 1):
        return f"{number:,.0f}"
    digits = significant - 1 - math.floor(math.log10(number)) if number > 0 else 0
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _summary(report: Json) -> list[str]:
    bound = report["bottleneck"]
    host = f", {report['host_slots']:,} in RAM" if report["host_slots"] else ""
    read = f"Prompts: {_speed(report, 'prefill')}. " if report["prefill_range"] else ""
    bound = "the time between kernels" if bound == "between kernels" else bound
    return [
        f"{report['slots']:,} of {report['experts']:,} experts in slots{host}; "
        f"room for a context of {report['largest_context']:,}.",
        f"{read}Decode is bound by {bound}.",
    ]


def _reckoning(report: Json) -> list[str]:
    """What the figures are made of."""
    settings, resident = report["settings"], report["resident"]
    peak = [f"{format_size(size)} of {_NAMES[t]}" for t, size in report["predicted_peak"].items()]
    rates = [
        f"{tier} {figure(rate['bytes_per_second'] / 1e9)} GB/s ({rate['origin']})"
        for tier, rate in report["bandwidths"].items()
    ]
    core = [
        f"{figure(rate['per_second'] / 1e9)} G {name.replace('_', ' ')}"
        for name, rate in report["core"].items()
    ]
    of = ", ".join(dict.fromkeys(rate["origin"] for rate in report["core"].values()))
    constants = [f"{name} {figure(value)}" for name, value in report["constants"].items()]
    prompt, token = (
        ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in report[kind].items() if s >= 5e-4)
        for kind in ("prefill_seconds", "decode_seconds")
    )
    more = f", each taken for one of the {cores()} here as far as RAM feeds it"
    more = more if settings["threads"] > cores() else ""
    return [
        f"GPU: {report['gpu'] or 'none'}.",
        f"Resident weights are {brief(resident['precision'])}: {resident['why']}.",
        f"A prompt of {settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones: "
        f"peak {', '.join(peak)}.",
        f"The prompt waits for {prompt}; one token for {token}.",
        *["Estimated as docs/gpu.md shows; no GPU has measured it."] * report["estimated"],
        f"Bandwidths: {', '.join(rates)}.",
        f"A core of {settings['threads']}{more}, in a second: {', '.join(core)} ({of}).",
        f"Taken for granted: {', '.join(constants)}.",
    ]
