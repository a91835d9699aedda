"""Ways to break the files of a checkpoint or an export, and how each has to be refused: in one line
that names the culprit."""

import json
import os
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from slotmoe.errors import SlotmoeError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
EXPERT, NORM = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"


def refused(action, *wanted, kind=SlotmoeError):
    """``action()`` must end in a one-line error of ours that holds every string of ``wanted``."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or control characters"
    assert len(message) < 1000
    for part in wanted:
        assert part in message


def flip(path, place, bit=1):
    """``place`` is from the end where it is negative."""
    with open(path, "r+b") as file:
        start = file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ bit]))


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensor(folder, name, change):
    """Replace one tensor of the shard that holds it by ``change(tensor)``; None drops it."""
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name])
    kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
    save_file(kept, folder / file)


# Each of these makes a function that breaks the checkpoint or the export in a folder.


def edited(file, change):
    return lambda folder: edit_json(folder / file, change)


def changed(name, change):
    """Of a tensor, as ``edit_tensor`` does it."""
    return lambda folder: edit_tensor(folder, name, change)


def entry(name, **values):
    """Other values in a tensor's entry of the header; its data stays."""

    def apply(folder):
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header[name] |= values
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return apply


def remap(name, file):
    return edited(INDEX, lambda index: index["weight_map"].update({name: file}))


def linked(name):
    """The file or folder lies elsewhere, and a link leads there."""

    def apply(folder):
        outside = folder.parent / f"outside-{folder.name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return apply


def single(header, data=b""):
    """Replace the weights by one file with this header (object or bytes)."""

    def apply(folder):
        without(INDEX, FIRST, SECOND)(folder)
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return apply


def many(count):
    """A header of so many tensors that have no element."""
    entry = b'"t%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return lambda folder: single(b"{" + b",".join(entry % i for i in range(count)) + b"}")(folder)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, data):
    def apply(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return apply


def fifo(name):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def truncate(name, size):
    """Cut or lengthen to ``size`` bytes, or by -``size`` from the end."""
    return lambda folder: os.truncate(
        folder / name, size if size >= 0 else (folder / name).stat().st_size + size
    )


def f32(start, stop):
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]}
