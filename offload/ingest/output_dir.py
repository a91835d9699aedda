"""The folder that an export is made in, the moment when it gets its name, and an export that is
there already.

Work happens in ``DST.partial``, which one process owns at a time and at last renames to ``DST``.
"""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os.path import samestat
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from slotmoe import system
from slotmoe.errors import ExportError, naming, refused
from slotmoe.jsonfile import Json, typed
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME, MAX_INDEX_BYTES
from slotmoe.offload.machine import read_note
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.quant.export.layout import COPIED, MANIFEST, RESIDENT
from slotmoe.quant.export.manifest import manifest_checksum, read_manifest
from slotmoe.quant.export.writer import sync_folder, write_json
from slotmoe.sizes import format_size

_STATE = "state.json"
STREAM = "stream.bin"  # where ``slotmoe.offload.ingest.calibration`` goes on
_Sum = Annotated[float, Meta(ge=0, le=1e100)]
_Squares = Annotated[list[_Sum], Meta(min_length=4, max_length=4)]
Written = tuple[list[str], _Squares, dict[str, int]]
Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes, called from worker threads."""
Notify = Callable[[str], None]
_Level = Annotated[int, Meta(ge=-127, le=127)]


class Stopped(Exception):
    """The work was given up because another thread failed."""


def ignore(*_arguments: object) -> None:
    """For callers that want no progress and no sentences."""


def beside(destination: Path, suffix: str) -> Path:
    """``DST.suffix`` beside ``destination``; ``ExportError`` if the destination has no name."""
    if destination.name in ("", ".."):
        problem = "is not the name of a new folder; choose another destination"
        raise ExportError(f"{destination}: {problem}")
    return destination.with_name(f"{destination.name}.{suffix}")


def finished_manifest(destination: Path) -> Json | None:
    """The manifest of an export that another process has just made, or None."""
    return read_manifest(destination) if (destination / MANIFEST).is_file() else None


@dataclass
class Resumption:
    """What a killed run goes on from, all of it durable before it is noted here: the ``identity``,
    what is made of what; the ``stamps`` of weight files, which tell that they are the same; by
    tensor that is ``written`` the checksums of its parts, sums of squares of its error and of its
    weights, plainly and by a Hessian, and what was read for it (``Seen.sums``); learned ``levels``
    by codec; the first ``layer`` that a calibration text has not gone through, with the checksum of
    its residual ``stream`` there; and torch's ``threads``, on which the text's sums depend."""

    identity: Json
    stamps: dict[str, str] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    levels: dict[str, list[_Level]] = field(default_factory=dict)
    layer: Annotated[int, Meta(ge=0, le=99999)] = 0
    stream: str = ""
    threads: Annotated[int, Meta(ge=0, le=4096)] = 0

    @classmethod
    def read(cls, folder: Path) -> "Resumption | None":
        """What ``save`` wrote; None if nothing is there, or if it is not as it was written."""
        try:
            return typed(read_signed(folder / _STATE), cls)
        except ValueError:
            return None

    def save(self, folder: Path) -> None:
        """Replace what is noted, durably and never half."""
        write_signed(folder / _STATE, vars(self))


def read_signed(path: Path) -> Json:
    """What ``write_signed`` wrote; nothing if it is not there or not as it was written."""
    values = read_note(path)
    return values if values.pop("checksum", None) == manifest_checksum(values) else {}


def write_signed(path: Path, values: Json) -> None:
    """Replace ``path``, durably and never half, by the JSON of ``values`` and its checksum."""
    write_json(path, {"checksum": manifest_checksum(values), **values}, indent=None)


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``ExportError`` if anything but, with ``overwrite``, an export would be lost."""
    problem = ""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        problem = "exists and is not a folder;"
    elif destination.is_dir() and any(destination.iterdir()):
        if not (destination / MANIFEST).is_file():
            problem = "exists and is not an export, so it is never overwritten;"
        elif not overwrite:
            problem = "exists; pass --overwrite to replace it, or"
    if problem:
        raise ExportError(f"{destination}: {problem} choose another destination")
    for folder in (destination, beside(destination, "partial"), beside(destination, "replaced")):
        check_ours(folder)


def check_ours(folder: Path) -> None:
    """Raise ``ExportError`` if ``folder``, soon to be emptied, holds what no export has."""
    ours = [*COPIED, MANIFEST, RESIDENT, STREAM, "experts", _STATE]
    refuse_foreign(folder, ours, "which no export has, so it is never emptied")


def refuse_begun(partial: Path) -> None:
    """Raise ``ExportError`` if ``partial`` holds what a stopped ``quantize`` goes on from."""
    if any((partial / name).exists() for name in (_STATE, MANIFEST)):
        problem = "holds what a stopped slotmoe quantize has made"
        advice = "give its command again to finish it, or pass --overwrite to remove it"
        raise ExportError(f"{partial}: {problem}; {advice}")


