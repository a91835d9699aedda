"""Measure the native kernels beside what bounds them: `python -m slotmoe.tools.bench.kernels
[--json]`.

A shared machine's bandwidth moves by half within seconds, so every timing of a kernel that streams
its weights from memory is paired with a plain read of the same bytes just before it, and the ratio
is the median over pairs. Weights lie in large pages, as the runtime has them. Each of the two is
run once untimed before it is timed: which core read a line last makes the first pass slower where
the cores have a third-level cache each, and the two deal the lines to the threads differently.
Kernels that compute (many tokens, attention) are given as multiply-adds a second and, for
comparison between machines, bytes of weights or cache.

Shapes are V2-Lite's: H = 2048, I = 1408, k = 6 experts; 16 heads over a latent of 512 + 64; context
8192.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slotmoe.offload.tiers.memory import in_large_pages, page_aligned
from slotmoe.quant import nf4
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import PackedInt8
from slotmoe.quant.shapes import absmax_shape, codes_shape, latent_bytes, record_bytes

HIDDEN, INTERMEDIATE, TOP_K = 2048, 1408, 6
LATENT, ROPE, HEADS = 512, 64, 16
LEVELS = torch.tensor(nf4.LEVELS)

Row = dict[str, object]


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def streaming(
    native: qk.Kernels,
    name: str,
    memory: Tensor,
    used: int,
    action: Callable[[], object],
    rounds: int,
) -> Row:
    """`action` reads `used` bytes spread over all of `memory` (uint8 [n]) once."""
    pairs = []
    for _ in range(rounds):
        native.read(memory)
        read = seconds(lambda: native.read(memory))
        action()
        pairs.append((memory.numel() / read, used / seconds(action)))
    return {
        "kernel": name,
        "bytes_per_second": statistics.median(k for _, k in pairs),
        "read_bytes_per_second": statistics.median(r for r, _ in pairs),
        "ratio": statistics.median(k / r for r, k in pairs),
    }


def computing(name: str, macs: float, size: int, action: Callable[[], object], rounds: int) -> Row:
    """`action` does `macs` multiply-adds over `size` bytes of weights, cache or source."""
    action()
    middle = statistics.median(seconds(action) for _ in range(rounds))
    return {
        "kernel": name,
        "seconds": middle,
        "macs_per_second": macs / middle,
        "bytes_per_second": size / middle,
    }


def records(count: int) -> tuple[Tensor, list[Tensor], int]:
    """-> the memory, `count` page-aligned random expert records in it, bytes of one."""
    size = record_bytes(HIDDEN, INTERMEDIATE)
    step = -(-size // 4096) * 4096
    memory = page_aligned(count * step)
    shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    codes = sum(math.prod(codes_shape(*shape)) for shape in shapes)
    first = memory[:step]
    first.random_(0, 256)
    first[codes:size] = torch.full(((size - codes) // 2,), 0.02, dtype=torch.float16).view(
        torch.uint8
    )
    memory.view(count, step)[1:] = first
    return memory, [memory[i * step : i * step + size] for i in range(count)], size


def experts(native: qk.Kernels, rounds: int, working_set: int) -> list[Row]:
    """One token through k experts a layer, layer after layer; and one expert with many tokens."""
    x = torch.randn(HIDDEN)
    count = working_set // record_bytes(HIDDEN, INTERMEDIATE) // TOP_K * TOP_K
    memory, all_records, size = records(count)
    groups = [all_records[i : i + TOP_K] for i in range(0, count, TOP_K)]

    def decode() -> None:
        for group in groups:
            native.experts_each(x, group, INTERMEDIATE, LEVELS)

    rows = [streaming(native, "experts_each", memory, count * size, decode, rounds)]
    for tokens in (1, 4, 16, 48, 128, 512):
        many = torch.randn(tokens, HIDDEN)
        slots, y = torch.zeros(tokens, 1, dtype=torch.int32), torch.empty(tokens, 1, HIDDEN)
        action = partial(
            native.experts_by_slot, many, all_records[0][None], slots, INTERMEDIATE, LEVELS, y
        )
        rows.append(
            computing(
                f"experts_by_slot, {tokens} tokens",
                3 * tokens * HIDDEN * INTERMEDIATE,
                size,
                action,
                rounds,
            )
        )
    return rows


def linears(native: qk.Kernels, rounds: int, working_set: int) -> list[Row]:
    """Resident matrices, one token and many."""
    n = 8192
    x, many = torch.randn(1, HIDDEN), torch.randn(512, HIDDEN)
    macs = 512 * HIDDEN * n
    packed = in_large_pages(
        (working_set // (n * HIDDEN), n // 16, HIDDEN // 64, 1024), torch.int8
    ).random_(-127, 128)
    scale = torch.rand(n)

    def int8() -> None:
        for w in packed:
            native.linear_int8(x, PackedInt8(w, n, HIDDEN), scale)

    first = PackedInt8(packed[0], n, HIDDEN)
    rows = [
        streaming(
            native, "linear_int8", packed.view(torch.uint8).flatten(), packed.numel(), int8, rounds
        ),
        computing(
            "linear_int8, 512 tokens",
            macs,
            n * HIDDEN,
            partial(native.linear_int8, many, first, scale),
            rounds,
        ),
    ]

    codes = packed.view(torch.uint8).view(-1, *codes_shape(n, HIDDEN))  # any bytes are codes
    absmax = in_large_pages((len(codes), *absmax_shape(n, HIDDEN)), torch.float16).uniform_()

    def coded() -> None:
        for c, a in zip(codes, absmax, strict=True):
            native.linear_nf4(x, c, a, LEVELS, n)

    size = codes[0].numel() + 2 * absmax[0].numel()
    action = partial(native.linear_nf4, many, codes[0], absmax[0], LEVELS, n)
    rows.append(streaming(native, "linear_nf4", codes.flatten(), size * len(codes), coded, rounds))
    rows.append(computing("linear_nf4, 512 tokens", macs, size, action, rounds))
    return rows


def attention(native: qk.Kernels, rounds: int) -> list[Row]:
    """One token over as many layers' caches as outgrow the processor's; seconds are for one
    layer."""
    rows = []
    for heads, context in ((HEADS, 128), (HEADS, 1024), (HEADS, 8192), (128, 8192)):
        layers = in_large_pages(
            (27 * 1024 // context + 1, context, latent_bytes(LATENT, ROPE)), torch.uint8
        )
        for cache in layers:
            native.store_latents(torch.randn(context, LATENT + ROPE), LATENT, cache)
        q = torch.randn(1, heads, LATENT + ROPE)

        def attend(layers: Tensor = layers, q: Tensor = q, context: int = context) -> None:
            for cache in layers:
                native.mla(q, cache, context, LATENT, 0.1)

        macs = len(layers) * heads * context * (2 * LATENT + ROPE)
        row = computing(
            f"mla, {heads} heads, context {context}", macs, layers.numel(), attend, rounds
        )
        rows.append(row | {"seconds": float(str(row["seconds"])) / len(layers)})
    return rows


def quantizers(native: qk.Kernels, rounds: int) -> list[Row]:
    """bytes_per_second is of the bf16 source."""
    source = torch.randn(8192, HIDDEN).bfloat16()
    count = source.numel()
    return [
        computing(
            "quantize_nf4, bf16", count, 2 * count, partial(native.quantize_nf4, source), rounds
        ),
        computing(
            "quantize_int8, bf16", count, 2 * count, partial(native.quantize_int8, source), rounds
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="threads (default: all cores)")
    parser.add_argument("--isa", help="instruction set (default: the best here)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="timings of each kernel; medians are reported"
    )
    parser.add_argument(
        "--working-set", type=float, default=1.5, help="GiB that streaming kernels run through"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    native = qk.load()
    if native is None:
        print("the native kernels are not built: pip install . with a C++ compiler present")
        return 1
    if options.threads:
        native.set_threads(options.threads)
    if options.isa:
        native.set_isa(options.isa)
    rounds, working_set = options.rounds, int(options.working_set * 2**30)
    rows = experts(native, rounds, working_set) + linears(native, rounds, working_set)
    rows += attention(native, rounds) + quantizers(native, rounds)
    if options.json:
        print(json.dumps({"isa": native.isa, "threads": native.threads, "kernels": rows}))
        return 0
    print(f"{native.isa}, {native.threads} threads")
    for row in rows:
        line = f"{row['kernel']:36} {float(str(row['bytes_per_second'])) / 1e9:8.1f} GB/s"
        if "ratio" in row:
            read, ratio = float(str(row["read_bytes_per_second"])), float(str(row["ratio"]))
            line += f"  read {read / 1e9:6.1f} GB/s  {ratio:6.1%}"
        else:
            macs, middle = float(str(row["macs_per_second"])), float(str(row["seconds"]))
            line += f"  {macs / 1e9:8.1f} GMAC/s  {middle * 1e6:10.1f} us"
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
