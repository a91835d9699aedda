"""The disk tier: threads with several aligned direct reads in flight, the most urgent record
first."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any, Protocol

from torch import Tensor

from slotmoe.errors import ExportError
from slotmoe.offload.plan.memory import HELP_BYTES
from slotmoe.offload.tiers.device import Copy
from slotmoe.quant.export.reader import Export

# Urgencies; prefetches lie between them, the number of layers until their use.
DEMAND, WARM = 0, 1 << 30
READERS = 8
# Records are read in pieces, so that one missing expert too is worth several reads in flight.
PIECE_BYTES = 1 << 20
After = Callable[[bool], None] | None


class Read:
    """One record on its way into memory.  ``done`` is True when it can be used or when ``error``
    says why not; on a GPU it can be used by kernels that wait for ``copy`` first."""

    __slots__ = (
        "after", "buffer", "cancelled", "copy", "done", "error", "expert_id", "outstanding",
        "started", "taken", "urgency",
    )  # fmt: skip

    def __init__(self, expert_id: int, buffer: memoryview, urgency: int, after: After = None):
        # ``after(arrived)`` runs once in the reading thread, before ``done``: False if the read
        # failed or was given up.
        self.expert_id, self.buffer, self.urgency, self.after = expert_id, buffer, urgency, after
        self.taken = self.outstanding = 0  # bytes given to readers, pieces being read
        self.started = self.done = self.cancelled = False
        self.error: BaseException | None = None
        self.copy: Copy | None = None


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
                self._push(read)
                if not (self._helps and read.urgency == DEMAND):
                    self._work.notify(max(1, self.record_bytes // self._piece))

    def _push(self, read: Read) -> None:
        heapq.heappush(self._queue, (read.urgency, next(self._order), read))

    def promote(self, read: Read) -> None:
        """A prefetch has become a demand."""
        with self._lock:
            if read.urgency != DEMAND and not read.done:
                read.urgency = DEMAND
                self._push(read)  # the old entry is skipped when it comes up

    def cancel(self, read: Read) -> bool:
        """Give a read up; True if its buffer is free now, else when the read is ``done``."""
        with self._lock:
            read.cancelled = True
            unread = read.outstanding == 0 and read.taken < len(read.buffer)
            if not read.done and (unread or not read.started):
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
            if given_up or (read.started and read.taken >= total):
                heapq.heappop(self._queue)
                continue
            start, read.taken = read.taken, min(read.taken + self._piece, total)
            read.started = True
            read.outstanding += 1
            if read.taken >= total:
                heapq.heappop(self._queue)
            if self._busy == 0:
                self._busy_since = time.perf_counter()
            self._busy += 1
            return read, start, read.taken
        return None

    def _read(self, read: Read, start: int, stop: int) -> None:
        problem: BaseException | None = None
        try:
            if stop > start:
                layer, expert = self._place(read.expert_id)
                self._export.read_range(layer, expert, start, read.buffer[start:stop])
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
        layer, expert = self._place(read.expert_id)
        if read.error is None:
            try:
                if read.buffer:
                    self._export.verify_record(layer, expert, read.buffer)
                return
            except ExportError:
                pass
        read.error = None
        self.retries += 1
        self._export.read_range(layer, expert, 0, read.buffer)
        self._export.verify_record(layer, expert, read.buffer)


class Source(Protocol):
    """Where ``Slots`` gets records from: ``DiskReader`` or ``HostTier``."""

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read: ...

    def submit(self, reads: Iterable[Read]) -> None: ...

    def promote(self, read: Read) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def cancel(self, read: Read) -> bool: ...

    def wait(self, reads: Collection[Read]) -> list[Read]: ...

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...
