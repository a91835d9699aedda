"""Triton's launches on the CPU, by ``tests.support.ptx``: what a GPU of ``arch`` would compile runs
on the memory of CPU tensors.

Triton decides when it is imported that it interprets.  Here its functions become the compiled kind
for a while.
"""

import sys
from functools import cache, partial

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.support.compile_gpu import described
from tests.support.ptx import Program, Regions, launch
from tests.support.ptx_ops import UNSIGNED, build

NUMBERS = {"fp32": np.float32, "i32": np.int32}
parsed = cache(partial(Program, build=build))


class Launches:
    """``edit`` changes a kernel's PTX before it runs.  ``named`` are tensors that addresses in
    memory may point into."""

    def __init__(self, arch, seed=0, edit=None):
        self.target, self.seed, self.edit = GPUTarget("cuda", arch, 32), seed, edit
        self.named, self.kernels = [], set()
        self._compiled = {}

    def run(self, kernel, *args, grid, warmup, **options):
        """``JITFunction.run``."""
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        signature, constants, attributes = described(kernel, arguments)
        key = kernel, repr((signature, constants, attributes, options))
        if key not in self._compiled:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=self.target, options=options)
            text = compiled.asm["ptx"] if self.edit is None else self.edit(compiled.asm["ptx"])
            self._compiled[key] = parsed(text), compiled.metadata.shared
        program, shared = self._compiled[key]
        given = {name: arguments[name] for name in signature if signature[name] != "constexpr"}
        bits = [_bits(value, signature[name]) for name, value in given.items()]
        bits += [_bits(0, "i64")] * (len(program.parameters) - len(bits))  # of Triton's own memory
        held = [_extent(value, name) for name, value in given.items() if torch.is_tensor(value)]
        held += [_extent(tensor, "a tensor that the test names") for tensor in self.named]
        self.kernels.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
        self.seed += 1
        parameters = dict(zip(program.parameters, bits, strict=True))
        grid = (*grid, 1, 1)[:3]
        launch(program, grid, shared, parameters, Regions(filter(None, held)), self.seed)


def _bits(value, kind):
    """What a kernel finds in a parameter."""
    number = value.data_ptr() if torch.is_tensor(value) else value
    array = np.array([[number]], NUMBERS.get(kind, np.int64))
    return array.view(UNSIGNED[array.itemsize])


def _extent(tensor, name):
    """The first address and the end of a tensor, which need not be contiguous."""
    if tensor.numel() == 0:
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    size = (1 + sum((length - 1) * step for length, step in steps)) * tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + size, f"{name} {list(tensor.shape)}"


@cache
def _compilable(function):
    return JITFunction(function.fn, **function.kwargs)


def emulated(patch, folder, **options):
    """Until the end of ``patch``, launches go to what this returns; ``folder`` keeps their PTX."""
    launches = Launches(**options)
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.", "slotmoe.quant.kernels.triton")):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, InterpretedFunction):
                    patch.setattr(module, attribute, _compilable(value))
    patch.setenv("TRITON_CACHE_DIR", str(folder))
    patch.setattr(CUDABackend, "make_cubin", lambda *given: b"")  # which nothing here would run
    patch.setattr(
        JITFunction, "run", lambda kernel, *args, **options: launches.run(kernel, *args, **options)
    )
    return launches
