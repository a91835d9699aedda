"""Weight files that are not all in the checkpoint's folder, but come one after the other: each is
held from the first step of the work that reads it to the last."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.quant.codecs.encode import Hessian


class Step(NamedTuple):
    """A part of the work: the weight ``files`` that it reads, the tensors that it writes, and what
    comes before them, which gives these tensors' Hessians."""

    files: set[str]
    names: list[str]
    prepare: Callable[[], Mapping[str, Hessian]] = dict


class Shards(Protocol):
    """Where the files come from."""

    def announce(self, together: Sequence[list[str]], export_bytes: int, free_bytes: int) -> int:
        """Say which files will come, some at a time ``together`` on the disk; returns the bytes
        that they take there at their peak beyond what is taken already."""

    def arrivals(self, files: list[str]) -> Generator[tuple[str, Path], None, None]:
        """Each file and its path."""

    def release(self, file: str, path: Path) -> None:
        """The file is not needed any more."""


def order(steps: Sequence[Step]) -> list[str]:
    return list(dict.fromkeys(file for step in steps for file in sorted(step.files)))


def together(steps: Sequence[Step]) -> list[list[str]]:
    """Which files are on the disk at once: what is held and the next, as each one comes."""
    files, uses = order(steps), _uses(steps)
    return [
        [held for held in files[:at] if uses[held][-1] >= uses[file][0]] + files[at : at + 2]
        for at, file in enumerate(files)
    ]


def held(
    checkpoint: Checkpoint, shards: Shards, steps: Sequence[Step], arrived: Callable[[str], None]
) -> Generator[Step, None, None]:
    """Each step while ``checkpoint`` can read its files, ``arrived`` told of each."""
    uses, coming = _uses(steps), shards.arrivals(order(steps))
    there: dict[str, tuple[Path, ExitStack]] = {}
    with ExitStack() as closing:
        for index in range(len(steps) + 1):
            for file in [file for file in there if uses[file][-1] < index]:
                path, reading = there.pop(file)
                reading.close()
                shards.release(file, path)
            if index == len(steps):
                return
            while not there.keys() >= steps[index].files:
                file, path = next(coming)
                reading = closing.enter_context(ExitStack())
                reading.enter_context(checkpoint.read_from(file, path))
                there[file] = path, reading
                arrived(file)
            yield steps[index]


def _uses(steps: Sequence[Step]) -> dict[str, list[int]]:
    """Numbers of the steps that read a file."""
    files = order(steps)
    return {file: [i for i, step in enumerate(steps) if file in step.files] for file in files}
