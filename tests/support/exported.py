"""What readers get of an export, and manifests that are signed anew."""

import json

import torch

from slotmoe.model.config import read_config
from slotmoe.model.names import resident_shapes
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.manifest import manifest_checksum
from slotmoe.quant.export.reader import Export
from tests.support.tiny import REMOVE


def weight_bytes(export, name):
    """Shapes and bytes of a resident weight's tensors."""
    weight = export.resident(name)
    kinds = {Int8Weight: ("q", "scale"), CodedWeight: ("codes", "scales")}
    parts = [getattr(weight, part) for part in kinds.get(type(weight), ())] or [weight]
    return b"".join(
        str(part.shape).encode() + part.contiguous().view(torch.uint8).numpy().tobytes()
        for part in parts
    )


def read_everything(folder):
    """Every value that a reader can get: bytes by name."""
    with Export.open(folder) as export:
        found = {"levels": export.layout.levels().numpy().tobytes()}
        record = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        for layer in export.layers:
            for expert in range(export.experts):
                export.read_range(layer, expert, 0, record.numpy().data)
                export.verify_record(layer, expert, record.numpy().data)
                found[f"{layer}.{expert}"] = record.numpy().tobytes()
        for name in resident_shapes(read_config(folder / "config.json")):
            found[name] = weight_bytes(export, name)
        return found


def resign(folder, change):
    """Change the manifest and give it a fresh checksum, as someone with bad intentions would."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    path.unlink()  # ext4 writes a file that was cut to nothing to the disk when it is closed
    path.write_text(json.dumps(manifest))


def signed(*path, value):
    """A function that gives a folder a manifest, signed anew, whose entry at ``path`` is
    ``value``."""

    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        if value is REMOVE:
            del manifest[path[-1]]
        else:
            manifest[path[-1]] = value

    return lambda folder: resign(folder, change)
