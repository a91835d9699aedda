"""From a source to its export: of a checkpoint at hand or a model on the hub, at a destination or
in the cache folder.

An export is named after the content of its source, so a folder that was moved, copied or touched
finds its own.  Reading a source takes as long as its disk needs, so a note keeps what was found:
``NAME-FACTS.source.json`` names the export of a folder whose files have those sizes and times.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slotmoe import system
from slotmoe.errors import CheckpointError, DownloadError, ExportError
from slotmoe.jsonfile import Json, typed
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint.gguf_header import shard_paths
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.encoder import codecs_for
from slotmoe.offload.ingest.hub import Shards, copy
from slotmoe.offload.ingest.output_dir import Notify, Progress, ignore
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.repository import Snapshot, is_commit, needed, resolve
from slotmoe.offload.machine import cache_folder, read_note, write_note
from slotmoe.offload.model_cache import is_export, locate, mark_used
from slotmoe.offload.plan.memory import export_bytes, sizes_of
from slotmoe.offload.plan.precision import precision_of
from slotmoe.quant.codecs.codec import DEFAULT_CODEC
from slotmoe.quant.export.layout import COPIED, FORMAT_VERSION, MANIFEST
from slotmoe.quant.export.writer import span_checksums
from slotmoe.sizes import format_size

_READ = {".json", ".jinja", ".model", ".safetensors"}  # what an export is made of
_READERS = 4


def cached_export(
    source: Path,
    cache: Path,
    progress: Progress = ignore,
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
        sizes = sizes_of(config, precision_of(config, "auto"), codecs)
        size = format_size(export_bytes(config, sizes))
        free = format_size(shutil.disk_usage(cache).free)
        notify(f"{source} is quantized once, into {destination}: {size} of {free} that are free")
        # What a copy of the folder left unfinished is begun anew.
        quantize(source, destination, overwrite=True, wait_for_lock=True, progress=progress)
    mark_used(destination)
    return destination


def resolve_model(path: str | Path, revision: str | None = None, **reporting: Any) -> Path:
    """Path of a ``MODEL``, as ``locate`` finds it.  A hub id becomes an export in the cache first,
    ``reporting`` as to ``quantize_from_hub``.  Raises ``ConfigError`` and as that."""
    if (folder := locate(path, revision)) is not None:
        return folder
    destination, commit = hub_place(str(path), revision, cache_folder())
    if not (destination / MANIFEST).is_file():
        quantize_from_hub(str(path), commit, destination, wait_for_lock=True, **reporting)
    mark_used(destination)
    return destination


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
    known = read_note(note).get("export")
    if isinstance(known, str) and Path(known).name == known and is_export(cache / known):
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


def _digest(parts: Iterable[str]) -> str:
    text = "\n".join([f"{FORMAT_VERSION}{DEFAULT_CODEC}", *parts])
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


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
    ready: Callable[[Path], Json | None] = lambda folder: None,
    **options: Any,
) -> Json:
    """``quantize`` (which gets ``options``) of a model on the hub; returns the manifest.

    Killed at any moment, the same call resumes with the weight file that was arriving, from the
    commit that the first call found.  ``keep_source`` leaves the checkpoint in ``DST.source``.
    ``arriving(done, total)`` gets bytes of the download; ``ready`` the folder of config, tokenizer
    and headers before any weight is fetched, to return more ``options``.  Raises as ``quantize``
    and ``resolve`` do, and ``DownloadError`` where network or server fail.
    """
    download = output_dir.beside(destination, "download")
    kept = output_dir.beside(destination, "source") if keep_source else None
    with output_dir.locked(download, wait_for_lock):
        if wait_for_lock and (manifest := output_dir.finished_manifest(destination)) is not None:
            _clear(download)
            return manifest
        snapshot = _begin(download, repo, revision, overwrite)
        is_noted = (download / "plan.json").is_file()
        if kept is not None:
            why = f"which {repo} has not, so nothing is put there"
            output_dir.refuse_foreign(kept, (*snapshot.files, ".cache"), why)
        try:
            with closing(Shards(snapshot, download, kept, arriving, notify)) as shards:
                with output_dir.full_disk_explained(download):
                    shards.prepare()
                    options |= ready(shards.folder) or {}
                    output_dir.write_signed(download / "plan.json", vars(snapshot))
                options |= {"overwrite": overwrite, "wait_for_lock": wait_for_lock}
                options |= {"notify": notify, "shards": shards, "keep_mtp": keep_mtp}
                manifest = quantize(shards.folder, destination, **options)
        except BaseException as problem:
            begun = output_dir.beside(destination, "partial").exists()
            if not begun and not any((download / "weights").glob("*")):
                _clear(download)
            if is_noted and isinstance(problem, (CheckpointError, DownloadError)):
                advice = "if it stays so, slotmoe quantize --overwrite asks the hub anew"
                raise type(problem)(f"{problem}; {advice}") from None
            raise
        if kept is not None:  # with the small files it is a checkpoint
            shards.tidy()
            for name in (*COPIED, INDEX_NAME, tiktoken.FILE_NAME):
                if (shards.folder / name).is_file():
                    copy(shards.folder / name, kept / name)
        _clear(download)
        return manifest


def _begin(folder: Path, repo: str, revision: str, overwrite: bool) -> Snapshot:
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
    snapshot = resolve(repo, revision)
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


def hub_place(repo: str, revision: str | None, cache: Path) -> tuple[Path, str]:
    """Where in the folder ``cache`` the export of a model on the hub belongs, and its commit.

    The commit that a revision was at first is noted there: later runs need no network, and a new
    README does not start a download of hundreds of gigabytes.  Raises as ``resolve`` does.
    """
    revision = revision or "main"
    name = repo.replace("/", "--")
    note = cache / f"{name}@{quote(revision, safe='')}.json"
    commit = str(read_note(note).get("commit"))
    if not is_commit(commit):
        commit = resolve(repo, revision).commit
        output_dir.make_cache(cache)
        write_note(note, {"commit": commit})
    return cache / f"{name}-{commit[:12]}-{FORMAT_VERSION}{DEFAULT_CODEC}", commit
