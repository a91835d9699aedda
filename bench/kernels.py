"""Each kernel beside what bounds it, in V2-Lite's shapes: on a CPU (``kernels``) and on a GPU
(``gpu``).

A machine's bandwidth moves by half within seconds.  So a kernel that streams its weights from
memory runs in turn with a plain read of the same bytes (on a GPU: torch's copy of 1 GiB), and its
ratio is the median over pairs.  Weights outgrow every cache and lie in large pages, as the runtime
has them.  What is timed ran once untimed just before: which core read a line last makes the first
pass slower where cores have third-level caches of their own.  On a GPU many launches are one CUDA
graph, so that no launch is measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor

from bench import turns
from slotmoe.errors import ConfigError
from slotmoe.model.config import read_config
from slotmoe.offload.devices.pages import in_large_pages
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.observe.measure import bytes_per_token
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Records
from slotmoe.quant.codecs.codec import DEFAULT_CODECS, KINDS, LUT3, LUT4, NF4, Codec, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, levels_of
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.quant.kernels.cpu.weights import INT8, Matrix
from slotmoe.quant.shapes import record_bytes
from slotmoe.system import Placement, cores
from slotmoe.tools.bench import speed
from slotmoe.tools.options import choice, codec_options, count, expert_codecs

Actions = Sequence[Callable[[], Any]]
MANY = 512  # tokens of a prefill pass
N = 8192  # rows of a resident matrix
# How one token's 4-bit kernels may be compiled, the first as they are: blocks of 64 columns that a
# program takes at a time, and its warps.
VARIANTS = ("8x2", "8x4", "16x4")


class _Bench:
    """The kernels of a device, and the rows measured so far."""

    def __init__(self, device: str, rounds: int, gibibytes: float, threads: int | None = None):
        self.config = read_config(geometry_path("v2-lite"))
        self.ops, self._rounds = pick_backend(torch.device(device)), rounds
        self.ops.run_on(Placement(threads or cores()))
        self.on_cpu, self._device = device == "cpu", device
        self.rows, self.working_set = list[turns.Row](), int(gibibytes * 2**30)
        if not self.on_cpu:
            source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
            self._copy = partial(torch.empty_like(source).copy_, source)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        if self.on_cpu:
            return in_large_pages(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device)

    def _timed(self, actions: Actions) -> Callable[[], float]:
        """Seconds of all ``actions``, when they have run once before."""

        def run() -> None:
            for action in actions:
                action()

        def on_cpu() -> float:
            run()
            return speed.seconds(run)

        def on_gpu() -> float:
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            started.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            return float(started.elapsed_time(ended)) / 1e3

        if self.on_cpu:
            return on_cpu
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return on_gpu

    def measure(
        self, name: str, macs: float, size: int, actions: Actions, memory: Tensor | None = None
    ) -> None:
        """Each action does ``macs`` multiply-adds over ``size`` bytes; all of them together read
        ``memory``, where they are bound by that."""
        ways, plain = {"kernel": self._timed(actions)}, 2 << 30
        if memory is not None:
            read: Callable[[], Any] = partial(self.ops._read, memory.flatten().view(torch.uint8))
            ways["plain"] = self._timed([read if self.on_cpu else self._copy])
            plain = memory.nbytes if self.on_cpu else plain
        spent = speed.take_turns(ways, self._rounds, warm_up=False)
        seconds = median(spent["kernel"]) / len(actions)
        row = {"kernel": name, "seconds": seconds, "macs_per_second": macs / seconds}
        row["bytes_per_second"] = size / seconds
        if memory is not None:
            row["plain_bytes_per_second"] = plain / median(spent["plain"])
            total, pairs = size * len(actions), zip(*spent.values(), strict=True)
            row["ratio"] = median(total / kernel / (plain / read) for kernel, read in pairs)
        self.rows.append(row)


def _fill_scales(weight: CodedWeight, deviation: float) -> None:
    """Scales with which random codes have about this deviation."""
    largest = float(weight.levels.abs().max())
    if weight.scales.dtype == torch.float16:
        weight.scales.fill_(2 * deviation / largest)
    else:
        weight.scales[:, 2:] = 127
        weight.scales[:, :2].view(torch.float32).fill_(2 * deviation / largest / 127)


def _experts(bench: _Bench, codecs: ExpertCodecs) -> None:
    """One token through K experts a layer, layer after layer; and experts with many tokens."""
    c, ops = bench.config, bench.ops
    D, K = c.hidden_size, c.num_experts_per_tok
    layout = RecordLayout(D, c.moe_intermediate_size, codecs)
    S = bench.working_set // layout.record_bytes // K * K
    slab = bench.empty((S, layout.record_bytes))
    slab[0].random_(0, 256)
    levels = layout.levels().to(slab.device)
    for name, (_, columns) in layout.shapes.items():
        _fill_scales(layout.weight(slab[0], name, levels), 0.9 * columns**-0.5)
    slab[1:] = slab[0]
    x_1D, macs = bench.randn(1, D), 3 * D * c.moe_intermediate_size
    size = record_bytes(D, c.moe_intermediate_size, codecs)
    records, slots_E = Records(slab, layout, levels), bench.empty((S,), torch.int32)
    torch.arange(S, out=slots_E)
    choices, y_1KD = slots_E.long().view(-1, 1, K), bench.empty((1, K, D), torch.float32)
    decode = [partial(ops.experts, x_1D, records, slots_E, chosen, y_1KD) for chosen in choices]
    bench.measure(f"experts, 1 token, {K} experts", K * macs, K * size, decode, slab)
    for T in (1, 4, 16, 48, 128, MANY):
        x_TD, first = bench.randn(T, D), choices.new_zeros(T, 1)
        y_T1D = bench.empty((T, 1, D), torch.float32)
        single = partial(ops.experts, x_TD, records, slots_E, first, y_T1D)
        bench.measure(f"experts, {T} tokens, 1 expert", T * macs, size, [single])
    if not bench.on_cpu:
        x_TD, y_TKD = bench.randn(MANY, D), bench.empty((MANY, K, D), torch.float32)
        chosen = torch.rand(MANY, 64, device=slab.device).topk(K).indices
        grouped = partial(ops.experts, x_TD, records, slots_E[:64], chosen, y_TKD)
        name = f"experts, {MANY} tokens, 64 experts"
        bench.measure(name, MANY * K * macs, 64 * size, [grouped])


def _linears(bench: _Bench) -> None:
    """Resident matrices, one token and many.  Any bytes are weights."""
    D, linear = bench.config.hidden_size, bench.ops.linear
    memory = bench.empty((max(2, bench.working_set // (N * D)), N * D)).random_(0, 256)
    scale_N = bench.empty((N,), torch.float32).fill_(D**-0.5 / 73)

    def int8(block: Tensor) -> Matrix | Int8Weight:
        if not bench.on_cpu:
            return Int8Weight(block.view(N, D), scale_N)
        return Matrix(INT8, N, D, block.view(N // 16, D // 64, 1024), scale_N)

    def coded(codec: Codec) -> Sequence[CodedWeight]:
        shapes = codec.codes_shape(N, D), codec.scales_shape(N, D)
        dtype = torch.float16 if codec.scales == "f16" else torch.uint8
        size, levels = math.prod(shapes[0]), levels_of(codec).to(memory.device)
        whole = memory.view(-1)[: memory.numel() // size * size].view(-1, *shapes[0])
        scales = bench.empty((len(whole), *shapes[1]), dtype)
        pairs = zip(whole, scales, strict=True)
        weights = [CodedWeight(codes, of_codes, levels, (N, D)) for codes, of_codes in pairs]
        for weight in weights:
            _fill_scales(weight, 0.9 * D**-0.5)
        return weights

    kinds: dict[str, tuple[int, Sequence[Any]]]
    kinds = {"int8": (N * D, [int8(block) for block in memory.view(torch.int8)])}
    kinds |= {codec.name: (codec.nbytes(N, D), coded(codec)) for codec in (NF4, LUT4, LUT3)}
    x_1D, x_TD = bench.randn(1, D), bench.randn(MANY, D)
    for kind, (size, weights) in kinds.items():
        actions = [partial(linear, x_1D, weight) for weight in weights]
        bench.measure(f"linear {kind}, 1 row", N * D, size, actions, memory)
        many = [partial(linear, x_TD, weights[0])]
        bench.measure(f"linear {kind}, {MANY} rows", MANY * N * D, size, many)


def _attention(bench: _Bench) -> None:
    """One token over as many layers' caches as outgrow the processor's."""
    c, ops = bench.config, bench.ops
    R, W = c.kv_lora_rank, c.kv_lora_rank + c.qk_rope_head_dim
    width, dtype = ops.latent_row(R, c.qk_rope_head_dim)
    for H, context in ((16, 128), (16, 1024), (16, 8192), (128, 8192)):
        caches = bench.empty((27 * 1024 // context + 1, context, width), dtype)
        for cache in caches:
            ops.store_latents(bench.randn(context, W), R, cache)
        q_1HW, name = bench.randn(1, H, W), f"mla, {H} heads, context {context}"
        actions = [partial(ops.mla, q_1HW, cache, R, 0.1) for cache in caches]
        memory = None if bench.on_cpu else caches
        bench.measure(name, H * context * (R + W), caches[0].nbytes, actions, memory)


def _layer(bench: _Bench, codecs: ExpertCodecs | None) -> None:
    """All kernels of a layer."""
    _experts(bench, codecs or DEFAULT_CODECS)
    _linears(bench)
    _attention(bench)


def _stages(export: str, threads: int | None, rounds: int) -> list[turns.Row]:
    """What the stages of a decoded token read, and their share of a plain read's bandwidth."""
    with Runtime.open(export, context=64, threads=threads) as runtime:
        runtime.warm()
        report, sizes = speed.measure(runtime, 8, 32, 1, rounds), runtime.model.sizes
    assert sizes is not None
    ceiling, of = report["ceiling"], sizes.resident
    read = {"attention": of["attention"] + of["router"] + ceiling["bytes_per_token"]["KV cache"]}
    read["experts"] = ceiling["bytes_per_token"]["experts"]
    read["shared experts and dense layers"] = of["shared experts"] + of.get("dense layers", 0)
    read["head"] = sum(ceiling["bytes_per_token"].values()) - sum(read.values())
    rows = []
    for stage, spent in report["decode_milliseconds"].items():
        row = {"stage": stage, "milliseconds": spent}
        if size := read.get(stage):
            row |= {"bytes": size, "ratio": 1e3 * size / spent / ceiling["read_bandwidth"]}
        rows.append(row)
    return rows


