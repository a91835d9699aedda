"""A GPU in RAM, really asynchronous: copies run in a thread and take as long as a test wants.

Its compute stream is the thread that computes, so ``wait`` blocks.  What a missing wait or event
would do on a real GPU is an assertion here: each launch says which slots it reads, and each copy
into a slot has to come after the slot's last reader and before its next.  A slot holds NaNs from
the moment its copy is queued until it has landed, and a copy reads its source late, so that what
slips through is a wrong result.
"""

import gc
import os
import sys
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from mmap import mmap
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slotmoe.offload.devices.cuda import CudaDevice, Mailbox, Mapped
from slotmoe.offload.devices.device import DeviceMemory
from slotmoe.offload.engine import loading
from slotmoe.offload.plan.memory import make_plan
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.layout import checksum


class Block(bytearray):
    """Memory of the GPU; can be watched until it is freed."""


@dataclass(frozen=True)
class Point:
    """An event of the compute stream, which has happened: behind kernel ``tick``."""

    tick: int
    error = None

    def done(self):
        return True

    def synchronize(self):
        pass


class TwinCopy:
    def __init__(self, twin, number):
        self._twin, self.number = twin, number
        self.landed, self.error, self.seconds = threading.Event(), None, 0.0

    def done(self):
        if self.landed.is_set():
            self._twin.order(self.number)
        return self.landed.is_set()

    def synchronize(self):
        assert self.landed.wait(30)
        self._twin.order(self.number)


class TwinDownload:
    """Counts the host's waits."""

    def __init__(self, twin, download):
        self._twin, self._download, self.others = twin, download, download.others

    def get(self):
        self._twin.syncs += 1
        return self._download.get()


class NoEngine(TorchDispatchMode):
    """The GPU's one copy engine has records before it: nothing small may be given to it, which is
    what torch does when a tensor is copied as it is between the host and the GPU."""

    COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.clone)

    def __init__(self, twin):
        super().__init__()
        self._twin = twin

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in self.COPIES:
            sides = {self._twin.side(tensor) for tensor in args if isinstance(tensor, torch.Tensor)}
            assert sides == {"host"}, f"{operation} of small memory by the copy engine"
        return operation(*args, **(kwargs or {}))


class Told:
    """A backend that tells the twin what it launches."""

    twin = None

    def experts(self, x_TD, records, slots_E, indices_TK, y_TKD):
        used = set(slots_E[indices_TK].flatten().tolist()) - {-1}
        self.twin.launch([records.slab[slot] for slot in used])
        super().experts(x_TD, records, slots_E, indices_TK, y_TKD)


class Decoding(TorchBackend):
    """Plain torch.  Weights are decoded once, and known again by the bytes of the record: most of
    its time.  Bytes that are not the record's are decoded as what they are."""

    known = {}  # noqa: RUF012

    def experts(self, x_TD, records, slots_E, indices_TK, y_TKD):
        layout = records.layout
        how = layout.hidden_size, layout.moe_intermediate_size, repr(layout.codecs)

        def weights(slot):
            key = checksum(records.slab[slot].numpy()), *how, records.levels.numpy().tobytes()
            if key not in self.known:
                self.known[key] = [weight.dequantize() for weight in records.weights(slot)]
            return self.known[key]

        decoded = SimpleNamespace(weights=weights)
        super().experts(x_TD, decoded, slots_E, indices_TK, y_TKD)


class TwinBackend(Told, Decoding):
    pass


