"""Weight files that are not all in the checkpoint's folder, but come one after the other: each is
held from the first step of the work that reads it to the last."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from slotmoe.model.checkpoint.reader import Checkpoint


class Shards(Protocol):
    """Where the files come from."""

    def announce(
        self, together: Sequence[Collection[str]], export_bytes: int, free_bytes: int
    ) -> int:
        """Say which files will come, some at a time ``together`` on the disk; returns the bytes
        that they take there at their peak beyond what is taken already."""

    def arrivals(self, files: list[str]) -> Generator[tuple[str, Path], None, None]:
        """Each file and its path."""

    def release(self, file: str, path: Path) -> None:
        """The file is not needed any more."""


class Arriving:
    """The files that the steps of some work read, ``needed`` by step, so that ``checkpoint`` reads
    them.  ``arrived`` is called with each when it can be read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: Shards,
        needed: Sequence[Collection[str]],
        arrived: Callable[[str], None],
    ):
        self._checkpoint, self._shards, self._needed = checkpoint, shards, needed
        self._arrived = arrived
        self._first: dict[str, int] = {}  # step by file, in the order in which they come
        self._last: dict[str, int] = {}
        for step, files in enumerate(needed):
            for file in sorted(files):
                self._first.setdefault(file, step)
                self._last[file] = step
        self._coming = shards.arrivals(list(self._first))
        self._held: dict[str, tuple[Path, ExitStack]] = {}

    def together(self) -> list[list[str]]:
        """Which files are on the disk at once: what is held and the next, as each one comes."""
        files = list(self._first)
        return [
            [held for held in files[:at] if self._last[held] >= self._first[file]]
            + files[at : at + 2]
            for at, file in enumerate(files)
        ]

    def reach(self, step: int) -> None:
        """Hold what a step reads, and nothing that only steps before it read."""
        for file in [file for file in self._held if self._last[file] < step]:
            path, reading = self._held.pop(file)
            reading.close()
            self._shards.release(file, path)
        while step < len(self._needed) and not self._held.keys() >= set(self._needed[step]):
            file, path = next(self._coming)
            reading = ExitStack()
            reading.enter_context(self._checkpoint.read_from(file, path))
            self._held[file] = path, reading
            self._arrived(file)

    def __enter__(self) -> "Arriving":
        return self

    def __exit__(self, problem: type[BaseException] | None, *_: object) -> None:
        if problem is None:
            self.reach(len(self._needed))
        for _path, reading in self._held.values():
            reading.close()