def refuse_foreign(folder: Path, ours: Collection[str], why: str) -> None:
    """Raise ``ExportError`` if ``folder`` holds what, without ``.tmp``, is not in ``ours``."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in ours and path.name.removesuffix(".tmp") not in ours:
            raise ExportError(f"{folder}: holds {path.name}, {why}; move it away")


def empty(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            system.patiently(shutil.rmtree, path)
        else:
            system.patiently(path.unlink, True)  # or it has just gone


def make_cache(cache: Path) -> None:
    """Make the folder that holds exports made on the way.  Raises ``ExportError``."""
    advice = "; set SLOTMOE_CACHE to a folder that can"
    with refused(cache, ExportError, "can't be made", advice):
        cache.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(partial: Path, wait_for_lock: bool) -> Iterator[None]:
    """Own the folder ``partial``, made if absent; a second process waits or is refused."""
    handle = None
    while handle is None:
        with suppress(FileNotFoundError):  # another process finished and renamed it meanwhile
            handle = _lock(partial, math.inf if wait_for_lock else 0)
    owned = partial.stat()
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if samestat(partial.stat(), owned) and not any(partial.iterdir()):
                partial.rmdir()
        os.close(handle)


def _lock(partial: Path, seconds: float) -> int:
    reason = "can't be made"
    try:
        partial.mkdir(exist_ok=True)
        reason = "is no folder of ours"
        return system.take_lock(partial, seconds, folder=True)
    except BlockingIOError:
        refusal = "another process is writing it; wait for it to finish"
        raise ExportError(f"{partial}: {refusal}") from None
    except OSError as problem:
        if partial.parent.is_dir() and isinstance(problem, FileNotFoundError):
            raise
        reason = f"{reason} ({problem.strerror})"
        raise ExportError(f"{partial}: {reason}; choose another destination") from None


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Raise ``ExportError`` instead of the ``OSError`` of a full disk; others name a file, or at
    least the ``folder``."""
    try:
        with naming(folder):
            yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "make room and run the same command to resume"
        raise ExportError(f"{folder}: the disk is full; {advice}") from None


def check_space(partial: Path, needed: int) -> None:
    """Raise ``ExportError`` unless the disk of ``partial`` has ``needed`` free bytes."""
    free = shutil.disk_usage(partial).free
    if needed > free:
        sizes = f"needs {format_size(needed)} of free disk, has {format_size(free)}"
        raise ExportError(f"{partial.parent}: {sizes}; make room or choose another destination")


def publish(partial: Path, destination: Path) -> None:
    """Give the finished folder its name, replacing an older export."""
    replaced = beside(destination, "replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed here
    if destination.is_dir() and any(destination.iterdir()):
        system.move(destination, replaced)
    system.move(partial, destination)
    sync_folder(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def export_of(checkpoint: Checkpoint, mode: str, codecs: ExpertCodecs, folder: Path) -> Json | None:
    """The manifest of ``folder`` if it is an export of ``checkpoint`` in this precision."""
    if folder.is_symlink():
        return None
    try:
        manifest = read_manifest(folder)
    except ExportError:
        return None
    how, has_head = manifest["quantization"], "mtp_layer" in manifest["experts"]
    found = manifest["source"]["files"], how["resident"], how["experts"], has_head
    wanted = source_files(checkpoint), mode, codecs.names(), checkpoint.config.mtp
    return manifest if found == wanted else None


def refuse_others(where: str | Path, made: Path, was: Json, now: Json) -> None:
    """Raise ``ExportError`` naming the first weight file in ``where`` whose stamp or checksum is
    not what it ``was`` when ``made`` was made of it."""
    for file, value in now.items():
        if was.get(file) != value:
            problem = f"is not the file that {made} is of (found {value}, expected {was.get(file)})"
            advice = "pass --overwrite to start anew, or give that file again"
            raise ExportError(f"{where}/{file}: {problem}; {advice}")


def source_files(checkpoint: Checkpoint) -> dict[str, Json]:
    """Size and SHA-256 of the checkpoint's files: of a weight file's header alone, since hashing 31
    GB would double the time.  Raises ``CheckpointError``."""
    files = {}
    for name, size, header in checkpoint.headers():
        files[name] = {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest()}
    for name in (INDEX_NAME, *COPIED):
        if (data := checkpoint.small_file(name, MAX_INDEX_BYTES)) is not None:
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return dict(sorted(files.items()))


def replace_files(destination: Path, manifest: Json, partial: Path, entries: Json) -> None:
    """Replace files of the export by those in ``partial``, if their ``entries`` are the same."""
    for name, entry in entries.items():
        if entry != manifest["files"][name]:
            problem = "this slotmoe makes other bytes of the source"
            advice = "pass --overwrite to replace the export"
            empty(partial)  # or the next repair would find them
            raise ExportError(f"{destination / name}: {problem}; {advice}")
    for name in entries:
        (destination / name).parent.mkdir(exist_ok=True)
        system.move(partial / name, destination / name)
        sync_folder((destination / name).parent)
