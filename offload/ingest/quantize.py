"""Checkpoint in, export out: a tensor at a time, resumable, never half-written under its final
name.

Every tensor is quantized straight to its place in the file of the export that holds it, so weight
files can arrive in any order and leave at once (``slotmoe.offload.ingest.hub``).  Work happens in
``DST.partial``.  ``state.json`` there says what is done: each finished file's manifest entry, and
the checksums of the tensors that unfinished files hold already.  It is written after those bytes
are durable, so a killed run resumes to the same bytes.  The last act is to rename the folder to
``DST``.
"""

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slotmoe.errors import CheckpointError, ConfigError, ExportError
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.gguf.checkpoint import open_checkpoint
from slotmoe.model.names import text_layer
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.calibration import Calibration, Windows, chosen, fingerprint
from slotmoe.offload.ingest.encoder import Coder, codecs_for, learn_levels, learns, levels_file
from slotmoe.offload.ingest.held_files import Arriving, Shards
from slotmoe.offload.ingest.manifest import Contents, write_files
from slotmoe.offload.ingest.output_dir import check_space
from slotmoe.offload.ingest.repair import export_of, repair, source_files
from slotmoe.offload.ingest.report import quantization_report
from slotmoe.quant.codecs.codec import TILE, ExpertCodecs
from slotmoe.quant.codecs.encode import NotFiniteError
from slotmoe.quant.export import writer
from slotmoe.quant.export.layout import COPIED, FORMAT_VERSION, MANIFEST
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.validate import MAX_COPIED_BYTES, refuse_unlisted
from slotmoe.quant.export.verify import damaged_files, span_checksums
from slotmoe.quant.export.writer import ExportFile, publish_file, write_json
from slotmoe.quant.shapes import RESIDENT_MODES

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes of the source, called from worker threads."""
Notify = Callable[[str], None]
_CHUNK = 8 << 20  # weights quantized at once


class Stopped(Exception):
    """The work was given up because another thread failed."""


def ignore(*_arguments: Any) -> None:
    """For callers that want no progress and no sentences."""


def resident_mode(resident: str) -> str:
    """The precision that ``--resident`` stands for.  Raises ``ConfigError``."""
    if resident == "auto":
        return "int8"
    if resident not in RESIDENT_MODES:
        known = ", ".join(("auto", *RESIDENT_MODES))
        raise ConfigError(f"resident {resident!r:.40} is unknown, expected one of: {known}")
    return resident


def quantize(
    source: Path,
    destination: Path,
    *,
    resident: str = "auto",
    codecs: ExpertCodecs | None = None,
    keep_mtp: bool = False,
    calibration: Windows | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    wait_for_lock: bool = False,
    progress: Progress = ignore,
    checking: Progress = ignore,
    notify: Notify = ignore,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """Quantize ``source``, a checkpoint folder or GGUF file, into the export ``destination`` and
    return its manifest.  If ``destination`` is an export of this source already, its checksums are
    compared (``checking(done, total)`` in bytes of it) and what is damaged is made again.
    Interrupted or failed, the call leaves ``DST.partial``, from which the same call resumes.
    ``wait_for_lock`` waits for another process that writes the same destination and then returns
    what it made.  With ``shards``, ``source`` needs only the headers of its weight files.
    ``keep_mtp`` keeps the head that predicts one token more.  ``notify`` gets sentences for people.
    ``calibration`` are windows of token ids: codes with learned levels, but for that head's, are
    made with that text's Hessians.  Raises ``CheckpointError`` or ``ConfigError`` for a bad source
    and ``ExportError`` if the destination can't take the export."""
    mode, partial = resident_mode(resident), output_dir.beside(destination, "partial")
    with open_checkpoint(source, keep_mtp) as checkpoint, output_dir.locked(partial, wait_for_lock):
        if wait_for_lock and (manifest := output_dir.finished_manifest(destination)) is not None:
            return manifest
        codecs = codecs or codecs_for(checkpoint)
        existing = None if overwrite else export_of(checkpoint, mode, codecs, destination)
        if existing is None:
            output_dir.check_destination(destination, overwrite)
        else:
            output_dir.check_ours(partial)
        workers = workers or min(os.cpu_count() or 1, 8)
        job = _Job(checkpoint, partial, mode, codecs, workers, progress, notify, shards)
        job.calibrate(calibration)
        with output_dir.full_disk_explained(partial):
            if existing is not None:
                refuse_unlisted(destination, existing)
                damaged = damaged_files(destination, existing, checking)
                job.continue_from(destination, existing, damaged)
                return repair(destination, existing, damaged, partial, job.rebuild, notify)
            # A run that was killed before the last rename has left a whole export.
            manifest = export_of(checkpoint, mode, codecs, partial)
            if manifest is None or damaged_files(partial, manifest, checking):
                job.load_state(overwrite)
                manifest = job.run()
            wanted = {partial / name for name in (MANIFEST, *manifest["files"])}
            for path in list(partial.rglob("*")):  # the state, and what kills left half-written
                if path.is_file() and path not in wanted:
                    path.unlink()
            writer.sync_folder(partial)
            with Export.open(partial):  # before it replaces anything
                pass
            output_dir.publish(partial, destination)
        return manifest


