"""``slotmoe plan``: what goes where and how fast it will be, by arithmetic, before a byte is
downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slotmoe.offload.ingest.hub_id import require_hub_library
from slotmoe.tools.options import is_on_hub, runtime_options

if TYPE_CHECKING:
    from slotmoe.model.config import Config
    from slotmoe.offload.plan.memory import Plan
    from slotmoe.offload.plan.speed import Bandwidths, Speed


@dataclass(frozen=True)
class _Model:
    """A geometry, and of an export how its resident weights are stored, its predictor's bytes and
    its routing."""

    name: str
    config: Config
    resident: str | None = None
    predictor_bytes: int = 0
    random_routing: bool = False


@dataclass(frozen=True)
class _Machine:
    """Budgets in bytes; ``vram`` None without a GPU."""

    ram: int
    vram: int | None
    threads: int
    bandwidths: Bandwidths


@click.command(name="plan")
@click.argument("model", metavar="MODEL")
@click.option(
    "--gpu",
    metavar="NAME",
    help="Plan for this card: its memory and bandwidths, like rtx-4090 or rtx-3060.",
)
@click.option(
    "--resident",
    type=click.Choice(["auto", "bf16", "int8", "nf4"]),
    default="auto",
    help="As for slotmoe quantize.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of the prompt.",
)
@click.option(
    "-n",
    "--new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens to generate.",
)
@click.option(
    "--ram-bandwidth", metavar="SIZE", help="Bytes a second at which RAM reads, like 40GB."
)
@click.option("--disk-bandwidth", metavar="SIZE", help="Bytes a second of the disk, like 3.5GB.")
@click.option(
    "--pcie-bandwidth", metavar="SIZE", help="Bytes a second from RAM to the GPU, like 25GB."
)
@click.option(
    "--gpu-bandwidth", metavar="SIZE", help="Bytes a second of the GPU's memory, like 1008GB."
)
@runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, prompt_tokens: int, new_tokens: int, as_json: bool, **options: Any) -> None:
    """Say whether MODEL fits, what goes to which tier, and how fast it will be.  No weights are
    needed.

    MODEL is v2 (236B), v2-lite (16B), sample, an export, a checkpoint folder, the path of a
    config.json, or a hub id, of which the config alone is fetched.  Speeds come from bandwidths:
    those given here, those that slotmoe bench --calibrate has measured on this machine, or
    assumptions; the report says which.  If the model does not fit, it names the shortfall and the
    cheapest ways out.

    \b
    Examples:
      slotmoe plan v2 --gpu rtx-4090 --ram 64GiB --disk-bandwidth 5GB
      slotmoe plan v2-lite --ram 5GiB
      slotmoe plan lite-export --ram 8GiB --context 32768 --json
    """
    from slotmoe.errors import PlanError
    from slotmoe.offload.plan.memory import by_tier, predicted_components
    from slotmoe.offload.plan.speed import Setting
    from slotmoe.offload.policy.hybrid import choose_mode

    found, machine = _model(model, options["revision"]), _machine(options)
    context = options["context"]
    limit = found.config.max_position_embeddings
    if (
        click.get_current_context().get_parameter_source("context")
        == click.core.ParameterSource.DEFAULT
    ):
        context = min(context, limit)
    if not 1 <= context <= limit:
        raise PlanError(
            f"context {context} is outside 1 to {limit}, the model's max_position_embeddings"
        )
    if prompt_tokens >= context:
        raise PlanError(
            f"a prompt of {prompt_tokens} tokens does not fit the context of {context}: raise --context or lower --prompt-tokens"
        )
    resident, why = _precision(found, machine, options["resident"], context, options["slots"])
    plan, sizes = _plan(found, machine, resident, context, options["slots"])
    speed = None
    if not plan.shortfall:
        misses = choose_mode(
            options["misses"],
            machine.bandwidths,
            sizes.record_bytes,
            found.config.num_experts_per_tok,
        )
        setting = Setting(
            found.config,
            sizes,
            plan,
            machine.bandwidths,
            machine.threads,
            found.random_routing,
            misses,
        )
        speed = setting.predict(prompt_tokens, new_tokens)
    report = _report(found, machine, plan, resident, why, speed) | {
        "largest_context": _largest_context(found, machine, resident, options["slots"]),
        "predicted_peak": by_tier(predicted_components(plan, prompt_tokens, new_tokens)),
        "ways_out": _ways_out(found, machine, resident, context, options["slots"], plan),
        "settings": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "threads": machine.threads,
            "context": context,
        },
    }
    print(json.dumps(report)) if as_json else _print(report)


def _model(name: str, revision: str | None) -> _Model:
    """What MODEL is, from its config and, for an export, its manifest.  Raises ``ConfigError``."""
    from slotmoe.errors import ConfigError
    from slotmoe.jsonfile import read_json
    from slotmoe.model.config import read_config
    from slotmoe.tools.synth import geometry_path

    folder = Path(name)
    if is_on_hub(name, revision):
        return _Model(name, read_config(_hub_config(name, revision or "main")))
    if not folder.is_dir():
        return _Model(name, read_config(geometry_path(name)))
    config = read_config(folder / "config.json")
    path = folder / "slotmoe.json"
    if not path.is_file():
        return _Model(name, config)
    manifest = read_json(path, 8 << 20)
    try:
        resident, source, files = (
            manifest["quantization"]["resident"],
            manifest["source"]["name"],
            manifest["files"],
        )
        predictor = sum(
            entry["bytes"] for file, entry in files.items() if file.startswith("predictor-")
        )
        assert resident in ("bf16", "int8", "nf4") and isinstance(predictor, int)
    except (KeyError, TypeError, AssertionError):
        raise ConfigError(f"{path}: is not a complete export's manifest; quantize again") from None
    return _Model(name, config, resident, predictor, str(source).startswith("random weights"))


def _hub_config(repo: str, revision: str) -> Path:
    """The config of a model on the hub, from huggingface_hub's cache where it is there already.
    Raises ``ConfigError`` or ``DownloadError``."""
    require_hub_library()
    from huggingface_hub import errors, hf_hub_download

    from slotmoe.errors import DownloadError

    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision))
    except errors.LocalEntryNotFoundError:
        raise DownloadError(
            f"{repo}: the hub can't be reached and its config.json is not in huggingface_hub's cache"
        ) from None
    except Exception:
        from slotmoe.offload.ingest.hub import (
            hub_errors,  # imports torch, for the few who have an error to be told
        )

        with hub_errors(repo, revision):
            raise


def _machine(options: dict[str, Any]) -> _Machine:
    """The budgets and bandwidths to plan for: as asked, or this machine's."""
    import psutil

    from slotmoe.errors import PlanError
    from slotmoe.offload.machine import available_memory, cache_folder, process_bytes
    from slotmoe.offload.plan.memory import IMPORT_BYTES, parse_size
    from slotmoe.offload.plan.speed import stored_bandwidths

    bandwidths = stored_bandwidths(cache_folder() / "machine.json")
    vram, card = options["vram"], None
    if options["gpu"] is not None:
        card = _card(options["gpu"])
        bandwidths = bandwidths.told(
            f"of {options['gpu']}", gpu=card.bandwidth, pcie=card.pcie, pcie_busy=card.pcie
        )
    rates = {tier: options[f"{tier}_bandwidth"] for tier in ("ram", "disk", "pcie", "gpu")}
    rates["pcie_busy"] = rates["pcie"]
    bandwidths = bandwidths.told(
        "given",
        **{tier: float(parse_size(rate)) for tier, rate in rates.items() if rate is not None},
    )
    # What run would find free, once it has imported its libraries.
    ram = options["ram"] or int(available_memory() * 0.9) - process_bytes() + IMPORT_BYTES
    if options["device"] == "cpu":
        if vram is not None or card is not None:
            raise PlanError("--device cpu is given together with --gpu or --vram: drop one")
    elif vram is None:
        vram = card.budget if card is not None else _installed_gpu()
        if vram is None and options["device"] == "cuda":
            raise PlanError(
                "--device cuda: no GPU is found on this machine; give --gpu NAME or --vram SIZE"
            )
    if vram is None and options["misses"] != "auto":
        raise PlanError(
            f"--misses {options['misses']} is given and no GPU is planned for, without which the CPU computes everything: drop it"
        )
    threads = options["threads"] or psutil.cpu_count(logical=False) or 1
    if threads < 1:
        raise PlanError(f"threads is {threads}, expected at least 1")
    return _Machine(
        parse_size(ram), None if vram is None else parse_size(vram), threads, bandwidths
    )


