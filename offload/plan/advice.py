"""What a user can do with a model on a machine, before a byte is downloaded: precision, context,
speed, and the ways out if the model does not fit.  Without torch."""

import json
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from pathlib import Path

from slotmoe import model as model_package
from slotmoe.errors import ConfigError, PlanError
from slotmoe.jsonfile import Json, read_json
from slotmoe.model.checkpoint.gguf_metadata import files_of
from slotmoe.model.config import Config, config_among, read_config
from slotmoe.model.names import resident_shapes
from slotmoe.offload.plan import memory, precision
from slotmoe.offload.plan.memory import PREFILL_CHUNK, Plan, Sizes, sizes_of
from slotmoe.offload.plan.precision import expected, gpu_kernels, int8_bytes, precision_of
from slotmoe.offload.plan.speed import CORE, Bandwidths, Setting, constants
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.sizes import format_size, size_option

# Least and most that was measured of a predicted speed, also with one core busy, by whether rates
# are assumed (docs/memory-and-planning.md).
SPREAD = {False: (0.65, 1.7), True: (0.4, 2.5)}


@dataclass(frozen=True)
class KnownGpu:
    """A GPU: its memory in GiB, bandwidths of memory and PCIe link in bytes a second, and the
    operations of its tensor cores a second, bf16 with float32 sums, dense; where its memory is RAM,
    no GiB and no link.  ``vulkan``: nothing else runs on it."""

    gibibytes: int
    bandwidth: float
    pcie: float
    operations: float
    vulkan: bool = False

    @property
    def budget(self) -> int:
        """Bytes that ``run`` takes: a share of what a CUDA context and a desktop leave free."""
        return memory.share_of(int(max(0.0, self.gibibytes - 0.9) * (1 << 30)))


_GPUS: Json = json.loads(Path(__file__).with_name("gpus.json").read_bytes())
GPUS = {
    name: KnownGpu(gibibytes, bandwidth * 1e9, pcie * 1e9, operations * 1e12, *vulkan)
    for name, (gibibytes, bandwidth, pcie, operations, *vulkan) in _GPUS["known"].items()
}
OLDER: dict[str, str] = _GPUS["older"]  # too old for the kernels: their compute capabilities


def gpu_named(name: str) -> KnownGpu:
    """The GPU of ``GPUS`` with that name, however it is spelled.  Raises ``ConfigError``."""
    key, plain = re.sub("[ _-]", "", name.lower()), {each.replace("-", ""): each for each in GPUS}
    if key in plain:
        return GPUS[plain[key]]
    if older := next((each for each in OLDER if each.replace("-", "") == key), None):
        reason = f"GPU {older} has compute capability {OLDER[older]}, slotmoe's kernels need 8.0"
        raise ConfigError(f"{reason}: run takes the CPU beside it; plan that with --device cpu")
    digits = re.sub(r"\D", "", key)  # a number is another GPU's, however close
    near = [plain[each] for each in plain if re.sub(r"\D", "", each) == digits]
    near += [plain[each] for each in plain if len(key) > 4 and key in each]
    meant = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    known = f"known are {', '.join(GPUS)}; or give --vram and --gpu-bandwidth"
    raise ConfigError(f"GPU {name!r:.40} is unknown; {meant}{known}")


_KNOWN: dict[str, tuple[str, str]] = json.loads(
    Path(__file__).with_name("geometries.json").read_bytes()
)
GEOMETRIES = {name: f"geometries/{file}.json" for name, (file, _) in _KNOWN.items()}
HUB = {name: hub for name, (_, hub) in _KNOWN.items()}  # a model on the hub with that geometry
GEOMETRIES["sample"] = "sample/config.json"


def geometry_key(name: str) -> str:
    """The name in ``GEOMETRIES`` that is meant, if any is."""
    return name.lower().replace(" ", "-").replace("_", "-").removeprefix("deepseek-")


