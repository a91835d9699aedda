"""The disk tier: threads with aligned direct reads in flight, the most urgent record first.

A piece of a record goes to whichever drive asks for it first, so each gets a share that its speed
allows.  A drive that is so slow that the others would be through with all that waits before it has
read one piece leaves that to them.  A drive that fails is left out as long as another is there.
"""

import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue

from slotmoe.errors import CLOSED, ConfigError, ExportError, SlotmoeError
from slotmoe.jsonfile import Json
from slotmoe.offload.devices.device import Region
from slotmoe.offload.experts.store import DEMAND, FILL, Read
from slotmoe.offload.plan.memory import HELP_BYTES
from slotmoe.quant.export.reader import Export

STUCK_SECONDS = 5.0  # how long ``close`` waits for a disk that does not answer
# Records are read in pieces, so that one missing expert too is worth several reads in flight.
PIECE_BYTES = 1 << 20
_AGAIN_SECONDS = 0.02
THREADS = 8  # reads in flight on a drive
_WEIGHT = 0.1  # of the latest piece in a drive's pace
_FORGET_SECONDS = 5.0  # after which an unused drive counts as twice as fast: it may have recovered


class Meter:
    """Bytes that were read, and the seconds in which something was being read."""

    def __init__(self) -> None:
        self.bytes, self._seconds, self.running, self._since = 0, 0.0, 0, 0.0

    def begin(self) -> None:
        if self.running == 0:
            self._since = time.perf_counter()
        self.running += 1

    def end(self) -> None:
        self.running -= 1
        if self.running == 0:
            self._seconds += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self.running else 0.0)


class Drive:
    """A folder of ``Export.folders``, the ``number``th of them."""

    def __init__(self, number: int, folder: Path):
        self.number, self.folder, self.meter = number, folder, Meter()
        self.failed = False
        self._pace, self._used = 0.0, 0.0  # seconds that a piece takes; when one was read last

    def note(self, started: float, size: int) -> None:
        """A piece of ``size`` bytes has been read since ``started``."""
        before, self._used = self.pace(started), time.perf_counter()
        self._pace = before + (_WEIGHT if before else 1.0) * (self._used - started - before)
        self.meter.bytes += size

    def pace(self, now: float) -> float:
        """Seconds that it takes for a piece, as far as is known."""
        return self._pace * math.pow(0.5, (now - self._used) / _FORGET_SECONDS)

    def stats(self) -> Json:
        counts = {"bytes": self.meter.bytes, "seconds": self.meter.seconds}
        return {"folder": str(self.folder), **counts, "failed": self.failed}


class Drives:
    """All of them; callers hold a lock of their own."""

    def __init__(self, folders: Sequence[Path]):
        self.all = [Drive(number, folder) for number, folder in enumerate(folders)]
        self.alive = list(self.all)

    def takes(self, drive: Drive, waiting: Callable[[], int]) -> bool:
        """Whether ``drive`` should read the next of the pieces, ``waiting()`` in number."""
        now = time.perf_counter()
        pace = drive.pace(now)
        faster = [other.pace(now) for other in self.alive if other.pace(now) < pace]
        if drive.failed or not faster or not min(faster):
            return not drive.failed
        return pace <= min(faster) + waiting() / sum(THREADS / other for other in faster)

    def fastest(self) -> Drive:
        """The one that should read a piece that is wanted at once."""
        now = time.perf_counter()
        return min(self.alive, key=lambda drive: drive.pace(now))

    def leave_out(self, drive: Drive, problem: Exception) -> Drive:
        """Use ``drive`` no more and return another one; raises ``problem`` where there is none."""
        if drive in self.alive:
            if len(self.alive) == 1:
                raise problem
            self.alive.remove(drive)
            drive.failed = True
            without = "%s; reads go on without the experts in %s"
            logging.getLogger("slotmoe").warning(without, problem, drive.folder)
        return self.fastest()


