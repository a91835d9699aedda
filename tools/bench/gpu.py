"""Measure the Triton kernels and a decode step on a CUDA device: `python -m slotmoe.tools.bench.gpu
[--json]`.

Bandwidth is that of torch's own copy of 1 GiB in the same run; every kernel that is bound by it is
given as a share of it. Kernels run through more weights than any cache holds, many launches in one
CUDA graph, so that no launch is measured with them. The step is V2-Lite's, random weights, every
expert in a slot, in three ways: kernel by kernel, as two graphs a layer, and as one graph. Its gaps
are the share of the wall time in which the device ran no kernel, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe import model
from slotmoe.model.config import Config, read_config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import EMBEDDING, resident_shapes, role_of
from slotmoe.model.network import DeepseekV2
from slotmoe.quant import nf4
from slotmoe.quant.backends import pick_ops
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import absmax_shape, codes_shape, resident_quantization

GEOMETRY = Path(model.__file__).parent / "geometries" / "v2-lite.json"
Row = dict[str, Any]


class DeviceExperts:
    """A network's routed experts, all in one slab (uint8 [S, record_bytes]) and found by tables on
    the device (int32 [E], of each layer), as an engine whose slots hold every expert has them."""

    def __init__(
        self,
        ops: TorchOps,
        layout: RecordLayout,
        slab: Tensor,
        tables: dict[int, Tensor],
        on_device: bool = True,
    ):
        self.ops, self.layout, self.slab, self.tables, self.on_device, self.calls = (
            ops,
            layout,
            slab,
            tables,
            on_device,
            0,
        )
        self._levels = torch.tensor(nf4.LEVELS, device=slab.device)

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        self.calls += 1
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        self.ops.experts_by_slot(
            x_TD, self.slab, self.tables[layer][indices_TK], self.layout, self._levels, y_TKD
        )
        return self.ops.weighted_sum(y_TKD, weights_TK)


def random_int8(N: int, K: int, device: torch.device) -> Int8Weight:
    """[N, K] with weights of about 1 / sqrt(K)."""
    return Int8Weight(
        torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device),
        torch.full((N,), K**-0.5 / 73, device=device),
    )


def random_nf4(N: int, K: int, device: torch.device) -> Nf4Weight:
    """The same; any bytes are codes."""
    codes = torch.randint(0, 256, codes_shape(N, K), dtype=torch.uint8, device=device)
    absmax = torch.full(absmax_shape(N, K), 1.8 * K**-0.5, dtype=torch.float16, device=device)
    return Nf4Weight(codes, absmax, torch.tensor(nf4.LEVELS, device=device), (N, K))


def random_slab(S: int, layout: RecordLayout, device: torch.device) -> Tensor:
    """Records of random codes."""
    slab = torch.randint(0, 256, (S, layout.record_bytes), dtype=torch.uint8, device=device)
    for name, (_, K) in layout.shapes.items():
        part = layout.parts[f"{name}.weight.absmax"]
        slab[:, part.offset : part.offset + part.nbytes].view(torch.float16).fill_(1.8 * K**-0.5)
    return slab


def random_network(config: Config, ops: TorchOps, device: torch.device) -> DeepseekV2:
    """``config`` with random int8 resident weights and every expert on the device."""
    weights: dict[str, Any] = {}
    for name, shape in resident_shapes(config).items():
        if resident_quantization(role_of(name), "int8") == "int8":
            N, K = shape
            weights[name] = random_int8(N, K, device)
        else:
            weights[name] = (
                torch.ones(shape, device=device)
                if len(shape) == 1
                else torch.randn(shape, device=device) * shape[1] ** -0.5
            )
    layout = RecordLayout(config.hidden_size, config.moe_intermediate_size)
    layers, E = config.moe_layers, config.n_routed_experts
    tables = torch.randperm(len(layers) * E).to(device, torch.int32).view(len(layers), E)
    experts = DeviceExperts(
        ops,
        layout,
        random_slab(len(layers) * E, layout, device),
        dict(zip(layers, tables, strict=True)),
    )
    return DeepseekV2(config, weights, ops, experts)


def touched(config: Config, position: int) -> int:
    """Bytes that a token at ``position`` reads: int8 resident weights, its experts, the latent
    cache."""
    shapes = {name: shape for name, shape in resident_shapes(config).items() if name != EMBEDDING}
    resident = sum(
        math.prod(shape) * (4 if resident_quantization(role_of(name), "int8") == "none" else 1)
        for name, shape in shapes.items()
    )
    record = RecordLayout(config.hidden_size, config.moe_intermediate_size).payload_bytes
    cache = config.num_hidden_layers * position * config.latent_width * 2
    return resident + len(config.moe_layers) * config.num_experts_per_tok * record + cache


def bandwidth() -> float:
    """Bytes a second, read and written, of torch's copy."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds([lambda: target.copy_(source)])


