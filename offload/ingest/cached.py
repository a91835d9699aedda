"""Exports that are made when a checkpoint is run: one in the cache for each source's content.

An export is named after the content of its source, so a folder that was moved, copied or touched
finds its own.  Reading a source takes as long as its disk needs, so a note keeps what was found:
``NAME-FACTS.source.json`` names the export of a folder whose files have those sizes and times.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from slotmoe.model.checkpoint.gguf_header import shard_paths
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.encoder import codecs_for
from slotmoe.offload.ingest.quantize import Notify, Progress, ignore, quantize, resident_mode
from slotmoe.offload.machine import cache_folder, read_note, write_note
from slotmoe.offload.model_cache import is_export, locate, mark_used
from slotmoe.offload.plan.memory import export_bytes, sizes_of
from slotmoe.quant.codecs.codec import DEFAULT_CODEC
from slotmoe.quant.export.layout import FORMAT_VERSION
from slotmoe.quant.export.writer import span_checksums
from slotmoe.sizes import format_size

_READ = {".json", ".jinja", ".model", ".safetensors"}  # what an export is made of
_READERS = 4


def cached_export(
    source: Path,
    cache: Path,
    progress: Progress | None = None,
    reading: Progress = ignore,
    notify: Notify = ignore,
    ready: Callable[[Path], None] = ignore,
) -> Path:
    """Export of the checkpoint ``source`` in the folder ``cache``, quantized now if it is not there
    yet.  ``notify`` is told where it will be, and ``ready`` may refuse to make it."""
    destination = cached_place(source, cache, reading, ready)
    if not is_export(destination):
        with open_checkpoint(source) as checkpoint:
            config, codecs = checkpoint.config, codecs_for(checkpoint)
        sizes = sizes_of(config, resident_mode("auto"), codecs)
        size = format_size(export_bytes(config, sizes))
        free = format_size(shutil.disk_usage(cache).free)
        notify(f"{source} is quantized once, into {destination}: {size} of {free} that are free")
        quantize(source, destination, wait_for_lock=True, progress=progress or ignore)
    mark_used(destination)
    return destination


def resolve_model(path: str | Path, revision: str | None = None, **reporting: Any) -> Path:
    """Path of a ``MODEL``, as ``locate`` finds it.  A hub id becomes an export in the cache first,
    by ``hub_export`` with ``revision`` and ``reporting``.  Raises ``ConfigError`` and as that."""
    if (folder := locate(path, revision)) is not None:
        return folder
    from slotmoe.offload.ingest.hub import hub_export

    return hub_export(str(path), revision, cache_folder(), **reporting)


def cached_place(
    source: Path, cache: Path, reading: Progress = ignore, ready: Callable[[Path], None] = ignore
) -> Path:
    """Where in the folder ``cache`` the export of the checkpoint ``source`` is, or belongs.  New or
    changed content is read, ``reading(done, total)`` in bytes, unless ``ready`` refuses it."""
    if source.is_dir():  # what the export depends on
        files = sorted(path for path in source.iterdir() if path.suffix in _READ and path.is_file())
    else:
        files = shard_paths(source)
    states = [(path.name, path.stat()) for path in files]
    facts = [f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in states]
    digest = _digest([os.fspath(source.resolve()), *facts])
    note = cache / f"{source.resolve().name}-{digest}.source.json"
    if (known := noted_export(note)) is not None and is_export(cache / known):
        return cache / known
    ready(source)
    key = content_key(files, reading)
    place = next(filter(is_export, sorted(cache.glob(f"*-{key}"))), None)
    if place is None:
        place = cache / f"{source.resolve().name}-{key}"
        output_dir.make_cache(cache)
    with suppress(OSError):  # a cache that can't be written goes without
        write_note(note, {"export": place.name, "source": os.fspath(source.resolve())})
    return place


def content_key(files: Sequence[Path], progress: Progress) -> str:
    """Digest of the names and all bytes of ``files`` and of the export's format."""
    done, total = dict.fromkeys(files, 0), sum(path.stat().st_size for path in files)

    def advance(path: Path, position: int) -> None:
        done[path] = position
        progress(sum(done.values()), total)

    with ThreadPoolExecutor(_READERS) as pool:
        checksums = pool.map(
            lambda path: span_checksums(path, (), partial(advance, path))[0], files
        )
    return _digest(f"{path.name} {whole}" for path, whole in zip(files, checksums, strict=True))


def noted_export(note: Path) -> str | None:
    """The name of the export that the note names, if there is such a note."""
    name = read_note(note).get("export")
    return name if isinstance(name, str) and Path(name).name == name else None


def _digest(parts: Iterable[str]) -> str:
    text = "\n".join([f"{FORMAT_VERSION}{DEFAULT_CODEC}", *parts])
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