@dataclass
class _Job:
    """One quantization: what to write, what is there already, and the workers."""

    checkpoint: Checkpoint
    partial: Path
    mode: str
    codecs: ExpertCodecs
    workers: int
    progress: Progress
    notify: Notify
    shards: Shards | None

    def __post_init__(self) -> None:
        dtypes = {name: info.dtype for name, info in self.checkpoint.infos.items()}
        self._contents = Contents(self.checkpoint.config, self.mode, self.codecs, dtypes)
        self._coder, self._levels = Coder(self.checkpoint), dict[str, list[float]]()
        self._kinds = {name: tensor.kind for name, tensor in self._contents.tensors.items()}
        self._levels_file = levels_file(self.checkpoint, self._kinds)
        self._text: list[list[int]] | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._done, self._total = 0, 0
        self._state: dict[str, Any] = {}
        # By unfinished file of the export, and source tensors that are still to be written to it.
        self._open_files: dict[str, ExportFile] = {}
        self._left: dict[str, set[str]] = {}

    def run(self) -> dict[str, Any]:
        """Write every missing file, then the manifest; returns it."""
        files = self.write([*self._contents.files, *self._small_files()])
        report = quantization_report(
            self._contents, self._state["squares"], self._state["weighted"]
        )
        source = self._state["identity"]["source"]
        made: dict[str, Any] = {"report": report}
        if self._text is not None:
            made["calibration"] = fingerprint(self._text)
        manifest = self._contents.manifest(source, files, self._state["levels"], **made)
        write_json(self.partial / MANIFEST, manifest)
        return manifest

    def continue_from(
        self, destination: Path, manifest: dict[str, Any], damaged: Mapping[str, str]
    ) -> None:
        """Make files as those of an export were made.  Raises ``ExportError`` where that takes a
        text that is not given."""
        quantization = manifest["quantization"]
        self._levels = {name: item["levels"] for name, item in quantization["codecs"].items()}
        wanted = quantization.get("calibration")
        if wanted is None:
            self._text = None
        elif any(name not in COPIED for name in damaged) and wanted != self._fingerprint():
            problem = f"{min(damaged)} is damaged, and was coded with a calibration text"
            advice = "pass the same --calibrate files to make it again, or --overwrite"
            raise ExportError(f"{destination}: {problem}; {advice}")

    def calibrate(self, windows: Windows | None) -> None:
        """Make codes with the Hessians of a text, where any have learned levels."""
        if windows is not None and any(map(learns, self._kinds.values())):
            self._text = chosen(windows)

    def _fingerprint(self) -> str | None:
        return None if self._text is None else fingerprint(self._text)

    def rebuild(self, names: list[str]) -> dict[str, Any]:
        """Write the files ``names`` in any case; returns their manifest entries."""
        self.load_state(overwrite=False)
        return self.write(names)

    def load_state(self, overwrite: bool) -> None:
        """Continue a killed run; what else is there is removed with ``overwrite``, or refused."""
        name, files = self.checkpoint.name, source_files(self.checkpoint)
        identity = {
            "format_version": FORMAT_VERSION,
            "resident": self.mode,
            "experts": self.codecs.names(),
            "mtp": self.checkpoint.config.mtp,
            "text": self._fingerprint(),
            "source": {"name": name, "files": files},
        }
        fresh: dict[str, Any] = {"identity": identity, "files": {}, "written": {}, "squares": {}}
        fresh |= {"weighted": {}, "levels": self._levels}
        state = output_dir.read_state(self.partial)
        if state is not None and state["identity"] == identity and state.keys() == fresh.keys():
            self._state = state
            return
        if state is not None and not overwrite:
            problem = "was begun from another source or with other options"
            advice = "pass --overwrite to start anew, or remove it"
            raise ExportError(f"{self.partial}: {problem}; {advice}")
        output_dir.empty(self.partial)
        self._state = fresh

    def _save_state(self) -> None:
        output_dir.write_state(self.partial, self._state)

    def write(self, names: list[str]) -> dict[str, Any]:
        """Write the files ``names`` unless they are finished; returns their manifest entries."""
        infos, tensors = self.checkpoint.infos, self._contents.tensors
        weights = [name for name in names if name not in COPIED]
        sizes = dict.fromkeys(weights, 0)  # of what each file is made of
        for name, tensor in tensors.items():
            if tensor.file in sizes:
                sizes[tensor.file] += infos[name].nbytes
        self._done, self._total = 0, sum(sizes.values())
        unfinished = [name for name in weights if not self._finished(name, sizes[name])]
        written = {name: self._written(name) for name in unfinished}
        self._left = {name: set() for name in written}
        for name, tensor in tensors.items():
            if tensor.file in written and not written[tensor.file].keys() >= set(tensor.parts):
                self._left[tensor.file].add(name)
        todo = [name for name in tensors if name in self._left.get(tensors[name].file, ())]
        calibration = self._calibration(todo)
        arriving = None
        if self.shards is not None:
            needed = self._needed_files(todo, calibration)
            arriving = Arriving(self.checkpoint, self.shards, needed, self._know_levels)
        self._check_space(arriving)
        self._advance(self._total - sum(infos[name].nbytes for name in todo) - self._done)
        with ExitStack() as closing_files:
            for name in written:
                export_file = ExportFile(
                    self.partial / name, self._contents.parts(name), written[name]
                )
                self._open_files[name] = closing_files.enter_context(closing(export_file))
                if not self._left[name]:  # killed after its last tensor
                    self._finish(name)
            if arriving is None:
                self._know_levels(self._levels_file)
            else:
                closing_files.enter_context(arriving)
            if calibration is not None:
                self._write_calibrated(todo, calibration, arriving)
            elif arriving is not None:
                self._write_arriving(todo, arriving)
            else:
                self._write_tensors(todo)
        small = {name: data for name, data in self._small_files().items() if name in names}
        entries = {name: self._state["files"][name] for name in weights}
        return entries | write_files(small, self.partial)

    def _small_files(self) -> dict[str, bytes]:
        found = {name: self.checkpoint.small_file(name, MAX_COPIED_BYTES) for name in COPIED}
        return {name: data for name, data in found.items() if data is not None}

    def _needed_files(self, names: list[str], calibration: Calibration | None) -> list[set[str]]:
        """Weight files by step of the work: file by file, or with a text layer by layer."""
        infos, config = self.checkpoint.infos, self.checkpoint.config
        if calibration is None:
            return [{file} for file in sorted({infos[name].file for name in names})]
        needed: dict[int | None, set[str]] = {layer: set() for layer in calibration.remaining}
        for name in infos:
            if (layer := text_layer(name, config)) in needed:
                needed[layer].add(infos[name].file)
        first = [*calibration.embedding_files, *[self._levels_file] * (not self._state["levels"])]
        rest = {infos[name].file for name in names if text_layer(name, config) is None}
        return [set(filter(None, first)), *needed.values(), rest]

    def _write_arriving(self, names: list[str], arriving: Arriving) -> None:
        """Quantize ``names`` one weight file after the other, in the order in which they come."""
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.checkpoint.infos[name].file, []).append(name)
        for step, file in enumerate(sorted(by_shard)):
            arriving.reach(step)
            self._write_tensors(by_shard[file])
            self._save_written()

    def _save_written(self) -> None:
        """Make what unfinished files hold durable, and say so in the state."""
        for name, export_file in self._open_files.items():
            export_file.sync()
            self._state["written"][name] = dict(export_file.checksums)
        self._save_state()

    def _know_levels(self, file: str) -> None:
        """Learn levels, unless they are known, when the file is there that they are learned
        from."""
        if not self._state["levels"] and file == self._levels_file:
            self._state["levels"] = learn_levels(self.checkpoint, self._kinds, file)
            self._save_state()
        self._coder.levels = self._state["levels"]

    def _calibration(self, names: list[str]) -> Calibration | None:
        """The text's way through the layers that have tensors among ``names``."""
        if self._text is None:
            return None
        coded = {name for name, kind in self._kinds.items() if learns(kind)}
        layers = {text_layer(name, self.checkpoint.config) for name in names} - {None}
        wanted = [layer for layer in layers if layer is not None]
        return Calibration(self.checkpoint, self._text, coded, wanted, self.partial, self._advance)

    def _write_calibrated(
        self, names: list[str], calibration: Calibration, arriving: Arriving | None
    ) -> None:
        """Quantize ``names`` layer by layer, with the Hessians of a text."""
        by_layer: dict[int | None, list[str]] = {}
        for name in names:
            by_layer.setdefault(text_layer(name, self.checkpoint.config), []).append(name)
        with self._lock:
            self._total += calibration.nbytes
        self.notify(calibration.announcement())

        def reach(step: int) -> None:
            if arriving is not None:
                arriving.reach(step)

        for calibrated in calibration.layers(reach):
            self._coder.hessians = calibrated.hessians
            self._write_tensors(by_layer.get(calibrated.layer, []))
            self._save_written()
        reach(len(calibration.remaining) + 1)
        self._write_tensors(by_layer.get(None, []))
        for sentence in calibration.remarks(self._coder.uncalibrated):
            self.notify(sentence)

    def _write_tensors(self, names: list[str]) -> None:
        """Quantize the tensors ``names`` to their places, in parallel."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.workers, "", torch.set_num_threads, (1,)) as pool:
            try:
                deque(pool.map(self._write_tensor, names), maxlen=0)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(threads)

    def _write_tensor(self, name: str) -> None:
        checkpoint, tensor = self.checkpoint, self._contents.tensors[name]
        info, file = checkpoint.infos[name], tensor.file
        export_file = self._open_files[file]
        step = max(TILE, _CHUNK // (info.row_bytes // info.dtype.itemsize) // TILE * TILE)
        squares, weighted = [0.0, 0.0], [0.0, 0.0]
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            try:
                coded = self._coder.code(name, start, stop, tensor.kind)
            except NotFiniteError:
                problem = f"{name} holds NaN, infinite or larger than fp16 weights"
                source = checkpoint.folder / info.file
                raise CheckpointError(f"{source}: {problem}; the file is damaged") from None
            for part, output in zip(tensor.parts, coded.outputs, strict=True):
                export_file.write(part, output)
            squares = [a + b for a, b in zip(squares, coded.squares or (0.0, 0.0), strict=True)]
            weighted = [a + b for a, b in zip(weighted, coded.weighted or (0.0, 0.0), strict=True)]
            self._advance((stop - start) * info.row_bytes)
        with self._lock:
            if tensor.kind != "none":
                self._state["squares"][name] = squares
            if weighted[1]:
                self._state["weighted"][name] = weighted
            self._left[file].remove(name)
            whole = not self._left[file]
        if whole:
            self._finish(file)

    def _finish(self, file: str) -> None:
        """Check a complete file, record it, then name it: ``_finished`` may have to do the last."""
        entry = None
        try:
            entry = self._open_files[file].finish(self._contents.record_bytes(file))
        finally:
            with self._lock:
                del self._open_files[file]
                self._state["written"].pop(file, None)
                if entry is not None:
                    self._state["files"][file] = entry
                self._save_state()
        publish_file(self.partial / file)

    def _finished(self, file: str, size: int) -> bool:
        """Whether ``file``, made of ``size`` bytes of the source, is whole; a kill before the
        rename leaves its temporary name."""
        entry, path = self._state["files"].get(file), self.partial / file
        if entry is None:
            return False
        if not path.exists():
            publish_file(path)
        before = self._done

        def advance(position: int) -> None:
            self._advance(before + size * position // entry["bytes"] - self._done)

        intact = path.is_file() and path.stat().st_size == entry["bytes"]
        if intact and span_checksums(path, (), advance)[0] == entry["checksum"]:
            return True
        # Its successor will have the right size long before it is whole: forget the entry first.
        del self._state["files"][file]
        self._save_state()
        path.unlink(missing_ok=True)
        return False

    def _written(self, file: str) -> dict[str, str]:
        """Checksums of what the unfinished ``file`` holds already, if it is there as it was."""
        path, size = writer.temporary_name(self.partial / file), self._contents.nbytes(file)
        intact = path.is_file() and path.stat().st_size == size
        return self._state["written"].get(file, {}) if intact else {}

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            done = self._done
        self.progress(done, self._total)

    def _check_space(self, arriving: Arriving | None) -> None:
        paths = [writer.temporary_name(self.partial / file) for file in self._left]
        taken = sum(path.stat().st_blocks * 512 for path in paths if path.is_file())
        needed = max(sum(map(self._contents.nbytes, self._left)) - taken, 0) + (16 << 20)
        if self.shards is not None and arriving is not None:
            free = shutil.disk_usage(self.partial).free
            needed += self.shards.announce(arriving.together(), needed, free)
        check_space(self.partial, needed)
