"""An export that is there already: whether it is one of this source, and how it is repaired."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME, MAX_INDEX_BYTES
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.quant.export.layout import COPIED, MANIFEST, is_predictor
from slotmoe.quant.export.validate import manifest_checksum, read_manifest
from slotmoe.quant.export.writer import sync_folder, write_json


def export_of(checkpoint: Checkpoint, mode: str, codecs: ExpertCodecs, folder: Path) -> Json | None:
    """The manifest of ``folder`` if it is an export of ``checkpoint`` and its layers in this
    precision."""
    if folder.is_symlink():
        return None
    try:
        manifest = read_manifest(folder)
    except ExportError:
        return None
    source = manifest.get("source")
    same = isinstance(source, dict) and source.get("files") == source_files(checkpoint)
    quantization = manifest["quantization"]
    same = same and quantization["resident"] == mode
    same = same and ("mtp_layer" in manifest["experts"]) == checkpoint.config.mtp
    return manifest if same and quantization["experts"] == codecs.names() else None


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


def repair(
    destination: Path,
    manifest: Json,
    damaged: dict[str, str],
    partial: Path,
    rebuild: Callable[[list[str]], Json],
    notify: Callable[[str], None],
) -> Json:
    """Make the ``damaged`` files (name -> problem) again, each replaced by one rename; returns the
    manifest.  ``rebuild`` writes files into ``partial`` and returns their manifest entries."""
    for name, problem in damaged.items():
        if (destination / name).is_dir():
            advice = "move it away, so that the file can be made"
            raise ExportError(f"{destination / name}: is a folder; {advice}")
        remedy = "removed, calibrate again" if is_predictor(name) else "it is made again"
        notify(f"{destination / name} {problem}; {remedy}")
    if not damaged:
        notify(f"{destination}: is this export already, and every checksum is right")
    predictors = {name for name in damaged if is_predictor(name)}
    names = [name for name in damaged if name not in predictors]
    entries = rebuild(names) if names else {}
    for name, entry in entries.items():
        if entry != manifest["files"][name]:
            problem = "this slotmoe makes other bytes of the source"
            advice = "pass --overwrite to replace the export"
            raise ExportError(f"{destination / name}: {problem}; {advice}")
    for name in entries:
        (destination / name).parent.mkdir(exist_ok=True)
        os.rename(partial / name, destination / name)
        sync_folder((destination / name).parent)
    if predictors:
        files = manifest["files"]
        manifest["files"] = {name: files[name] for name in files if name not in predictors}
        manifest["checksum"] = manifest_checksum(manifest)
        write_json(destination / MANIFEST, manifest)
        for name in predictors:
            (destination / name).unlink(missing_ok=True)
    shutil.rmtree(partial)
    return manifest
