"""``slotmoe plan``: what goes where and how fast it will be, before a byte is downloaded."""

import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from slotmoe.errors import DownloadError, PlanError, SlotmoeError, one_line
from slotmoe.jsonfile import Json
from slotmoe.model.config import read_config
from slotmoe.offload import machine
from slotmoe.offload.model_cache import is_hub_id, library, locate
from slotmoe.offload.plan import advice
from slotmoe.offload.plan.advice import Machine, Model
from slotmoe.offload.plan.memory import IMPORT_BYTES, choose_context, or_more_context, share_of
from slotmoe.offload.plan.speed import Bandwidths, stored_bandwidths
from slotmoe.quant.codecs.codec import KEPT_CODECS
from slotmoe.sizes import format_size, parse_size
from slotmoe.system import MAX_THREADS, choose_placement, cores
from slotmoe.tools import options
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import Console, table

_NAMES = {"vram": "GPU memory", "ram": "RAM", "disk": "disk"}
_LOSS = (
    "KL is the bundled sample's divergence from its source in nats a token, by quantize alone and "
    "with a text for --calibrate; other models lose more or less."
)
_BOUNDS = {"between kernels": "the time between kernels"}  # where the key is no noun
_CHOICES = ("codec", "bits", "resident", "export", "in memory", "tokens/s", "KL", "with text")
# What describes a machine: with one of them it may be another than this.
_MACHINE = "gpu ram vram ram_bandwidth disk_bandwidth pcie_bandwidth gpu_bandwidth".split()
_GPU_HELP = "Plan for this GPU, like rtx-4090 or rtx-3060."
_PROMPT_HELP = "Tokens of the prompt. [default: 512, or what the context has room for]"


@click.command(name="plan", cls=options.Command)
@options.MODEL
@options.option("--gpu", "NAME", _GPU_HELP, shell_complete=options.completing(lambda: advice.GPUS))
@options.RESIDENT
@options.codec_options
@options.count("--prompt-tokens", None, _PROMPT_HELP)
@options.count("-n --max-new-tokens", 128, "Tokens to generate.")
@options.option("--ram-bandwidth", "SIZE", "Bytes a second of RAM, like 40GB.")
@options.option("--disk-bandwidth", "SIZE", "Bytes a second of a drive, like 3.5GB.")
@options.option("--pcie-bandwidth", "SIZE", "Bytes a second to the GPU, like 25GB.")
@options.option("--gpu-bandwidth", "SIZE", "Bytes a second of GPU memory, like 1008GB.")
@options.plan_options
@options.JSON
def command(
    model: str, prompt_tokens: int | None, max_new_tokens: int, as_json: bool, **given: Any
) -> int:
    """Say whether MODEL fits, what goes to which tier, and how fast it will be, without weights.

    MODEL is a geometry (v2-lite, coder-v2-lite, moonlight, glm-4.7-flash, mistral-small-4, v2,
    v2.5, coder-v2, v3, r1, v3.1, v3.2, v4-flash, v4-pro, glm-5, kimi-k2, qwen3-30b-a3b,
    qwen3-235b-a22b, glm-4.5-air, minimax-m2, gpt-oss-20b, gpt-oss-120b, sample), an export, a
    checkpoint folder, a GGUF file, the path of a config.json, or a hub id, of which the config
    alone is fetched. Speeds come from bandwidths: those given here, those that slotmoe bench
    --calibrate has measured on this machine, or assumptions; the report says which.

    If the model does not fit, the exit code is 1, and the report names the shortfall and the
    cheapest ways out.  Without options for another machine (--gpu, budgets, bandwidths) the free
    disk of this folder counts too.

    \b
    Examples:
      slotmoe plan v2 --gpu rtx-4090 --ram 64GiB --disk-bandwidth 5GB
      slotmoe plan v2-lite --ram 5GiB
      slotmoe plan DeepSeek-V2-Lite-Chat --ram 8GiB --context 32768 --json
    """
    wanted = options.expert_codecs(given)
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
    resident, why = advice.choose_precision(planned, target, given["resident"])
    scenario = advice.Scenario(
        planned,
        target,
        resident,
        codecs=advice.choose_codecs(planned, wanted),
        context=context,
        slots=given["slots"],
        misses=given["misses"],
        drafts=given["draft"] == "mtp",
        prefetch=not given["no_prefetch"],
    )
    if given["threads"] is None and _is_here(given):  # fewer where the plan fits one processor
        plan = scenario.plan
        size = plan.total if target.vram is None else sum(plan.host.values())
        target = replace(target, threads=choose_placement(size).threads)
        scenario = replace(scenario, machine=target)
    report = scenario.report(prompt_tokens, max_new_tokens)
    report["resident"] = {"precision": resident, "why": why}
    report["choices"] = scenario.choices(prompt_tokens, max_new_tokens)
    print(json_of(report)) if as_json else _print(report)
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
    if vram is None and given["misses"] != "auto":
        problem = "no GPU is planned for, without which the CPU computes everything"
        raise PlanError(f"--misses {given['misses']} is given and {problem}: drop it")
    threads = given["threads"] or cores()
    if not 1 <= threads <= MAX_THREADS:
        raise PlanError(f"threads is {threads}, expected 1 to {MAX_THREADS}")
    if _is_here(given):
        threads = min(threads, cores())
    # What run would find free, once it has imported its libraries.
    free_ram = share_of(machine.available_memory(), vram is not None)
    free_ram += IMPORT_BYTES - machine.process_bytes()
    is_this = all(given[name] is None for name in _MACHINE)
    free_disk = shutil.disk_usage(Path.cwd()).free if is_this else None
    rates, ram = _bandwidths(given, name, known), parse_size(given["ram"] or free_ram)
    return Machine(ram, vram, threads, rates, free_disk, name, unused)


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
    """Whether this machine is planned for, whatever the budgets."""
    return all(given[name] is None for name in _MACHINE if name not in ("ram", "vram"))


