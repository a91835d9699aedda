"""Opening a model: what is asked for becomes a plan, and the plan's parts are made and filled."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, PlanError, check_types
from slotmoe.jsonfile import ReadFile
from slotmoe.model.attention import new_state
from slotmoe.model.checkpoint.gguf_metadata import files_of
from slotmoe.model.checkpoint.reader import Checkpoint, open_checkpoint
from slotmoe.model.config import Config, config_among
from slotmoe.model.names import EMBEDDING, HEAD, resident_shapes, role_of
from slotmoe.model.network import MtpHead, Network
from slotmoe.model.sampling import Generation
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.network.state import SequenceState, plain_row
from slotmoe.offload.devices.device import Device
from slotmoe.offload.devices.pages import tune_heap
from slotmoe.offload.devices.vulkan import PlacedExperts
from slotmoe.offload.experts.ahead import Lookahead
from slotmoe.offload.experts.disk import DiskReader
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.misses import LINK_BYTES, HostCompute, with_link
from slotmoe.offload.experts.slots import CheckpointRecords, Slots, resident_slots
from slotmoe.offload.ingest.output_dir import Notify, ignore
from slotmoe.offload.machine import available_memory, cache_folder, process_bytes, total_memory
from slotmoe.offload.model_source import Place, generation_of, load_resident, open_tokenizer
from slotmoe.offload.plan import memory
from slotmoe.offload.plan.memory import HELP_BYTES, PREFILL_CHUNK, Plan, Sizes, make_plan
from slotmoe.offload.plan.precision import kernels_for, precision_of
from slotmoe.offload.plan.speed import MODES, Setting, Split, stored_bandwidths
from slotmoe.offload.policy import BY_KERNELS, DEFAULT, POLICIES, WITHOUT_KERNELS
from slotmoe.offload.policy.cache import Cache, make_cache
from slotmoe.offload.policy.passes import DRAFTS
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Prepared, Records, TorchBackend
from slotmoe.quant.codecs.codec import manifest_codecs
from slotmoe.quant.codecs.weight import Weight
from slotmoe.quant.export.layout import MANIFEST, RecordLayout
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu.bindings import load
from slotmoe.quant.shapes import TABLE
from slotmoe.sizes import format_size, parse_size, size_option
from slotmoe.system import MAX_THREADS, choose_placement

Store: TypeAlias = DiskReader | HostTier


@dataclass(frozen=True)
class Options:
    """What ``Runtime.open`` is asked for; it documents them."""

    vram: float | str | None = None
    ram: float | str | None = None
    context: int | None = None
    threads: int | None = None
    cache_policy: str | None = None
    prefetch: bool = True
    quantize: bool = True
    slots: int | None = None
    kernels: str = "auto"
    logits_rows: int = 1
    sequences: int = 1
    misses: str = "auto"
    experts_dirs: Sequence[str | Path] = ()
    draft: str = "auto"

    def __post_init__(self) -> None:
        check_types(vars(self), type(self).__annotations__)
        for name, most in (("sequences", 256), ("threads", MAX_THREADS)):
            if (given := getattr(self, name)) is not None and not 1 <= given <= most:
                raise ConfigError(f"{name} is {given}, expected 1 to {most}")
        for name, values in (("cache_policy", POLICIES), ("misses", MODES), ("draft", DRAFTS)):
            if (given := getattr(self, name)) is not None and given not in values:
                expected = f"expected one of: {', '.join(values)}"
                raise ConfigError(f"{name} {given!r:.40} is unknown, {expected}")
        if self.cache_policy in BY_KERNELS and load() is None:
            problem = f"cache_policy {self.cache_policy} needs native kernels, which were not built"
            raise ConfigError(f"{problem}; take {WITHOUT_KERNELS}, or see slotmoe doctor")
        for name, is_given, why in (
            ("slots", self.slots is not None, "keeps every expert resident"),
            ("cache_policy", self.cache_policy is not None, "keeps every expert resident"),
            ("experts_dirs", self.experts_dirs, "reads no export"),
            ("sequences", self.sequences > 1, "holds one sequence"),
        ):
            if is_given and not self.quantize:
                problem = f"the reference path (quantize=False) {why}"
                raise ConfigError(f"{problem}; {name} can't be given")


@dataclass(frozen=True)
class LoadedModel:
    """An open model; ``opened`` closes its files and threads.  ``draft`` is what drafts come from,
    ``ngram``, ``mtp`` or ``off``, and why; ``head`` makes them for ``mtp``.  ``sizes``
    and ``store`` are None on the reference path."""

    config: Config
    tokenizer: Tokenizer
    network: Network
    states: list[SequenceState]
    plan: Plan
    generation: Generation
    source: Export | Checkpoint
    device: Device
    device_reason: str
    backend: TorchBackend
    experts: Experts
    opened: ExitStack
    options: Options
    draft: tuple[str, str]
    sizes: Sizes | None = None
    store: Store | None = None
    head: MtpHead | None = None

    @property
    def cpu(self) -> TorchBackend:
        """What multiplies on the CPU: ``backend`` itself where there is no GPU."""
        hybrid = self.experts.hybrid
        return self.backend if hybrid is None else hybrid.backend

    @property
    def export(self) -> Export:
        """The open export; only quantized models have one."""
        assert isinstance(self.source, Export)
        return self.source

    def quantized(self, purpose: str) -> Experts:
        """The experts' slots.  Raises ``ConfigError`` on the reference path."""
        if self.store is None:
            problem = f"the reference path has no expert cache to {purpose}"
            raise ConfigError(f"{problem}; open the model quantized")
        return self.experts


