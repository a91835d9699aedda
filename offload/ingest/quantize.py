"""Checkpoint in, export out: a tensor at a time, resumable, never half-written under its final
name.

Every tensor is quantized straight to its place in the file of the export that holds it, so weight
files can arrive in any order and leave at once (``slotmoe.offload.ingest.hub``).  Work happens in
``DST.partial``.  ``state.json`` there says what is done: each finished file's manifest entry, and
the checksums of the tensors that unfinished files hold already.  It is written after those bytes
are durable, so a killed run resumes to the same bytes.  The last act is to rename the folder to
``DST``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch

from slotmoe.errors import CheckpointError, ConfigError, ExportError
from slotmoe.model.checkpoint import INDEX_NAME, Checkpoint, inside
from slotmoe.model.config import Config
from slotmoe.model.names import expert_name
from slotmoe.offload.ingest.contents import Contents
from slotmoe.offload.ingest.output_dir import (
    check_destination,
    check_ours,
    check_space,
    full_disk_explained,
    locked,
    partial_folder,
    publish,
)
from slotmoe.offload.ingest.report import experts_name, quantization_report
from slotmoe.quant import nf4
from slotmoe.quant.export.layout import (
    COPIED,
    FORMAT_VERSION,
    MANIFEST,
    PROJECTIONS,
    RESIDENT,
    RecordLayout,
    is_predictor,
)
from slotmoe.quant.export.validate import MAX_COPIED_BYTES, manifest_checksum, read_manifest
from slotmoe.quant.export.verify import damaged_files, file_checksum
from slotmoe.quant.export.writer import (
    ExportFile,
    publish_file,
    sync_folder,
    temporary_name,
    write_json,
)
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import BLOCK, TILE
from slotmoe.quant.weights import quantize_int8, quantize_nf4, squared_error

RESIDENT_CHOICES = ("auto", "bf16", "int8", "nf4")
Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes of the source, called from worker threads."""
_CHUNK = 8 << 20  # resident weights quantized at once
_LEVELS = torch.tensor(nf4.LEVELS)


class Shards(Protocol):
    """Weight files that are not all in the checkpoint's folder, but come one after the other."""

    def announce(self, files: list[str], export_bytes: int, free_bytes: int) -> int:
        """Say what will be brought; returns the disk, in bytes, that it takes at its peak beyond
        what is taken already."""

    def bring(self, files: list[str]) -> Generator[tuple[str, Path], None, None]:
        """Each file with the place where it lies; it may be gone when the next one is asked for."""


