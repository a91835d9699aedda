"""Opening a model: what is asked for becomes a plan, and the plan's parts are made and filled.
``Runtime`` composes them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe import model
from slotmoe.errors import ConfigError, PlanError
from slotmoe.jsonfile import read_json
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.config import Config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import resident_shapes, role_of
from slotmoe.model.network import DeepseekV2
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.card_experts import CardExperts, CardSlots, Misses
from slotmoe.offload.experts import OffloadedExperts, ResidentExperts
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.machine import available_memory, cache_folder, process_bytes
from slotmoe.offload.plan.memory import (
    HELP_BYTES,
    PREFILL_CHUNK,
    Plan,
    Sizes,
    format_size,
    kv_bytes,
    make_plan,
    parse_size,
    runtime_growth,
    scratch_bytes,
    sizes_of,
)
from slotmoe.offload.plan.speed import stored_bandwidths
from slotmoe.offload.policy.cache import Cache, make_cache
from slotmoe.offload.policy.hybrid import Costs, choose_mode
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.offload.predictor import NextGate, Predictor
from slotmoe.offload.tiers.device import Card
from slotmoe.offload.tiers.disk import DiskReader, Source
from slotmoe.offload.tiers.host import HostTier
from slotmoe.offload.tiers.memory import Arena, Staging, in_large_pages
from slotmoe.offload.tiers.slots import Slots
from slotmoe.quant.backends import pick_ops
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.export.layout import MANIFEST, RecordLayout
from slotmoe.quant.export.reader import Export

FREE_SHARE = 0.9  # of what is free, where no budget is given


@dataclass(frozen=True)
class Wish:
    """What the caller of ``Runtime.open`` asks for; budgets in bytes, ``host_budget`` that of RAM
    below a card."""

    card: Card | None
    ops: TorchOps
    budget: int
    host_budget: int | None
    context: int
    slots: int | None
    policy: str
    prefetch: bool
    logits_rows: int
    sequences: int
    misses: str = "auto"
    kernels: str = "auto"
    threads: int | None = None

    @property
    def tier(self) -> str:
        """The fast tier."""
        return "ram" if self.card is None else "vram"

    @property
    def device(self) -> torch.device:
        """Where the fast tier's tensors live."""
        return torch.device("cpu") if self.card is None else self.card.device


@dataclass(frozen=True)
class Parts:
    """An open model's parts, of which ``Runtime`` is made.  ``sizes`` and ``store`` are None on the
    reference path."""

    config: Config
    tokenizer: Tokenizer
    network: DeepseekV2
    caches: list[LatentCache]
    plan: Plan
    eos_token_ids: tuple[int, ...]
    source: Export | Checkpoint
    sizes: Sizes | None = None
    store: Source | None = None


def resolve_model(path: str | Path, revision: str | None = None, **reporting: Any) -> Path:
    """Folder of a ``MODEL``: an export, a Hugging Face checkpoint, or ``sample``.

    A hub id that is no folder here becomes an export in the cache folder first;
    ``slotmoe.offload.ingest.hub.hub_export`` gets ``revision`` and ``reporting``.  Raises
    ``ConfigError``, and what that raises.
    """
    folder = Path(path)
    if is_hub_id(str(path)) and not folder.exists():
        from slotmoe.offload.ingest.hub import hub_export

        return hub_export(str(path), revision, cache_folder(), **reporting)
    if revision is not None:
        raise ConfigError(
            f"{folder}: a revision is of a model on the hub, but this is a folder here; leave the revision out"
        )
    if str(path) == "sample" and not folder.is_dir():
        return Path(model.__file__).parent / "sample"
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; MODEL is an export, a Hugging Face checkpoint folder, a hub id or 'sample'"
        )
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: holds neither {MANIFEST} (an export) nor config.json (a checkpoint)"
        )
    return folder


def budgets(
    card: Card | None, ram: int | str | None, vram: int | str | None
) -> tuple[int, int | None]:
    """Bytes of the fast tier that may be used, and of RAM below a card: as asked, or nine tenths of
    what is free now."""
    free_ram = (
        parse_size(ram)
        if ram is not None
        else int(available_memory() * FREE_SHARE) + process_bytes()
    )
    if card is not None:
        return parse_size(vram) if vram is not None else int(
            card.memory().free * FREE_SHARE
        ), free_ram
    if vram is not None:
        raise PlanError("--vram is given but the device is the CPU: give --ram, or --device cuda")
    return free_ram, None


