"""Damage to an export and to sessions that no reader may miss.  ``python -m tests.faults.flips``.

A case is one flipped bit, a cut, or two exchanged stretches of one file; then that part is read.
What comes must be an error that names the file, for a session nothing, or the very bytes that were
there: white space of the manifest, for example.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tests.faults.kills import memory

KINDS = ("flip", "flip", "flip", "cut", "swap")


def damage(
    good: bytes, kind: str, span: tuple[int, int], generator: random.Random
) -> dict[int, bytes]:
    """What stands where instead, or for a cut nothing from there on; the same as before in rare
    cases of a swap."""
    start, end = span
    first, second = sorted(generator.randrange(start, end) for _ in "ab")
    if kind == "cut":
        return {first: b""}
    if kind == "flip":
        return {first: bytes([good[first] ^ 1 << generator.randrange(8)])}
    size = min(generator.choice((1, 64, 4096)), second - first, end - second)
    return {first: good[second : second + size], second: good[first : first + size]}


class Target:
    """A file, which ``good`` bytes it has, where in it damage is done, and ``read``, which gives
    all that stands there or raises; ``weight`` says how often it is damaged beside others."""

    def __init__(self, path: Path, read: Callable[[], Any], weight: int, span: Any, good: bytes):
        self.path, self.read, self.weight, self.good = path, read, weight, good
        self.wanted, self.span = read(), span or (0, len(good))
        assert self.wanted is not None

    def attack(self, generator: random.Random) -> str:
        """One case: ``refused``, ``same`` or what was ``missed``."""
        from slotmoe.errors import SlotmoeError

        kind = generator.choice(KINDS)
        edits = damage(self.good, kind, self.span, generator)
        handle = os.open(self.path, os.O_WRONLY)
        try:
            for at, data in edits.items():
                os.pwrite(handle, data, at) if data else os.ftruncate(handle, at)
            found = self.read()
        except SlotmoeError as problem:
            named = self.path.name in str(problem) or "slotmoe.json" in str(problem)
            return "refused" if named else f"missed: {problem} does not name {self.path.name}"
        finally:
            if os.fstat(handle).st_nlink == 0:  # a block that was dropped
                os.close(handle)
                edits, handle = {0: b""}, os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            for at, data in edits.items():
                os.pwrite(handle, self.good[at : at + len(data)] if data else self.good[at:], at)
            os.close(handle)
        if found is None:
            return "refused"
        return "same" if found == self.wanted else f"missed: {kind} of {self.path.name}"


class Targets(list[Target]):
    """Of a tiny export, while it is opened and while it is open; of sessions."""

    def __init__(self, folder: Path):
        from slotmoe.quant.export.reader import Export
        from tests.faults.parsers import make_export

        self._place, self._good = make_export(folder), dict[Path, bytes]()
        self._opened = Export.open(self._place)  # for as long as this process lasts
        self._export()
        self._records()
        self._tensors()
        self._named(folder / "sessions")
        self._blocks(folder / "blocks")

    def _add(self, path: Path, read: Callable[[], Any], weight: int, span: Any = None) -> None:
        good = self._good.setdefault(path, path.read_bytes())
        self.append(Target(path, read, weight, span, good))

    def _export(self) -> None:
        """What is checked when an export is opened, and the small files."""
        from slotmoe.quant.export.reader import Export

        def open_again(beside: Path | None = None, size: int = 0) -> tuple[str, bytes]:
            with Export.open(self._place) as export:
                manifest = json.dumps(export.manifest, sort_keys=True)
            return manifest, beside.read_bytes()[:size] if beside else b""

        def small_file(name: str) -> bytes | None:
            return self._opened.small_file(name, 1 << 24)

        self._add(self._place / "slotmoe.json", open_again, 3)
        for name, entry in self._opened.manifest["files"].items():
            path, size = self._place / name, entry.get("header_bytes", entry["bytes"])
            self._add(path, partial(open_again, path, size), 3, (0, size))
            if "header_bytes" not in entry:
                self._add(path, partial(small_file, name), 5)

    def _records(self) -> None:
        from slotmoe.quant.export.layout import layer_file

        export, size = self._opened, self._opened.layout.record_bytes

        def read(layer: int, expert: int) -> bytes:
            record = bytearray(size)
            export.read_range(layer, expert, 0, memoryview(record))
            export.verify_record(layer, expert, memoryview(record))
            return bytes(record)

        for layer, expert in product(export.layers, range(export.experts)):
            start = export.manifest["files"][layer_file(layer)]["header_bytes"] + expert * size
            path = self._place / layer_file(layer)
            self._add(path, partial(read, layer, expert), 20, (start, start + size))

    def _tensors(self) -> None:
        """Of the resident weights and of the predictor."""
        from slotmoe.model.config import read_config
        from slotmoe.model.names import resident_shapes
        from slotmoe.quant.export.layout import RESIDENT, is_predictor, tensor_parts
        from tests.support.exported import weight_bytes

        def predictor() -> dict[str, bytes]:
            tensors = self._opened.predictor() or {}
            return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

        weights = resident_shapes(read_config(self._place / "config.json"))
        for name, entry in self._opened.manifest["files"].items():
            if name != RESIDENT and not is_predictor(name):
                continue
            for tensor, part in tensor_parts(entry).items():
                read: Callable[[], Any] = predictor
                if name == RESIDENT:
                    of = next(of for of in weights if f"{tensor}.".startswith(f"{of}."))
                    read = partial(weight_bytes, self._opened, of)
                self._add(self._place / name, read, 5, part.span(entry["header_bytes"]))

    def _named(self, folder: Path) -> None:
        from slotmoe.offload.sessions.names import NamedSession, Saved

        def saved() -> Any:
            with NamedSession(folder, "plans") as session:
                return session.saved

        with NamedSession(folder, "plans") as session:
            text = [{"role": "text", "content": "Hello"}]
            session.save(Saved(bytes(16), [1, 2], "text", text))
        self._add(session.path, saved, 20)

    def _blocks(self, folder: Path) -> None:
        from slotmoe.offload.sessions.blocks import Block, BlockFolder, chain

        store, blocks = BlockFolder(folder, 1 << 20, _ignore), chain(bytes(16), [*range(99)])

        def latents(block: Block) -> Any:
            found = store.read(block.parent, block.start, block.tokens, 24)
            return found and (found[0], bytes(found[1]))

        for block in (kept := list(blocks)):
            store.add(kept, 24, lambda block: memoryview(bytes(range(24)) * len(block.tokens)))
            (path,) = folder.rglob(f"*-{block.address.hex()}")
            self._add(path, partial(latents, block), 100)


def _ignore(remark: str) -> None:
    pass


def attacked(every: list[Target], cases: int, seconds: float, seed: int) -> dict[str, Any]:
    """How many cases came out how, and what was missed."""
    generator = random.Random(seed)
    weights = [target.weight for target in every]
    came, missed, end = Counter[str](), list[str](), time.monotonic() + seconds
    while sum(came.values()) < cases and time.monotonic() < end:
        for target in generator.choices(every, weights, k=min(cases, 1000)):
            outcome = target.attack(generator)
            came[outcome.partition(":")[0]] += 1
            missed += [outcome] * outcome.startswith("missed")
    return {"cases": sum(came.values()), **came, "problems": missed[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        found = attacked(Targets(Path(folder)), given.cases, given.seconds, given.seed)
        print(json.dumps(found), flush=True)
    raise SystemExit(bool(found["problems"]))


if __name__ == "__main__":
    main()