def device_seconds(actions: Sequence[Callable[[], Any]], rounds: int = 7) -> float:
    """Median time of all ``actions`` on the device, captured in one graph."""
    for action in actions:
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    times = []
    for _ in range(rounds + 1):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1e3)
    return float(statistics.median(times[1:]))


def streaming(name: str, size: int, actions: Sequence[Callable[[], Any]], ceiling: float) -> Row:
    """Each action reads ``size`` bytes of its own."""
    seconds = device_seconds(actions) / len(actions)
    return {
        "kernel": name,
        "seconds": seconds,
        "bytes_per_second": size / seconds,
        "ratio": size / seconds / ceiling,
    }


def computing(name: str, macs: float, actions: Sequence[Callable[[], Any]]) -> Row:
    seconds = device_seconds(actions) / len(actions)
    return {"kernel": name, "seconds": seconds, "macs_per_second": macs / seconds}


def kernels(c: Config, ops: TorchOps, working_set: int, ceiling: float) -> list[Row]:
    """Every kernel alone, in V2-Lite's shapes."""
    cuda, D, K, T = torch.device("cuda"), c.hidden_size, c.num_experts_per_tok, 512
    layout, levels = (
        RecordLayout(D, c.moe_intermediate_size),
        torch.tensor(nf4.LEVELS, device="cuda"),
    )
    S = working_set // layout.record_bytes // K * K
    slab, x_1D, x_TD = (
        random_slab(S, layout, cuda),
        torch.randn(1, D, device=cuda),
        torch.randn(T, D, device=cuda),
    )
    slots, y = (
        torch.arange(S, dtype=torch.int32, device=cuda).view(-1, 1, K),
        torch.empty(1, K, D, device=cuda),
    )
    size = K * layout.payload_bytes
    by_slot = [partial(ops.experts_by_slot, x_1D, slab, one, layout, levels, y) for one in slots]
    rows = [streaming(f"experts_by_slot, 1 token, {K} experts", size, by_slot, ceiling)]

    tokens = torch.randint(T, (T * K,), device=cuda)
    starts = torch.linspace(0, T * K, 65, device=cuda).int()
    groups = torch.arange(64, dtype=torch.int32, device=cuda)
    grouped = [partial(ops.experts_grouped, x_TD, tokens, starts, groups, slab, layout, levels)]
    rows.append(
        computing(
            f"experts_grouped, {T} tokens, 64 experts",
            T * K * 3 * D * c.moe_intermediate_size,
            grouped,
        )
    )

    N = 8192
    for kind, make in (("int8", random_int8), ("nf4", random_nf4)):
        size = N * D if kind == "int8" else N * D * 17 // 32
        weights = [make(N, D, cuda) for _ in range(max(2, working_set // size))]
        one = [partial(ops.linear, x_1D, weight) for weight in weights]
        rows.append(streaming(f"linear {kind}, 1 row", size, one, ceiling))
        rows.append(
            computing(
                f"linear {kind}, {T} rows", T * N * D, [partial(ops.linear, x_TD, weights[0])]
            )
        )

    H, W, R = c.num_attention_heads, c.latent_width, c.kv_lora_rank
    q_1HW = torch.randn(1, H, W, device=cuda)
    for context in (128, 1024, 8192):
        caches = [
            torch.randn(context, W, device=cuda).half()
            for _ in range(max(2, min(4096, working_set // (2 * context * W))))
        ]
        attend = [partial(ops.mla, q_1HW, rows_SW, R, 0.1) for rows_SW in caches]
        rows.append(
            streaming(f"mla, {H} heads, context {context}", 2 * context * W, attend, ceiling)
        )
    return rows


def step_seconds(network: DeepseekV2, cache: LatentCache, steps: int, depth: int) -> float:
    """Median wall time of a decode step whose token is fetched by the host, as when it is sampled
    there."""
    times = []
    for position in range(depth, depth + steps + 3):
        cache.length = position
        started = time.perf_counter()
        network.forward(
            torch.tensor([position % 1000], device=cache.layers.device), cache
        ).argmax().item()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def busy_seconds(network: DeepseekV2, cache: LatentCache, steps: int, depth: int) -> float:
    """Time a step in which the device runs something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step_seconds(network, cache, steps, depth)
    return (
        float(sum(event.self_device_time_total for event in profiler.key_averages()))
        / 1e6
        / (steps + 3)
    )


def decode_steps(config: Config, steps: int, depth: int, ceiling: float) -> list[Row]:
    """A whole decode step in three ways; ``gaps`` is the share of its wall time without a
    kernel."""
    cuda, rows = torch.device("cuda"), []
    graph = pick_ops(cuda).graph  # type: ignore[attr-defined]
    for name, with_graphs, on_device in (
        ("kernel by kernel", None, False),
        ("two graphs a layer", graph, False),
        ("one graph", graph, True),
    ):
        ops: Any = pick_ops(cuda)
        ops.graph = with_graphs
        network = random_network(config, ops, cuda)
        assert isinstance(network.experts, DeviceExperts)
        network.experts.on_device = on_device
        cache = LatentCache(
            config, depth + 4 * steps + 64, (config.latent_width, torch.float16), cuda
        )
        cache.layers.fill_(0.1)
        seconds = step_seconds(network, cache, steps, depth)
        busy = busy_seconds(network, cache, steps, depth)
        rows.append(
            {
                "step": name,
                "seconds": seconds,
                "tokens_per_second": 1 / seconds,
                "gaps": max(0.0, 1 - busy / seconds),
            }
        )
        rows[-1]["share_of_bandwidth_bound"] = touched(config, depth) / ceiling / seconds
        del network, cache
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time the Triton kernels and a decode step on a CUDA device."
    )
    parser.add_argument(
        "--working-set", type=float, default=1.5, help="GiB that streaming kernels run through"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="decode steps of each kind; medians are reported"
    )
    parser.add_argument(
        "--depth", type=int, default=128, help="tokens in the latent cache before them"
    )
    parser.add_argument(
        "--layers", type=int, help="fewer layers than V2-Lite's 27, for a card of less than 12 GB"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_bench: needs a CUDA device, and torch finds none here; slotmoe.tools.bench.kernels measures the CPU",
            file=sys.stderr,
        )
        return 2
    config, ops = read_config(GEOMETRY), pick_ops(torch.device("cuda"))
    if options.layers:
        config = replace(config, num_hidden_layers=options.layers)
    with torch.inference_mode():
        ceiling = bandwidth()
        rows = kernels(config, ops, int(options.working_set * 2**30), ceiling)
    steps = decode_steps(config, options.steps, options.depth, ceiling)
    report = {
        "device": torch.cuda.get_device_name(),
        "ops": ops.name,
        "bandwidth": ceiling,
        "kernels": rows,
        "steps": steps,
    }
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"{report['device']}, {ops.name}, {ceiling / 1e9:.0f} GB/s by torch's copy")
    for row in rows:
        speed = (
            f"{row['bytes_per_second'] / 1e9:8.1f} GB/s {row['ratio']:6.1%}"
            if "ratio" in row
            else f"{row['macs_per_second'] / 1e12:8.2f} TMAC/s"
        )
        print(f"{row['kernel']:40} {row['seconds'] * 1e6:10.1f} us {speed}")
    for row in steps:
        line = f"{row['tokens_per_second']:8.1f} tokens/s, gaps {row['gaps']:.1%}, {row['share_of_bandwidth_bound']:.1%} of the bound"
        print(f"step, {row['step']:34} {row['seconds'] * 1e6:10.1f} us {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