def open_model(
    folder: Path, options: Options, device: Device, reason: str, notify: Notify
) -> LoadedModel:
    """Read the export or checkpoint in ``folder`` as ``options`` ask; ``notify`` gets a line where
    the machine is measured first.  If it fails, nothing stays allocated.  Raises ``ConfigError``,
    ``CheckpointError``, ``ExportError``, or ``PlanError``, also where the device has less memory
    than it seemed to."""
    tune_heap()
    loader = _Loader(folder, options, device, reason, notify)
    try:
        return loader.open()
    except torch.OutOfMemoryError:
        pass  # what the traceback's frames hold of the device is free only after this block
    device.release()
    gpu = device.memory()
    assert gpu is not None
    free = f"{format_size(gpu.free)} of {format_size(gpu.total)} are free now"
    known = f"the budget is {format_size(loader.budget)} and {free}"
    problem = f"{device.name} ran out of memory while the model was opened: {known}"
    advice = loader.way_out(gpu.free)
    raise PlanError(f"{problem}, other programs may have taken some: {advice}")


def check_options(options: Options, device: Device, checkpoint: Path) -> None:
    """Refuse options with which the export that ``cached_export`` would make of ``checkpoint``
    can't be opened.  Reads its config alone, and raises as ``open_model`` does."""
    _Loader(checkpoint, options, device, "", ignore).check()


