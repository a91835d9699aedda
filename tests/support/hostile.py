"""Ways to break the files of a checkpoint or an export, and how each has to be refused: in one line
that names the culprit, fast and lean."""

import json
import os
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from slotmoe.errors import SlotmoeError

INDEX, FIRST, SECOND = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
EXPERT, NORM = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"


def refused(action, *wanted, kind=SlotmoeError):
    """``action()`` must end in a one-line error of ours that holds every string of ``wanted``,
    within a second of CPU."""
    start = sum(os.times()[:4])
    with pytest.raises(kind) as caught:
        action()
    seconds = sum(os.times()[:4]) - start
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or control characters"
    assert len(message) < 1000
    for part in wanted:
        assert part in message
    assert seconds < 1, f"took {seconds:.1f} s of CPU"


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensor(folder, name, change):
    """Replace one tensor of the shard that holds it by ``change(tensor)``; None drops it."""
    for file in (FIRST, SECOND):
        tensors = load_file(folder / file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(
                {key: value.contiguous() for key, value in tensors.items() if value is not None},
                folder / file,
            )
            return
    raise AssertionError(name)


def edit_header(path, change):
    """Rewrite a safetensors file's header by ``change(text) -> text``, keeping its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_entry(name, change):
    """A header edit of one tensor's entry."""

    def apply(folder):
        def edit(text):
            header = json.loads(text)
            change(header[name])
            return json.dumps(header)

        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        edit_header(folder / file, edit)

    return apply


def remap(name, file):
    return lambda folder: edit_json(
        folder / INDEX, lambda index: index["weight_map"].__setitem__(name, file)
    )


def linked_out(folder):
    shutil.move(folder / FIRST, folder.parent / FIRST)
    (folder / FIRST).symlink_to(folder.parent / FIRST)


def single(header, data=b""):
    """Replace the weights by one file with this header (object or bytes)."""

    def apply(folder):
        for name in (INDEX, FIRST, SECOND):
            (folder / name).unlink()
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return apply


def write(name, data):
    def apply(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return apply


def fifo(name):
    def apply(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def append(name):
    def apply(folder):
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return apply


def truncate(name, keep):
    return lambda folder: os.truncate(
        folder / name, keep if keep >= 0 else (folder / name).stat().st_size + keep
    )


def f32(start, stop, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


# name -> how it is broken, and what the message must hold
