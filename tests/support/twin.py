"""A GPU in RAM, really asynchronous: the product's ``CudaDevice`` over a simulated ``torch.cuda``.

What a missing wait, an early write or a slot that is used again would do on a GPU shows as a wrong
text: nothing here knows slots or events.  ``tests/support/simulated.py`` says what runs when.
"""

import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from slotmoe.network.layer_types import Mlp
from slotmoe.network.shapes import SWIGLU
from slotmoe.offload.engine import loading
from slotmoe.offload.plan.memory import make_plan
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.weight import map_tensors
from slotmoe.quant.export.layout import checksum
from tests.support import simulated, streams


class Told:
    """A backend that tells the twin what it launches."""

    twin = None

    def experts(self, *what):
        self.twin.launch()
        super().experts(*what)


class AsKernels:
    """What has most operations is one kernel each, as the Triton backend's are."""

    def experts(self, x_TD, records, slots_E, indices_TK, y_TKD):
        levels, layout, compute = records.levels.elem, records.layout, super().experts

        def run(slab, *tensors):
            compute(tensors[0], Records(slab, layout, levels), *tensors[1:])

        simulated.launch(run, records.slab, x_TD, slots_E, indices_TK, y_TKD)

    def linear(self, x_TK, weight):
        if not isinstance(x_TK, simulated.Tensor):
            return super().linear(x_TK, weight)
        y_TN, linear = torch.empty(len(x_TK), weight.shape[0], device=x_TK.device), super().linear
        weight = map_tensors(weight, lambda tensor: tensor.elem)
        simulated.launch(lambda y_TN, x_TK: y_TN.copy_(linear(x_TK, weight)), y_TN, x_TK)
        return y_TN

    def weighted_sum(self, y_TKD, weights_TK):
        y_TD, compute = torch.empty_like(y_TKD[:, 0]), super().weighted_sum
        simulated.launch(lambda y_TD, *given: y_TD.copy_(compute(*given)), y_TD, y_TKD, weights_TK)
        return y_TD


class Decoding(TorchBackend):
    """Plain torch.  Weights are decoded once, and known again by the bytes of the record: most of
    its time.  Bytes that are not the record's are decoded as what they are."""

    known = {}  # noqa: RUF012

    def experts(self, x_TD, records, slots_E, indices_TK, y_TKD):
        layout = records.layout
        how = layout.hidden_size, layout.moe_intermediate_size, repr(layout.codecs)

        def mlp_of(slot):
            key = checksum(records.slab[slot].numpy()), *how, records.levels.numpy().tobytes()
            if key not in self.known:
                mlp = records.mlp(slot)
                weights = mlp.gate_proj, mlp.up_proj, mlp.down_proj
                decoded = [weight.dequantize() for weight in weights]
                self.known[key] = Mlp(*decoded, mlp.biases)
            return self.known[key]

        decoded = SimpleNamespace(mlp=mlp_of)
        super().experts(x_TD, decoded, slots_E, indices_TK, y_TKD)


class TwinBackend(Told, AsKernels, Decoding):
    pass


class Twin(simulated.cuda.CudaDevice):
    """``seed`` is the adversary's.  ``fail(n)`` may raise when the n-th copy is queued,
    ``spoil(n)`` says that the GPU fails before it; ``on_launch(n)`` acts before the n-th launch.
    ``graph`` is the Triton backend's, where ``triton``."""

    def __init__(self, seed=0, capacity=1 << 30, triton=False, graph=None):
        sys.audit("tests.twin")
        self.gpu = streams.new_gpu(seed, capacity)
        weakref.finalize(self, self.gpu.close)
        super().__init__(self.gpu.index)
        self._triton, self._graph = triton, graph
        self.fail = self.spoil = self.on_launch = lambda number: None
        self.launches = self.copies = self.released = 0

    def backend(self, kernels, activation=SWIGLU):
        if self._triton:
            from slotmoe.quant.backends.triton import TritonBackend

            simulated.queue_interpreted_kernels()
            ops = type("TwinTriton", (Told, TritonBackend), {})(self.device, activation)
            ops.few.graph = self._graph
        else:
            ops = TwinBackend(torch.float32, activation)
        ops.twin = self
        return ops

    def empty(self, shape, dtype):
        gpu, size = self.gpu, torch.Size(shape).numel() * dtype.itemsize
        if gpu.allocated + size > gpu.capacity - gpu.taken:
            raise torch.OutOfMemoryError(f"out of memory: tried to allocate {size} bytes")
        gpu.allocated += size
        gpu.peak = max(gpu.peak, gpu.allocated)
        made = super().empty(shape, dtype)
        weakref.finalize(made.memory, self._freed, gpu, size)
        return made

    @staticmethod
    def _freed(gpu, size):
        gpu.allocated -= size

    def run(self, step, ways_out):
        """Its one copy engine has records before it: nothing small may be given to it, which is
        what torch does when a tensor is copied as it is between the host and the GPU."""
        before = self.gpu.engine
        result = super().run(step, ways_out)
        assert self.gpu.engine == before, "small memory went by the copy engine"
        return result

    def copy(self, source, target, after):
        self.copies += 1
        self.fail(self.copies)
        if self.spoil(self.copies):
            self.gpu.put(self._copies, simulated.fault)
        return super().copy(source, target, after)

    def release(self):
        self.released += 1

    def launch(self):
        self.on_launch(self.launches + 1)
        self.launches += 1


# The engine on it

EXPERTS = 3 * 16  # of the fixture ``twin_export``


def open_on(export, twin, host_slots=EXPERTS, **options):
    """An export on a twin, with so many experts in RAM below it.  CPU and link are said to take as
    long for an expert, so ``hybrid`` halves the misses."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=host_slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "make_plan", plan)
        patch.setattr(loading, "stored_bandwidths", lambda path, gpu: measured())
        chosen = twin, "a test"
        patch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted, notify: chosen)
        return Runtime.open(export, context=256, threads=1, **options)


def measured(pcie_busy=1e9, experts=1e9):
    return Bandwidths().updated("measured on a day", pcie_busy=pcie_busy, experts=experts)