def _print(report: Json) -> None:
    console, resident = Console(), report["resident"]
    for line in _verdict(report):
        console.print(Text(one_line(line)), style="bold", soft_wrap=True)
    tiers = [tier for tier in _NAMES if tier in report["total"]]

    def row(name: str, sizes: dict[str, int]) -> list[str]:
        return [name, *(format_size(sizes[tier]) if sizes.get(tier) else "" for tier in tiers)]

    rows = [row(*item) for item in report["components"].items() if any(item[1].values())]
    sums = [row(name, report[name]) for name in ("total", "budget")]
    console.print(table(["", *(_NAMES[tier] for tier in tiers)], rows, sums=sums))
    rows = []
    for choice in report["choices"]:
        speed = choice["decode_tokens_per_second"]
        share = min(1, choice["slots"] / report["experts"])
        keys = ("kl_divergence", "kl_divergence_calibrated")
        losses = ["" if choice[key] is None else f"{choice[key]:.4f}" for key in keys]
        codec = f"none ({choice['codec']})" if choice["codec"] in KEPT_CODECS else choice["codec"]
        gains = format_size(choice["export"]), f"{share:.0%}", figure(speed, 2) if speed else "-"
        rows.append([codec, choice["bits"], choice["resident"], *gains, *losses])
    console.print(table(_CHOICES, rows, left=range(3)))
    lines = [_LOSS, *([f"GPU: {report['gpu']}."] if report["gpu"] else [])]
    lines += [f"Resident weights are {resident['precision']}: {resident['why']}."]
    lines += [f"{note[0].upper()}{note[1:]}." for note in report["notes"]]
    ways = report["ways_out"]
    lines += [f"Way out: {way}." for way in ways if len(ways) == 1]
    if len(ways) > 1:
        lines.append("Ways out, the cheapest first:")
        lines += [f"  {number}. {way}" for number, way in enumerate(ways, 1)]
    lines += _outlook(report) if report["fits"] else []
    for line in lines:
        console.print(Text(one_line(line)))


def _verdict(report: Json) -> list[str]:
    """Whether it fits, and how fast it is and what it takes of the disk, or what is missing."""
    name, disk = report["model"], report["disk"]
    export, download = (format_size(disk[name]) for name in ("export", "download"))
    free = "" if disk["free"] is None else f", {format_size(disk['free'])} are free in {Path.cwd()}"
    if missing := report["shortfall_by_tier"].items():
        short = [f"{format_size(size)} of {_NAMES[tier]}" for tier, size in missing]
        return [f"{name} does not fit: {' and '.join(short)} short."]
    if not disk["fits"]:
        return [f"{name} does not fit: its export takes {export}{free}."]
    speed, hits = figure(report["decode_tokens_per_second"], 2), report["hit_rate"]
    share = "all experts" if hits == 1 else f"{hits:.0%} of a token's experts found"
    about = "an estimated" if report["estimated"] else "about"
    lines = [f"{name} fits: {about} {speed} tokens/s, with {share} in memory."]
    if disk["export"]:
        streamed = f"; {download} to download, streamed and not kept" if disk["download"] else ""
        lines.append(f"Disk: the export takes {export}{free}{streamed}.")
    return lines


def figure(number: float, significant: int = 3) -> str:
    """So many significant digits, or all before the point, and no exponent."""
    if number >= 10 ** (significant - 1):
        return f"{number:,.0f}"
    digits = significant - 1 - math.floor(math.log10(number)) if number > 0 else 0
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _outlook(report: Json) -> list[str]:
    settings, prefill = report["settings"], report["prefill_tokens_per_second"]
    host = f" and {report['host_slots']} in RAM" if report["host_slots"] else ""
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
    slow = max(report["prefill_seconds"].items(), key=lambda item: item[1])[0]
    slow = _BOUNDS.get(slow, slow)
    slowest = sorted(report["decode_seconds"].items(), key=lambda item: -item[1])
    spent = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in slowest if seconds >= 5e-4]
    bound = _BOUNDS.get(report["bottleneck"], report["bottleneck"])
    gpu = " (estimated as docs/gpu.md shows; no GPU has measured it)"
    more = f", each taken for one of the {cores()} here as far as RAM feeds it"
    more = more if settings["threads"] > cores() else ""
    return [
        f"{report['slots']} of {report['experts']} experts in fast slots{host}; "
        f"a context of up to {report['largest_context']} fits.",
        f"A prompt of {settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones: "
        f"peak {', '.join(peak)};",
        ("  " if prefill is None else f"  prefill {figure(prefill)} tokens/s, bound by {slow}, ")
        + f"decode {figure(report['decode_tokens_per_second'])} tokens/s at "
        f"{report['hit_rate']:.0%} hits, bound by {bound}"
        f"{gpu if report['estimated'] else ''}.",
        f"One token: {', '.join(spent)}.",
        f"Bandwidths: {', '.join(rates)}.",
        f"A core of {settings['threads']}{more}, in a second: {', '.join(core)} ({of}).",
        f"Taken for granted: {', '.join(constants)}.",
    ]
