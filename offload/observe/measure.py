"""Measured bandwidths of disk, link and memory, for reports and ``slotmoe bench --calibrate``."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import median_high

import torch

from slotmoe.jsonfile import Json
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.experts.misses import measure_link
from slotmoe.offload.plan.advice import by_tier, predicted_components
from slotmoe.offload.plan.memory import HELP_BYTES, kv_read_bytes
from slotmoe.offload.plan.speed import Bandwidths, Setting
from slotmoe.offload.policy import available
from slotmoe.offload.policy.cache import Choices, make_cache, replay
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.layout import layer_file
from slotmoe.quant.export.reader import Export, Folder
from slotmoe.quant.kernels.cpu.bindings import load
from slotmoe.quant.shapes import ALIGNMENT
from slotmoe.sizes import size_option
from slotmoe.system import bypass_page_cache, read_at

_MEASURED_BYTES = 256 << 20  # enough to leave every cache of the processor behind


def _random_reads(path: Path, size: int, count: int, random: Random) -> list[float]:
    """Seconds of each of ``count`` direct reads of ``size`` bytes at random multiples of it."""
    memory, seconds = page_aligned(size).numpy().data, []  # in large pages, like the slots
    with open(path, "rb", buffering=0) as file:
        bypass_page_cache(file.fileno(), ALIGNMENT)
        blocks = max(1, path.stat().st_size // size)
        for _ in range(count):
            started = time.perf_counter()
            read_at(file.fileno(), memory, random.randrange(blocks) * size)
            seconds.append(time.perf_counter() - started)
    return seconds


def drive_bandwidths(export: Export, total: int = 1 << 30) -> list[float]:
    """Bytes a second of each export folder, all at once: ``total`` by 8 threads, random 4 MiB."""

    def measure(folder: Folder) -> float:
        paths, random = [folder.path_of(layer_file(layer)) for layer in export.layers], Random(0)
        size = min(4 << 20, paths[0].stat().st_size // ALIGNMENT * ALIGNMENT)
        rounds = max(1, total // len(export.folders) // size // 8)
        started = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            chosen = [random.choice(paths) for _ in range(8)]
            list(pool.map(lambda path: _random_reads(path, size, rounds, random), chosen))
        return 8 * rounds * size / (time.perf_counter() - started)

    with ThreadPoolExecutor(len(export.folders)) as pool:
        return list(pool.map(measure, export.folders))


def disk_latency(export: Export) -> float:
    """Median seconds of one direct read of a record, or of 128 KiB, when nothing else is read."""
    path, size = export.folder / layer_file(export.layers[0]), export.layout.record_bytes
    return median_high(_random_reads(path, min(size, HELP_BYTES), 64, Random(0)))


def link_bandwidths(model: LoadedModel) -> dict[str, float]:
    """Is ``measure_link`` of an open model; empty without a GPU."""
    if model.experts.hybrid is None:
        return {}
    codecs = model.experts.records.layout.codecs
    return measure_link(model.device, model.experts.slots.slab, model.cpu, codecs)


def read_bandwidth(model: LoadedModel) -> float:
    """Bytes a second at which the device's memory is read, measured now: a GPU's over its slots;
    RAM by all threads, over slots that have pages, or else over memory within the budget."""
    memory = model.experts.slots.memory() if model.store is not None else None
    if model.device.memory() is not None:
        assert memory is not None
        return model.backend.read_bandwidth(memory[: 16 * _MEASURED_BYTES])
    room = model.plan.budget - model.plan.total
    if memory is None or memory.nbytes < _MEASURED_BYTES <= room:
        return ram_bandwidth(model.cpu)
    return model.cpu.read_bandwidth(memory[: 4 * _MEASURED_BYTES])


def ram_bandwidth(cpu: TorchBackend, room: float = math.inf) -> float:
    """Bytes a second at which all threads read RAM, measured now in at most ``room`` bytes."""
    size = max(1 << 20, min(_MEASURED_BYTES, room))
    return cpu.read_bandwidth(torch.ones(int(size), dtype=torch.uint8))


def bytes_per_token(model: LoadedModel, position: int) -> dict[str, int]:
    """Bytes that decoding one token at ``position`` reads: weights, its experts, latent cache."""
    assert model.sizes is not None
    config = model.config
    return {
        "resident weights": model.sizes.touched,
        "experts": len(config.moe_layers) * config.num_experts_per_tok * model.plan.record_bytes,
        "KV cache": kv_read_bytes(replace(config, mtp=False), position, model.backend.kind),
    }


class Lasting:
    """What has none of an open ``model``'s memory: to measure and predict when it is closed."""

    def __init__(self, model: LoadedModel):
        assert model.sizes is not None
        self.export, self.cpu, self.placement = model.export, model.cpu, model.device.placement
        self.config, self.sizes, self.plan = model.config, model.sizes, model.plan
        self.gpu = model.device.name
        self.kernels, self.misses = model.backend.kind, model.quantized("predict").misses

    def setting(self, bandwidths: Bandwidths) -> Setting:
        run = bandwidths, self.cpu.threads, self.export.random_weights, self.misses
        return Setting(self.config, self.sizes, self.plan, *run)


def best(setting: Setting, steps: Sequence[Sequence[Choices]], waste: float) -> Json:
    """What of the budget's slots, policies and look-ahead, which reads ``waste`` in vain for each
    miss, would decode those ``steps`` fastest, or as fast within 2% in fewer slots: ``options``,
    ``slots``, their ``hit_rate`` and tokens a second.  Policies play the steps without inputs."""
    plan, config, native = setting.plan, setting.config, load()
    sizes, ways = (len(config.moe_layers), config.n_routed_experts), list[Json]()
    for eighths, policy in product(range(8, 0, -1), available(native is not None)):
        slots = max(config.num_experts_per_tok, plan.slots * eighths // 8)
        hits = replay(make_cache(policy, slots, *sizes, native), steps)
        size = size_option(plan.total - (plan.slots - slots) * plan.record_bytes, -1)
        for ahead in (True, False):
            played = replace(setting, plan=replace(plan, slots=slots), known=hits, prefetch=ahead)
            spent = played.predict(1, 1).decode_seconds
            spent |= {"disk": spent["disk"] * (1 + waste * ahead)}
            options = f"--{plan.tier} {size} --cache-policy {policy}"
            way = {"options": options + " --no-prefetch" * (not ahead), "slots": slots}
            ways.append(way | {"hit_rate": hits, "tokens_per_second": 1 / played.total(spent)})
    most = max(way["tokens_per_second"] for way in ways)
    near = [way for way in ways if way["tokens_per_second"] >= 0.98 * most]
    return min(near, key=lambda way: (way["slots"], -way["tokens_per_second"]))


def predict(setting: Setting, prompt_tokens: int, new_tokens: int) -> Json:
    """What the plan expects of a run: ``components`` at the peak (name -> tier -> bytes) and their
    ``peak`` (tier -> bytes), ``hit_rate``, tokens a second of prefill and decode,
    ``decode_seconds`` by what a token waits for, and its ``bottleneck``."""
    components = predicted_components(setting.plan, prompt_tokens, new_tokens)
    speed = asdict(setting.predict(prompt_tokens, new_tokens))
    return {"peak": by_tier(components), "components": components, **speed}