class DiskReader:
    """``threads`` for each drive read records by pieces, the most urgent one first.

    Reads bypass the page cache where the file system allows (``direct``).  A record that fails to
    arrive or has a wrong checksum is read once more, from each drive, of which those that fail are
    left out; from the only one, its ``Read`` then carries an ``ExportError``.
    Small records are read by the thread that waits for them, too; only one may wait.
    """

    def __init__(self, export: Export, direct: bool, threads: int = THREADS):
        self._export, self.record_bytes = export, export.layout.record_bytes
        self.direct = direct and export.bypass_page_cache()
        if direct and not self.direct:
            refused = "%s: this file system refuses direct reads; reads go through the page cache"
            logging.getLogger("slotmoe").warning(refused, export.folder)
        self._lock = threading.Lock()
        self.drives = Drives([folder.path for folder in export.folders])
        self._work = [threading.Condition(self._lock) for _ in self.drives.all]  # by drive
        # An item says: look whether a read is done.  It wakes a thread sooner than a condition.
        self._arrived: SimpleQueue[None] = SimpleQueue()
        self._queue: list[tuple[int, int, Read]] = []
        self._order = count()
        self._helps = self.record_bytes <= HELP_BYTES
        self._piece = min(PIECE_BYTES, -(-self.record_bytes // 4096) * 4096)
        self._closing = False
        self._meter, self.retries = Meter(), 0
        self._threads = list[threading.Thread]()
        for number in range(threads * len(self.drives.all)):
            name, given = f"slotmoe-read-{number}", (self.drives.all[number // threads],)
            self._threads.append(threading.Thread(None, self._run, name, given, daemon=True))
            self._threads[-1].start()

    def read(self, expert_id: int, target: Region, urgency: int) -> Read:
        """A read of a record into ``target`` in RAM, which ``submit`` starts."""
        return Read(expert_id, urgency, target.tensor.numpy().data)

    def submit(self, reads: Iterable[Read]) -> None:
        """Queue what ``read`` gave, as far as it is not done; reads of urgency ``DEMAND`` overtake
        all others.  Raises ``ConfigError`` after ``stop``."""
        with self._lock:
            if self._closing:
                raise ConfigError(CLOSED)
            for read in reads:
                if read.done:
                    continue
                heapq.heappush(self._queue, (read.urgency, next(self._order), read))
                if not (self._helps and read.urgency == DEMAND):
                    for work in self._work:
                        work.notify(max(1, self.record_bytes // self._piece))

    def promote(self, read: Read) -> None:
        """A prefetch has become a demand."""
        if read.urgency != DEMAND:
            read.urgency = DEMAND
            self.submit([read])  # the old entry is skipped when it comes up

    def cancel(self, read: Read) -> bool:
        """Give a read up; True if its target is free now, else when the read is ``done``."""
        with self._lock:
            read.cancelled = True
            if not read.done and read.outstanding == 0 and read.taken < len(read.buffer):
                if read.after is not None:
                    after, read.after = read.after, None
                    after(False)
                read.done = True
            return read.done

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Block until at least one of ``reads`` is done, and return those that are.  Raises
        ``ConfigError`` after ``stop``, which another thread may call meanwhile."""
        assert reads  # nothing would ever be done
        while True:
            with self._lock:
                if self._closing:
                    raise ConfigError(CLOSED)
                if finished := [read for read in reads if read.done]:
                    return finished
                drive = self.drives.fastest()
                piece = self._take(drive, fills=False) if self._helps else None
            if piece is None:
                self._arrived.get()
            else:
                self._read(drive, *piece)

    def _tell(self) -> None:
        """Let the waiting thread look again; it needs no more than one word."""
        if self._arrived.empty():
            self._arrived.put(None)

    def bandwidth(self) -> float:
        """Bytes a second while reads were in flight, so far; 1 GB/s until something was read."""
        with self._lock:
            read, seconds = self._meter.bytes, self._meter.seconds
            return read / seconds if read and seconds else 1e9

    def stats(self) -> Json:
        """``disk``: bytes, seconds with reads in flight, records read twice, whether direct, and of
        each of the ``drives`` bytes, seconds, and whether it failed."""
        counts = {"bytes": self._meter.bytes, "seconds": self._meter.seconds}
        counts |= {"retries": self.retries, "direct": self.direct}
        return {"disk": {**counts, "drives": [drive.stats() for drive in self.drives.all]}}

    def stop(self) -> None:
        """Let what is queued fail and waits end, from now on; any thread may ask."""
        with self._lock:
            self._closing = True
            for *_, read in self._queue:
                read.after = None  # it may keep the read
                if not read.done:
                    read.error, read.cancelled = ConfigError(CLOSED), True
                    read.done = read.outstanding == 0  # else its reader says so
            self._queue.clear()
            for work in self._work:
                work.notify_all()
        self._tell()

    def close(self) -> None:
        """``stop``, and wait for the threads, which end after the pieces that they are reading.
        One that the disk keeps longer than ``STUCK_SECONDS`` is left behind."""
        self.stop()
        until = time.monotonic() + STUCK_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            stuck = "%s: the disk does not answer; a read of it is left behind"
            logging.getLogger("slotmoe").warning(stuck, self._export.folder)

    def _run(self, drive: Drive) -> None:
        while True:
            with self._lock:
                while (piece := self._take(drive)) is None:
                    if self._closing:
                        return
                    # What a slow drive has left to others is looked at again, if they leave it too.
                    again = self._queue and not self._is_kept(self._queue[0][0])
                    self._work[drive.number].wait(_AGAIN_SECONDS if again else None)
            self._read(drive, *piece)
            if piece[0].done:
                self._tell()
            del piece  # it keeps memory

    def _waiting(self) -> int:
        """Pieces that wait; the lock is held."""
        left = [len(read.buffer) - read.taken for *_, read in self._queue if not read.cancelled]
        return sum(left) // self._piece

    def _is_kept(self, urgency: int) -> bool:
        """Whether others keep it: half of the threads fill slots, so a demand finds some free."""
        return urgency == FILL and self._meter.running >= len(self._threads) / 2

    def _take(self, drive: Drive, fills: bool = True) -> tuple[Read, int, int] | None:
        """A drive's next piece, (read, start, stop) in bytes of the record, if it ``fills`` also of
        what fills slots; the lock is held."""
        while self._queue:
            urgency, _, read = self._queue[0]
            total = len(read.buffer)
            given_up = read.done or read.cancelled or urgency != read.urgency
            if given_up or read.taken == total:
                heapq.heappop(self._queue)
                continue
            kept = self._is_kept(urgency) or (urgency == FILL and not fills)
            if kept or not self.drives.takes(drive, self._waiting):
                return None
            start, read.taken = read.taken, min(read.taken + self._piece, total)
            read.outstanding += 1
            self._meter.begin()
            drive.meter.begin()
            return read, start, read.taken
        return None

    def _read(self, drive: Drive, read: Read, start: int, stop: int) -> None:
        """Read a piece; the last makes its read ``done``.  The thread survives what goes wrong."""
        problem: Exception | None = None
        try:
            self._read_piece(drive, read, start, stop)
        except Exception as raised:
            problem = _without_frames(raised)
        with self._lock:
            self._meter.bytes += stop - start
            read.outstanding -= 1
            read.error = read.error or problem
            if read.error is not None:
                read.taken = len(read.buffer)  # no use in reading the rest
            last = read.outstanding == 0 and (read.taken >= len(read.buffer) or read.cancelled)
        if last:
            try:
                self._finish(read)
            except Exception as raised:
                read.error = _without_frames(raised)
        with self._lock:
            self._meter.end()
            drive.meter.end()
            read.done = read.done or last

    def _read_piece(self, drive: Drive, read: Read, start: int, stop: int) -> None:
        """Read bytes of a record, where the drive fails from another."""
        while True:
            began = time.perf_counter()
            try:
                where = self._place(read.expert_id)
                self._export.read_range(*where, start, read.buffer[start:stop], drive.number)
            except ExportError as problem:
                with self._lock:
                    drive = self.drives.leave_out(drive, problem)
            else:
                with self._lock:
                    return drive.note(began, stop - start)

    def _place(self, expert_id: int) -> tuple[int, int]:
        moe_layer, expert = divmod(expert_id, self._export.experts)
        return self._export.layers[moe_layer], expert

    def _finish(self, read: Read) -> None:
        """Verify a whole record, reading it once more if something is wrong, and hand it on."""
        arrived = False
        try:
            if not read.cancelled:
                self._verify(read)
                arrived = True
        finally:
            if read.after is not None:
                after, read.after = read.after, None  # it keeps the read alive
                after(arrived)

    def _verify(self, read: Read) -> None:
        where = self._place(read.expert_id)
        if read.error is None:
            with suppress(ExportError):
                return self._export.verify_record(*where, read.buffer)
        read.error = None
        self.retries += 1
        asked = list(self.drives.alive)  # which of them gave wrong bytes is not known
        while asked:
            drive = asked.pop()
            try:
                self._export.read_range(*where, 0, read.buffer, drive.number)
                self._export.verify_record(*where, read.buffer)
            except ExportError as problem:
                with self._lock:
                    another = self.drives.leave_out(drive, problem)
                asked = asked or [another]  # the bytes of those before are overwritten


def _without_frames(problem: Exception) -> Exception:
    """An error that a ``Read`` may keep: the frames of one would keep the read."""
    return problem.with_traceback(None) if isinstance(problem, SlotmoeError) else problem
