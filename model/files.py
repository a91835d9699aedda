"""A model's small files: config, tokenizer, chat template, wherever they come from.

A checkpoint has them in its folder, an export has their checksums too, and those of a GGUF file
are made of its metadata.  Whoever uses them gets a ``ReadFile`` and never a path, so that what a
stranger puts beside an export is not read.
"""

import os
from collections.abc import Callable
from pathlib import Path

from slotmoe.errors import CheckpointError
from slotmoe.jsonfile import read_file

ReadFile = Callable[[str, int], bytes | None]
"""``read(name, limit)``: the content of the file ``name``, None if the model has none.  Raises what
its source raises for a bad file, also for more than ``limit`` bytes."""


def files_in(folder: Path) -> ReadFile:
    """The files of a plain folder, as they are.  Raises ``ConfigError``."""

    def read(name: str, limit: int) -> bytes | None:
        path = folder / name
        return read_file(path, limit) if path.exists() else None

    return read


def inside(folder: Path, name: str) -> Path:
    """Path of a regular file in ``folder``; links may lead only to the hub cache's own blobs."""
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent not in (home, blobs):
        problem = "is a link that leads out of the folder; copy the file itself here"
    elif not path.is_file():
        problem = "is missing or not a regular file; download the checkpoint again"
    else:
        return path
    raise CheckpointError(f"{path}: {problem}")