def _card(name: str) -> Any:
    from slotmoe.errors import ConfigError
    from slotmoe.offload.plan.speed import GPUS

    key = name.lower().replace(" ", "-").replace("_", "-")
    if key in GPUS:
        return GPUS[key]
    near = get_close_matches(key, GPUS, 1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"GPU {name!r:.40} is unknown; {hint}known are {', '.join(GPUS)}; or give --vram and --gpu-bandwidth"
    )


def _installed_gpu() -> int | None:
    """Nine tenths of the free memory of the first NVIDIA GPU here, in bytes; None if there is
    none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout.split()
        return int(int(found[0]) * (1 << 20) * 0.9)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _plan(
    model: _Model, machine: _Machine, resident: str, context: int, slots: int | None
) -> tuple[Plan, Any]:
    from slotmoe.offload.plan.memory import CUDA_IMPORT_BYTES, IMPORT_BYTES, make_plan, sizes_of

    sizes = sizes_of(model.config, resident, model.predictor_bytes)
    gpu = machine.vram is not None
    plan = make_plan(
        model.config,
        sizes,
        tier="vram" if gpu else "ram",
        budget=machine.vram or machine.ram,
        context=context,
        runtime_bytes=CUDA_IMPORT_BYTES if gpu else IMPORT_BYTES,
        slots=slots,
        host_budget=machine.ram if gpu else None,
        kernels="triton" if gpu else "native",
    )
    return plan, sizes


def _precision(
    model: _Model, machine: _Machine, asked: str, context: int, slots: int | None
) -> tuple[str, str]:
    """How resident weights are stored, and why: int8 stays closest to the source, unless that takes
    half of the fast tier."""
    from slotmoe.errors import PlanError
    from slotmoe.offload.plan.memory import format_size, sizes_of

    if model.resident is not None:
        if asked not in ("auto", model.resident):
            raise PlanError(
                f"{model.name}: its resident weights are {model.resident}; quantize again for --resident {asked}"
            )
        return model.resident, "as in the export"
    if asked != "auto":
        return asked, "as asked"
    budget = machine.vram or machine.ram
    size = sum(sizes_of(model.config, "int8").resident.values())
    told = f"int8 takes {format_size(size)} of {format_size(budget)}"
    if 2 * size <= budget:
        return "int8", f"{told} and is closest to the source"
    return "nf4", f"{told}, more than half, and leaves too little to the experts"


def _largest_context(model: _Model, machine: _Machine, resident: str, slots: int | None) -> int:
    """Positions that fit with the least number of slots; 0 if none do."""
    low, high = 0, model.config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if _plan(model, machine, resident, middle, slots)[0].shortfall:
            high = middle - 1
        else:
            low = middle
    return low


def _ways_out(
    model: _Model, machine: _Machine, resident: str, context: int, slots: int | None, plan: Plan
) -> list[str]:
    """Up to three changes that make the plan fit, the cheapest first."""
    from dataclasses import replace

    ways: list[str] = []
    again = "" if model.resident is None else "quantize again with "
    if not plan.shortfall:
        return ways
    if slots is not None and not _plan(model, machine, resident, context, None)[0].shortfall:
        ways.append("drop --slots")
    if largest := _largest_context(model, machine, resident, slots):
        ways.append(f"--context {largest}")
    if resident != "nf4":
        if not _plan(model, machine, "nf4", context, slots)[0].shortfall:
            ways.append(f"{again}--resident nf4")
        elif not largest and (shorter := _largest_context(model, machine, "nf4", slots)):
            ways.append(f"{again}--resident nf4 and --context {shorter}")
    if (
        machine.vram is not None
        and not _plan(model, replace(machine, vram=None), resident, context, slots)[0].shortfall
    ):
        ways.append("--device cpu: RAM alone is enough")
    if (smaller := _smaller_model(model, machine, context)) is not None:
        ways.append(smaller)
    raised = [
        f"--{tier} {_rounded_up((plan.budget if tier == plan.tier else plan.host_budget) + n)}"
        for tier, n in plan.shortfall.items()
    ]
    return [*ways, " and ".join(raised)][:3]


def _smaller_model(model: _Model, machine: _Machine, context: int) -> str | None:
    """V2-Lite instead of a larger model, if that fits."""
    from slotmoe.model.config import read_config
    from slotmoe.offload.plan.memory import format_size
    from slotmoe.tools.synth import geometry_path

    lite = _Model("v2-lite", read_config(geometry_path("v2-lite")))
    plan, sizes = _plan(
        lite, machine, "int8", min(context, lite.config.max_position_embeddings), None
    )
    if plan.shortfall or model.config.hidden_size <= lite.config.hidden_size:
        return None
    return (
        f"a smaller model: v2-lite, {format_size(sum(sizes.resident.values()))} of resident weights"
    )


def _rounded_up(size: int) -> str:
    """A size option of at least ``size`` bytes, to the tenth of a GiB or the MiB."""
    return f"{-(-size * 10 >> 30) / 10:.1f}GiB" if size >= 1 << 30 else f"{-(-size >> 20)}MiB"


def _report(
    model: _Model, machine: _Machine, plan: Plan, resident: str, why: str, speed: Speed | None
) -> dict[str, Any]:
    from slotmoe.offload.plan.memory import by_tier

    components: dict[str, dict[str, int]] = {}
    for tier, parts in ((plan.tier, plan.components), ("ram", plan.host)):
        for name, size in parts.items():
            components.setdefault(name, {})[tier] = size
    everything = len(model.config.moe_layers) * model.config.n_routed_experts
    components["all experts"] = {"disk": everything * plan.record_bytes}
    budgets = {"ram": machine.ram} | ({} if machine.vram is None else {"vram": machine.vram})
    used = ("ram", "disk") if machine.vram is None else ("ram", "disk", "gpu", "pcie")
    rates = {
        tier: {
            "bytes_per_second": getattr(machine.bandwidths, tier),
            "origin": machine.bandwidths.origin_of(tier),
        }
        for tier in used
    }
    report: dict[str, Any] = {
        "model": model.name,
        "fits": not plan.shortfall,
        "components": components,
        "total": by_tier(components),
        "budget": budgets,
        "shortfall": sum(plan.shortfall.values()),
        "shortfall_by_tier": plan.shortfall,
        "slots": plan.slots,
        "host_slots": plan.host_slots,
        "experts": everything,
        "prefill_chunk": plan.prefill_chunk,
        "resident": {"precision": resident, "why": why},
        "bandwidths": rates,
    }
    if speed is not None:
        report |= {
            "prefill_tokens_per_second": speed.prefill,
            "decode_tokens_per_second": speed.decode,
            "hit_rate": speed.hit_rate,
            "decode_seconds": speed.seconds,
            "bottleneck": speed.bottleneck,
        }
    return report


_NAMES = {"vram": "GPU memory", "ram": "RAM", "disk": "disk"}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from slotmoe.offload.plan.memory import format_size

    console = Console(file=sys.stdout)
    tiers = [tier for tier in _NAMES if tier in report["total"]]
    verdict = (
        "fits" if report["fits"] else f"does not fit: {format_size(report['shortfall'])} short"
    )
    table = Table(
        title=f"{report['model']}, resident weights {report['resident']['precision']}: {verdict}",
        show_footer=True,
    )
    table.add_column("", footer="total")
    for tier in tiers:
        table.add_column(_NAMES[tier], justify="right", footer=format_size(report["total"][tier]))
    for name, parts in report["components"].items():
        if any(parts.values()):
            table.add_row(
                name, *(format_size(parts[tier]) if parts.get(tier) else "" for tier in tiers)
            )
    table.add_section()
    table.add_row(
        "budget",
        *(
            format_size(report["budget"][tier]) if tier in report["budget"] else ""
            for tier in tiers
        ),
    )
    console.print(table)
    console.print(
        f"Resident weights are {report['resident']['precision']}: {report['resident']['why']}.",
        highlight=False,
    )
    for line in _shortage(report) if not report["fits"] else _outlook(report):
        console.print(line, highlight=False)


def _shortage(report: dict[str, Any]) -> list[str]:
    return [
        "Ways out, the cheapest first:",
        *(f"  {number}. {way}" for number, way in enumerate(report["ways_out"], 1)),
    ]


def _outlook(report: dict[str, Any]) -> list[str]:
    from slotmoe.offload.plan.memory import format_size

    settings, seconds = report["settings"], report["decode_seconds"]
    host = f" and {report['host_slots']} in RAM" if report["host_slots"] else ""
    peak = ", ".join(
        f"{format_size(size)} of {_NAMES[tier]}" for tier, size in report["predicted_peak"].items()
    )
    rates = ", ".join(
        f"{tier} {rate['bytes_per_second'] / 1e9:.3g} GB/s ({rate['origin']})"
        for tier, rate in report["bandwidths"].items()
    )
    spent = ", ".join(
        f"{name} {1000 * value:.0f} ms"
        for name, value in sorted(seconds.items(), key=lambda one: -one[1])
        if value >= 5e-4
    )
    gpu = (
        ""
        if "vram" not in report["budget"]
        else " GPU speeds are what bytes over bandwidth allow; they are not measured."
    )
    prefill = (
        ""
        if report["prefill_tokens_per_second"] is None
        else f"prefill {report['prefill_tokens_per_second']:.3g} tokens/s, "
    )
    lines = [
        f"{report['slots']} of {report['experts']} experts in fast slots{host}; a context of up to {report['largest_context']} fits.",
        f"A prompt of {settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones: peak {peak};",
        f"  {prefill}decode {report['decode_tokens_per_second']:.3g} tokens/s "
        f"at {report['hit_rate']:.0%} hits, bound by {report['bottleneck']}.{gpu}",
        f"One token: {spent}.",
        f"Bandwidths: {rates}.",
    ]
    return lines