@click.command()
@click.argument("export", metavar="[EXPORT]", required=False)
@turns.THREADS
@click.option("--isa", help="Instruction set. [default: the best here]")
@turns.repetitions(7)
@turns.WORKING_SET
@codec_options
def kernels(
    export: str | None, threads: int | None, isa: str | None, repetitions: int, **given: Any
) -> None:
    """Each native kernel beside what bounds it; or a token of EXPORT, stage by stage."""
    native = bindings.load()
    if native is None:
        advice = "pip install . with a C++ compiler present"
        raise ConfigError(f"the native kernels are not built: {advice}")
    if isa:
        native.set_isa(isa)
    if export is not None:
        return turns.finish(_stages(export, threads, repetitions), isa=native.isa)
    bench = _Bench("cpu", repetitions, given.pop("working_set"), threads)
    _layer(bench, expert_codecs(given))
    turns.finish(bench.rows, isa=native.isa, threads=native.threads)


@contextmanager
def _launching(way: str) -> Iterator[None]:
    """A runtime that is opened and used inside launches its decode kernels this way."""
    from slotmoe.quant.backends import triton

    with ExitStack() as stack:
        if way != "one graph":
            stack.enter_context(patch.object(Slots, "complete", False))
        if way == "kernel by kernel":
            stack.enter_context(patch.object(triton, "CudaGraphs", lambda: None))
        yield


