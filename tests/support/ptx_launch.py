"""Triton's launches on the CPU: ``tests.support.ptx`` runs what a GPU would be given on the memory
of CPU tensors.

Triton decides when it is imported that it interprets; here its functions become the compiled kind
for a while.  A launch stands where that of the interpreter would, so ``tests.support.graphs``
records it.
"""

import sys
from functools import cache, partial

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.interpreter import GridExecutor, InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.support.compile_gpu import described
from tests.support.interpreter import span_of
from tests.support.ptx import Program, Regions, launch
from tests.support.ptx_ops import UNSIGNED, build

NUMBERS = {"fp32": np.float32, "i32": np.int32}
parsed = cache(partial(Program, build=build))


class Launches:
    """``edit`` changes the PTX of a kernel before it runs.  ``named`` are tensors that addresses in
    memory may point into."""

    def __init__(self, arch, seed):
        self.target, self.seed, self.edit = GPUTarget("cuda", arch, 32), seed, lambda text: text
        self.named = list[torch.Tensor]()
        self._compiled = dict[str, triton.compiler.CompiledKernel]()

    def run(self, kernel, *args, grid, warmup, **options):
        """``JITFunction.run``."""
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        signature, *description = described(kernel, arguments)
        key = f"{kernel.fn.__module__}.{kernel.fn.__name__} {signature} {description} {options}"
        if key not in self._compiled:
            source = ASTSource(kernel, signature, *description)
            self._compiled[key] = triton.compile(source, target=self.target, options=options)
        given = {name: arguments[name] for name in signature if signature[name] != "constexpr"}
        bits = [_bits(value, signature[name]) for name, value in given.items()]
        tensors = {name: value for name, value in given.items() if torch.is_tensor(value)}

        def go():
            compiled = self._compiled[key]
            held = [(*span_of(tensor), name) for name, tensor in tensors.items()]
            held += [(*span_of(tensor), "a tensor that the test names") for tensor in self.named]
            program = parsed(self.edit(compiled.asm["ptx"]))
            unused = [_bits(0, "i64")] * (len(program.parameters) - len(bits))  # Triton's own
            parameters = dict(zip(program.parameters, bits + unused, strict=True))
            shared, regions = compiled.metadata.shared, Regions(held)
            launch(program, (*grid, 1, 1)[:3], shared, parameters, regions, self.seed)
            self.seed += 1

        GridExecutor.__call__(go)


def _bits(value, kind):
    """What a kernel finds in a parameter."""
    number = value.data_ptr() if torch.is_tensor(value) else value
    array = np.array([[number]], NUMBERS.get(kind, np.int64))
    return array.view(UNSIGNED[array.itemsize])


@cache
def _compilable(function):
    return JITFunction(function.fn, **function.kwargs)


def emulated(patch, folder, arch=89, seed=0):
    """Until ``patch`` ends, launches go to what this returns; ``folder`` keeps their PTX."""
    launches = Launches(arch, seed)
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.", "slotmoe.quant.kernels.triton")):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, InterpretedFunction):
                    patch.setattr(module, attribute, _compilable(value))
    patch.setenv("TRITON_CACHE_DIR", str(folder))
    patch.setattr(CUDABackend, "make_cubin", lambda *given: b"")  # which nothing here would run
    patch.setattr(GridExecutor, "__call__", lambda go: go())
    patch.setattr(JITFunction, "run", lambda *args, **options: launches.run(*args, **options))
    return launches
