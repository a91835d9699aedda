"""SIGKILL while ``quantize`` or a session's save is under way.  ``python -m tests.faults.kills``.

The work is done by a child of a process that has imported everything.  It dies at each of its
changes of the disk in turn, then at random moments, sometimes three times before it may end.
Whatever is left has to be right, and the same work has to make the same bytes of it.  Then the
machine loses its power at each change, and files lose all that was not made durable.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.disk import die_at_change, digests, forked, memory


@dataclass
class Work:
    """What is killed: how its folder is prepared, what is done, and ``check``, which raises where
    anything that is there is wrong, whenever that is, and gives its bytes."""

    prepare: Callable[[], object]
    do: Callable[[], object]
    check: Callable[[], dict[str, str]]


def quantizing(source: Path, folder: Path) -> Work:
    import torch  # noqa: F401, once and not in every child

    from slotmoe.offload.ingest.quantize import quantize

    destination = folder / "export"

    def check() -> dict[str, str]:
        return digests(destination) if destination.exists() else {}

    return Work(lambda: None, lambda: quantize(source, destination, workers=2), check)


def saving(source: Path, folder: Path) -> Work:
    """A text that has grown, by tokens and by name; ``source`` is not used."""
    from slotmoe.offload.sessions.blocks import Block, BlockFolder, chain
    from slotmoe.offload.sessions.names import NamedSession, Saved

    tokens, root = list(range(200)), bytes(16)

    def rows(block: Block) -> memoryview:
        return memoryview(b"".join(token.to_bytes(24, "little") for token in block.tokens))

    def save(count: int) -> None:
        store = BlockFolder(folder / "blocks", 1 << 20, print)
        store.add(list(chain(root, tokens[:count])), 24, rows)
        text = [{"role": "text", "content": str(count)}]
        with NamedSession(folder, "plans") as session:
            session.save(Saved(root, tokens[:count], "text", text))

    def check() -> dict[str, str]:
        damaged = list[str]()
        store = BlockFolder(folder / "blocks", 1 << 20, damaged.append)
        for block in chain(root, tokens):
            found = store.read(block.parent, block.start, block.tokens, 24)
            assert found is None or found[1] == rows(found[0])
        assert not damaged, damaged
        with NamedSession(folder, "plans") as session:
            assert session.saved is not None and len(session.saved.tokens) in (70, 200)
        sums = digests(folder)
        return {name: sums[name] for name in sums if "lock" not in name}

    return Work(partial(save, 70), partial(save, 200), check)


WORKS = {"quantize": quantizing, "session": saving}


def attacked(
    name: str,
    source: Path,
    folder: Path,
    count: int,
    stride: int = 1,
    power: bool = False,
    change: int = 1,
    seconds: float = 1e9,
    seed: int = 0,
) -> dict[str, Any]:
    """So many kills, first at each ``stride``-th ``change`` of the disk, or as many power cuts as
    there are changes, or fewer where ``seconds`` are over; what came of them."""
    work, wrong, killed, resumed = WORKS[name](source, folder), list[str](), 0, 0

    def child(die_at: int = 0, after: float | None = None) -> int:
        def run() -> None:
            die_at_change(die_at, folder if power and die_at else None)
            work.do()

        return forked(run, after)

    def clean() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        assert forked(work.prepare) == 0

    clean()
    started = time.perf_counter()
    assert child() == 0
    duration, wanted = time.perf_counter() - started, work.check()
    generator, end = random.Random(seed), time.monotonic() + seconds
    while killed < count and (stride or not power) and time.monotonic() < end:
        clean()
        what = f"change {change}" if stride else "random moment"
        for again in range(1 if power else generator.choice((1, 1, 3))):
            moment = {"die_at": change} if stride else {"after": generator.random() * duration}
            if not os.WIFSIGNALED(child(**moment)):
                stride = 0  # it has no more changes
                break
            killed, change = killed + 1, change + stride
            resumed += again > 0
            try:
                found = work.check()
                assert name != "quantize" or found in ({}, wanted), "wrong bytes in place"
            except Exception as problem:
                wrong.append(f"{what}: {problem!r}")
        if child() or work.check() != wanted:
            wrong.append(f"{what}: does not resume to the same bytes")
    return {
        "work": name,
        "power": power,
        "killed": killed,
        "resumed_again": resumed,
        "wrong": wrong,
    }


def main() -> None:
    from tests.support.tiny import SMALL, write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; all by default")
    parser.add_argument("--count", type=int, default=2000, help="kills, for each work")
    parser.add_argument("--stride", type=int, default=1, help="changes of the disk between two")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each work")
    parser.add_argument("--seed", type=int, default=0)
    given, failed = parser.parse_args(), False
    with tempfile.TemporaryDirectory(dir=memory()) as name:
        source = Path(name) / "source"
        assert forked(partial(write_checkpoint, source, shards=2, **SMALL)) == 0
        for work, power in product(given.works or WORKS, (False, True)):
            options = {"stride": given.stride, "power": power}
            options |= {"seconds": given.seconds, "seed": given.seed}
            found = attacked(work, source, Path(name) / "work", given.count, **options)
            failed = failed or bool(found["wrong"])
            print(json.dumps(found), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