def _step(export: str, way: str, ceiling: float, steps: int, depth: int) -> turns.Row:
    """A decode step after ``depth`` cached tokens, every expert in a slot.  ``gaps`` is the share
    of its wall time without a kernel, by torch's profiler."""
    ids, activities = turns.random_ids(steps + 3), [torch.profiler.ProfilerActivity.CUDA]
    context = depth + len(ids)
    with _launching(way), Runtime.open(export, device="cuda", context=context) as runtime:
        runtime.warm()
        speed.token_seconds(runtime, ids, depth)
        spent = median(speed.token_seconds(runtime, ids, depth)[3:])
        with torch.profiler.profile(activities=activities) as profiler:
            speed.token_seconds(runtime, ids, depth)
        busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
        bound = sum(bytes_per_token(runtime.model, depth).values()) / ceiling
    row = {"step": way, "seconds": spent, "tokens_per_second": 1 / spent}
    return row | {"gaps": max(0.0, 1 - busy / len(ids) / spent), "ratio": bound / spent}


@contextmanager
def _compiled(variant: str, hint: bool) -> Iterator[None]:
    """Kernels that are first used inside are compiled as this one of ``VARIANTS``, and with the
    ``hint`` of which levels lie side by side, or without."""
    import triton
    from triton import language

    from slotmoe.quant.backends import triton_few
    from slotmoe.quant.kernels.triton import rows

    blocks, warps = map(int, variant.split("x"))
    with (
        patch.object(rows, "BLOCKS", language.constexpr(blocks)),
        patch.dict(triton_few.WARPS, dict.fromkeys(KINDS.values(), warps)),
        ExitStack() as stack,
    ):
        if not hint:  # what lies in Triton's cache is known by its source alone
            cache = stack.enter_context(TemporaryDirectory())
            stack.enter_context(patch.dict(os.environ, TRITON_CACHE_DIR=cache))
            unhinted = triton.jit(_unhinted)
            stack.enter_context(patch.object(language, "max_contiguous", unhinted))
        yield