class Twin:
    """``delay(n)`` acts in the copies' thread before the n-th; ``fail(n)`` may raise when it is
    queued, ``spoil(n)`` says that it fails on its way; ``on_launch(n)`` acts before the n-th
    launch.  ``graph`` is the Triton backend's, where ``triton``.  ``capacity`` bytes, of which
    others have ``taken`` some."""

    device, name, tier, queues = torch.device("cpu"), "the twin", "vram", True

    def __init__(self, delay=None, capacity=1 << 30, triton=False, graph=None):
        sys.audit("tests.twin")
        self._triton, self._graph = triton, graph
        self.delay = delay or (lambda number: None)
        self.fail = self.spoil = self.on_launch = lambda number: None
        self.capacity, self.taken, self.allocated, self.peak = capacity, 0, 0, 0
        self.syncs = self.launches = self.copies = self.released = self.seams = 0
        self._mailbox, self._host_side, self._given = Mailbox(), [], set()
        self.pinned, self.pins_allowed, self.unpinned_copies = {}, 1 << 30, 0  # address -> bytes
        self._ordered = -1
        # By a slot's address: its last reader, and the number of its last copy.
        self._read, self._written = {}, {}
        self._lock, self._queue = threading.Lock(), Queue()
        threading.Thread(target=self._run, args=(self._queue,), daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    @staticmethod
    def _run(queue):
        while (item := queue.get()) is not None:
            copy, source, target, delay, spoiled = item
            started = time.perf_counter()
            delay(copy.number)
            if spoiled:
                copy.error = RuntimeError("an illegal memory access")
            else:
                target.copy_(source)
            copy.seconds = time.perf_counter() - started
            copy.landed.set()
            del item, copy, source, target, delay

    # What the engine asks for

    def backend(self, kernels, swiglu_limit=0.0):
        if self._triton:
            from slotmoe.quant.backends.triton import TritonBackend

            ops = type("TwinTriton", (Told, TritonBackend), {})(self.device, swiglu_limit)
            ops.graph = self._graph
        else:
            ops = TwinBackend(torch.float32, swiglu_limit)
        ops.twin = self
        return ops

    def empty(self, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            if self.allocated + size > self.capacity - self.taken:
                raise torch.OutOfMemoryError(f"out of memory: tried to allocate {size} bytes")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        block = Block(b"\xff" * max(size, 1))
        weakref.finalize(block, self._freed, size)
        return torch.frombuffer(block, dtype=torch.uint8)[:size].view(dtype).view(shape)

    weights = CudaDevice.weights
    run = CudaDevice.run

    def current(self):
        return nullcontext()

    def _freed(self, size):
        self.allocated -= size

    def record(self):
        return Point(self.launches)

    def wait(self, event):
        event.synchronize()
        if event.error is not None:
            raise event.error

    def copy(self, source, target, after):
        with self._lock:
            self.copies += 1
            self.fail(self.copies)
            last = self._read.get(target.data_ptr(), 0)
            assert after.tick >= last, (
                f"copy {self.copies} overwrites a slot that kernel {last} reads, "
                f"and waits only for {after.tick}"
            )
            self.unpinned_copies += not self._is_pinned(source)
            self._written[target.data_ptr()] = self.copies
            target.fill_(255)
            copy = TwinCopy(self, self.copies)
            self._queue.put((copy, source, target, self.delay, self.spoil(self.copies)))
            return copy

    def mapped(self, size):
        """Memory with two addresses, as page-locked RAM has one for the host and one for
        kernels."""
        handle = os.memfd_create("mapped")
        os.ftruncate(handle, size)
        memory = Mapped(*(torch.frombuffer(mmap(handle, size), dtype=torch.uint8) for _ in "12"))
        os.close(handle)
        self._host_side.append(memory.host)
        return memory

    def side(self, tensor):
        """Whether memory is the host's or the GPU's: kernels' view of page-locked RAM is theirs."""
        address = tensor.data_ptr()
        if any(0 <= address - own.data_ptr() < len(own) for own in self._host_side):
            return "host"
        return "host" if address in self._given else "GPU"

    def download(self, *tensors):
        self.seams += 1
        with NoEngine(self):
            download = self._mailbox.read(self, *tensors)
        return TwinDownload(self, download)

    def upload(self, tensor):
        result = torch.empty_like(tensor)
        self.write(tensor, result)
        return result

    def write(self, source, target, at=None):
        self.seams += 1
        self._given = {given.data_ptr() for given in (source, at) if given is not None}
        with NoEngine(self):
            self._mailbox.write(self, source, target, at)
        self._given = set()

    def _is_pinned(self, memory):
        address = memory.data_ptr()
        return any(start <= address < start + size for start, size in self.pinned.items())

    def pin(self, memory):
        first = memory.data_ptr()
        assert first % 4096 == 0 and not self._is_pinned(memory)
        assert not any(first <= start < first + memory.nbytes for start in self.pinned)
        if len(self.pinned) >= self.pins_allowed:
            return False
        self.pinned[first] = memory.nbytes
        return True

    def unpin(self, memory):
        del self.pinned[memory.data_ptr()]

    def memory(self):
        free = self.capacity - self.taken - self.allocated
        return DeviceMemory(free, self.capacity, self.allocated, self.allocated, self.peak)

    def release(self):
        self.released += 1

    # What its copies and ops tell

    def order(self, number):
        """The compute stream is behind the copy ``number`` now, and so behind all before it."""
        self._ordered = max(self._ordered, number)

    def launch(self, rows):
        """A kernel that reads ``rows``."""
        self.on_launch(self.launches + 1)
        self.launches += 1
        for row in rows:
            number = self._written.get(row.data_ptr(), -1)
            assert number <= self._ordered, (
                f"kernel {self.launches} reads a slot and nobody has waited for copy {number} into "
                "it"
            )
            self._read[row.data_ptr()] = self.launches


# The engine on it

EXPERTS = 7 * 32


def open_on(export, twin, host_slots=EXPERTS, **options):
    """The sample on a twin, with so many experts in RAM below it.  CPU and link are said to take as
    long for an expert, so ``hybrid`` halves the misses."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=host_slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "make_plan", plan)
        patch.setattr(loading, "stored_bandwidths", lambda path: measured())
        patch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (twin, "a test"))
        return Runtime.open(export, context=256, threads=1, **options)


@contextmanager
def freed(runtime):
    """Closes it behind the block; then network, slots and the twin's memory are gone without a
    garbage collection: the next model needs the memory now."""
    gc.collect()
    gc.disable()
    try:
        yield
        model = runtime.model
        twin, parts = model.device, [model.network, model.network.layers[1], model.states[0]]
        parts += [model.experts, model.experts.slots.slab, model.store]
        layers = getattr(model.network._decoder, "_layers", None)
        parts += layers if isinstance(layers, list) else []
        gone = [weakref.ref(part) for part in parts]
        del model, parts, layers
        runtime.close()
        assert not [type(ref()) for ref in gone if ref() is not None]
        if getattr(twin, "_triton", True) is False:  # Triton's interpreter keeps tensors itself
            assert twin.allocated == 0
    finally:
        gc.enable()


def slow(number):
    time.sleep(0.0005 * (number % 3))


def measured(pcie_busy=1e9, experts=1e9):
    return Bandwidths().updated("measured on a day", pcie_busy=pcie_busy, experts=experts)
