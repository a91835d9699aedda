"""One file over HTTP, several ranges at once: resumable to the byte, checked while it arrives.

huggingface_hub downloads a file in one stream to a temporary name of each process's own and removes
it when it fails, so a broken 9 GB shard starts from zero (version 2.4).  Here its HTTP client
fetches ranges.  ``NAME.incomplete`` has its full size from the start, and ``NAME.ranges`` says how
far each range of it has come; the file gets its name when its checksum is right.
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anyio import current_time, fail_after

from slotmoe import system
from slotmoe.errors import DownloadError, naming
from slotmoe.jsonfile import typed
from slotmoe.offload.ingest.repository import Expected, PassingError, Remote, explained
from slotmoe.offload.machine import read_note, write_note
from slotmoe.quant.export.writer import sync_folder

CONNECTIONS = 8
RANGE_BYTES = 64 << 20  # one request
SAVE_SECONDS = 1.0
_BUFFER_BYTES = 256 << 10  # a connection that brings less in ``Patience.stall`` seconds is given up
_ENOUGH_BYTES = 1 << 20  # after so many bytes failures are counted from zero again
_HASH_BYTES = 4 << 20


@dataclass
class Range:
    """Bytes ``start`` to ``end`` of a file, of which those from ``at`` on are still to come."""

    start: int
    end: int
    at: int


async def receive(client: Any, remote: Remote, part: Range, take: Callable[[bytes], None]) -> None:
    """Give ``take``, which moves ``part.at`` behind them, all bytes of ``part`` in order, after as
    many requests by huggingface_hub's ``client`` as ``remote.patience`` allows.

    Raises ``DownloadError``, and ``ConfigError`` or ``CheckpointError`` if the hub refuses.
    """
    failures, before = 0, part.at
    while part.at < part.end:
        try:
            await _request(client, remote, part, take)
        except PassingError as problem:
            if part.at - before >= _ENOUGH_BYTES:
                failures, before = 0, part.at
            failures += 1
            await asyncio.sleep(remote.patience.pause_after(failures, remote.name, problem))


async def _request(client: Any, remote: Remote, part: Range, take: Callable[[bytes], None]) -> None:
    """Ask once.  Of a server that knows no ranges, skip what comes before ``part``."""
    from huggingface_hub import errors
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    stall = remote.patience.stall
    span = {"Range": f"bytes={part.at}-{part.end - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers(library_name="slotmoe", headers=span)
    failures = (errors.HTTPError, errors.OfflineModeIsEnabled)  # type: ignore[attr-defined]
    try:
        with fail_after(stall) as limit:
            async with (
                client.stream("GET", remote.url, headers=headers) as response,
                aclosing(response.aiter_raw()) as chunks,
            ):
                remote.check(response, part.at)
                position = buffered = part.at if response.status_code == 206 else 0
                async for chunk in chunks:
                    if data := chunk[max(part.at - position, 0) : part.end - position]:
                        take(data)
                    position += len(chunk)
                    if part.at == part.end:
                        return
                    if position - buffered >= _BUFFER_BYTES:
                        buffered, limit.deadline = position, current_time() + stall
        raise PassingError(f"the connection ended at byte {part.at}")
    except TimeoutError:
        raise PassingError(f"the connection stalled for {stall:g} seconds") from None
    except failures as problem:
        raise explained(remote.repo, remote.commit, problem) from None


async def checksum_of(handle: int, expected: Expected) -> str:
    """Checksum of an open file, of the kind of ``expected``.  It can be cancelled soon."""
    digest, start, data = expected.digest(), 0, memoryview(bytearray(_HASH_BYTES))
    while count := await asyncio.to_thread(system.read_at, handle, data, start):
        await asyncio.to_thread(digest.update, data[:count])
        start += count
    return str(digest.hexdigest())


async def fetch(
    remote: Remote, path: Path, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Download ``remote`` to ``path``, going on from what an earlier call left.

    ``advance`` gets counts of bytes: that arrive, were there already and, negative, are thrown
    away.  Raises what ``receive`` raises, and ``OSError`` if ``path`` can't be written.
    """
    expected = remote.expected
    for _ in range(2):  # a wrong checksum may be one bad transfer, twice is a bad file
        checksum = await _Transfer(remote, path, advance).run()
        if checksum == expected.checksum:
            return
        advance(-expected.size)
    sums = f"the server's bytes have the checksum {checksum}, the hub promises {expected.checksum}"
    raise DownloadError(f"{remote.name}: {sums}; they were thrown away, try again later")


class _Transfer:
    """What is missing of a file, fetched in several ranges at once."""

    def __init__(self, remote: Remote, path: Path, advance: Callable[[int], None]):
        self._remote, self._path, self._advance = remote, path, advance
        self._incomplete = path.with_name(path.name + ".incomplete")
        self._note, self._saved = path.with_name(path.name + ".ranges"), time.monotonic()
        expected, state = remote.expected, read_note(self._note)
        starts = range(0, expected.size, RANGE_BYTES)
        self._ranges = [Range(at, min(at + RANGE_BYTES, expected.size), at) for at in starts]
        with suppress(OSError, ValueError, KeyError, TypeError):
            received = typed(state["received"], list[int])
            pairs = list(zip(self._ranges, received, strict=True))
            possible = all(0 <= count <= part.end - part.start for part, count in pairs)
            same = state["checksum"] == expected.checksum
            if possible and same and self._incomplete.stat().st_size == expected.size:
                for part, count in pairs:
                    part.at += count
                return
        system.patiently(self._incomplete.unlink, True)

    async def run(self) -> str:
        """Returns the checksum, and names the file if that is right."""
        expected = self._remote.expected
        handle = os.open(self._incomplete, os.O_RDWR | os.O_CREAT | system.NO_LINK, 0o666)
        try:
            with naming(self._path):
                os.ftruncate(handle, expected.size)
            self._advance(sum(self._received()))
            try:
                await self._receive(handle)
            except BaseException:
                self._save()
                raise
            checksum = await checksum_of(handle, expected)
            if checksum == expected.checksum:
                with naming(self._path):
                    os.fsync(handle)
        finally:
            os.close(handle)
        if checksum == expected.checksum:
            system.move(self._incomplete, self._path)
            sync_folder(self._path.parent)
        else:
            system.patiently(self._incomplete.unlink)
        system.patiently(self._note.unlink, True)
        return checksum

    async def _receive(self, handle: int) -> None:
        from huggingface_hub import get_async_session

        queue = deque(part for part in self._ranges if part.at < part.end)

        async def work() -> None:
            while queue:
                part = queue.popleft()
                await receive(client, self._remote, part, partial(self._take, handle, part))

        async with get_async_session() as client:
            tasks = [asyncio.ensure_future(work()) for _ in range(min(CONNECTIONS, len(queue)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    def _take(self, handle: int, part: Range, data: bytes) -> None:
        with naming(self._path):
            system.write_at(handle, memoryview(data), part.at)
        part.at += len(data)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()
            self._saved = time.monotonic()
        self._advance(len(data))

    def _received(self) -> list[int]:
        return [part.at - part.start for part in self._ranges]

    def _save(self) -> None:
        """After a power failure the note may claim what never reached the disk; then the checksum
        is wrong and this file comes again, which is cheaper than to sync all the time."""
        checksum = self._remote.expected.checksum
        write_note(self._note, {"checksum": checksum, "received": self._received()})
