"""Where records come from: what a tier of experts asks of the tier below it.

    ExpertStore   expert slots, on the device or in RAM below it
      | read(expert_id, slot, urgency) -> Read
    DiskReader    threads with several aligned direct reads in flight
    HostTier      below a GPU: the same, through slots in page-locked RAM

An expert id is (MoE layer index) * n_routed_experts + expert.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from torch import Tensor

from slotmoe.offload.devices.device import Event

DEMAND = 0  # the highest urgency; a prefetch has the number of layers until its use
_NOTHING = memoryview(b"")


@dataclass(eq=False, slots=True)
class Read:
    """One record on its way into memory.  ``done`` is True when it can be used or when ``error``
    says why not; on a GPU kernels can use it that wait for ``copy`` first, None once they do."""

    expert_id: int
    urgency: int
    buffer: memoryview = _NOTHING
    # Called once in the reading thread, before ``done``; False: the read failed or was given up.
    after: Callable[[bool], None] | None = None
    taken: int = 0  # bytes given to readers
    outstanding: int = 0  # pieces being read
    done: bool = False
    cancelled: bool = False
    error: Exception | None = None
    copy: Event | None = None

    @property
    def arrived(self) -> bool:
        """Whether it is done, and so is its copy."""
        return self.done and (self.copy is None or self.copy.done())


class Source(Protocol):
    """What gives records to the tier above."""

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read:
        """A read of a record into ``target``, uint8; ``submit`` starts it, if it is not done."""

    def submit(self, reads: Iterable[Read]) -> None:
        """Queue what ``read`` gave, as far as it is not done; reads of urgency ``DEMAND`` overtake
        all others.  Raises ``ConfigError`` after ``stop``."""

    def promote(self, read: Read) -> None:
        """A prefetch has become a demand."""

    def cancel(self, read: Read) -> bool:
        """Give a read up; True if its target is free now, else when the read is ``done``."""

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until at least one of ``reads`` is done, and return those that are.  Raises
        ``ConfigError`` after ``stop``, which another thread may call meanwhile."""

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins."""


def read_each(
    source: Source, expert_ids: Iterable[int], at_once: int, begin: Callable[[int], Read]
) -> Iterator[Read]:
    """What ``begin`` has started for each expert, as it is done, so many at a time."""
    ids, pending = iter(expert_ids), list[Read]()
    while pending := pending + [begin(id) for id in islice(ids, at_once - len(pending))]:
        for read in source.wait(pending):
            pending.remove(read)
            yield read
