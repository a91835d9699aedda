"""The drives that hold an export's experts, and which of them reads the next piece.

A piece goes to whichever drive asks for it first, so each gets a share that its speed allows.  A
drive that is so slow that the others would be through with all that waits before it has read one
piece leaves that to them.  A drive that fails is left out as long as another is there.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slotmoe.jsonfile import Json

THREADS = 8  # reads in flight on a drive
_WEIGHT = 0.1  # of the latest piece in a drive's pace
_FORGET_SECONDS = 5.0  # after which an unused drive counts as twice as fast: it may have recovered


class Meter:
    """Bytes that were read, and the seconds in which something was being read."""

    def __init__(self) -> None:
        self.bytes, self._seconds, self._running, self._since = 0, 0.0, 0, 0.0

    def begin(self) -> None:
        if self._running == 0:
            self._since = time.perf_counter()
        self._running += 1

    def end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._seconds += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        return self._seconds + (time.perf_counter() - self._since if self._running else 0.0)


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
