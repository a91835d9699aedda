"""Checkpoint in, export out: streamed an expert at a time, resumable, never half-written under its final name.

Work happens in ``DST.partial``.  A file gets its name there only when it is whole and durable; ``state.json`` lists the
finished ones, so that a killed run resumes to the same bytes.  The last act is to rename the folder to ``DST``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import INDEX_NAME, Checkpoint, inside
from model.config import Config
from model.shapes import expert_name, resident_shapes
from offload.plan import format_size
from offload.report import experts_name, quantization_report
from quant import nf4
from quant.export import (
    COPIED,
    FORMAT_VERSION,
    MANIFEST,
    MAX_COPIED_BYTES,
    PROJECTIONS,
    RESIDENT,
    LayerWriter,
    Part,
    RecordLayout,
    ResidentWriter,
    file_checksum,
    is_predictor,
    layer_file,
    manifest_checksum,
    place,
    resident_parts,
    sync_folder,
    write_json,
)
from quant.int8 import Int8Weight
from quant.matmul import quantize_int8, quantize_nf4, squared_error
from quant.nf4 import Nf4Weight
from quant.sizes import BLOCK, TILE, resident_quantization
from slotmoe import CheckpointError, ConfigError, ExportError

RESIDENT_CHOICES = ("auto", "bf16", "int8", "nf4")
Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes of the source, called from worker threads."""
_CHUNK = 8 << 20  # resident weights quantized at once
_LEVELS = torch.tensor(nf4.LEVELS)


