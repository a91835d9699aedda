"""What the engine asks of the device that computes: memory, streams, events.

The engine orders its work by two streams and never asks which library they come from:

    compute   kernels, in the order in which they are launched
    copies    records from RAM into slots, one after the other, and nothing else

Small things never wait behind records in a copy engine: kernels read and write page-locked RAM.

``copy`` starts after an event of the compute stream (the slot's last reader has been launched
before it) and returns an event that ``wait`` makes the compute stream wait for.  The host waits
only where it has to decide: ``Download.get``.  ``tests/support/twin.py`` is a GPU in RAM whose
streams are as late as CUDA allows.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import TypeVar

import torch
from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.network.shapes import Activation
from slotmoe.offload.devices.pages import Arena, in_large_pages
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Empty, TorchBackend
from slotmoe.system import Placement

T = TypeVar("T")


class Event:
    """A point in a stream, or the end of a copy; on a CPU it is always reached."""

    @property
    def seconds(self) -> float:
        """How long a copy that is done took, from its first byte on."""
        return 0.0

    def done(self) -> bool:
        """Whether everything before it has happened; what is launched after a True sees it."""
        return True

    def synchronize(self) -> None:
        """Block the host until then."""


@dataclass(frozen=True)
class Region:
    """Bytes of memory, from ``address`` on for the kernels that read it, or in ``parts`` of whole
    records.  ``tensor``, uint8, is the same memory; where torch does not know the device it is
    empty."""

    address: int
    nbytes: int
    tensor: Tensor
    parts: "tuple[Region, ...]" = ()

    @classmethod
    def of(cls, tensor: Tensor) -> "Region":
        """The memory of a whole ``tensor``."""
        return cls(tensor.data_ptr(), tensor.nbytes, tensor)

    def split(self, size: int) -> list["Region"]:
        """Its parts, of ``size`` bytes each, the last perhaps of less."""
        if self.parts:
            return [piece for part in self.parts for piece in part.split(size)]
        places, total = range(0, self.nbytes, size), self.nbytes
        tensors = self.tensor.split(size) if len(self.tensor) else repeat(self.tensor)
        return [
            Region(self.address + place, min(size, total - place), tensor)
            for place, tensor in zip(places, tensors, strict=False)
        ]


class Download:
    """Values on their way to the host, all by one ``event``; without one, on a CPU, they are there.
    Kernels write them into page-locked RAM, which serves the next ones, so they are copied."""

    def __init__(self, tensor: Tensor, *others: Tensor, event: Event | None = None):
        self._host, self._others, self._event = tensor, others, event

    def get(self) -> Tensor:
        """The tensor in RAM; blocks until it is there."""
        if self._event is None:
            return self._host
        self._event.synchronize()
        return self._host.clone()

    def others(self) -> tuple[Tensor, ...]:
        """What came with it, once ``get`` has returned."""
        if self._event is None:
            return self._others
        return tuple(tensor.clone() for tensor in self._others)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes: ``free`` and ``total`` of a GPU; of this process's tensors those ``allocated`` now,
    their ``peak`` so far, and what its allocator has ``reserved`` for them."""

    free: int
    total: int
    allocated: int
    reserved: int
    peak: int

    @property
    def beside(self) -> int:
        """Bytes of no tensor of this process: the CUDA context, libraries, other programs."""
        return max(0, self.total - self.free - self.reserved)


class Device:
    """The CPU, whose every call has done its work when it returns; ``CudaDevice`` is a GPU.
    ``device`` is where its tensors live, ``tier`` the memory that its slots take (``ram`` or
    ``vram``).  ``queues``: kernels are only queued when a call returns.
    ``reads_in_place``: they read experts that have no slot from RAM, which is all the memory that a
    ``unified`` one has.  ``placement``: where CPU
    threads run and RAM lies.  ``copy``, ``pin`` and ``empty`` may be called from any thread."""

    device, name, tier, queues = torch.device("cpu"), "cpu", "ram", False
    reads_in_place = unified = False
    placement = Placement(1)

    def refuse(self, config: Config, asked: Mapping[str, object]) -> None:
        """Raises ``ConfigError`` for a model, or what is ``asked`` of it, that is not there yet."""

    def backend(self, kernels: str, activation: Activation) -> TorchBackend:
        """What multiplies here; all as for ``pick_backend``."""
        return pick_backend(self.device, kernels, activation)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory on the device.  Raises ``torch.OutOfMemoryError``."""
        return in_large_pages(shape, dtype, self.placement.nodes)

    def region(self, count: int, size: int) -> Region:
        """Memory for ``count`` records of ``size``.  Raises ``torch.OutOfMemoryError``."""
        return Region.of(self.empty((count * size,), torch.uint8))

    def reach(self, memory: Region) -> Region:
        """RAM by the address that copies and kernels know.  Raises ``DeviceError``."""
        return memory

    def latents(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for what sequences keep.  Raises ``torch.OutOfMemoryError``."""
        return self.empty(shape, dtype)

    def weights(self) -> Empty:
        """An allocator for many weights that stay."""
        return Arena(nodes=self.placement.nodes).empty

    def current(self) -> AbstractContextManager[object]:
        """Kernels are launched on this device inside, whichever thread launches them."""
        return nullcontext()

    def run(self, step: Callable[[], T], ways_out: str) -> T:
        """What ``step`` gives, computed.  Raises ``DeviceError`` if the device fails; ``ways_out``
        is what could be asked for instead."""
        return step()

    def record(self) -> Event:
        """The point after all kernels launched so far."""
        return Event()

    def wait(self, event: Event) -> None:
        """Kernels launched from now on run after ``event``; ``RuntimeError`` if its copy failed."""

    def copy(self, source: Region, target: Region, after: Event) -> Event:
        """Once ``after`` is reached, copy ``source`` (in RAM, unchanged until that is done)."""
        target.tensor.copy_(source.tensor)
        return Event()

    def download(self, tensor: Tensor, *others: Tensor) -> Download:
        """Bring small tensors to the host together, behind the kernels launched so far."""
        return Download(tensor, *others)

    def upload(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A small tensor from the host, before the kernels launched from now on; on a GPU ``into``
        what is there already, if that is given."""
        return tensor

    def write(self, source: Tensor, target: Tensor, at: Tensor | None = None) -> None:
        """The same into ``target``, which is on the device already, or into its rows ``at``."""
        if at is None:
            target.copy_(source)
        else:
            target.index_copy_(0, at, source)

    def pin(self, memory: Region) -> bool:
        """Page-lock RAM so that copies from it need no host; False if the system refuses."""
        return True

    def unpin(self, memory: Region) -> None:
        """Undo ``pin``."""

    def memory(self) -> DeviceMemory | None:
        """A GPU's memory; None where the device's memory is RAM."""
        return None

    def release(self) -> None:
        """Give what the allocator keeps for later back to the driver."""
