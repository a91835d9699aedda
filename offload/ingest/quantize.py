"""Checkpoint in, export out: by tensor, resumable, never half-written under its final name.

Every tensor is quantized straight to its place in the file of the export that holds it, so weight
files can arrive in any order and leave at once (``slotmoe.offload.ingest.hub``).  Work happens in
``DST.partial``.  ``state.json`` there says what is done: the checksums of the tensors that files
hold already.  It is written after those bytes are durable, and compared with them before a killed
run goes on, which so makes the same bytes.  At last the folder is renamed to ``DST``.
"""

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import InitVar, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from slotmoe import system
from slotmoe.errors import CheckpointError, ExportError, informs
from slotmoe.jsonfile import Json
from slotmoe.model.checkpoint.reader import Checkpoint, Seen, open_checkpoint, weights_read
from slotmoe.model.names import text_layer
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.calibration import Calibration, Windows, chosen, fingerprint
from slotmoe.offload.ingest.encoder import Coder, codecs_for, learn_levels, level_samples
from slotmoe.offload.ingest.hub import Portion, Shards
from slotmoe.offload.ingest.manifest import Contents, quantization_report, write_files
from slotmoe.offload.ingest.output_dir import (
    Notify,
    Progress,
    Resumption,
    Stopped,
    Written,
    check_space,
    export_of,
    ignore,
    replace_files,
    source_files,
)
from slotmoe.offload.model_source import small_parts
from slotmoe.offload.plan.precision import precision_of
from slotmoe.quant.codecs.codec import TILE, Codec, ExpertCodecs
from slotmoe.quant.codecs.encode import Hessian, NotFiniteError
from slotmoe.quant.export import writer
from slotmoe.quant.export.layout import COPIED, EXPERTS, FORMAT_VERSION, MANIFEST
from slotmoe.quant.export.manifest import MAX_COPIED_BYTES, refuse_unlisted
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.writer import ExportFile, damaged_files, write_json
from slotmoe.system import cores

Key = TypeVar("Key")
_CHUNK = 8 << 20  # weights quantized at once


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
) -> Json:
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
    folder = output_dir.beside(destination, "partial")
    progress, checking, notify = informs(progress), informs(checking), informs(notify)
    with open_checkpoint(source, keep_mtp) as checkpoint, output_dir.locked(folder, wait_for_lock):
        if wait_for_lock and (manifest := output_dir.finished_manifest(destination)) is not None:
            return manifest
        mode, codecs = precision_of(checkpoint.config, resident), codecs or codecs_for(checkpoint)
        existing = None if overwrite else export_of(checkpoint, mode, codecs, destination)
        if existing is None:
            output_dir.check_destination(destination, overwrite)
            small_parts(checkpoint, source)
        else:
            output_dir.check_ours(folder)
        workers = workers or min(os.cpu_count() or 1, 8)
        job = _Job(checkpoint, folder, mode, codecs, calibration, workers, progress, notify, shards)
        with output_dir.full_disk_explained(folder):
            if existing is not None:
                return job.repair(destination, existing, checking)
            # A run that was killed before the last rename has left a whole export.
            manifest = export_of(checkpoint, mode, codecs, folder)
            if manifest is not None and manifest["source"].get("stamps") != job.stamps():
                manifest = None
            if manifest is None or damaged_files(folder, manifest, checking):
                job.load_state(overwrite)
                manifest = job.run()
            wanted = {folder / name for name in (MANIFEST, *manifest["files"])}
            for path in list(folder.rglob("*")):  # the state, and what kills left half-written
                if path.is_file() and path not in wanted:
                    system.patiently(path.unlink, True)
            for changed in (folder / EXPERTS, folder):
                writer.sync_folder(changed)
            with Export.open(folder) as export:  # before it replaces anything
                small_parts(export, folder)
            output_dir.publish(folder, destination)
        return manifest