def geometry_path(geometry: str) -> Path:
    """The config file of a geometry's name, or the path itself.  Raises ``ConfigError``."""
    key = geometry_key(geometry)
    if key in GEOMETRIES:
        return Path(model_package.__file__).parent / GEOMETRIES[key]
    if not Path(geometry).is_file():
        near = get_close_matches(key, GEOMETRIES, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        known = f"known are {', '.join(GEOMETRIES)}; or give the path of a config.json"
        raise ConfigError(f"{geometry}: no such geometry; {meant}{known}")
    return Path(geometry)


@dataclass(frozen=True)
class Model:
    """A geometry, and whether its weights are on this machine; of an export also the precision of
    its resident weights, whether ``slotmoe synth`` made it, and whether it has ``kept`` the head
    that predicts one token more."""

    name: str
    config: Config
    is_here: bool = False
    resident: str | None = None
    codecs: ExpertCodecs | None = None
    random_weights: bool = False
    kept: bool = True

    def coded(self, resident: str, codecs: ExpertCodecs | None) -> tuple[str, str, ExpertCodecs]:
        """``precision_of`` for ``--resident``, and why, and how experts are coded, as ``codecs`` if
        given; of an export both are settled.  Raises ``ConfigError`` or ``PlanError``."""
        mode, why = self.resident, "as in the export"
        if mode is None:
            mode = precision_of(self.config, resident)
            size, most = format_size(int8_bytes(self.config)), format_size(precision.MOST_INT8)
            why = f"int8 would take {size}, and is the default up to {most}"
            why = why if resident == "auto" else "as asked"
        elif resident not in ("auto", mode):
            problem = f"its resident weights are {precision.brief(mode)}"
            way_out = f"quantize again for --resident {precision.brief(resident)}"
            raise PlanError(f"{self.name}: {problem}; {way_out}")
        stored = self.codecs or codecs or memory.default_codecs(self.config)
        if codecs is not None and codecs.names() != stored.names():  # levels are the model's own
            names = " and ".join(dict.fromkeys(stored.names().values()))
            advice = "quantize again for another --codec or --bits"
            raise PlanError(f"{self.name}: its experts are {names}; {advice}")
        return mode, why, stored

    def with_mtp(self) -> "Model":
        """The same with the head that predicts one token more.  Raises ``ConfigError``."""
        if not self.kept:
            problem = "the export does not hold the head that --draft mtp needs"
            raise ConfigError(f"{self.name}: {problem}; make it anew with quantize --keep-mtp")
        return replace(self, config=self.config.with_mtp(Path(self.name), "--draft mtp"))

    @classmethod
    def read(cls, name: str) -> "Model":
        """A geometry's name, config file, checkpoint folder, GGUF file or export.  Raises
        ``ConfigError``, ``CheckpointError`` or ``ExportError``."""
        folder = Path(name)
        if folder.suffix == ".gguf":
            return cls(name, config_among(files_of(folder), folder), True)
        if not folder.is_dir():
            return cls(name, read_config(geometry_path(name)))
        config, path = read_config(folder / "config.json"), folder / "slotmoe.json"
        if not path.is_file():
            return cls(name, config, True)
        from slotmoe.quant.export.manifest import refuse_other_version, typed_manifest  # torch

        manifest = read_json(path, 8 << 20, Json)
        refuse_other_version(path, manifest)
        try:
            given = typed_manifest(manifest)
            resident = given.quantization.resident
            random_weights = not given.source.files  # as Export.random_weights
            codecs = ExpertCodecs.of_manifest(manifest)
            kept = given.experts.mtp_layer >= 0
            return cls(name, config, True, resident, codecs, random_weights, kept)
        except ValueError as problem:
            what = f"{problem}; not a complete export's manifest, quantize again"
            raise ConfigError(f"{path}: {what}") from None


@dataclass(frozen=True)
class Machine:
    """Budgets in bytes, ``vram`` None without a GPU; ``free_disk`` bytes where an export would go,
    None on another machine; the GPU's name where it is known, and ``notes`` on what is there;
    ``vulkan`` computes there, without a link in RAM."""

    ram: int
    vram: int | None
    threads: int
    bandwidths: Bandwidths
    free_disk: int | None
    gpu: str | None = None
    notes: Sequence[str] = ()
    vulkan: bool = False


@dataclass(frozen=True)
class Scenario:
    """A model on a machine: ``resident`` is of ``RESIDENT_MODES``, ``codecs`` are the experts',
    ``context`` counts positions, and ``slots`` caps the expert slots.  ``misses`` is as in
    ``slotmoe run``; ``drafts`` have memory, with ``prefetch`` experts are read ahead."""

    model: Model
    machine: Machine
    resident: str
    codecs: ExpertCodecs
    context: int
    slots: int | None = None
    misses: str = "auto"
    drafts: bool = False
    prefetch: bool = True

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.model.config, self.resident, self.codecs)

    @cached_property
    def plan(self) -> Plan:
        """Raises ``PlanError`` for slots that can't serve one token."""
        machine, gpu = self.machine, self.machine.vram is not None
        on_cuda = self.kernels in ("triton", "torch")
        return memory.make_plan(
            self.model.config,
            self.sizes,
            tier="vram" if gpu else "ram",
            budget=machine.vram or machine.ram,
            context=self.context,
            runtime_bytes=memory.CUDA_IMPORT_BYTES if on_cuda else memory.IMPORT_BYTES,
            slots=self.slots,
            host_budget=machine.ram if gpu else None,
            kernels=self.kernels,
            drafts=self.drafts,
            unified=not machine.bandwidths.pcie,
        )

    @property
    def kernels(self) -> str:
        """What multiplies."""
        on_gpu = "vulkan" if self.machine.vulkan else gpu_kernels(self.resident, self.codecs)
        return "native" if self.machine.vram is None else on_gpu

    @property
    def fits(self) -> bool:
        return not self.plan.shortfall

    def disk(self) -> Json:
        """Bytes to ``download``, which are streamed, of the ``export`` that is still to be made,
        and ``free``, None on another machine; and whether the export ``fits``."""
        config, sizes = self.model.config, self.sizes
        experts = len(config.moe_layers) * config.n_routed_experts
        resident = sum(map(math.prod, resident_shapes(config).values()))
        weights = experts * 3 * config.hidden_size * config.moe_intermediate_size
        export = memory.export_bytes(config, sizes) if self.model.resident is None else 0
        each = config.encoding.method.weight_bytes if config.encoding else 2
        others = 2 if config.encoding and config.encoding.blocks else each  # gpt-oss'
        download = 0 if self.model.is_here else int(each * weights + others * resident)
        needed = {"download": download, "export": export}
        free = self.machine.free_disk
        return {**needed, "free": free, "fits": free is None or export <= free}

    def largest_context(self) -> int:
        """Positions that fit with the least number of slots; 0 if none do."""
        contexts = range(1, self.model.config.max_position_embeddings + 1)
        return bisect_left(contexts, True, key=lambda n: not replace(self, context=n).fits)

    def ways_out(self) -> list[str]:
        """Up to three changes that make the plan fit, the cheapest first; none if it fits."""
        if self.fits:
            size, fits = (self.disk()[name] for name in ("export", "fits"))
            where = f"a folder with {format_size(size)} free"
            return [] if fits else [f"set SLOTMOE_CACHE to {where}, or quantize into one"]
        again = "" if self.model.resident is None else "quantize again with "
        largest, mixed = self.largest_context(), replace(self, resident="mixed")
        on_cpu = replace(self, machine=replace(self.machine, vram=None))
        ways = ["drop --slots"] if replace(self, slots=None).fits else []
        if largest:
            ways.append(f"--context {largest}")
        if mixed.fits:
            ways.append(f"{again}--resident mixed")
        elif not largest and (shorter := mixed.largest_context()):
            ways.append(f"{again}--resident mixed and --context {shorter}")
        if on_cpu.fits:
            ways.append("--device cpu: RAM alone is enough")
        needs = by_tier(by_name(self.plan))
        raised = [f"--{tier} {size_option(needs[tier], -1)}" for tier in self.plan.shortfall]
        return [*ways, " and ".join(raised)][:3]

    def report(self, prompt_tokens: int, new_tokens: int) -> Json:
        """All of it under the names that ``slotmoe plan --json`` gives."""
        plan, machine, config = self.plan, self.machine, self.model.config
        experts = len(config.moe_layers) * config.n_routed_experts
        components = by_name(plan) | {"all experts": {"disk": experts * plan.record_bytes}}
        gpu, rates = machine.vram is not None, machine.bandwidths
        tiers = ("ram", "disk", "gpu", "pcie", "experts") if gpu else ("ram", "disk")
        slower = "Triton's kernels lack these codes: torch's multiply on CUDA, slower than said"

        def known(name: str, unit: str) -> Json:
            rate = rates.beside_gpu() if name == "experts" else getattr(rates, name)
            return {unit: rate, "origin": rates.origin_of(name)}

        report: Json = {
            "model": self.model.name,
            "notes": [*config.notes, *machine.notes, *[slower] * (self.kernels == "torch")],
            "fits": self.fits and self.disk()["fits"],
            "components": components,
            "total": by_tier(components),
            "gpu": machine.gpu,
            "estimated": gpu,
            "budget": {"ram": machine.ram} | ({"vram": machine.vram} if gpu else {}),
            "disk": self.disk(),
            "shortfall": sum(plan.shortfall.values()),
            "shortfall_by_tier": plan.shortfall,
            "slots": plan.slots,
            "host_slots": plan.host_slots,
            "experts": experts,
            "expert_codecs": self.codecs.names(),
            "record_bytes": plan.record_bytes,
            "prefill_chunk": plan.prefill_chunk,
            "bandwidths": {tier: known(tier, "bytes_per_second") for tier in tiers},
            "core": {name: known(name, "per_second") for name in CORE},
            "constants": constants(rates, gpu, config, machine.vulkan),
            "largest_context": self.largest_context(),
            "predicted_peak": by_tier(predicted_components(plan, prompt_tokens, new_tokens)),
            "ways_out": self.ways_out(),
            "settings": {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
            | {"threads": machine.threads, "context": self.context},
        }
        if not self.fits:
            return report
        setting = self._setting()
        report["settings"]["misses"] = setting.misses if gpu else None
        report |= asdict(setting.predict(prompt_tokens, new_tokens))
        report["found_in_memory"] = setting.hits(max(plan.slots, plan.host_slots))
        assumed = any(rates.origin_of(tier).startswith("assumed") for tier in (*tiers, *CORE))
        for kind in ("prefill", "decode"):
            speed = report[f"{kind}_tokens_per_second"]
            report[f"{kind}_range"] = speed and [share * speed for share in SPREAD[assumed]]
        return report

    def _setting(self) -> Setting:
        config, sizes, rates = self.model.config, self.sizes, self.machine.bandwidths
        on, threads = (config, sizes, self.plan, rates), self.machine.threads
        setting = Setting(*on, threads, self.model.random_weights, prefetch=self.prefetch)
        misses = "read" if self.machine.vulkan else self.misses
        return setting.with_mode(misses) if self.plan.tier == "vram" else setting

    def choices(self, prompt_tokens: int, new_tokens: int) -> list[Json]:
        """What each ``--codec``, ``--bits`` and ``--resident`` would give: bytes of the ``export``,
        expert slots, the speed of decode, None where it does not fit, and the divergence that the
        bundled sample has so, with and without a text for ``--calibrate``.  On a GPU those that
        Triton's kernels have."""
        rows, config = list[Json](), self.model.config
        resident = dict.fromkeys([self.resident, "int8", "mixed"])
        experts = precision.expert_choices(config).items()
        for ((codec, bits), codecs), mode in product(experts, resident):
            other, speed = replace(self, codecs=codecs, resident=mode), None
            if other.kernels == "torch" and other != self:
                continue
            if other.fits:
                speed = other._setting().predict(prompt_tokens, new_tokens).decode_tokens_per_second
            row = {"codec": codec, "bits": bits, "resident": mode, "slots": other.plan.slots}
            row["host_slots"] = other.plan.host_slots
            row["planned"] = mode == self.resident and codecs.names() == self.codecs.names()
            row["export"] = memory.export_bytes(config, other.sizes)
            row["decode_tokens_per_second"] = speed
            row["kl_divergence"] = expected(config, codec, bits, mode, calibrated=False)
            row["kl_divergence_calibrated"] = expected(config, codec, bits, mode, calibrated=True)
            rows.append(row)
        return rows


def predicted_components(
    plan: Plan, prompt_tokens: int, new_tokens: int
) -> dict[str, dict[str, int]]:
    """Name -> tier -> bytes at a run's peak: the plan, less what a short prompt or text spares."""
    components = by_name(plan)
    step, chunk = min(prompt_tokens, PREFILL_CHUNK), min(prompt_tokens, plan.prefill_chunk)
    marks, cache = plan.marks, components["KV cache"]
    made = min(marks.ends + marks.most, prompt_tokens // marks.tokens + 2)  # 2 where texts end
    cache[plan.tier] -= marks.constant + (marks.ends + marks.most) * marks.nbytes
    for name, part, whole in (
        ("KV cache", min(prompt_tokens + new_tokens, plan.context), plan.context),
        ("prefill scratch", step, PREFILL_CHUNK),
        ("waiting tokens", chunk - step, max(1, plan.prefill_chunk - PREFILL_CHUNK)),
    ):
        components[name][plan.tier] = components[name][plan.tier] * part // whole
    cache[plan.tier] += marks.constant + made * marks.nbytes
    return components


def by_name(plan: Plan) -> dict[str, dict[str, int]]:
    """Name -> tier -> bytes of all components."""
    components: dict[str, dict[str, int]] = {}
    for tier, (_, parts) in plan.tiers.items():
        for name, size in parts.items():
            components.setdefault(name, {})[tier] = size
    return components


def by_tier(components: dict[str, dict[str, int]]) -> dict[str, int]:
    """Tier -> bytes of all components."""
    total = Counter[str]()
    for parts in components.values():
        total.update(parts)
    return dict(total)
