"""One file over HTTP, several ranges at once: resumable to the byte after a kill, checked while it
arrives.

huggingface_hub downloads a file in one stream to a temporary name of each process's own and removes
it when it fails, so a broken 9 GB shard starts from zero (version 2.4).  Here ``NAME.incomplete``
has its full size from the start, and ``NAME.ranges`` says how far each range of it has come; the
file gets its name when its checksum is right.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path

from slotmoe.errors import DownloadError
from slotmoe.offload.ingest import http
from slotmoe.offload.ingest.http import PassingError, Remote, StopEvent, Stopped
from slotmoe.quant.export.writer import sync_folder

CONNECTIONS = 8
RANGE_BYTES = 64 << 20  # one request
SAVE_SECONDS = 1.0
_HASH_BYTES = 1 << 20
_CUT = -1.0  # in place of the time when a connection last received something


def fetch(
    remote: Remote,
    path: Path,
    stop: threading.Event,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Download ``remote`` to ``path``, going on from what an earlier call left.

    ``advance`` gets the count of bytes as they arrive, of those that were there already and,
    negative, of those thrown away.  Raises ``DownloadError``, ``OSError`` if ``path`` can't be
    written, ``Stopped`` soon after ``stop`` is set, and what ``remote.locate`` raises.
    """
    checksum, expected = "", remote.expected
    for _ in range(2):  # a wrong checksum may be one bad transfer, twice is a bad file
        checksum = _Transfer(remote, path, stop, advance).run()
        if checksum == expected.checksum:
            return
        advance(-expected.size)
    sums = f"the server's bytes have the checksum {checksum}, the hub promises {expected.checksum}"
    raise DownloadError(f"{remote.name}: {sums}; they were thrown away, try again later")


class _Transfer:
    """The download of one file: its ranges, their workers and the hash that follows them."""

    def __init__(
        self, remote: Remote, path: Path, stop: threading.Event, advance: Callable[[int], None]
    ):
        self._remote, self._expected, self._path = remote, remote.expected, path
        self._stop, self._advance, self._halt = stop, advance, StopEvent()
        self._incomplete = path.with_name(path.name + ".incomplete")
        self._ranges = path.with_name(path.name + ".ranges")
        size = remote.expected.size
        starts = range(0, size, RANGE_BYTES) or range(1)
        self._spans = [(start, min(start + RANGE_BYTES, size)) for start in starts]
        self._received = self._load()
        self._last: dict[socket.socket, float] = {}  # when each connection received something
        self._handle = os.open(self._incomplete, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._digest, self._hashed = remote.expected.digest(), 0
        self._buffer = memoryview(bytearray(min(_HASH_BYTES, size)))

    def run(self) -> str:
        """Fetch what is missing; returns the checksum, and names the file if that is right."""
        try:
            os.ftruncate(self._handle, self._expected.size)
            self._advance(sum(self._received))
            self._fetch()
            self._hash()
            checksum: str = self._digest.hexdigest()
            if checksum == self._expected.checksum:
                os.fsync(self._handle)
                os.rename(self._incomplete, self._path)
                sync_folder(self._path.parent)
            else:
                self._incomplete.unlink()
            self._ranges.unlink(missing_ok=True)
            return checksum
        finally:
            os.close(self._handle)

    def _load(self) -> list[int]:
        """How many bytes of each range are there already."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._ranges.read_text())
            received: list[int] = state["received"]
            spans = zip(self._spans, received, strict=True)
            possible = all(0 <= count <= end - start for (start, end), count in spans)
            same = state["checksum"] == self._expected.checksum
            if possible and same and self._incomplete.stat().st_size == self._expected.size:
                return received
        self._incomplete.unlink(missing_ok=True)
        return [0] * len(self._spans)

    def _save(self) -> None:
        """Note how far the ranges are, for after a kill.  After a power failure the note may claim
        what never reached the disk; then the checksum is wrong and this one file comes again, which
        is cheaper than to sync gigabytes all the time."""
        temporary = self._ranges.with_name(self._ranges.name + ".tmp")
        state = {"checksum": self._expected.checksum, "received": self._received}
        temporary.write_text(json.dumps(state))
        os.rename(temporary, self._ranges)

    def _missing(self, index: int) -> int:
        start, end = self._spans[index]
        return end - start - self._received[index]

    def _fetch(self) -> None:
        queue = deque(index for index in range(len(self._spans)) if self._missing(index))
        workers = min(CONNECTIONS, len(queue))
        if not workers:
            return
        with ThreadPoolExecutor(workers) as pool:
            pending: set[Future[None]] = {pool.submit(self._work, queue) for _ in range(workers)}
            saved = time.monotonic()
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.05, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if self._stop.is_set():
                        raise Stopped
                    self._cut_silent()
                    self._hash()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
            except BaseException:
                self._halt.set()
                wait(pending)
                self._save()
                raise

    def _cut_silent(self) -> None:
        """End the connections that have received nothing for too long."""
        now = time.monotonic()
        for connection, last in list(self._last.items()):
            if now - last >= self._remote.patience.stall:
                self._last[connection] = _CUT
                http.cut(connection)

    def _hash(self) -> None:
        """Let the checksum follow as far as the file is there without a hole."""
        first = next((i for i in range(len(self._spans)) if self._missing(i)), len(self._spans) - 1)
        available = self._spans[first][0] + self._received[first]
        while self._hashed < available and not self._stop.is_set():
            buffer = self._buffer[: available - self._hashed]
            count = os.preadv(self._handle, [buffer], self._hashed)
            self._digest.update(buffer[:count])
            self._hashed += count

    def _work(self, queue: deque[int]) -> None:
        buffer, remote = memoryview(bytearray(http.BUFFER_BYTES)), self._remote
        while not self._halt.is_set():
            try:
                index = queue.popleft()
            except IndexError:
                return
            receive = partial(self._receive, index, buffer)
            received = partial(self._received.__getitem__, index)
            http.patiently(receive, remote.name, remote.patience, self._halt, received)

    def _receive(self, index: int, buffer: memoryview) -> None:
        start, end = self._spans[index]
        start += self._received[index]
        sockets: list[socket.socket] = []

        def watch(connection: socket.socket) -> None:
            sockets.append(connection)
            self._last[connection] = time.monotonic()
            self._halt.watch(connection)

        try:
            with http.opened(self._remote, start, end, watch) as response:
                while start < end:
                    with http.network_errors():
                        count = response.readinto(buffer[: end - start])
                    if not count:
                        raise PassingError(f"the connection ended or stalled at byte {start}")
                    os.pwrite(self._handle, buffer[:count], start)
                    start += count
                    self._received[index] += count
                    self._last[sockets[-1]] = time.monotonic()
                    self._advance(count)
        except PassingError:
            if self._halt.is_set():
                raise Stopped from None
            if any(self._last[connection] == _CUT for connection in sockets):
                stall = self._remote.patience.stall
                raise PassingError(f"the connection stalled for {stall:g} seconds") from None
            raise
        finally:
            for connection in sockets:
                del self._last[connection]