def open_model(folder: Path, config: Config, wish: Wish, quantized: bool) -> Parts:
    """Read the model in ``folder`` into what ``wish`` gives it.  Nothing stays allocated if that
    fails.

    Raises ``ConfigError``, ``CheckpointError``, ``ExportError``, or ``PlanError``, also where the
    card has less memory than it seemed to."""
    opening = open_quantized if quantized else open_reference
    if wish.card is None:
        return opening(folder, config, wish)
    try:
        return opening(folder, config, wish)
    except torch.OutOfMemoryError:
        pass  # what the traceback's frames hold of the card is free only after this block
    wish.card.release()
    memory = wish.card.memory()
    raise PlanError(
        f"{wish.card.name} ran out of memory while the model was opened: the budget is {format_size(wish.budget)} and "
        f"{format_size(memory.free)} of {format_size(memory.total)} are free now, other programs may have taken some: lower --vram"
    )


def _check_free(plan: Plan, card: Card | None) -> None:
    """Refuse a plan for more of the card than is free, before anything is read."""
    if card is None or plan.total <= (free := card.memory().free):
        return
    raise PlanError(
        f"the plan takes {format_size(plan.total)} of {card.name}, of which {format_size(free)} are free: give --vram {free >> 20}MiB "
        "or less, or end the programs that use it"
    )


_LOADERS = 6  # threads: more than cores, since reading waits for the disk; 4 were no faster


