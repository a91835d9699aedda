"""Compiles what the Triton backend launches for V2-Lite or V2, for a GPU that need not be
here: ``python -m tests.support.compile_gpu sm_86 [v2] [all]``.  ``all`` adds prefill and NF4
resident weights.

A process of its own, since Triton interprets in the tests' one.  Each line of the output is a JSON
object: kernel, the ``kind`` of the weights that it reads, the bytes of shared memory that a program
takes, its registers, the bytes that it spills into memory.  With ``all``, and else of NF4 experts,
``loops`` is what the machine code tells of each loop: the instructions of a turn, and for each of
its 128-bit loads how many of these lie before the first use of what it loads.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from slotmoe.border import Geometry, Layer, Mlp, Router, Step, Timer
from slotmoe.quant.backends.base import Records, SlotTable
from slotmoe.quant.backends.triton import TritonBackend
from slotmoe.quant.codec import LUT3, LUT4, NF4, ExpertCodecs
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight

V2 = "v2" in sys.argv
D, WIDTH, H, N, P, R, V, E, K = 2048, 1408, 16, 128, 64, 512, 128, 64, 6
Q, GROUPS, KEPT, DENSE_WIDTH = None, 1, 1, 10944
if V2:
    D, WIDTH, H, E, Q, GROUPS, KEPT, DENSE_WIDTH = 5120, 1536, 128, 160, 1536, 8, 3, 12288
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
NF4S, LUTS = ExpertCodecs(NF4, NF4), ExpertCodecs(LUT3, LUT4)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def described(kernel, arguments):
    """What a launch with ``arguments`` would compile: the types, constants and alignments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specialized
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = "*" + TYPES[value.dtype] if is_tensor else "i32"
            address = value.storage_offset() * value.element_size() if is_tensor else value
            if specialized and address % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(compiled, read):
    """Registers and spilled bytes of a compiled kernel, and its loops if its code is to be
    ``read``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True).stdout
            if wanted
            else ""
            for what, wanted in (("-res-usage", True), ("-sass", read))
        )
    counts = {what: int(count) for what, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = [(len(body), list(ahead_of_use(body))) for body in loops(code)]
    return {"registers": counts["REG"], "spilled": counts["STACK"], "loops": found}


def loops(code):
    """The bodies of a kernel's loops, as lists of instructions."""
    lines = re.findall(r"(?m)^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    for address, text in instructions:
        target = re.search(r"\bBRA(?:\.U)? (?:\S+, )?`?\(?(?:\.L_x_\d+\))?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            begin = int(target[1], 16)
            body = [held for at, held in instructions if begin <= at <= address]
            if len(body) > 1:
                yield body


def registers(text):
    """Numbers of the registers that an operand list names; an address takes two."""
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", text):
        yield int(number)
        if wide:
            yield int(number) + 1


def ahead_of_use(body):
    """Of each 128-bit load of a loop, the instructions until one reads what it loads, the next turn
    included."""
    for index, text in enumerate(body):
        load = re.search(r"LDG\.E\.128(?:\.\w+)* R(\d+), ", text)
        if load is None:
            continue
        loaded = set(range(int(load[1]), int(load[1]) + 4))
        for distance in range(1, len(body) + 1):
            operands = body[(index + distance) % len(body)].partition(",")[2]
            if loaded.intersection(registers(operands)):
                yield distance
                break


def compile_instead(capability):
    """A ``JITFunction.run`` that compiles as a launch with these arguments would, once for each
    kind of arguments."""
    seen = set()

    def run(kernel, *args, grid, warmup, **options):
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        description = described(kernel, arguments)
        name = f"{kernel.fn.__module__}.{kernel.__name__}"
        if (variant := f"{name} {description} {options}") in seen:
            return
        seen.add(variant)
        source, target = ASTSource(kernel, *description), GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        shared = compiled.metadata.shared
        told = {"kernel": name, "kind": arguments.get("KIND"), "shared": shared}
        read = "all" in sys.argv or (".rows.experts_" in name and told["kind"] == NF4.kind)
        print(json.dumps(told | resources(compiled, read)))

    return run


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def int8(n, k):
    return Int8Weight(empty(n, k, dtype=torch.int8), empty(n))


def nf4(n, k):
    return CodedWeight(
        empty(*NF4.codes_shape(n, k), dtype=torch.uint8),
        empty(*NF4.scales_shape(n, k), dtype=torch.float16),
        empty(16),
        (n, k),
    )


def records(codecs):
    layout = RecordLayout(D, WIDTH, codecs)
    return Records(empty(E, layout.record_bytes, dtype=torch.uint8), layout, empty(2, 16))


class Experts:
    """The network's experts, which all have slots if ``complete``."""

    def __init__(self, codecs, complete):
        self._records, self._complete = records(codecs), complete

    def slot_table(self):
        return SlotTable(self._records, empty(1, E, dtype=torch.int32), self._complete)

    def __call__(self, backend, x_TD, weights_TK, indices_TK):
        """What is late after what is there, as ``slotmoe.offload.experts`` does it."""
        y_TKD = empty(1, K, D)
        for _ in range(2):
            backend.experts(x_TD, self._records, empty(E, dtype=torch.int32), indices_TK, y_TKD)
        return backend.weighted_sum(y_TKD, weights_TK)

    def passed(self, layer, indices_MTK, x_MTD):
        assert indices_MTK.shape == (1, 1, K)


def decode(backend, make, router, bias=None, codecs=NF4S):
    """One token through a dense layer and one with experts, of which some are late, and again with
    all in slots.  With a bias, rotated pairs stand in halves."""
    moe = Layer(
        input_layernorm=empty(D),
        q_proj=None if Q else make(H * (N + P), D),
        q_a_proj=make(Q, D) if Q else None,
        q_a_layernorm=empty(Q) if Q else None,
        q_b_proj=make(H * (N + P), Q) if Q else None,
        kv_a_proj=make(R + P, D),
        kv_a_layernorm=empty(R),
        kv_b_proj=int8(H * (N + V), R),
        o_proj=make(D, H * V),
        post_attention_layernorm=empty(D),
        gate=empty(E, D),
        gate_bias=bias,
        mlp=Mlp(make(2 * WIDTH, D), make(2 * WIDTH, D), make(D, 2 * WIDTH)),
    )
    mlp = Mlp(make(DENSE_WIDTH, D), make(DENSE_WIDTH, D), make(D, DENSE_WIDTH))
    dense = replace(moe, gate=None, gate_bias=None, mlp=mlp)
    geometry = Geometry(H, N, P, R, V, 1e-6, 1e-6, 0.1, bias is not None, router, WIDTH)
    cache = SimpleNamespace(
        length=8, layers=empty(2, 64, R + P, dtype=torch.float16), extend=lambda layer, count: None
    )
    decoder = backend.decoder(geometry, [dense, moe])
    for complete in (False, True):
        rope, experts = empty(1, P // 2, dtype=torch.complex64), Experts(codecs, complete)
        step = Step(empty(1, D), rope, None, [cache], [1], Timer())
        if not complete:
            _, *choice = decoder.run_layers(step, experts)
            step.routed_TD = experts(backend, *choice)
        assert decoder.run_layers(step, experts) is None


def prefill(backend, make, codecs=NF4S):
    for T in (4, 512):
        backend.linear(empty(T, D), make(3072, D))
        backend.mlp(empty(T, D), make(2 * WIDTH, D), make(2 * WIDTH, D), make(D, 2 * WIDTH))
    backend.mla(empty(4, H, R + P), empty(4096, R + P, dtype=torch.float16), R, 0.1)
    backend.absorb_query(empty(4, H, N), int8(H * (N + V), R))
    backend.absorb_value(empty(4, H, R), int8(H * (N + V), R), N)
    slots_E, indices_TK = empty(E, dtype=torch.int32), empty(512, K, dtype=torch.int64)
    backend.experts(empty(512, D), records(codecs), slots_E, indices_TK, empty(512, K, D))


if __name__ == "__main__":
    JITFunction.run = compile_instead(int(sys.argv[1].removeprefix("sm_")))
    backend = TritonBackend(torch.device("cuda"))
    backend.graph = None
    decode(backend, int8, Router(8, 4, K, 2.5, True, 2, True), empty(E), LUTS)
    for make in (int8, nf4) if "all" in sys.argv else (int8,):
        decode(backend, make, Router(GROUPS, KEPT, K))
        if "all" in sys.argv:
            prefill(backend, make)
            prefill(backend, make, LUTS)
