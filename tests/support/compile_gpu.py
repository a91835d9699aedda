"""Compiles what the Triton ops launch for V2-Lite's shapes, for a card that need not be here:
``compile_gpu.py 86 [prefill]``.

A process of its own, since Triton interprets in the tests' one. Each line of the output is a JSON
object: kernel, the bytes of shared memory that a program takes, and whether it spills registers
into memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from slotmoe.model.network import Layer, Mlp
from slotmoe.quant.backends.triton import TritonOps
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import absmax_shape, codes_shape

D, I, H, N, P, R, V, E, K = 2048, 1408, 16, 128, 64, 512, 128, 64, 6
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_instead(capability):
    """A ``JITFunction.run`` that compiles as a launch with these arguments would, once each."""
    seen = set()

    def run(kernel, *args, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, args, strict=False)) | {
            name: options.pop(name) for name in kernel.arg_names if name in options
        }
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, given[parameter.name]
            if (
                parameter.is_constexpr
                or value is None
                or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
            ):
                signature[name], constants[name] = "constexpr", value
                continue
            address = (
                value.storage_offset() * value.element_size()
                if isinstance(value, torch.Tensor)
                else value
            )
            signature[name] = (
                "*" + TYPES[value.dtype]
                if isinstance(value, torch.Tensor)
                else "fp32"
                if isinstance(value, float)
                else "i32"
            )
            if (
                not parameter.do_not_specialize
                and not isinstance(value, float)
                and address % 16 == 0
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = kernel.__name__, kernel.fn.__module__, str((signature, constants, attributes))
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = {what: int(count) for what, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        name = f"{kernel.fn.__module__}.{kernel.__name__}"
        print(
            json.dumps(
                {
                    "kernel": name,
                    "shared": compiled.metadata.shared,
                    "registers": found["REG"],
                    "spilled": found["STACK"],
                }
            )
        )

    return run


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def int8(n, k):
    return Int8Weight(empty(n, k, dtype=torch.int8), empty(n))


def nf4(n, k):
    return Nf4Weight(
        empty(*codes_shape(n, k), dtype=torch.uint8),
        empty(*absmax_shape(n, k), dtype=torch.float16),
        empty(16),
        (n, k),
    )


def decode(ops, make):
    attention = (
        make(H * (N + P), D),
        None,
        None,
        None,
        make(R + P, D),
        empty(R),
        int8(H * (N + V), R),
        make(D, H * V),
    )
    layer = Layer(
        empty(D),
        *attention,
        empty(D),
        empty(E, D),
        Mlp(make(2 * I, D), make(2 * I, D), make(D, 2 * I)),
    )
    fused = ops.fuse(layer, (H, N, P, R, V), 1e-6, 1e-6, 0.1)
    fused._attention(empty(1, D), 0)
    fused._feed_forward(empty(1, D), empty(1, D), empty(1, D))
    layout, y_1KD = RecordLayout(D, I), empty(1, K, D)
    slab = empty(E, layout.record_bytes, dtype=torch.uint8)
    ops.experts_by_slot(empty(1, D), slab, empty(1, K, dtype=torch.int32), layout, empty(16), y_1KD)
    ops.weighted_sum(y_1KD, empty(1, K))
    ops.route(empty(1, E), 1, 1, K, 1.0)


def prefill(ops, make):
    for T in (4, 512):
        ops.linear(empty(T, D), make(3072, D))
        ops.mlp(empty(T, D), make(2 * I, D), make(2 * I, D), make(D, 2 * I))
    ops.mla(empty(4, H, R + P), empty(4096, R + P, dtype=torch.float16), R, 0.1)
    ops.absorb_query(empty(4, H, N), int8(H * (N + V), R))
    ops.absorb_value(empty(4, H, R), int8(H * (N + V), R), N)
    layout, tokens = RecordLayout(D, I), empty(512 * K, dtype=torch.int64)
    slab, starts = empty(E, layout.record_bytes, dtype=torch.uint8), empty(E + 1, dtype=torch.int32)
    ops.experts_grouped(
        empty(512, D), tokens, starts, empty(E, dtype=torch.int32), slab, layout, empty(16)
    )


if __name__ == "__main__":
    JITFunction.run = compile_instead(int(sys.argv[1]))
    ops = TritonOps(torch.device("cuda"))
    ops.graph = None
    for make in (int8, nf4) if "prefill" in sys.argv else (int8,):
        decode(ops, make)
        if "prefill" in sys.argv:
            prefill(ops, make)
