"""Compiles what the Triton backend launches for V2-Lite or V2, or of the attention of V3.2 or V4,
for a GPU that need not be here: ``python -m tests.support.compile_gpu sm_86 v2-lite``.

A process of its own, since Triton interprets in the tests' one.  Each line of the output is a JSON
object: kernel, the bytes of shared memory that a program takes, the bytes that it spills into
memory, and how many ``loads`` of each width in bits each of its loops has.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from slotmoe.model.config import parse_config, read_config
from slotmoe.model.layers import geometry_of
from slotmoe.network.layer_types import ListedRows, Mixing
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.quant.backends.triton import TritonBackend
from slotmoe.quant.codecs.codec import DEFAULT_CODECS, LUT3, LUT4, ExpertCodecs
from tests.support.meta import META, empty, forward, network_of
from tests.support.slab import NF4S

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
LUTS = ExpertCodecs(LUT3, LUT4)
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


def resources(compiled):
    """Spilled bytes and loops' loads of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True).stdout
            for what in ("-res-usage", "-sass")
        )
    counts = {what: int(count) for what, count in re.findall(r"(STACK):(\d+)", usage)}
    loads = [Counter(filter(None, map(width_of_load, body))) for body in loops(code)]
    return {"spilled": counts["STACK"], "loads": loads}


def width_of_load(text):
    """In bits, of a load from memory."""
    load = re.search(r"\bLDG((?:\.\w+)*) ", text)
    return load and int((re.findall(r"\.[US]?(8|16|64|128)\b", load[1]) or [32])[0])


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
        told = {"kernel": name, "shared": compiled.metadata.shared}
        print(json.dumps(told | resources(compiled)))

    return run


def launch(backend, config, mode, codecs=DEFAULT_CODECS):
    """What decode launches, where experts may be missing and where they can not, and what a short
    and a long prefill do."""
    network = network_of(config, backend, mode, codecs)
    for tokens in (1, 4, 16, 512):
        forward(network, tokens, 512)
    forward(network_of(config, backend, mode, codecs, complete=True), 1, 512)


def launch_operations(backend, geometry):
    """What is launched layer by layer for lists, by their indexer, and in V4 for residual streams,
    compressed rows and gates, of one token, of a few, and of many."""
    H, _, P, R, *_ = geometry
    compressed, hyper, router = geometry.compressed, geometry.hyper, geometry.router
    J, A, topk, _ = geometry.indexer
    width, window = (R, compressed.window) if compressed else (R + P, 0)
    rows_SX, keys_SA = (empty(4096, X, dtype=torch.float16) for X in (width, A))
    more_SX, sinks_H = (rows_SX, empty(H)) if compressed else (None, None)
    for T in (1, 4, 512):
        lists_TL = empty(T, window + topk, dtype=torch.int32)
        listed = ListedRows(rows_SX, more_SX, lists_TL, sinks_H)
        backend.attend(empty(T, H, width), listed, R, 0.1)
        counts_T = empty(T, dtype=torch.int32)
        backend.index(empty(T, J, A), empty(T, J), keys_SA, counts_T, topk)
        if hyper is not None:
            Q, D = hyper.Q, 4096
            mixing = Mixing(empty((2 + Q) * Q, Q * D), empty((2 + Q) * Q), empty(3))
            _, mixed = backend.mix(empty(T, Q * D), mixing, hyper)
            backend.add_mixed(empty(T, D), empty(T, Q * D), mixed)
            head = Mixing(empty(Q, Q * D), empty(Q), empty(1))
            backend.collapse(empty(T, Q * D), head, hyper)
            for M, Y in ((8, R), (8, A), (128, R)):
                backend.compress(empty(T, M, 2, Y), empty(M, Y), empty(Y), 1e-6)
        chosen_TK = empty(T, router.top_k, dtype=torch.int64)
        for given in ((empty(256), None), (None, chosen_TK)):
            backend.route(empty(T, 256), router, *given)


if __name__ == "__main__":
    _, target, geometry = sys.argv
    JITFunction.run = compile_instead(int(target[3:]))
    given = TritonBackend(META)
    geometry = geometry_path(geometry)
    described_by = read_config(geometry)
    if described_by.indexer is not None:
        launch_operations(given, geometry_of(described_by))
        sys.exit()
    sigmoid = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    sigmoid |= {"norm_topk_prob": True, "rope_interleave": False, "n_group": 8, "topk_group": 4}
    sigmoid["architectures"] = None
    launch(given, parse_config(json.loads(geometry.read_text()) | sigmoid), "int8", LUTS)
    launch(given, described_by, "int8")
    launch(given, described_by, "nf4", NF4S)
