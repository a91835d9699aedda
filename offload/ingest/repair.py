"""An export that is there already: whether it is one of this source, and how it is repaired."""

import hashlib
from pathlib import Path

from slotmoe import system
from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME, MAX_INDEX_BYTES
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.quant.export.layout import COPIED
from slotmoe.quant.export.manifest import read_manifest
from slotmoe.quant.export.writer import sync_folder


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
            raise ExportError(f"{destination / name}: {problem}; {advice}")
    for name in entries:
        (destination / name).parent.mkdir(exist_ok=True)
        system.move(partial / name, destination / name)
        sync_folder((destination / name).parent)
