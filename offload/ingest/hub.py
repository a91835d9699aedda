"""A model on the hub as the source of an export, one weight file at a time.

The revision is resolved once, to a commit.  ``DST.download`` holds what has come of that:

    plan.json        repository, revision, commit, and the size and checksum of each file, signed
    headers/NAME/    the small files, and sparse files with each weight file's header and size
    weights/         at most two weight files, one being quantized and one arriving

``headers/NAME`` is thus a checkpoint whose tensors can be checked before weights are fetched.
"""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from anyio.from_thread import BlockingPortal, start_blocking_portal

from slotmoe import system
from slotmoe.errors import CheckpointError, ExportError
from slotmoe.jsonfile import Json, typed
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint import shards
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME, MAX_HEADER_BYTES, TensorInfo
from slotmoe.model.config import read_config
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.calibration import Windows
from slotmoe.offload.ingest.download import CONNECTIONS, Range, checksum_of, fetch, receive
from slotmoe.offload.ingest.quantize import Notify, Progress, ignore, quantize
from slotmoe.offload.ingest.repository import Patience, Snapshot, is_commit, needed, resolve
from slotmoe.offload.machine import read_note, write_note
from slotmoe.offload.model_cache import mark_used
from slotmoe.quant.codecs.codec import DEFAULT_CODEC
from slotmoe.quant.export.layout import COPIED, FORMAT_VERSION, MANIFEST
from slotmoe.quant.export.manifest import MAX_COPIED_BYTES
from slotmoe.sizes import format_size

_HEAD_BYTES = 64 << 10  # holds most headers; the rest of a longer one takes a second request