def quantize(
    source: Path,
    destination: Path,
    *,
    resident: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    wait_for_lock: bool = False,
    progress: Progress | None = None,
    checking: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """Quantize the checkpoint folder ``source`` into the export ``destination`` and return its
    manifest.

    If ``destination`` is an export of this source already, its checksums are compared (``checking``
    is told) and what is damaged is made again.  Interrupted or failed, the call leaves
    ``DST.partial``, from which the same call resumes. ``wait_for_lock`` waits for another process
    that writes the same destination and then returns what it made. With ``shards``, ``source``
    needs only the headers of its weight files.  ``notify`` gets sentences for people.

    Raises ``CheckpointError`` or ``ConfigError`` for a bad source and ``ExportError`` if the
    destination can't take the export.
    """
    if resident not in RESIDENT_CHOICES:
        raise ConfigError(
            f"resident {resident!r:.40} is unknown, expected one of: {', '.join(RESIDENT_CHOICES)}"
        )
    mode = "int8" if resident == "auto" else resident
    with Checkpoint.open(source) as checkpoint:
        partial = partial_folder(destination)
        with locked(partial, wait_for_lock):
            if wait_for_lock and (destination / MANIFEST).exists():
                finished: dict[str, Any] = json.loads((destination / MANIFEST).read_text())
                return finished
            found = None if overwrite else _export_of(checkpoint, mode, destination)
            if found is None:
                check_destination(destination, overwrite)
            else:
                check_ours(partial)
            job = _Job(
                checkpoint,
                partial,
                mode,
                workers or min(os.cpu_count() or 1, 8),
                progress or _ignore,
                shards,
            )
            with full_disk_explained(partial):
                if found is not None:
                    return _repair(
                        job, partial, destination, found, checking or _ignore, notify or _ignore
                    )
                manifest = _export_of(
                    checkpoint, mode, partial
                )  # a run that was killed before the last rename
                if manifest is None or not _has_sizes(partial, manifest):
                    job.load_state(overwrite)
                    manifest = job.run()
                for path in list(partial.rglob("*")):  # the state, and what kills left half-written
                    if path.is_file() and str(path.relative_to(partial)) not in (
                        MANIFEST,
                        *manifest["files"],
                    ):
                        path.unlink()
                sync_folder(partial)
                publish(partial, destination)
            return manifest


def _ignore(*_arguments: Any) -> None:
    """For callers that want no progress and no sentences."""


def _export_of(checkpoint: Checkpoint, mode: str, folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder`` if it is an export of ``checkpoint`` in this precision, else
    None."""
    if folder.is_symlink():
        return None
    try:
        manifest = read_manifest(folder)
    except ExportError:
        return None
    source = manifest.get("source")
    same = isinstance(source, dict) and source.get("files") == source_files(checkpoint)
    return manifest if same and manifest["quantization"]["resident"] == mode else None


def _has_sizes(folder: Path, manifest: dict[str, Any]) -> bool:
    paths = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _repair(
    job: _Job,
    partial: Path,
    destination: Path,
    manifest: dict[str, Any],
    checking: Progress,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Make the damaged files of an export again, each in the moment of one rename; returns the
    manifest."""
    damaged = damaged_files(destination, manifest, checking)
    for name, problem in damaged.items():
        if (destination / name).is_dir():
            raise ExportError(
                f"{destination / name}: is a folder; move it away, so that the file can be made"
            )
        notify(
            f"{destination / name} {problem}; "
            + ("removed, calibrate again" if is_predictor(name) else "it is made again")
        )
    if not damaged:
        notify(f"{destination}: is this export already, and every checksum is right")
    predictors = [name for name in damaged if is_predictor(name)]
    entries = (
        job.rebuild([name for name in damaged if name not in predictors])
        if len(damaged) > len(predictors)
        else {}
    )
    for name, entry in entries.items():
        if entry != manifest["files"][name]:
            raise ExportError(
                f"{destination / name}: this slotmoe makes other bytes of the source; pass --overwrite to replace the export"
            )
    for name in entries:
        (destination / name).parent.mkdir(exist_ok=True)
        os.rename(partial / name, destination / name)
        sync_folder((destination / name).parent)
    if predictors:
        manifest["files"] = {
            name: entry for name, entry in manifest["files"].items() if name not in predictors
        }
        manifest["checksum"] = manifest_checksum(manifest)
        write_json(destination / MANIFEST, manifest)
        for name in predictors:
            (destination / name).unlink(missing_ok=True)
    shutil.rmtree(partial)
    return manifest


def source_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that ``checkpoint`` is made of: of a weight file's header
    alone, since hashing 31 GB would double the time, of any other file whole.  Raises
    ``CheckpointError``."""
    folder, files = checkpoint.folder, {}
    for name in sorted({info.file for info in checkpoint.infos.values()} | {INDEX_NAME, *COPIED}):
        if not (folder / name).is_file():
            continue
        with open(inside(folder, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if name in COPIED and size > MAX_COPIED_BYTES:
                raise CheckpointError(
                    f"{folder / name}: more than {MAX_COPIED_BYTES} bytes; not a real model's file"
                )
            if name.endswith(".safetensors"):
                head = file.read(8)
                files[name] = {
                    "bytes": size,
                    "header_sha256": _sha256(head + file.read(int.from_bytes(head, "little"))),
                }
            else:
                files[name] = {"bytes": size, "sha256": _sha256(file.read())}
    return files


class _Stopped(Exception):
    """Raised inside workers when the run is being given up."""


class _Job:
    """One quantization: what to write, what is already there, and the workers that write the
    rest."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        partial: Path,
        mode: str,
        workers: int,
        progress: Progress,
        shards: Shards | None,
    ):
        self._checkpoint, self._partial, self._mode = checkpoint, partial, mode
        self._workers, self._progress, self._shards = workers, progress, shards
        self._contents = Contents(
            checkpoint.config, mode, {name: info.dtype for name, info in checkpoint.infos.items()}
        )
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._done, self._total = 0, 0
        self._state: dict[str, Any] = {}
        self._assemblies: dict[str, ExportFile] = {}
        self._left: dict[
            str, set[str]
        ] = {}  # by file of the export: source tensors that are still to be written

    def run(self) -> dict[str, Any]:
        """Write every missing file, then the manifest; returns it."""
        contents = self._contents
        files = self._write_files(contents.files)
        for name in COPIED:
            if (self._checkpoint.folder / name).is_file():
                shutil.copyfile(self._checkpoint.folder / name, self._partial / name)
        files |= small_files(self._partial)
        source = self._state["identity"]["source"]
        manifest = export_manifest(
            contents.config,
            contents.layout,
            self._mode,
            contents.quantization,
            contents.resident_shapes,
            source,
            files,
            report=self._report(),
        )
        write_json(self._partial / MANIFEST, manifest)
        return manifest

    def _report(self) -> dict[str, Any]:
        contents = self._contents
        errors = {
            name: squares
            for found in self._state["errors"].values()
            for name, squares in found.items()
        }
        layers, experts = contents.config.moe_layers, contents.config.n_routed_experts
        parts = contents.parts(RESIDENT)
        return quantization_report(
            layers,
            experts,
            contents.layout,
            contents.resident_shapes,
            contents.quantization,
            parts,
            errors,
        )

    def rebuild(self, names: list[str]) -> dict[str, Any]:
        """Write the files ``names`` of the export into the partial folder; returns their manifest
        entries."""
        self.load_state(overwrite=False)
        copied = [name for name in names if name in COPIED]
        for name in copied:
            shutil.copyfile(self._checkpoint.folder / name, self._partial / name)
        entries = self._write_files([name for name in names if name not in copied])
        return entries | {
            name: entry for name, entry in small_files(self._partial).items() if name in copied
        }

    def load_state(self, overwrite: bool) -> None:
        """Go on from what a killed run left; anything else in the partial folder is removed or,
        without ``overwrite``, refused."""
        source = {
            "name": self._checkpoint.folder.resolve().name,
            "files": source_files(self._checkpoint),
        }
        identity = {"format_version": FORMAT_VERSION, "resident": self._mode, "source": source}
        try:
            state: dict[str, Any] = json.loads((self._partial / "state.json").read_text())
            if (
                state["identity"] == identity
                and isinstance(state["errors"], dict)
                and isinstance(state["written"], dict)
            ):
                self._state = state
                return
            if not overwrite:
                raise ExportError(
                    f"{self._partial}: was begun from another source or with other options; pass --overwrite to start anew, or remove it"
                )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, ExportError):
                raise
        for leftover in self._partial.iterdir():
            shutil.rmtree(
                leftover
            ) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        self._state = {"identity": identity, "files": {}, "written": {}, "errors": {}}

    def _write_files(self, names: list[str]) -> dict[str, Any]:
        """Write the files ``names`` from their tensors, unless they are finished; returns their
        manifest entries."""
        infos, todo = self._checkpoint.infos, list[str]()
        self._total = sum(
            infos[tensor].nbytes for name in names for tensor in self._contents.tensors(name)
        )
        missing = [name for name in names if not self._finished(name)]
        for name in missing:
            written, parts_of = self._written(name), self._contents.part_names
            tensors = [
                tensor
                for tensor in self._contents.tensors(name)
                if not written.keys() >= set(parts_of(tensor))
            ]
            self._left[name] = set(tensors)
            todo += tensors
        self._check_space(missing, todo)
        self._advance(self._total - sum(infos[tensor].nbytes for tensor in todo))
        try:
            if self._shards is None:
                self._write_tensors(todo)
            else:
                self._write_arriving(todo, self._shards)
            for name in missing:
                if (
                    name not in self._state["files"]
                ):  # an earlier run was killed after its last tensor
                    self._finish(name)
        finally:
            for assembly in self._assemblies.values():
                assembly.close()
        return {name: self._state["files"][name] for name in names}

    def _write_arriving(self, names: list[str], shards: Shards) -> None:
        """Quantize ``names`` one weight file after the other, in the order in which they come."""
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._checkpoint.infos[name].file, []).append(name)
        with closing(shards.bring(sorted(by_shard))) as arrivals:
            for file, path in arrivals:
                with self._checkpoint.read_from(file, path):
                    self._write_tensors(by_shard[file])
                for name, assembly in self._assemblies.items():
                    assembly.sync()
                    self._state["written"][name] = dict(assembly.checksums)
                write_json(self._partial / "state.json", self._state)

    def _write_tensors(self, names: list[str]) -> None:
        """Quantize the tensors ``names`` to their places, in parallel."""
        queue = deque(names)

        def work() -> None:
            while True:
                try:
                    name = queue.popleft()
                except IndexError:
                    return
                self._write_tensor(name)

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(
            self._workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            try:
                pending: set[Future[None]] = {pool.submit(work) for _ in range(self._workers)}
                while pending:  # short waits, so that Ctrl-C is seen at once
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:
                self._stop.set()
                raise
            finally:
                pool.shutdown(wait=True)
                torch.set_num_threads(threads)

    def _write_tensor(self, name: str) -> None:
        checkpoint, contents = self._checkpoint, self._contents
        info, file = checkpoint.infos[name], contents.file_of(name)
        with self._lock:
            if file not in self._assemblies:
                self._assemblies[file] = ExportFile(
                    self._partial / file, contents.parts(file), self._written(file)
                )
            assembly = self._assemblies[file]
        step = max(TILE, _CHUNK // (info.row_bytes // info.dtype.itemsize) // TILE * TILE)
        squares = [0.0, 0.0]
        for start in range(0, info.shape[0], step):
            piece = checkpoint.rows(name, start, min(start + step, info.shape[0]))
            if file == RESIDENT:
                checkpoint.check_finite(name, piece)
            try:
                outputs = _quantized(piece, contents.kind(name))
            except nf4.NotFiniteError:
                raise _not_finite(checkpoint, name) from None
            for part, output in zip(contents.part_names(name), outputs, strict=True):
                assembly.write(part, output)
            if (made := _weight(outputs, contents.kind(name), piece)) is not None:
                squares = [a + b for a, b in zip(squares, squared_error(piece, made), strict=True)]
            self._advance(piece.nbytes)
        with self._lock:
            if contents.kind(name) != "none":
                self._state["errors"].setdefault(file, {})[name] = squares
            self._left[file].remove(name)
            whole = not self._left[file]
        if whole:
            self._finish(file)

    def _finish(self, file: str) -> None:
        """Check a file that has all of its tensors, note that it's done, then name it:
        ``_finished`` may have to do the last."""
        with self._lock:
            assembly = self._assemblies.pop(file, None) or ExportFile(
                self._partial / file, self._contents.parts(file), self._written(file)
            )
        entry = None
        try:
            records = None if file == RESIDENT else self._contents.layout.record_bytes
            entry = assembly.finish(records)
        finally:
            assembly.close()
            with self._lock:
                self._state["written"].pop(file, None)
                if entry is not None:
                    self._state["files"][file] = entry
                    self._state["errors"][file] = self._summed_errors(file)
                write_json(self._partial / "state.json", self._state)
        publish_file(self._partial / file)

    def _summed_errors(self, file: str) -> dict[str, list[float]]:
        """The sums of ``squared_error`` of a whole file's weights, all routed experts of a layer as
        one."""
        errors, config = self._state["errors"].get(file, {}), self._contents.config
        layer = self._contents.layer(file)
        if layer is None:
            return errors  # type: ignore[no-any-return]
        experts = range(config.n_routed_experts)
        return {
            experts_name(layer, projection): [
                math.fsum(errors[expert_name(layer, expert, projection)][i] for expert in experts)
                for i in (0, 1)
            ]
            for projection in PROJECTIONS
        }

    def _finished(self, file: str) -> bool:
        """Whether ``file`` is whole, under its own name or, killed before the rename, still under
        the temporary one."""
        entry, path = self._state["files"].get(file), self._partial / file
        if entry is None:
            return False
        if not path.exists():
            publish_file(path)
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            return True
        # Its successor will have the right size long before it is whole: forget the entry first.
        del self._state["files"][file]
        write_json(self._partial / "state.json", self._state)
        path.unlink(missing_ok=True)
        return False

    def _written(self, file: str) -> dict[str, str]:
        """Checksums of what the unfinished ``file`` holds already; nothing if it is not there as it
        was."""
        known: dict[str, str] = self._state["written"].get(file, {})
        path = temporary_name(self._partial / file)
        return (
            known
            if known and path.is_file() and path.stat().st_size == self._contents.nbytes(file)
            else {}
        )

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._done += count
            done = self._done
        self._progress(done, self._total)

    def _check_space(self, missing: list[str], tensors: list[str]) -> None:
        taken = sum(
            path.stat().st_blocks * 512
            for file in missing
            if (path := temporary_name(self._partial / file)).is_file()
        )
        needed = max(sum(map(self._contents.nbytes, missing)) - taken, 0) + (16 << 20)
        if self._shards is not None:
            files = sorted({self._checkpoint.infos[name].file for name in tensors})
            needed += self._shards.announce(files, needed, shutil.disk_usage(self._partial).free)
        check_space(self._partial, needed)


def _weight(
    outputs: tuple[torch.Tensor, ...], kind: str, piece: torch.Tensor
) -> Int8Weight | Nf4Weight | None:
    """What readers will see in the place of ``piece``; None if that is the piece itself."""
    if kind == "none":
        return None
    values, scales = outputs
    return (
        Int8Weight(values, scales)
        if kind == "int8"
        else Nf4Weight(values, scales, _LEVELS, (len(piece), piece.shape[1]))
    )


def _quantized(piece: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    """What the export holds of some rows of a weight: the rows themselves, or codes and scales."""
    if kind == "int8":
        return quantize_int8(piece)
    return quantize_nf4(piece) if kind == "nf4" else (piece,)


def small_files(folder: Path) -> dict[str, Any]:
    """Manifest entries of the copied JSON files in ``folder``, made durable."""
    entries = {}
    for name in COPIED:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            entries[name] = {
                "bytes": (folder / name).stat().st_size,
                "checksum": file_checksum(folder / name),
            }
    return entries


def export_manifest(
    config: Config,
    layout: RecordLayout,
    mode: str,
    quantization: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    source: dict[str, Any],
    files: dict[str, Any],
    linked_layers: dict[str, int] | None = None,
    report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of an export, signed.  ``linked_layers`` maps a layer to the one whose file it
    is a hard link to; ``report`` says what quantization cost, where weights were quantized
    (``slotmoe.offload.ingest.report``)."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "quantization": {
            "experts": "nf4",
            "block": BLOCK,
            "layout": "tiles16",
            "levels": list(nf4.LEVELS),
            "resident": mode,
            "resident_shapes": {
                name: list(shapes[name]) for name, kind in quantization.items() if kind == "nf4"
            },
            **({"report": report} if report is not None else {}),
        },
        "experts": {
            "layers": list(config.moe_layers),
            "linked_layers": linked_layers or {},
            "n_routed_experts": config.n_routed_experts,
            "hidden_size": config.hidden_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "record_bytes": layout.record_bytes,
            "record": layout.describe(),
        },
        "files": dict(sorted(files.items())),
    }
    return {**manifest, "checksum": manifest_checksum(manifest)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _not_finite(checkpoint: Checkpoint, name: str) -> CheckpointError:
    file = checkpoint.folder / checkpoint.infos[name].file
    return CheckpointError(
        f"{file}: {name} holds NaN, infinite or larger than fp16 weights; the file is damaged"
    )


def cached_export(source: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Export of ``source`` in the folder ``cache``, quantized now if it is not there yet.

    The name carries a digest of the source's path, file sizes and times, so that a changed source
    is quantized anew.
    """
    facts = [str(source.resolve())]
    for path in sorted(source.iterdir()):
        if path.is_file():
            facts.append(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}")
    digest = _sha256("\n".join([*facts, str(FORMAT_VERSION)]).encode())[:12]
    destination = cache / f"{source.resolve().name}-{digest}"
    if not (destination / MANIFEST).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ExportError(
                f"{cache}: can't be made ({problem.strerror}); set SLOTMOE_CACHE to a folder that can"
            ) from None
        quantize(source, destination, wait_for_lock=True, progress=progress)
    return destination