def quantize(
    source: Path,
    destination: Path,
    *,
    resident: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    wait_for_lock: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the checkpoint folder ``source`` into the export ``destination`` and return its manifest.

    Raises ``CheckpointError`` or ``ConfigError`` for a bad source and ``ExportError`` if the destination can't take the
    export.  Interrupted or failed, it leaves ``DST.partial``, from which the same call resumes.
    ``wait_for_lock`` waits for another process that writes the same destination and then returns what it made.
    """
    if resident not in RESIDENT_CHOICES:
        raise ConfigError(f"resident {resident!r:.40} is unknown, expected one of: {', '.join(RESIDENT_CHOICES)}")
    mode = "int8" if resident == "auto" else resident
    with Checkpoint.open(source) as checkpoint:
        partial = partial_folder(destination)
        with _locked(partial, wait_for_lock):
            if wait_for_lock and (destination / MANIFEST).exists():
                finished: dict[str, Any] = json.loads((destination / MANIFEST).read_text())
                return finished
            check_destination(destination, overwrite)
            job = _Job(checkpoint, partial, mode, overwrite, progress or (lambda done, total: None))
            try:
                manifest = job.run(workers or min(os.cpu_count() or 1, 8))
                publish(partial, destination)
            except OSError as problem:
                if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ExportError(f"{partial}: the disk is full; make room and run the same command to resume") from None
            return manifest


def source_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that ``checkpoint`` is made of: of a weight file's header alone, since hashing 31 GB would
    double the time, of any other file whole.  Raises ``CheckpointError``."""
    folder, files = checkpoint.folder, {}
    for name in sorted({info.file for info in checkpoint.infos.values()} | {INDEX_NAME, *COPIED}):
        if not (folder / name).is_file():
            continue
        with open(inside(folder, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if name in COPIED and size > MAX_COPIED_BYTES:
                raise CheckpointError(f"{folder / name}: more than {MAX_COPIED_BYTES} bytes; not a real model's file")
            if name.endswith(".safetensors"):
                head = file.read(8)
                files[name] = {"bytes": size, "header_sha256": _sha256(head + file.read(int.from_bytes(head, "little")))}
            else:
                files[name] = {"bytes": size, "sha256": _sha256(file.read())}
    return files


def partial_folder(destination: Path) -> Path:
    """The folder beside ``destination`` in which it is made.  Raises ``ExportError`` if the destination has no name."""
    if destination.name in ("", ".."):
        raise ExportError(f"{destination}: is not the name of a new folder; choose another destination")
    return destination.with_name(destination.name + ".partial")


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise ``ExportError`` if making ``destination`` an export would lose anything but, with ``overwrite``, an export."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ExportError(f"{destination}: exists and is not a folder; choose another destination")
    if destination.is_dir() and any(destination.iterdir()):
        if not (destination / MANIFEST).is_file():
            raise ExportError(f"{destination}: exists and is not an export, so it is never overwritten; choose another destination")
        if not overwrite:
            raise ExportError(f"{destination}: exists; pass --overwrite to replace it, or choose another destination")
    ours = {*COPIED, MANIFEST, RESIDENT, "experts", "state.json"}
    for folder in (destination, partial_folder(destination), _replaced_folder(destination)):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        foreign = [name for name in names if (plain := name.removesuffix(".tmp")) not in ours and not is_predictor(plain)]
        if foreign:
            raise ExportError(f"{folder}: holds {foreign[0]}, which no export has, so it is never emptied; move it away")


@contextmanager
def _locked(partial: Path, wait_for_lock: bool) -> Iterator[None]:
    """Own the folder ``partial`` (made if absent); a second process waits or is refused."""
    while True:
        try:
            partial.mkdir(exist_ok=True)
        except OSError as problem:
            raise ExportError(f"{partial}: can't be made ({problem.strerror}); choose another destination") from None
        try:
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise ExportError(f"{partial}: is no folder of ours ({problem.strerror}); choose another destination") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait_for_lock else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise ExportError(f"{partial}: another process is writing it; wait for it to finish") from None
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(partial))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)  # the other process finished and renamed it meanwhile
    try:
        yield
    finally:
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
        os.close(handle)


def check_space(partial: Path, needed: int) -> None:
    """Raise ``ExportError`` unless the disk of ``partial`` has ``needed`` free bytes."""
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ExportError(
            f"{partial.parent}: needs {format_size(needed)} of free disk, has {format_size(free)}; make room or choose another destination"
        )


def _replaced_folder(destination: Path) -> Path:
    return destination.with_name(destination.name + ".replaced")


def publish(partial: Path, destination: Path) -> None:
    """Give the finished folder its name, replacing an older export."""
    replaced = _replaced_folder(destination)
    shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed here
    if destination.is_dir() and any(destination.iterdir()):
        os.rename(destination, replaced)
    os.rename(partial, destination)
    sync_folder(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class _Stopped(Exception):
    """Raised inside workers when the run is being given up."""


class _Job:
    """One quantization: what to write, what is already there, and the workers that write the rest."""

    def __init__(self, checkpoint: Checkpoint, partial: Path, mode: str, overwrite: bool, progress: Progress):
        self._checkpoint, self._config, self._partial = checkpoint, checkpoint.config, partial
        self._mode, self._progress = mode, progress
        config = self._config
        self._layout = RecordLayout(config.hidden_size, config.moe_intermediate_size)
        self._shapes = resident_shapes(config)
        self._quantization = {name: resident_quantization(name, shape, mode) for name, shape in self._shapes.items()}
        parts: dict[str, Part] = {}
        for name, shape in self._shapes.items():
            parts |= resident_parts(name, shape, self._quantization[name], checkpoint.infos[name].dtype)
        self._parts = place(parts)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._done, self._total = 0, checkpoint.nbytes
        self._state = self._load_state(overwrite)

    def run(self, workers: int) -> dict[str, Any]:
        """Write every missing file, then the manifest; returns it."""
        self._check_space()
        tasks: list[Callable[[], None]] = []
        for layer in self._config.moe_layers:
            if self._missing(layer_file(layer), self._layer_source_bytes()):
                tasks.append(lambda layer=layer: self._write_layer(layer))  # type: ignore[misc]
        resident_source = sum(self._checkpoint.infos[name].nbytes for name in self._shapes)
        if self._missing(RESIDENT, resident_source):
            tasks.insert(0, self._write_resident)
        self._run_tasks(tasks, workers)
        for name in COPIED:
            if (self._checkpoint.folder / name).is_file():
                shutil.copyfile(self._checkpoint.folder / name, self._partial / name)
        files = {**self._state["files"], **small_files(self._partial)}
        source = self._state["identity"]["source"]
        manifest = export_manifest(
            self._config, self._layout, self._mode, self._quantization, self._shapes, source, files, report=self._report()
        )
        write_json(self._partial / MANIFEST, manifest)
        (self._partial / "state.json").unlink()
        sync_folder(self._partial)
        return manifest

    def _report(self) -> dict[str, Any]:
        errors = {name: squares for found in self._state["errors"].values() for name, squares in found.items()}
        layers, experts = self._config.moe_layers, self._config.n_routed_experts
        return quantization_report(layers, experts, self._layout, self._shapes, self._quantization, self._parts, errors)

    def _run_tasks(self, tasks: list[Callable[[], None]], workers: int) -> None:
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures: set[Future[None]] = {pool.submit(task) for task in tasks}
            try:
                pending = futures
                while pending:  # short waits, so that Ctrl-C is seen at once
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                torch.set_num_threads(threads)

    def _identity(self) -> dict[str, Any]:
        """What the export is made of; a partial folder made of something else is not resumed."""
        source = {"name": self._checkpoint.folder.resolve().name, "files": source_files(self._checkpoint)}
        return {"format_version": FORMAT_VERSION, "resident": self._mode, "source": source}

    def _load_state(self, overwrite: bool) -> dict[str, Any]:
        path, identity = self._partial / "state.json", self._identity()
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            if state["identity"] == identity and isinstance(state["errors"], dict):
                return state
            if not overwrite:
                raise ExportError(
                    f"{self._partial}: was begun from another source or with other options; pass --overwrite to start anew, or remove it"
                )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, ExportError):
                raise
        for leftover in self._partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        return {"identity": identity, "files": {}, "errors": {}}

    def _missing(self, name: str, source_bytes: int) -> bool:
        """True if the file has to be written; counts a finished one as progress."""
        entry = self._state["files"].get(name)
        path = self._partial / name
        if entry is not None and path.is_file() and path.stat().st_size == entry["bytes"]:
            self._advance(source_bytes)
            return False
        return True

    def _layer_source_bytes(self) -> int:
        layer = self._config.moe_layers[0]
        one = sum(self._checkpoint.infos[expert_name(layer, 0, name)].nbytes for name in PROJECTIONS)
        return one * self._config.n_routed_experts

    def _check_space(self) -> None:
        per_layer = self._config.n_routed_experts * (self._layout.record_bytes + 1024)
        needed = len(self._config.moe_layers) * per_layer + sum(part.nbytes for part in self._parts.values()) + (16 << 20)
        needed -= sum(file.stat().st_size for file in self._partial.rglob("*") if file.is_file())
        check_space(self._partial, needed)

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._done += count
            done = self._done
        self._progress(min(done, self._total), self._total)

    def _finish_file(self, name: str, entry: dict[str, Any], errors: dict[str, list[float]]) -> None:
        """Record that a file is whole; ``errors`` are the sums of ``squared_error`` of the quantized weights in it."""
        with self._lock:
            self._state["files"][name], self._state["errors"][name] = entry, errors
            write_json(self._partial / "state.json", self._state)

    def _write_layer(self, layer: int) -> None:
        checkpoint, layout = self._checkpoint, self._layout
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        errors = {experts_name(layer, projection): [0.0, 0.0] for projection in PROJECTIONS}
        with LayerWriter(self._partial, layer, self._config.n_routed_experts, layout) as writer:
            for expert in range(self._config.n_routed_experts):
                for projection in PROJECTIONS:
                    name = expert_name(layer, expert, projection)
                    info = checkpoint.infos[name]
                    source = checkpoint.rows(name, 0, info.shape[0])
                    try:
                        codes, absmax = quantize_nf4(source)
                    except nf4.NotFiniteError:
                        raise _not_finite(checkpoint, name) from None
                    _add(errors[experts_name(layer, projection)], source, Nf4Weight(codes, absmax, _LEVELS, layout.shapes[projection]))
                    layout.part(record, f"{projection}.weight").copy_(codes)
                    layout.part(record, f"{projection}.weight.absmax").copy_(absmax)
                    self._advance(info.nbytes)
                writer.write(record)
            self._finish_file(layer_file(layer), writer.commit(), errors)

    def _write_resident(self) -> None:
        checkpoint = self._checkpoint
        errors = {name: [0.0, 0.0] for name, kind in self._quantization.items() if kind != "none"}
        with ResidentWriter(self._partial, self._parts) as writer:
            for name, shape in self._shapes.items():
                width = checkpoint.infos[name].row_bytes // checkpoint.infos[name].dtype.itemsize
                step = max(TILE, _CHUNK // width // TILE * TILE)
                for start in range(0, shape[0], step):
                    piece = checkpoint.rows(name, start, min(start + step, shape[0]))
                    checkpoint.check_finite(name, piece)
                    made = self._write_piece(writer, name, piece)
                    if made is not None:
                        _add(errors[name], piece, made)
                    self._advance(piece.nbytes)
            self._finish_file(RESIDENT, writer.commit(), errors)

    def _write_piece(self, writer: ResidentWriter, name: str, piece: torch.Tensor) -> Int8Weight | Nf4Weight | None:
        """Write some rows of a resident weight; returns what they became, None if they stay as they are."""
        quantization = self._quantization[name]
        if quantization == "int8":
            values, scales = quantize_int8(piece)
            writer.write(name, values)
            writer.write(name + ".scale", scales)
            return Int8Weight(values, scales)
        if quantization == "nf4":
            try:
                values, scales = quantize_nf4(piece)
            except nf4.NotFiniteError:
                raise _not_finite(self._checkpoint, name) from None
            writer.write(name, values)
            writer.write(name + ".absmax", scales)
            return Nf4Weight(values, scales, _LEVELS, (len(piece), piece.shape[1]))
        writer.write(name, piece)
        return None


def _add(total: list[float], source: torch.Tensor, made: Int8Weight | Nf4Weight) -> None:
    error, square = squared_error(source, made)
    total[0], total[1] = total[0] + error, total[1] + square


def small_files(folder: Path) -> dict[str, Any]:
    """Manifest entries of the copied JSON files in ``folder``, made durable."""
    entries = {}
    for name in COPIED:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            entries[name] = {"bytes": (folder / name).stat().st_size, "checksum": file_checksum(folder / name)}
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
    """The manifest of an export, signed.  ``linked_layers`` maps a layer to the one whose file it is a hard link to; ``report``
    says what quantization cost, where weights were quantized (``offload.report``)."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "quantization": {
            "experts": "nf4",
            "block": BLOCK,
            "layout": "tiles16",
            "levels": list(nf4.LEVELS),
            "resident": mode,
            "resident_shapes": {name: list(shapes[name]) for name, kind in quantization.items() if kind == "nf4"},
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
    return CheckpointError(f"{file}: {name} holds NaN, infinite or larger than fp16 weights; the file is damaged")


def cached_export(source: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Export of ``source`` in the folder ``cache``, quantized now if it is not there yet.

    The name carries a digest of the source's path, file sizes and times, so that a changed source is quantized anew.
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
            raise ExportError(f"{cache}: can't be made ({problem.strerror}); set SLOTMOE_CACHE to a folder that can") from None
        quantize(source, destination, wait_for_lock=True, progress=progress)
    return destination