def _unhinted(x, values):  # type: ignore[no-untyped-def]
    return x


@click.command()
@click.argument("export", metavar="[EXPORT]", required=False)
@turns.WORKING_SET
@turns.repetitions(7)
@count("--steps", 50, "Decode steps of each kind; medians are reported.")
@count("--depth", 128, "Tokens cached before them.")
@codec_options
@choice("--variant", VARIANTS, VARIANTS[0], "Blocks x warps of one token's 4-bit products.")
@click.option("--hint/--no-hint", default=True, help="Tell Triton that levels lie side by side.")
def gpu(
    export: str | None, working_set: float, repetitions: int, variant: str, hint: bool, **given: Any
) -> None:
    """Each Triton kernel beside the GPU's bandwidth, and with EXPORT (slotmoe synth v2-lite EXPORT
    --share-layers 2) a decode step: kernel by kernel, as two graphs a layer, and as one graph."""
    if not torch.cuda.is_available():
        advice = "python -m bench kernels measures the CPU"
        raise ConfigError(f"gpu needs a CUDA device, and torch finds none here; {advice}")
    with _compiled(variant, hint), torch.inference_mode():
        bench = _Bench("cuda", repetitions, working_set)
        _layer(bench, expert_codecs(given))
    rows, ceiling = bench.rows, bench.rows[0]["plain_bytes_per_second"]
    if export is not None:
        for way in ("kernel by kernel", "two graphs a layer", "one graph"):
            rows.append(_step(export, way, ceiling, **given))
    told = {"device": torch.cuda.get_device_name(), "ops": bench.ops.name}
    told |= {"variant": variant, "hint": "on" if hint else "off"}
    turns.finish(rows, **told, bandwidth=ceiling)