def _load(
    export: Export, shapes: dict[str, tuple[int, ...]], place: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """All resident weights, verified and placed; a few at a time, so that reading and copying
    overlap."""
    own = threading.local()  # each thread's staging memory

    def load(name: str) -> Any:
        if not hasattr(own, "staging"):
            own.staging = Staging()
        weight = export.resident(name, own.staging.fresh())
        if tuple(weight.shape) != shapes[name]:
            raise ConfigError(
                f"{export.folder}: {name} has shape {list(weight.shape)}, config.json asks for {list(shapes[name])}"
            )
        return place(name, weight)

    pool = ThreadPoolExecutor(_LOADERS)
    try:
        names = sorted(
            shapes, key=lambda name: -math.prod(shapes[name])
        )  # the largest first, so that no thread ends alone
        return dict(zip(names, pool.map(load, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _placer(card: Card | None, ops: TorchOps) -> Callable[[str, Any], Any]:
    """A function that puts a resident weight in RAM, or on ``card``, in the form that ``ops``
    wants; norms and router gates, small and used in float32, are widened to it."""
    empty = Arena().empty if card is None else card.empty

    def place(name: str, weight: Any) -> Any:
        if isinstance(weight, Tensor) and (weight.dim() == 1 or role_of(name) == "gate"):
            weight = weight.float()
        return ops.prepare(role_of(name), weight, empty)

    return place


def _generation_eos(folder: Path, config: Config) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    found = read_json(path, 1 << 20).get("eos_token_id") if path.is_file() else None
    extra = found if isinstance(found, list) else [found]
    return tuple({*config.eos_token_ids, *(one for one in extra if isinstance(one, int))})


def open_quantized(folder: Path, config: Config, wish: Wish) -> Parts:
    """An export."""
    export, card, ops = Export.open(folder), wish.card, wish.ops
    source: Source | None = None
    try:
        layout = RecordLayout(config.hidden_size, config.moe_intermediate_size)
        if (export.layout.shapes, export.experts, export.layers) != (
            layout.shapes,
            config.n_routed_experts,
            config.moe_layers,
        ):
            raise ConfigError(
                f"{folder}: config.json and {MANIFEST} describe different models; quantize again"
            )
        tokenizer = Tokenizer(folder, config.bos_token_id)
        sizes = sizes_of(
            config, export.manifest["quantization"]["resident"], export.predictor_bytes
        )
        plan = make_plan(
            config,
            sizes,
            tier=wish.tier,
            budget=wish.budget,
            context=wish.context,
            runtime_bytes=process_bytes(),
            slots=wish.slots,
            host_budget=wish.host_budget,
            kernels="native"
            if ops.absorbs
            else "triton"
            if ops.name.startswith("triton")
            else "torch",
            logits_rows=wish.logits_rows,
            sequences=wish.sequences,
        ).check()
        _check_free(plan, card)
        rows, routed = len(export.layers), config.n_routed_experts
        # Where everything fits each expert is read once, and what an earlier run left in the page
        # cache is welcome.
        source = disk = DiskReader(export, direct=max(plan.slots, plan.host_slots) < rows * routed)
        place = _placer(card, ops)
        weights = _load(export, resident_shapes(config), place)
        predictor = Predictor.load(export, config.num_experts_per_tok, ops, place)
        popularity = predictor.popularity if predictor is not None else None
        if card is not None:
            source = HostTier(
                disk,
                _cache(wish, plan.host_slots, rows, routed, popularity),
                plan.host_transit,
                card,
            )
        experts = _offloaded(
            export,
            config,
            plan,
            wish,
            source,
            disk,
            predictor or NextGate(config, weights, ops),
            popularity,
        )
        network = DeepseekV2(config, weights, ops, experts)
        row = ops.latent_row(config.kv_lora_rank, config.qk_rope_head_dim)
        empty = in_large_pages if card is None else None  # all of it is read for each token
        caches = [
            LatentCache(config, wish.context, row, wish.device, empty)
            for _ in range(wish.sequences)
        ]
        return Parts(
            config,
            tokenizer,
            network,
            caches,
            plan,
            _generation_eos(folder, config),
            export,
            sizes,
            source,
        )
    except BaseException:
        if source is not None:
            source.close()
        export.close()
        raise


def _cache(wish: Wish, slots: int, rows: int, routed: int, popularity: list[float] | None) -> Cache:
    """Where every expert has a slot nothing ever leaves, and the cheapest bookkeeping will do."""
    return make_cache(
        wish.policy if slots < rows * routed else "lru", slots, rows, routed, popularity
    )


def _offloaded(
    export: Export,
    config: Config,
    plan: Plan,
    wish: Wish,
    source: Source,
    disk: DiskReader,
    guesser: NextGate | Predictor,
    popularity: list[float] | None,
) -> OffloadedExperts:
    """The slots over ``source``, their cache, and the prefetcher if reading ahead can pay."""
    rows, routed, size, top_k = (
        len(export.layers),
        export.experts,
        plan.record_bytes,
        config.num_experts_per_tok,
    )
    cache = _cache(wish, plan.slots, rows, routed, popularity)
    # Records that are not worth waking a thread for are not worth reading ahead either.
    ahead = (
        wish.prefetch and size > HELP_BYTES and plan.slots < rows * routed and plan.transit > top_k
    )
    likely = (
        sorted(range(rows * routed), key=popularity.__getitem__, reverse=True)
        if popularity and wish.prefetch
        else []
    )
    levels, warm = export.levels, likely[: plan.slots]
    if wish.card is None:
        slots = Slots(source, cache, plan.transit, top_k, size)
        prefetcher = Prefetcher(rows, routed, size, slots, disk.bandwidth) if ahead else None
        return OffloadedExperts(export, slots, wish.ops, levels, prefetcher, guesser, warm)
    assert isinstance(source, HostTier)
    bandwidths = stored_bandwidths(cache_folder() / "machine.json")
    mode = choose_mode(wish.misses, bandwidths, size, top_k)
    misses = Misses(
        mode,
        Costs.of(bandwidths, size),
        pick_ops(torch.device("cpu"), wish.kernels, wish.threads),
        levels,
    )
    placed = CardSlots(source, cache, plan.transit, top_k, size, wish.card)
    prefetcher = Prefetcher(rows, routed, size, placed, source.bandwidth) if ahead else None
    on_card = wish.card.empty(tuple(levels.shape), levels.dtype).copy_(levels)
    return CardExperts(
        export,
        placed,
        wish.ops,
        on_card,
        prefetcher,
        guesser,
        warm,
        wish.card,
        source,
        misses,
        top_k,
    )


def _reference_plan(config: Config, checkpoint: Checkpoint, wish: Wish) -> Plan:
    """Everything resident, in the checkpoint's own precision; the cache in float32."""
    components = {
        "resident weights": checkpoint.nbytes,
        "latent KV cache": kv_bytes(config, wish.context, "torch", value_bytes=4),
        "prefill scratch": scratch_bytes(config, PREFILL_CHUNK, "torch"),
    }
    if wish.tier == "ram":
        components["runtime"] = process_bytes() + runtime_growth(config, checkpoint.nbytes)
    missing = sum(components.values()) - wish.budget
    shortfall = {wish.tier: missing} if missing > 0 else {}
    return Plan(components, 0, 0, 0, wish.budget, wish.tier, wish.context, shortfall=shortfall)


def open_reference(folder: Path, config: Config, wish: Wish) -> Parts:
    """A checkpoint as it is, everything resident."""
    if wish.slots is not None:
        raise ConfigError(
            "the reference path (quantize=False) keeps every expert resident; slots can't be given"
        )
    if wish.sequences > 1:
        raise ConfigError(
            "the reference path (quantize=False) holds one sequence; sequences can't be given"
        )
    with Checkpoint.open(folder) as checkpoint:
        tokenizer = Tokenizer(folder, config.bos_token_id)
        plan = _reference_plan(config, checkpoint, wish).check()
        _check_free(plan, wish.card)
        place = _placer(wish.card, wish.ops)
        weights = {name: place(name, checkpoint.tensor(name)) for name in checkpoint.infos}
        network = DeepseekV2(config, weights, wish.ops, ResidentExperts(weights, wish.ops))
        cache = LatentCache(config, wish.context, (config.latent_width, torch.float32), wish.device)
        return Parts(
            config, tokenizer, network, [cache], plan, _generation_eos(folder, config), checkpoint
        )