class _Loader:
    """Makes the parts of one model."""

    def __init__(self, folder: Path, options: Options, device: Device, reason: str, notify: Notify):
        if device.tier == "ram" and options.misses != "auto":
            reason = "the device is the CPU, which computes every expert: leave it out"
            raise ConfigError(f"misses {options.misses} is given but {reason}")
        self._folder, self._options, self._device, self._reason = folder, options, device, reason
        self._notify = notify
        self.budget, self._host_budget = self._budgets()
        self._sizes: Sizes | None = None  # of an export
        self._kernels = options.kernels

    def check(self) -> None:
        """Is ``check_options`` for this model."""
        self._configure(files_of(self._folder))
        if self._options.draft == "mtp":
            problem = "draft mtp needs an export made for it"
            advice = "slotmoe quantize with --keep-mtp makes one"
            raise ConfigError(f"{self._folder}: {problem}; {advice}")
        codecs = memory.default_codecs(self._config)
        resident = precision_of(self._config, "auto")
        plan = self._make_plan(memory.sizes_of(self._config, resident, codecs), self.budget)
        self._draft(1 + plan.drafted)
        self._refuse(plan)

    def _configure(self, read: ReadFile) -> Tokenizer:
        """Take the config and the tokenizer from a model's files, which have been verified."""
        self._config, options = config_among(read, self._folder), self._options
        activation = self._config.activation
        if options.quantize:
            self._backend = self._device.backend(self._kernels, activation)
        else:
            self._backend = TorchBackend(activation=activation)
        self._context = memory.choose_context(self._config, self._options.context)
        self._generation = generation_of(self._config, read, self._folder)
        return open_tokenizer(self._config, read, self._folder)

    def _budgets(self) -> tuple[int, int | None]:
        """Bytes of the device tier, and of RAM below a GPU: as asked, or of what is free."""
        ram, vram, gpu = self._options.ram, self._options.vram, self._device.memory()
        if ram is not None:
            free_ram = parse_size(ram)
        else:
            free_ram = memory.share_of(available_memory(), gpu is not None) + process_bytes()
        if gpu is not None:
            return parse_size(vram) if vram is not None else memory.share_of(gpu.free), free_ram
        if vram is not None:
            problem = "--vram is given but the device is the CPU"
            raise PlanError(f"{problem}: give --ram, or --device cuda")
        return free_ram, None

    def open(self) -> LoadedModel:
        """Everything allocated, read and started."""
        with ExitStack() as opened:
            make = self._export if self._options.quantize else self._reference
            network, parts = make(opened)
            return LoadedModel(
                config=self._config,
                network=network,
                plan=self._plan,
                generation=self._generation,
                device=self._device,
                device_reason=self._reason,
                backend=self._backend,
                options=self._options,
                draft=self._draft(network.rows),
                sizes=self._sizes,
                opened=opened.pop_all(),
                **parts,
            )

    def _reference(self, opened: ExitStack) -> tuple[Network, dict[str, Any]]:
        """A checkpoint as it is, everything resident, computed in float32."""
        checkpoint = opened.enter_context(open_checkpoint(self._folder))
        tokenizer = self._configure(checkpoint.small_file)
        config, backend, device = self._config, self._backend, self._device
        marks = memory.choose_marks(config, self.budget, 1)
        components = {  # the checkpoint's own precision; the cache in float32
            "resident weights": checkpoint.nbytes,
            "KV cache": memory.kv_bytes(config, self._context, "reference", marks),
            "prefill scratch": memory.scratch_bytes(config, PREFILL_CHUNK, "torch"),
        }
        if device.tier == "ram":
            growth = memory.runtime_growth(config, checkpoint.nbytes)
            components["runtime"] = process_bytes() + growth
        self._settle(Plan(components, 0, 0, 0, self.budget, device.tier, self._context))
        place = self._placer()
        weights = {name: place(name, checkpoint.tensor(name)) for name in checkpoint.infos}
        records, slots = CheckpointRecords(config, weights), resident_slots(config, device)
        experts = Experts(config.moe_layers, records, slots, backend, device)
        network = Network(config, weights, backend, experts)
        states = [new_state(config, self._context, plain_row, device.empty, marks)]
        parts = {"tokenizer": tokenizer, "source": checkpoint, "experts": experts, "states": states}
        return network, parts

    def _draft(self, rows: int) -> tuple[str, str]:
        """What drafts come from, and why, where ``rows`` of a pass may be of one text.  Raises
        ``ConfigError`` where they would change bits."""
        asked, backend = self._options.draft, self._backend
        if asked == "off":
            return "off", "not asked for"
        if rows > 1 and asked == "auto" and backend.kind != "native":
            return "off", f"not measured to pay with {backend.name}"
        if rows > 1:
            return "mtp" if asked == "mtp" else "ngram", "rows of a pass are bitwise as alone"
        problem = f"{backend.name} computes several tokens of a text not bitwise as one by one"
        if asked != "auto":
            raise ConfigError(f"draft {asked}: {problem}; leave it out")
        return "off", problem

    def _make_plan(self, sizes: Sizes, budget: int) -> Plan:
        """The plan for an export of those sizes; for a budget of 0 the least one."""
        self._sizes, options = sizes, self._options
        return make_plan(
            self._config,
            sizes,
            tier=self._device.tier,
            budget=budget,
            context=self._context,
            runtime_bytes=process_bytes(),
            slots=options.slots,
            host_budget=self._host_budget,
            kernels=self._backend.kind,
            logits_rows=options.logits_rows,
            sequences=options.sequences,
            drafts=options.draft in ("ngram", "mtp")
            or (options.draft == "auto" and self._backend.kind == "native"),
            unified=self._device.unified,
        )

    def _settle(self, plan: Plan) -> None:
        """Take a plan: refuse it before anything is read, or say where threads and memory are."""
        self._plan = plan
        self._device.placement = choose_placement(self._refuse(plan), self._options.threads)
        self._backend.run_on(self._device.placement)

    def _refuse(self, plan: Plan) -> int:
        """Refuse a plan beyond the budget, or what is there; returns the bytes of RAM in it."""
        plan.check()
        self._device.refuse(self._config, vars(self._options))
        ram = plan.total if plan.tier == "ram" else sum(plan.host.values())
        if ram > (total := total_memory()):
            sizes = f"{format_size(ram)} of RAM and this machine has {format_size(total)}"
            advice = "give a smaller --ram, or none to take what is free"
            raise PlanError(f"the plan takes {sizes}: {advice}")
        gpu, name = self._device.memory(), self._device.name
        if gpu is not None and plan.total > gpu.free:
            free = format_size(gpu.free)
            sizes = f"{format_size(plan.total)} of {name}, of which {free} are free"
            raise PlanError(f"the plan takes {sizes}: {self.way_out(gpu.free)}")
        return ram

    def way_out(self, free: int) -> str:
        """What to do where ``free`` bytes of the GPU are too few; kernels take some beside it."""
        most, advice = memory.share_of(min(free, self.budget)), "end the programs that use it"
        if self._sizes is None or self._make_plan(self._sizes, 0).total > most:
            return f"{advice}, lower --context, or quantize with --resident mixed"
        return f"give --vram {size_option(most)} or less, or {advice}"

    def _export(self, opened: ExitStack) -> tuple[Network, dict[str, Any]]:
        """An export, its experts behind slots."""
        options, device = self._options, self._device
        copies = [Path(folder) for folder in options.experts_dirs]
        export = opened.enter_context(Export.open(self._folder, copies))
        codecs, is_gpu = manifest_codecs(export.manifest), device.tier == "vram"
        self._kernels = kernels_for(options.kernels, is_gpu, codecs)
        tokenizer = self._configure(export.small_file)
        config, backend = self._with_layers(export), self._backend
        self._config, resident = config, export.manifest["quantization"]["resident"]
        plan = self._make_plan(memory.sizes_of(config, resident, export.layout.codecs), self.budget)
        self._settle(plan)
        # Where everything fits each is read once: what is in the page cache is welcome.
        direct = max(plan.slots, plan.host_slots) < len(config.moe_layers) * export.experts
        if device.tier == "ram":
            store: Store = DiskReader(export, direct)
        else:
            cache = self._cache(plan.host_slots)
            store = HostTier(export, direct, cache, plan.host_staging, device)
        opened.callback(store.close)
        weights = load_resident(export, resident_shapes(config), self._placer())
        experts = self._experts(export, store, weights)
        opened.callback(experts.slots.close)
        network = Network(config, weights, backend, experts, PREFILL_CHUNK)
        if isinstance(store, HostTier):
            if told := store.pinned.announced():
                self._notify(told)
            top_k = config.num_experts_per_tok
            device.run(lambda: experts.load_kernels(config.hidden_size, top_k), "a lower --vram")
        head = MtpHead(network, weights, experts, PREFILL_CHUNK) if config.mtp else None
        states = [
            new_state(config, self._context, backend.latent_row, device.latents, plan.marks)
            for _ in range(options.sequences)
        ]
        parts = {"tokenizer": tokenizer, "source": export, "experts": experts, "states": states}
        return network, {**parts, "store": store, "head": head}

    def _with_layers(self, export: Export) -> Config:
        """The config with the layers that are used of ``export``.  Raises ``ConfigError``."""
        config, folder = replace(self._config, mtp=export.mtp_layer is not None), self._folder
        sizes = config.hidden_size, config.moe_intermediate_size
        layout = RecordLayout(*sizes, export.layout.codecs, config.family.expert_biases)
        geometry = layout.parts, config.n_routed_experts, config.moe_layers
        if (export.layout.parts, export.experts, export.layers) != geometry:
            problem = f"config.json and {MANIFEST} describe different models"
            raise ConfigError(f"{folder}: {problem}; quantize again")
        if self._options.draft == "mtp" and not config.mtp:
            problem = f"{folder}: has no head that predicts one token more, which draft mtp needs"
            advice = "make it anew with quantize --keep-mtp, or take --draft ngram"
            raise ConfigError(f"{problem}; {advice}")
        return replace(config, mtp=self._options.draft == "mtp")

    def _placer(self) -> Place:
        """A function that puts a resident weight on the device, in the form that the backend wants;
        norms and router gates, small and used in float32, are widened to it."""
        empty = self._device.weights()

        def place(name: str, weight: Weight) -> Prepared:
            role = role_of(HEAD if name == EMBEDDING and self._config.tie_word_embeddings else name)
            if role == TABLE:  # kernels trust the ids of experts
                last = self._config.n_routed_experts - 1
                if not isinstance(weight, Tensor) or weight.min() < 0 or weight.max() > last:
                    problem = f"{name} names an expert outside 0 to {last}"
                    raise ConfigError(f"{self._folder}: {problem}; quantize again")
            elif isinstance(weight, Tensor) and (weight.dim() == 1 or role == "gate"):
                weight = weight.float()
            head = self._config.qk_nope_head_dim, self._config.v_head_dim
            return self._backend.prepare(role, weight, empty, head)

        return place

    def _cache(self, slots: int) -> Cache:
        """Under the policy asked for; unasked a plain one will do where nothing is evicted."""
        layers, experts = len(self._config.moe_layers), self._config.n_routed_experts
        is_plain = (native := load()) is None or slots >= layers * experts
        policy = self._options.cache_policy or (WITHOUT_KERNELS if is_plain else DEFAULT)
        return make_cache(policy, slots, layers, experts, native)

    def _experts(self, export: Export, store: Store, weights: dict[str, Prepared]) -> Experts:
        """The slots over ``store``, what reads ahead if that can pay, and the CPU's part."""
        options, device, config, plan = self._options, self._device, self._config, self._plan
        size, top_k = plan.record_bytes, config.num_experts_per_tok
        layers, experts = len(config.moe_layers), export.experts
        slots = Slots(store, self._cache(plan.slots), plan.staging, top_k, size, device)
        # Records that are not worth waking a thread for are not worth reading ahead either.
        missing = plan.slots < layers * experts and plan.staging > top_k
        lookahead = None
        if options.prefetch and missing and size > HELP_BYTES and not device.reads_in_place:
            lookahead = Lookahead(
                config,
                weights,
                self._backend,
                record_bytes=size,
                target=slots,
                bandwidth=store.bandwidth,
                download=device.download,
            )
        hybrid, levels = None, export.layout.levels()
        if isinstance(store, HostTier) and not device.reads_in_place:
            # Triton's kernels are the GPU's; beside it the CPU has its own.
            kernels = "torch" if options.kernels == "torch" else "auto"
            cpu = pick_backend(torch.device("cpu"), kernels, config.activation)
            cpu.run_on(device.placement)
            split = Split()
            if plan.slots < layers * experts or options.misses != "auto":
                rates = stored_bandwidths(path := cache_folder() / "machine.json", device.name)
                room = plan.host_budget - plan.host["runtime"]
                if options.misses == "auto" and room >= LINK_BYTES:
                    given = path, self._notify, device, slots.slab, cpu
                    rates = with_link(rates, *given, codecs=export.layout.codecs)
                assert self._sizes is not None
                on = config, self._sizes, plan, rates, cpu.threads, export.random_weights
                split = Setting(*on).with_mode(options.misses).split
            in_ram = Records(store.slab.tensor.view(-1, size), export.layout, levels)
            hybrid = HostCompute(cpu, in_ram, store, device, max(top_k, memory.LENT), split)
            levels = device.empty(tuple(levels.shape), levels.dtype).copy_(levels)
        records = Records(slots.slab.tensor.view(-1, size), export.layout, levels)
        kind = PlacedExperts if device.reads_in_place else Experts
        parts = config.moe_layers, records, slots, self._backend, device
        return kind(*parts, lookahead, hybrid, config.mtp)