@dataclass
class _Job:
    """One quantization: what to write, what is there already, and the workers."""

    checkpoint: Checkpoint
    partial: Path
    mode: str
    codecs: ExpertCodecs
    calibration: InitVar[Windows | None]
    workers: int
    progress: Progress
    notify: Notify
    shards: Shards | None

    def __post_init__(self, calibration: Windows | None) -> None:
        dtypes = {name: info.dtype for name, info in self.checkpoint.infos.items()}
        self._contents = Contents(self.checkpoint.config, self.mode, self.codecs, dtypes)
        kinds = ((name, tensor.kind) for name, tensor in self._contents.tensors.items())
        self._coded = {name: kind for name, kind in kinds if isinstance(kind, Codec)}
        learned = {name: codec for name, codec in self._coded.items() if codec.learned}
        self._learned = {*learned}
        self._levels = {codec.name: 1 << codec.bits for codec in learned.values()}  # numbers of
        self._fitted = {name for name, codec in self._coded.items() if codec.fitted}
        self._text: Windows | None = None
        if calibration is not None and self._fitted:
            self._text = chosen(calibration, self.checkpoint.config.vocab_size)
        elif calibration is not None:
            self.notify("no codes here have fitted scales, so the calibration text changes nothing")
        self.where = self.checkpoint.folder if self.shards is None else self.shards.snapshot.repo
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._done, self._total = 0, 0
        self._state = Resumption({})
        self._coder = Coder(self.checkpoint, self._state.levels)
        # By file of the export, also source tensors that are still to be written, those that are
        # though not yet durable, and the manifest's entry in the end.
        self._open_files: dict[str, ExportFile] = {}
        self._left: dict[str, set[str]] = {}
        self._fresh: dict[str, dict[str, Written]] = {}
        self._entries: Json = {}

    def stamps(self) -> dict[str, str]:
        """What tells without reading whether a weight file is the same, by file."""
        stamps = self.checkpoint.stamps()
        return stamps if self.shards is None else self.shards.stamps(stamps)

    def compare(self, destination: Path, source: Json, reading: Progress) -> None:
        """Say whether an export that notes ``source`` is of these weights, which are read if need
        be.  Raises ``ExportError`` if it is of others."""
        was, now, what = source.get("stamps", {}), self.stamps(), "is this export already"
        if was != now and self.shards is None and "weights" in source:
            was, now = source["weights"], self.checkpoint.weights(reading)
        elif was != now and (self.shards is None or "commit" not in source):
            was, what = now, "nothing there tells whether it is of these weights or of others of"
            what += " the same shapes; pass --overwrite to make it anew"
        output_dir.refuse_others(self.where, destination, was, now)
        self.notify(f"{destination}: {what}")

    def run(self) -> Json:
        """Write every missing file, then the manifest; returns it."""
        files = self.write([*self._contents.files, *COPIED])
        state = self._state
        sums = {name: state.written[name][1] for name in self._contents.tensors}
        made: Json = {"report": quantization_report(self._contents, sums)}
        if self._text is not None:
            made["calibration"] = fingerprint(self._text)
            made["calibration_threads"] = state.threads
        output_dir.refuse_others(self.where, self.partial, state.stamps, self.stamps())
        weights = weights_read(state.written[name][2] for name in self._contents.tensors)
        source = state.identity["source"] | {"stamps": state.stamps, "weights": weights}
        if self.shards is not None:
            source["commit"] = self.shards.snapshot.commit
        manifest = self._contents.manifest(source, files, state.levels, made=made)
        write_json(self.partial / MANIFEST, manifest)
        return manifest

    def repair(self, destination: Path, manifest: Json, checking: Progress) -> Json:
        """Make the damaged files of an export again as they were, and replace each by a rename;
        returns the manifest.  Raises ``ExportError`` as ``compare`` does, and if a text is
        missing."""
        refuse_unlisted(destination, manifest)
        self.compare(destination, manifest["source"], checking)
        damaged = damaged_files(destination, manifest, checking)
        quantization = manifest["quantization"]
        for name, item in quantization["codecs"].items():
            if name in self._levels:
                self._state.levels[name] = item["levels"]
        self._state.threads = quantization.get("calibration_threads", 0)
        wanted = quantization.get("calibration")
        is_other_text = self._text is not None and wanted != fingerprint(self._text)
        if wanted is None:
            self._text = None
        elif any(name not in COPIED for name in damaged) and wanted != fingerprint(self._text):
            problem = f"{min(damaged)} is damaged, and was coded with a calibration text"
            advice = "pass the same --calibrate files (to an older slotmoe, if that made it), or"
            advice += " --overwrite"
            raise ExportError(f"{destination}: {problem}; {advice}")
        for name, problem in damaged.items():
            if (destination / name).is_dir():
                advice = "move it away, so that the file can be made"
                raise ExportError(f"{destination / name}: is a folder; {advice}")
            self.notify(f"{destination / name} {problem}; it is made again")
        if damaged:
            self.load_state(overwrite=False)
            replace_files(destination, manifest, self.partial, self.write([*damaged]))
        else:
            self.notify(f"{destination}: every checksum is right")
            if is_other_text:
                advice = "pass --overwrite to make it with this one"
                self.notify(f"{destination}: was not coded with this calibration text; {advice}")
        system.patiently(shutil.rmtree, self.partial)
        return manifest

    def load_state(self, overwrite: bool) -> None:
        """Continue a killed run; what else is there is removed with ``overwrite``, or refused."""
        name, files = self.checkpoint.name, source_files(self.checkpoint)
        self._state.identity = {
            "format_version": FORMAT_VERSION,
            "resident": self.mode,
            "experts": self.codecs.names(),
            "mtp": self.checkpoint.config.mtp,
            "text": fingerprint(self._text),
            "source": {"name": name, "files": files},
        }
        self._state.stamps = self.stamps()
        state, ours = Resumption.read(self.partial), self._state
        if state is not None and not overwrite:
            if state.identity != ours.identity:
                problem = "was begun from another source or with other options"
                advice = "pass --overwrite to start anew, or remove it"
                raise ExportError(f"{self.partial}: {problem}; {advice}")
            output_dir.refuse_others(self.where, self.partial, state.stamps, ours.stamps)
        is_other = state is None or state.identity != ours.identity or state.stamps != ours.stamps
        if state is None or is_other or ours.threads not in (0, state.threads):
            output_dir.empty(self.partial)
            return
        state.identity, state.levels = ours.identity, ours.levels or state.levels
        good = {name: len(it) for name, it in state.levels.items() if it == sorted(set(it))}
        if good != self._levels:  # what was coded with them is not known either
            written = {name: it for name, it in state.written.items() if name not in self._learned}
            state.levels, state.written = {}, written
        self._state, self._coder.levels = state, state.levels

    def write(self, names: list[str]) -> Json:
        """Write the files ``names`` unless they are finished; returns their manifest entries."""
        infos, tensors = self.checkpoint.infos, self._contents.tensors
        by_file = _grouped(tensors, lambda name: tensors[name].file)
        made_of = {name: by_file[name] for name in names if name not in COPIED}
        self._fresh = {file: {} for file in made_of}
        self._done, self._total = 0, sum(infos[n].nbytes for file in made_of for n in made_of[file])
        self._left = {file: self._resume(file, made_of[file]) for file in made_of}
        missing = [file for file in made_of if file not in self._entries]
        todo = [name for file in missing for name in made_of[file] if name in self._left[file]]
        calibration = self._calibration(todo)
        portions = self._portions(todo, calibration)
        paths = filter(Path.is_file, map(self.partial.joinpath, missing))
        taken = sum(map(system.bytes_on_disk, paths))
        needed = max(sum(map(self._contents.nbytes, missing)) - taken, 0) + (16 << 20)
        if self.shards is not None:
            free = shutil.disk_usage(self.partial).free
            needed += self.shards.announce(portions, needed, free)
        check_space(self.partial, needed)
        self._advance(self._total - sum(infos[name].nbytes for name in todo) - self._done)
        with ExitStack() as closing_files:
            for file in missing:
                opened = closing(self._opened(file, made_of[file]))
                self._open_files[file] = closing_files.enter_context(opened)
            ready: Iterable[Portion] = portions
            if self.shards is not None:
                arriving = self.shards.held(self.checkpoint, portions)
                ready = closing_files.enter_context(closing(arriving))
            if calibration is not None:
                self._total += calibration.nbytes
                self.notify(calibration.announcement())
            # A text's products have other bits by another number of threads.
            self._state.threads = self._state.threads or cores()
            closing_files.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._state.threads)
            for portion in ready:
                self._coder.hessians = portion.prepare()
                if portion.names:
                    self._write_tensors(portion.names)
                    for name, export_file in self._open_files.items():  # unfinished ones
                        export_file.sync()
                        self._state.written |= self._fresh[name]
                    self._state.save(self.partial)
            if calibration is not None:
                for sentence in calibration.remarks(self._coder.uncalibrated):
                    self.notify(sentence)
        found = {name: self.checkpoint.small_file(name, MAX_COPIED_BYTES) for name in COPIED}
        small = {name: data for name, data in found.items() if name in names and data is not None}
        return {file: self._entries[file] for file in made_of} | write_files(small, self.partial)

    def _opened(self, file: str, names: Iterable[str]) -> ExportFile:
        """``file``, which holds what is written of its tensors ``names``."""
        tensors, written = self._contents.tensors, self._state.written
        known = dict[str, str]()
        for name in written.keys() & {*names}:
            known |= zip(tensors[name].parts, written[name][0], strict=False)
        return ExportFile(self.partial / file, self._contents.parts(file), known)

    def _resume(self, file: str, names: list[str]) -> set[str]:
        """The tensors of ``file`` that are still to be written: the state may be wrong about others
        by now.  A whole file gets its entry."""
        contents, written, before = self._contents, self._state.written, self._done
        noted, wrong = written.keys() & {*names}, {*contents.parts(file)}
        size = sum(self.checkpoint.infos[name].nbytes for name in noted)

        def advance(position: int) -> None:
            self._advance(before + size * position // contents.nbytes(file) - self._done)

        if noted and (self.partial / file).is_file():
            with closing(self._opened(file, names)) as opened:
                entry, different = opened.check(contents.record_bytes(file), advance)
            wrong = {*different}
            if not wrong:
                self._entries[file] = entry
        for name in noted:
            if not wrong.isdisjoint(contents.tensors[name].parts):
                del written[name]
        return {*names} - written.keys()

    def _calibration(self, names: list[str]) -> Calibration | None:
        """The text's way through the layers that have tensors among ``names``."""
        if self._text is None:
            return None
        layers = {text_layer(name, self.checkpoint.config) for name in names}
        wanted = [layer for layer in layers if layer is not None]
        noting = self.partial, self._state, self._advance
        return Calibration(self.checkpoint, self._text, self._fitted, wanted, *noting)

    def _portions(self, names: list[str], calibration: Calibration | None) -> list[Portion]:
        """The work on the tensors ``names``: at once, or by weight files where these come one after
        the other, or layer by layer with a text; before it levels, unless they are known."""
        config, files_of = self.checkpoint.config, self.checkpoint.files_of
        if calibration is not None:
            by_layer = _grouped(names, lambda name: text_layer(name, config))
            read = _grouped(self.checkpoint.infos, lambda name: text_layer(name, config))
            portions = [Portion(files_of(calibration.begins_with), [], calibration.begin)]
            for layer in calibration.remaining:
                prepare = partial(calibration.layer, layer)
                files = files_of(read.get(layer, ()))
                portions.append(Portion(files, by_layer.get(layer, []), prepare))
            rest = by_layer.get(None, [])
            portions.append(Portion(files_of(rest), rest))
        elif self.shards is not None:
            by_files = _grouped(names, lambda name: tuple(sorted(files_of([name]))))
            portions = [Portion({*files}, by_files[files]) for files in sorted(by_files)]
        else:
            portions = [Portion(set(), names)]
        learned = self._learned & {*names}
        if learned and not self._state.levels:
            samples = level_samples(self.checkpoint, self._coded)
            first = next(at for at, it in enumerate(portions) if not learned.isdisjoint(it.names))
            files = files_of(name for names in samples.values() for name in names)
            portions.insert(first, Portion(files, [], partial(self._learn_levels, samples)))
        return portions

    def _learn_levels(self, samples: Mapping[Codec, Sequence[str]]) -> Mapping[str, Hessian]:
        self._state.levels |= learn_levels(self.checkpoint, samples)
        self._state.save(self.partial)
        return {}

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
        sums, seen = [0.0, 0.0, 0.0, 0.0], Seen()
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            try:
                outputs, squares = self._coder.code(name, start, stop, tensor.kind, seen)
            except NotFiniteError:
                problem = f"{name} holds NaN, infinite or larger than fp16 weights"
                source = checkpoint.folder / info.file
                raise CheckpointError(f"{source}: {problem}; the file is damaged") from None
            for part, output in zip(tensor.parts, outputs, strict=True):
                export_file.write(part, output)
            sums = [a + b for a, b in zip(sums, squares, strict=True)]
            self._advance((stop - start) * info.row_bytes)
        checksums = [export_file.checksums[part] for part in tensor.parts]
        with self._lock:
            self._fresh[file][name] = checksums, sums, seen.sums()
            self._left[file].remove(name)
            if self._left[file]:
                return
        # It is complete.
        entry = self._open_files.pop(file).finish(self._contents.record_bytes(file))
        with self._lock:
            self._entries[file] = entry
            self._state.written |= self._fresh[file]
            self._state.save(self.partial)

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._done += count
            done = self._done
        self.progress(done, self._total)


def _grouped(names: Iterable[str], key: Callable[[str], Key]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups
