"""The disk tier: threads with several aligned direct reads in flight, the most urgent record
first."""

import heapq
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch import Tensor

from slotmoe.errors import ExportError
from slotmoe.offload.plan.memory import HELP_BYTES
from slotmoe.offload.tiers.device import Event
from slotmoe.quant.export.reader import Export

# Urgencies; prefetches lie between them, the number of layers until their use.
DEMAND, WARM = 0, 1 << 30
READERS = 8
# Records are read in pieces, so that one missing expert too is worth several reads in flight.
PIECE_BYTES = 1 << 20


@dataclass(eq=False, slots=True)
class Read:
    """One record on its way into memory.  ``done`` is True when it can be used or when ``error``
    says why not; on a GPU it can be used by kernels that wait for ``copy`` first."""

    expert_id: int
    buffer: memoryview
    urgency: int
    # ``after(arrived)`` runs once in the reading thread, before ``done``: False if the read failed
    # or was given up.
    after: Callable[[bool], None] | None = None
    taken: int = 0  # bytes given to readers
    outstanding: int = 0  # pieces being read
    done: bool = False
    cancelled: bool = False
    error: BaseException | None = None
    copy: Event | None = None


class DiskReader:
    """The disk tier: ``READERS`` threads that read records piece by piece, the most urgent record
    first.

    Reads bypass the page cache where the file system allows (``direct``).  A record that fails to
    arrive or has a wrong checksum is read once more; then its ``Read`` carries an ``ExportError``.
    """

    def __init__(self, export: Export, direct: bool, threads: int = READERS):
        self._export, self.record_bytes = export, export.layout.record_bytes
        self.direct = direct and export.bypass_page_cache()
        if direct and not self.direct:
            refused = "%s: this file system refuses O_DIRECT; reads go through the page cache"
            logging.getLogger("slotmoe").warning(refused, export.folder)
        self._lock = threading.Lock()
        self._work, self._arrived = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[tuple[int, int, Read]] = []
        self._order = count()
        self._helps = self.record_bytes <= HELP_BYTES
        self._piece = min(PIECE_BYTES, -(-self.record_bytes // 4096) * 4096)
        self._closing = False
        self._busy, self._busy_since = 0, 0.0
        self.bytes_read, self.busy_seconds, self.retries = 0, 0.0, 0
        self._threads = [
            threading.Thread(target=self._run, name=f"slotmoe-read-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read:
        """A read of one record into ``target``, uint8 in RAM; ``submit`` starts it."""
        return Read(expert_id, target.numpy().data, urgency)

    def submit(self, reads: Iterable[Read]) -> None:
        """Queue reads; those of urgency ``DEMAND`` overtake all others."""
        with self._lock:
            for read in reads:
                heapq.heappush(self._queue, (read.urgency, next(self._order), read))
                if not (self._helps and read.urgency == DEMAND):
                    self._work.notify(max(1, self.record_bytes // self._piece))

    def promote(self, read: Read) -> None:
        """A prefetch has become a demand."""
        if read.urgency != DEMAND:
            read.urgency = DEMAND
            self.submit([read])  # the old entry is skipped when it comes up

    def cancel(self, read: Read) -> bool:
        """Give a read up; True if its buffer is free now, else when the read is ``done``."""
        with self._lock:
            read.cancelled = True
            if not read.done and read.outstanding == 0 and read.taken < len(read.buffer):
                if read.after is not None:
                    read.after(False)
                read.done = True
            return read.done

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until at least one of ``reads`` is done, and return those that are."""
        while True:
            with self._lock:
                if finished := [read for read in reads if read.done]:
                    return finished
                piece = self._take() if self._helps else None
                if piece is None:
                    self._arrived.wait()
                    continue
            self._read(*piece)

    def read_each(
        self, expert_ids: Iterable[int], at_once: int, begin: Callable[[int], Read]
    ) -> Iterator[Read]:
        """What ``begin`` has started for each expert, as it is done, so many at a time."""
        ids, pending = iter(expert_ids), list[Read]()
        while pending := pending + [begin(id) for id in islice(ids, at_once - len(pending))]:
            for read in self.wait(pending):
                pending.remove(read)
                yield read

    def advance(self, tokens: int) -> None:
        """A forward pass over more tokens begins; a disk remembers nothing."""

    def bandwidth(self) -> float:
        """Bytes a second while reads were in flight, so far; 1 GB/s until something was read."""
        with self._lock:
            busy = self.busy_seconds
            if self._busy:
                busy += time.perf_counter() - self._busy_since
            return self.bytes_read / busy if self.bytes_read and busy else 1e9

    def stats(self) -> dict[str, Any]:
        """``disk``: bytes, seconds with reads in flight, records read twice, and whether direct."""
        counts = {"bytes": self.bytes_read, "seconds": self.busy_seconds}
        return {"disk": {**counts, "retries": self.retries, "direct": self.direct}}

    def close(self) -> None:
        """Stop the threads after the pieces that they are reading; what is queued is given up."""
        with self._lock:
            self._closing = True
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while (piece := self._take()) is None:
                    if self._closing:
                        return
                    self._work.wait()
            self._read(*piece)

    def _take(self) -> tuple[Read, int, int] | None:
        """The next piece to read, (read, start, stop) in bytes of the record; the lock is held."""
        while self._queue:
            urgency, _, read = self._queue[0]
            total = len(read.buffer)
            given_up = read.done or read.cancelled or urgency != read.urgency
            if given_up or read.taken == total:
                heapq.heappop(self._queue)
                continue
            start, read.taken = read.taken, min(read.taken + self._piece, total)
            read.outstanding += 1
            if self._busy == 0:
                self._busy_since = time.perf_counter()
            self._busy += 1
            return read, start, read.taken
        return None

    def _read(self, read: Read, start: int, stop: int) -> None:
        problem: BaseException | None = None
        try:
            where = self._place(read.expert_id)
            self._export.read_range(*where, start, read.buffer[start:stop])
        # Also Ctrl-C in a thread that helps: others may wait for this read.
        except BaseException as raised:
            problem = raised
        with self._lock:
            self.bytes_read += stop - start
            read.outstanding -= 1
            read.error = read.error or problem
            if read.error is not None:
                read.taken = len(read.buffer)  # no use in reading the rest
            last = read.outstanding == 0 and (read.taken >= len(read.buffer) or read.cancelled)
        if last:
            try:
                self._finish(read)
            except BaseException as raised:
                problem = read.error = raised
        with self._lock:
            self._busy -= 1
            if self._busy == 0:
                self.busy_seconds += time.perf_counter() - self._busy_since
            if last:
                read.done = True
                self._arrived.notify_all()
        if problem is not None and not isinstance(problem, Exception):
            raise problem

    def _place(self, expert_id: int) -> tuple[int, int]:
        row, expert = divmod(expert_id, self._export.experts)
        return self._export.layers[row], expert

    def _finish(self, read: Read) -> None:
        """Verify a whole record, reading it once more if something is wrong, and hand it on."""
        arrived = False
        try:
            if not read.cancelled and not isinstance(read.error, KeyboardInterrupt):
                self._verify(read)
                arrived = True
        finally:
            if read.after is not None:
                read.after(arrived)

    def _verify(self, read: Read) -> None:
        where = self._place(read.expert_id)
        if read.error is None:
            try:
                self._export.verify_record(*where, read.buffer)
                return
            except ExportError:
                pass
        read.error = None
        self.retries += 1
        self._export.read_range(*where, 0, read.buffer)
        self._export.verify_record(*where, read.buffer)
