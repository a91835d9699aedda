"""What the engine asks of the device that computes: memory, streams, events.

The engine orders its work by two streams and never asks which library they come from:

    compute   kernels, in the order in which they are launched, and small transfers between two
    copies    records from RAM into slots, one after the other, and nothing else, since small copies
              between large ones slow both

``copy`` starts after an event of the compute stream (the slot's last reader has been launched
before it) and returns an event that ``wait`` makes the compute stream wait for.  The host waits
only where it has to decide: ``Download.get``.  On a CPU everything has happened when a call
returns.  ``tests/support/twin.py`` is a device in RAM whose copies take as long, or fail as often,
as a test wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from slotmoe.offload.tiers.memory import Arena, Touching, in_large_pages
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import TorchBackend

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether everything before it has happened; what is launched after a True sees it."""

    def synchronize(self) -> None:
        """Block the host until then."""


class Copy(Event, Protocol):
    """The end of a copy."""

    @property
    def seconds(self) -> float:
        """How long a copy that is done took, from its first byte on."""


class Download(Protocol):
    """Values on their way to the host."""

    def get(self) -> Tensor:
        """The tensor in RAM; blocks until it is there."""


class SlotEntries(Protocol):
    """A slot table on the device.  Entries change by kernels that carry their value, never by
    copies, which would wait for records' copies."""

    tensor: Tensor  # int32 [MoE layers, E]

    def set(self, expert_id: int, slot: int) -> None: ...

    def load(self, slots: list[int]) -> None:
        """Set all entries."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes: ``free`` and ``total`` of a GPU; of this process's tensors those ``allocated`` now,
    their ``peak`` so far, and what its allocator has ``reserved`` for them.  What is neither is the
    CUDA context and other programs."""

    free: int
    total: int
    allocated: int
    reserved: int
    peak: int

    @property
    def beside(self) -> int:
        """Bytes in use that are not this process's tensors: the CUDA context, libraries' own
        memory, other programs."""
        return max(0, self.total - self.free - self.reserved)


class Device(Protocol):
    """``device`` is where its tensors live, ``tier`` the memory that its slots take (``ram`` or
    ``vram``).  ``queues``: kernels are only queued when a call returns.  ``copy``, ``pin`` and
    ``empty`` may be called from any thread."""

    device: torch.device
    name: str
    tier: str
    queues: bool

    def backend(self, kernels: str, threads: int | None) -> TorchBackend:
        """What multiplies here; ``kernels`` and ``threads`` as for ``pick_backend``."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device.  Raises ``torch.OutOfMemoryError``."""

    def weights(self) -> Empty:
        """An allocator for many weights that stay."""

    def touching(self, slab: Tensor, ready: int) -> Touching | None:
        """A thread that makes a slab's memory present behind its first ``ready`` bytes, or None
        where it is all there."""

    def slot_entries(self, layers: int, experts: int) -> SlotEntries:
        """A slot table, -1 everywhere."""

    def layer_slots(self, experts: int, slots: Mapping[int, int]) -> Tensor:
        """int32 [experts] on the device: ``slots`` by expert, -1 elsewhere."""

    def run(self, step: Callable[[], Tensor], ways_out: str) -> Tensor:
        """What ``step`` gives, computed.  Raises ``DeviceError`` if the device fails; ``ways_out``
        is what could be asked for instead."""

    def record(self) -> Event:
        """The point after all kernels launched so far."""

    def wait(self, event: Event) -> None:
        """Kernels launched from now on run after ``event``.  Raises ``RuntimeError`` if its copy is
        known to have failed."""

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Copy:
        """Copy ``source`` (in RAM, unchanged until the event is done) to ``target`` on the device,
        once ``after`` has happened."""

    def download(self, tensor: Tensor) -> Download:
        """Bring a small tensor to the host, behind the kernels launched so far."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A small tensor from the host, before the kernels launched from now on."""

    def pin(self, memory: Tensor) -> bool:
        """Page-lock RAM so that copies from it need no host; False if the system refuses."""

    def unpin(self, memory: Tensor) -> None:
        """Undo ``pin``."""

    def memory(self) -> DeviceMemory | None:
        """A GPU's memory; None where the device's memory is RAM."""

    def release(self) -> None:
        """Give what the allocator keeps for later back to the driver."""

    def synchronize(self) -> None:
        """Block the host until all streams are idle."""


class _Done:
    """What has happened already: an event, a copy."""

    seconds = 0.0

    def done(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Here:
    """A tensor that is in RAM already."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get(self) -> Tensor:
        return self._tensor


class CpuEntries:
    """A slot table in RAM."""

    def __init__(self, layers: int, experts: int):
        self._slots = np.full((layers, experts), -1, np.int32)
        self.tensor = torch.from_numpy(self._slots)

    def set(self, expert_id: int, slot: int) -> None:
        self._slots.flat[expert_id] = slot

    def load(self, slots: list[int]) -> None:
        self._slots.flat[:] = slots


class CpuDevice:
    """The CPU: its memory is RAM, and every call has done its work when it returns."""

    device, name, tier, queues = torch.device("cpu"), "cpu", "ram", False
    _done = _Done()

    def backend(self, kernels: str, threads: int | None) -> TorchBackend:
        return pick_backend(self.device, kernels, threads)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return in_large_pages(shape, dtype)

    def weights(self) -> Empty:
        return Arena().empty

    def touching(self, slab: Tensor, ready: int) -> Touching | None:
        return Touching(slab.view(-1), ready) if ready < slab.nbytes else None

    def slot_entries(self, layers: int, experts: int) -> SlotEntries:
        return CpuEntries(layers, experts)

    def layer_slots(self, experts: int, slots: Mapping[int, int]) -> Tensor:
        table = np.full(experts, -1, np.int32)
        for expert, slot in slots.items():
            table[expert] = slot
        return torch.from_numpy(table)

    def run(self, step: Callable[[], Tensor], ways_out: str) -> Tensor:
        return step()

    def record(self) -> Event:
        return self._done

    def wait(self, event: Event) -> None:
        pass

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Copy:
        target.copy_(source)
        return self._done

    def download(self, tensor: Tensor) -> Download:
        return _Here(tensor)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def pin(self, memory: Tensor) -> bool:
        return True

    def unpin(self, memory: Tensor) -> None:
        pass

    def memory(self) -> DeviceMemory | None:
        return None

    def release(self) -> None:
        pass

    def synchronize(self) -> None:
        pass
