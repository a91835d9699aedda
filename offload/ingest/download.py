"""One file over HTTP, several ranges at once: resumable to the byte after a kill, checked while it
arrives.

huggingface_hub downloads a file in one stream to a temporary name of each process's own and removes
it when it fails, so a broken 9 GB shard starts from zero (version 2.4).  Here its HTTP client
fetches ranges.  ``NAME.incomplete`` has its full size from the start, and ``NAME.ranges`` says how
far each range of it has come; the file gets its name when its checksum is right.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import current_time, fail_after

from slotmoe.errors import DownloadError
from slotmoe.offload.ingest.repository import PassingError, Remote, explained
from slotmoe.quant.export.writer import sync_folder

CONNECTIONS = 8
RANGE_BYTES = 64 << 20  # one request
SAVE_SECONDS = 1.0
_BUFFER_BYTES = 256 << 10  # a connection that brings less in ``Patience.stall`` seconds is given up
_ENOUGH_BYTES = 1 << 20  # after so many bytes failures are counted from zero again
_HASH_BYTES = 4 << 20


@dataclass
class Range:
    """Bytes ``at`` to ``end`` of a file are still to come."""

    at: int
    end: int


async def receive(
    client: Any,
    remote: Remote,
    part: Range,
    take: Callable[[bytes], None],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Give ``take`` all bytes of ``part`` in order and ``advance`` their counts, after as many
    requests by huggingface_hub's ``client`` as ``remote.patience`` allows.

    Raises ``DownloadError``, and ``ConfigError`` or ``CheckpointError`` if the hub refuses.
    """
    failures, before = 0, part.at
    while part.at < part.end:
        try:
            await _request(client, remote, part, take, advance)
        except PassingError as problem:
            if part.at - before >= _ENOUGH_BYTES:
                failures, before = 0, part.at
            failures += 1
            await asyncio.sleep(remote.patience.pause_after(failures, remote.name, problem))


async def _request(
    client: Any,
    remote: Remote,
    part: Range,
    take: Callable[[bytes], None],
    advance: Callable[[int], None],
) -> None:
    """Ask once.  Of a server that knows no ranges, skip what comes before ``part``."""
    from huggingface_hub import errors
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    stall = remote.patience.stall
    span = {"Range": f"bytes={part.at}-{part.end - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers(library_name="slotmoe", headers=span)
    failures = (errors.HTTPError, errors.OfflineModeIsEnabled)  # type: ignore[attr-defined]
    try:
        with fail_after(stall) as limit:
            async with client.stream("GET", remote.url, headers=headers) as response:
                remote.check(response, part.at)
                position = buffered = part.at if response.status_code == 206 else 0
                async for chunk in response.aiter_raw():
                    if data := chunk[max(part.at - position, 0) : part.end - position]:
                        take(data)
                        part.at += len(data)
                        advance(len(data))
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


async def hash_bytes(digest: Any, handle: int, start: int, end: int) -> None:
    """Add bytes ``start`` to ``end`` of an open file to ``digest``, beside what else goes on."""

    def step() -> int:
        data = os.pread(handle, min(_HASH_BYTES, end - start), start)
        digest.update(data)
        return len(data)

    while start < end and (count := await asyncio.to_thread(step)):
        start += count


async def fetch(
    remote: Remote, path: Path, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Download ``remote`` to ``path``, going on from what an earlier call left.

    ``advance`` gets the count of bytes as they arrive, of those that were there already and,
    negative, of those thrown away.  Raises what ``receive`` raises, and ``OSError`` if ``path``
    can't be written.
    """
    checksum, expected = "", remote.expected
    for _ in range(2):  # a wrong checksum may be one bad transfer, twice is a bad file
        checksum = await _Transfer(remote, path, advance).run()
        if checksum == expected.checksum:
            return
        advance(-expected.size)
    sums = f"the server's bytes have the checksum {checksum}, the hub promises {expected.checksum}"
    raise DownloadError(f"{remote.name}: {sums}; they were thrown away, try again later")


class _Transfer:
    """The download of one file: its ranges, their workers and the hash that follows them."""

    def __init__(self, remote: Remote, path: Path, advance: Callable[[int], None]):
        self._remote, self._expected, self._path = remote, remote.expected, path
        self._advance = advance
        self._incomplete = path.with_name(path.name + ".incomplete")
        self._note = path.with_name(path.name + ".ranges")
        size = remote.expected.size
        self._starts = list(range(0, size, RANGE_BYTES))
        self._ranges = [Range(start, min(start + RANGE_BYTES, size)) for start in self._starts]
        self._load()
        self._handle = os.open(self._incomplete, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._digest, self._hashed = remote.expected.digest(), 0

    async def run(self) -> str:
        """Fetch what is missing; returns the checksum, and names the file if that is right."""
        try:
            os.ftruncate(self._handle, self._expected.size)
            self._advance(sum(self._received()))
            await self._receive()
            await self._hash()
            checksum: str = self._digest.hexdigest()
            if checksum == self._expected.checksum:
                os.fsync(self._handle)
                os.rename(self._incomplete, self._path)
                sync_folder(self._path.parent)
            else:
                self._incomplete.unlink()
            self._note.unlink(missing_ok=True)
            return checksum
        finally:
            os.close(self._handle)

    def _received(self) -> list[int]:
        """How many bytes of each range are there."""
        return [part.at - start for part, start in zip(self._ranges, self._starts, strict=True)]

    def _load(self) -> None:
        """Go on from an earlier run's note, or start anew."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._note.read_text())
            pairs = list(zip(self._ranges, state["received"], strict=True))
            possible = all(0 <= count <= part.end - part.at for part, count in pairs)
            same = state["checksum"] == self._expected.checksum
            if possible and same and self._incomplete.stat().st_size == self._expected.size:
                for part, count in pairs:
                    part.at += count
                return
        self._incomplete.unlink(missing_ok=True)

    def _save(self) -> None:
        """Note how far the ranges are, for after a kill.  After a power failure the note may claim
        what never reached the disk; then the checksum is wrong and this one file comes again, which
        is cheaper than to sync gigabytes all the time."""
        temporary = self._note.with_name(self._note.name + ".tmp")
        state = {"checksum": self._expected.checksum, "received": self._received()}
        temporary.write_text(json.dumps(state))
        os.rename(temporary, self._note)

    async def _receive(self) -> None:
        from huggingface_hub import get_async_session

        queue = deque(part for part in self._ranges if part.at < part.end)
        saved = time.monotonic()
        async with get_async_session() as client:
            workers = min(CONNECTIONS, len(queue))
            tasks = [asyncio.ensure_future(self._work(client, queue)) for _ in range(workers)]
            pending = set(tasks)
            try:
                while pending:
                    done, pending = await asyncio.wait(
                        pending, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION
                    )
                    for task in done:
                        task.result()
                    await self._hash()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
            except BaseException:
                for task in tasks:
                    task.cancel()
                self._save()
                raise

    async def _work(self, client: Any, queue: deque[Range]) -> None:
        while queue:
            part = queue.popleft()

            def write(data: bytes, part: Range = part) -> None:
                view, at = memoryview(data), part.at
                while view:
                    count = os.pwrite(self._handle, view, at)
                    view, at = view[count:], at + count

            await receive(client, self._remote, part, write, self._advance)

    async def _hash(self) -> None:
        """Let the checksum follow as far as the file is there without a hole."""
        hole = next((part.at for part in self._ranges if part.at < part.end), self._expected.size)
        start, self._hashed = self._hashed, hole
        await hash_bytes(self._digest, self._handle, start, hole)
