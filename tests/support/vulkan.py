"""A network of random weights on a Vulkan device, what a device there is, and one that fails.

Shapes: L layers, T rows, D hidden_size, E experts, M MoE layers, S positions, W latent row.
"""

import ctypes
from ctypes import c_void_p

import numpy as np
import pytest
import torch

from slotmoe.model.network import inverse_frequencies
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.vulkan import VulkanBackend, place
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.kernels import vulkan as vk
from tests.support.native import network_of
from tests.support.slab import SlabExperts
from tests.support.tiny import random_weights

LOST, NO_ROOM, TIMEOUT = -4, -2, 2  # VkResult
_Entry = ctypes.CFUNCTYPE(c_void_p, c_void_p, ctypes.c_char_p)
_Forward = ctypes.CFUNCTYPE(ctypes.c_int, *[c_void_p] * 6)
Span = vk.structure("address: address int: bytes")
Operation = vk.structure("address: reads writes int: barrier shader at")
SETS = (
    "io taken hidden low query latent queries caches sums values between logits normed activated"
    " choice order experts shared scores told"
).split()


def usable():
    """Why there is no device to test on, or None."""
    try:
        problems = [info.problem.decode() for info in vk.devices()]
    except vk.VulkanError as problem:
        return str(problem)
    return problems[0] or None if problems else "there is no Vulkan device"


PROBLEM = usable()
needs_vulkan = pytest.mark.skipif(PROBLEM is not None, reason=f"no Vulkan 1.3: {PROBLEM}")


class Loader:
    """The system's, but the ``at``-th call of function ``name`` gives ``result``: it stands before
    that, so that any function of Vulkan fails at any call.  ``seen`` gets its arguments first."""

    def __init__(self, name, at, result, seen=lambda *_: None):
        system = ctypes.CDLL("libvulkan.so.1").vkGetInstanceProcAddr
        system.restype, system.argtypes = c_void_p, [c_void_p, ctypes.c_char_p]
        self.calls, self.at, self._kept = 0, at, []

        def entry(instance, wanted):
            address = system(instance, wanted)
            if wanted.decode() != f"vk{name}" or not address:
                return address
            real = _Forward(address)

            def call(*arguments):
                self.calls += 1
                seen(*arguments)
                return result if self.calls == self.at else real(*arguments)

            self._kept.append(_Forward(call))
            return ctypes.cast(self._kept[-1], c_void_p).value

        self._entry = _Entry(entry)
        self.address = ctypes.cast(self._entry, c_void_p).value


class OnDevice:
    """A network's weights on a device, as the backend places them, and steps of its decode; beside
    it the reference path.  Records of experts whose number is in ``far`` lie in mapped memory."""

    def __init__(self, device, raw, resident="int8", codecs=EXPERT_CODECS["nf4", "4"], far=(1, 3)):
        self.device, self.backend, self.kept = device, TorchBackend(), []
        self.network = network_of(raw, resident, self.backend)
        self.config, self.geometry = self.network.config, self.network._geometry
        made = self.config, random_weights(raw), torch.device("cpu")
        experts = SlabExperts(self.backend, *made, codecs=codecs)
        self.network.experts, self.records = experts, experts._records
        placing = VulkanBackend(device)
        placing.layout, placing.rows = self.records.layout, 64
        network_of(raw, resident, placing)
        self.decoder, self.views = placing._decoder, placing._views
        self.addresses_ME = self._place_records(experts._slots_ME, far)
        self.views.table[:] = self.addresses_ME
        of = self.geometry.grouped  # groups of a layer's rows, and elements of each
        self.cached = (of.G, 2 * of.Z) if of else (1, self.geometry.R + self.geometry.P)
        self.frequencies_C = inverse_frequencies(self.config.rope, self.config.qk_rope_head_dim)

    def put(self, tensor):
        """Its address."""
        return place(self.device, tensor)[0]

    def _place_records(self, slots_ME, far):
        slab = self.records.slab
        mapped = self.device.allocate(vk.MAPPED, slab.nbytes)
        ctypes.memmove(mapped.mapped, slab.data_ptr(), slab.nbytes)
        near = self.put(slab)
        starts_E = [mapped.address if e in far else near for e in range(slots_ME.shape[1])]
        offsets_ME = slots_ME.numpy().astype(np.uint64) * np.uint64(slab.shape[1])
        return offsets_ME + np.array(starts_E, np.uint64)

    def cache(self, context=96):
        """The address of a sequence's latents [L, S, W], and the bytes of a layer: all NaN."""
        groups, width = self.cached
        shape = groups * self.config.num_hidden_layers, context, width
        rows = torch.full(shape, torch.nan, dtype=torch.float16)
        return self.put(rows), rows[0].nbytes

    def step(self, ids, positions, caches, first=None, last=None, **more):
        """What `Decoder.run` takes for a row each of these."""
        views, T = self.views, len(ids)
        rope_TC = self.backend.rotations(
            torch.tensor(positions, dtype=torch.float32),
            self.frequencies_C,
            self.config.rope.table_scale,
        )
        lists = [
            np.array(ids, np.int64),
            np.array(positions, np.int64),
            np.array([start for start, _ in caches], np.uint64),
            np.array([size for _, size in caches], np.int64),
        ]
        self.kept = [lists, rope_TC, *more.values()]
        pointers = {name: item.data_ptr() for name, item in more.items()}
        ends = views.begin if first is None else first, views.logits_end if last is None else last
        tables = (item.ctypes.data for item in lists)
        return vk.Step(T, *ends, *tables, **pointers)

    def run(self, *arguments, **more):
        """Do a step; logits float32 [T, V]."""
        step = self.step(*arguments, **more)
        self.decoder.run(step)
        return torch.from_numpy(self.views.logits[: step.rows].copy())

    def span(self, name):
        """Where a set's memory is, and its bytes."""
        spans = ctypes.cast(self.decoder.told.spans, ctypes.POINTER(Span))
        return spans[SETS.index(name)].address, spans[SETS.index(name)].bytes

    def read(self, name, dtype=torch.float32):
        """A set's memory."""
        address, size = self.span(name)
        host = torch.empty(size, dtype=torch.uint8)
        if size:
            self.device.read(address, host.data_ptr(), 1, size)
        return host.view(dtype)

    def plan(self, first=None, last=None, rows=1):
        """Operations of a step."""
        views = self.views
        last = last or (views.logits_end if rows <= vk.ROWS else views.hidden_end)
        ends = views.begin if first is None else first, last
        operations, count = (Operation * 999)(), ctypes.c_int64()
        vk.call("plan", self.decoder.handle, rows, *ends, operations, 999, ctypes.byref(count))
        return operations[: count.value]