@dataclass
class HubShards:
    """The weight files of one commit (``slotmoe.offload.ingest.quantize.Shards``): the next arrives
    while one is quantized.  With ``kept`` they stay in that folder.  Downloads run in the thread of
    ``portal``, which cancels them when it is left by an exception."""

    portal: BlockingPortal
    snapshot: Snapshot
    download: Path
    kept: Path | None
    arriving: Progress
    notify: Notify
    patience: Patience
    keep_mtp: bool

    def __post_init__(self) -> None:
        self._weights = self.download / "weights"
        self.folder = self.download / "headers" / self.snapshot.repo.rpartition("/")[2]
        self._done, self._total = 0, 0

    async def prepare(self) -> None:
        """Fetch everything but weights, so that ``folder`` can be opened as a checkpoint.

        Raises ``ConfigError`` or ``CheckpointError`` for what is unsupported or incomplete.
        """
        from huggingface_hub import get_async_session

        self.folder.mkdir(parents=True, exist_ok=True)
        self._weights.mkdir(exist_ok=True)
        files, at = self.snapshot.files, f"{self.snapshot.repo}: "
        commit = self.snapshot.commit[:12]
        if "config.json" not in files:
            problem = f"has no config.json at {commit}; not a model in Hugging Face's format"
            raise CheckpointError(at + problem)
        await self._fetch_small("config.json", MAX_COPIED_BYTES)
        read_config(self.folder / "config.json")
        for name in COPIED[1:]:
            await self._fetch_small(name, MAX_COPIED_BYTES)
        if "tokenizer.json" not in files:
            await self._fetch_small(tiktoken.FILE_NAME, tiktoken.MAX_BYTES)
        await self._fetch_small(INDEX_NAME, shards.MAX_INDEX_BYTES)
        weight_map = shards.weight_files(self.folder) or {"": shards.SINGLE_NAME}
        names = list(dict.fromkeys(weight_map.values()))
        if missing := [name for name in names if name not in files]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            count = f"{len(missing)} of {len(names)} weight files can't be had at {commit}"
            rule = "without a network all must be in huggingface_hub's cache"
            problem = f"{count}: {', '.join(missing[:5])}{more}; {rule}"
            raise CheckpointError(f"{at}{problem}, and weights must be .safetensors")
        free = asyncio.Semaphore(CONNECTIONS)

        async def span(name: str, start: int, end: int) -> bytes:
            """Bytes of a weight file, from huggingface_hub's cache if it is there."""
            if (cached := self.snapshot.cached(name)) is not None:
                with open(cached, "rb") as file:
                    file.seek(start)
                    return file.read(end - start)
            data, part = bytearray(), Range(start, end, start)

            def take(piece: bytes) -> None:
                data.extend(piece)
                part.at += len(piece)

            async with free:
                await receive(client, self.snapshot.remote(name, self.patience), part, take)
            return bytes(data)

        async def put_apart(info: TensorInfo) -> None:
            """A tensor's data into the sparse file: scales that are needed with another file."""
            data = await span(info.file, info.offset, info.offset + info.nbytes)
            with open(self.folder / info.file, "r+b") as file:
                file.seek(info.offset)
                file.write(data)

        async with get_async_session() as client:
            await asyncio.gather(*(self._fetch_header(span, name) for name in names))
            with open_checkpoint(self.folder, self.keep_mtp) as opened:
                apart = opened.apart
            await asyncio.gather(*map(put_apart, apart))

    async def _fetch_small(self, name: str, limit: int) -> None:
        path, expected = self.folder / name, self.snapshot.files.get(name)
        if expected is None:
            return
        if expected.size > limit:
            sizes = f"{expected.size} bytes, more than {limit}"
            raise CheckpointError(f"{self.snapshot.repo}/{name}: {sizes}; not a real model's file")
        found = await self._checked(name, path, self.snapshot.cached(name))
        if found is None:
            await fetch(self.snapshot.remote(name, self.patience), path)
        elif found != path:
            _copy(found, path)

    async def _fetch_header(
        self, span: Callable[[str, int, int], Awaitable[bytes]], name: str
    ) -> None:
        """Make a sparse file with a weight file's size and header, anew: no checksum is known."""
        path, size = self.folder / name, self.snapshot.files[name].size
        data = await span(name, 0, min(_HEAD_BYTES, size))
        length = 8 + int.from_bytes(data[:8], "little")
        if length > MAX_HEADER_BYTES:
            sizes = f"header of {length} bytes, more than {MAX_HEADER_BYTES}"
            raise CheckpointError(f"{self.snapshot.repo}/{name}: {sizes}; not a real checkpoint")
        if length > len(data):
            data += await span(name, len(data), min(length, size))
        temporary = path.with_name(name + ".tmp")
        with open(temporary, "wb") as file:
            system.keep_sparse(file.fileno())
            file.write(data[:length])
            file.truncate(size)
        if system.bytes_on_disk(temporary) > max(size // 2, length + (1 << 20)):
            system.patiently(temporary.unlink)
            problem = "the file system keeps no sparse files; choose a destination on another"
            raise ExportError(f"{path.parent}: {problem}")
        system.move(temporary, path)

    async def _checked(self, name: str, *places: Path | None) -> Path | None:
        """The first place that has a file with the checksum of the file ``name``."""
        expected = self.snapshot.files[name]
        for path in (place for place in places if place is not None and place.is_file()):
            with open(path, "rb") as file:
                if await checksum_of(file.fileno(), expected) == expected.checksum:
                    return path
            self.notify(f"{path}: is damaged, so it is not used but downloaded again")
        return None

    def _arrived(self, name: str) -> Path | None:
        """A weight file that came in an earlier run."""
        for folder in (self._weights, self.kept):
            path = None if folder is None else folder / name
            if path and path.is_file() and path.stat().st_size == self.snapshot.files[name].size:
                return path
        return None

    def announce(self, together: Sequence[list[str]], export_bytes: int, free_bytes: int) -> int:
        files = {file for group in together for file in group}
        for path in self._weights.iterdir():
            plain = path.name.removesuffix(".tmp").removesuffix(".incomplete")
            if plain.removesuffix(".ranges") not in files:
                self._retire(path)  # it was done when the last run was killed
        snapshot, size = self.snapshot, format_size
        coming = [name for name in files if not (self._arrived(name) or snapshot.cached(name))]
        sizes = {name: snapshot.files[name].size for name in coming}
        self._total = sum(sizes.values())
        have = sum(map(system.bytes_on_disk, self._weights.glob("*.incomplete")))
        at_once = [sum(sizes.get(name, 0) for name in group) for group in together]
        most = max(at_once, default=0) if self.kept is None else self._total
        peak = max(most - have, 0)
        if files:
            done = f", {size(have)} of it here" if have else ""
            kept = "" if self.kept is None else f" and the weight files in {self.kept}"
            at, count = snapshot.commit[:12], f"{len(coming)} of {len(files)} weight files"
            total = f"{count} to download, {size(self._total)}{done}"
            self.notify(f"{snapshot.repo} at commit {at}: {total}")
            needs = f"{size(export_bytes)} for the export and at most {size(peak)} for weight files"
            left = f"{size(free_bytes)} free; afterwards the export remains{kept}"
            self.notify(f"disk: {needs}, {left}")
        return peak

    def arrivals(self, files: list[str]) -> Generator[tuple[str, Path], None, None]:
        start = self.portal.start_task_soon
        coming = [start(self._arrive, file) for file in files[:1]]
        for index, file in enumerate(files):
            path = coming.pop().result()
            coming = [start(self._arrive, name) for name in files[index + 1 :][:1]]
            yield file, path

    def release(self, file: str, path: Path) -> None:
        if path.parent == self._weights:
            self._retire(path)
        elif self.kept is not None and path.parent != self.kept:
            _copy(path, self.kept / file)

    async def _arrive(self, name: str) -> Path:
        places = self._arrived(name), self.snapshot.cached(name)
        if (path := await self._checked(name, *places)) is None:
            path = self._weights / name
            await fetch(self.snapshot.remote(name, self.patience), path, self._advance)
        return path

    def _advance(self, count: int) -> None:
        self._done += count
        self.arriving(self._done, max(self._total, self._done))

    def _retire(self, path: Path) -> None:
        """A weight file is done: remove it, or keep it under its name."""
        if self.kept is not None and path.suffix == ".safetensors":
            system.move(path, self.kept / path.name)
        else:
            system.patiently(path.unlink)


def _copy(source: Path, destination: Path) -> None:
    """``destination`` appears when it is whole; big files are linked if they can be."""
    temporary = destination.with_name(destination.name + ".tmp")
    system.patiently(temporary.unlink, True)
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    system.move(temporary, destination)


def quantize_from_hub(
    repo: str,
    revision: str,
    destination: Path,
    *,
    overwrite: bool = False,
    keep_source: bool = False,
    keep_mtp: bool = False,
    wait_for_lock: bool = False,
    arriving: Progress = ignore,
    notify: Notify = ignore,
    ready: Callable[[Path], Windows | None] = lambda folder: None,
    patience: Patience | None = None,
    **options: Any,
) -> Json:
    """``quantize`` (which gets ``options``) of a model on the hub; returns the manifest.

    Killed at any moment, the same call resumes at the byte, from the commit that the first call
    found.  ``keep_source`` leaves the checkpoint in ``DST.source``.  ``arriving(done, total)`` gets
    bytes of the download; ``ready`` the folder of config, tokenizer and headers before any weight
    is fetched, to return ``calibration``.  Raises as ``quantize``, ``resolve`` and ``fetch`` do.
    """
    download = output_dir.beside(destination, "download")
    kept = output_dir.beside(destination, "source") if keep_source else None
    patience = patience or Patience()
    with output_dir.locked(download, wait_for_lock):
        if wait_for_lock and (manifest := output_dir.finished_manifest(destination)) is not None:
            _clear(download)
            return manifest
        snapshot = _begin(download, repo, revision, overwrite, patience)
        if kept is not None:
            why = f"which {repo} has not, so nothing is put there"
            output_dir.refuse_foreign(kept, snapshot.files, why)
        try:
            with start_blocking_portal() as portal:
                reporting = arriving, notify, patience
                shards = HubShards(portal, snapshot, download, kept, *reporting, keep_mtp)
                with output_dir.full_disk_explained(download):
                    portal.call(shards.prepare)
                    calibration = ready(shards.folder)
                    output_dir.write_signed(download / "plan.json", vars(snapshot))
                    if kept is not None:
                        kept.mkdir(exist_ok=True)
                options |= {"overwrite": overwrite, "wait_for_lock": wait_for_lock}
                options |= {"notify": notify, "shards": shards, "keep_mtp": keep_mtp}
                manifest = quantize(shards.folder, destination, calibration=calibration, **options)
        except BaseException:
            begun = output_dir.beside(destination, "partial").exists()
            if not begun and not any((download / "weights").glob("*")):
                _clear(download)
            raise
        if kept is not None:  # with the small files it is a checkpoint
            for name in (*COPIED, INDEX_NAME, tiktoken.FILE_NAME):
                if (shards.folder / name).is_file():
                    _copy(shards.folder / name, kept / name)
        _clear(download)
        return manifest


def _begin(folder: Path, repo: str, revision: str, overwrite: bool, patience: Patience) -> Snapshot:
    """The commit that a killed run began with, so that all files are of one commit even if the
    revision moved on; without one, what the revision is now, and an empty folder."""
    begun = None
    with suppress(ValueError):
        begun = typed(output_dir.read_signed(folder / "plan.json"), Snapshot)
        begun = begun if is_commit(begun.commit) and needed(begun.files) == begun.files else None
    if begun is not None and not overwrite:
        if (begun.repo, begun.revision) != (repo, revision):
            problem = f"was begun with {begun.repo} at {begun.revision}"
            advice = f"pass --overwrite to start anew with {repo} at {revision}"
            raise ExportError(f"{folder}: {problem}; {advice}")
        return begun
    snapshot = resolve(repo, revision, patience)
    if snapshot != begun:
        _clear(folder)
    return snapshot


def _clear(download: Path) -> None:
    """Remove what a run made, and refuse to touch anything else."""
    why = "which no download makes, so it is never emptied"
    output_dir.refuse_foreign(download, ("plan.json", "headers", "weights"), why)
    # First what vouches for the others.
    system.patiently((download / "plan.json").unlink, True)
    output_dir.empty(download)


def hub_export(repo: str, revision: str | None, cache: Path, **reporting: Any) -> Path:
    """Export of a hub's model in ``cache``, made if absent; raises as ``quantize_from_hub``."""
    destination, commit = hub_place(repo, revision, cache, reporting.get("patience"))
    if not (destination / MANIFEST).is_file():
        quantize_from_hub(repo, commit, destination, wait_for_lock=True, **reporting)
    mark_used(destination)
    return destination


def hub_place(
    repo: str, revision: str | None, cache: Path, patience: Patience | None = None
) -> tuple[Path, str]:
    """Where in the folder ``cache`` the export of a model on the hub belongs, and its commit.

    The commit that a revision was at first is noted there: later runs need no network, and a new
    README does not start a download of hundreds of gigabytes.  Raises as ``resolve`` does.
    """
    revision = revision or "main"
    name = repo.replace("/", "--")
    note = cache / f"{name}@{quote(revision, safe='')}.json"
    commit = str(read_note(note).get("commit"))
    if not is_commit(commit):
        commit = resolve(repo, revision, patience or Patience()).commit
        output_dir.make_cache(cache)
        write_note(note, {"commit": commit})
    return cache / f"{name}-{commit[:12]}-{FORMAT_VERSION}{DEFAULT_CODEC}", commit
