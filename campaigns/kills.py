"""SIGKILL while a model is quantized or a session is saved.

A child of a process that has imported everything does the work.  It dies at each of its changes of
the disk in turn, then at random moments, sometimes three times before it may end.  Whatever is left
has to be right, and the same work has to make the same bytes of it.  In the parts "power" the
machine loses its power at each change, and files lose what was not made durable.
"""

import os
import shutil
import time
from contextlib import contextmanager
from functools import partial

from campaigns.runner import Attack
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved
from tests.support.disk import die_at_change, digests, forked, memory, per_token
from tests.support.tiny import SMALL, write_checkpoint


class Quantizing:
    """``check`` raises where anything that is there is wrong, whenever that is, and gives its
    bytes."""

    def __init__(self, source, folder):
        self.source, self.made = source, folder / "export"
        self.wanted = None

    def begin(self):
        """What is there before."""

    def do(self):
        quantize(self.source, self.made, workers=2)

    def check(self):
        found = digests(self.made) if self.made.exists() else {}
        assert self.wanted is None or found in ({}, self.wanted), "wrong bytes in place"
        return found


class Saving:
    """A text that grows, in blocks and under a name."""

    root, tokens = bytes(16), list(range(200))

    def __init__(self, source, folder):
        self.folder = folder

    @staticmethod
    def rows(block):
        return memoryview(b"".join(token.to_bytes(24, "little") for token in block.tokens))

    def do(self, count=200):
        store = BlockFolder(self.folder / "blocks", 1 << 20, print)
        store.add(list(chain(self.root, self.tokens[:count])), per_token(24), self.rows)
        text = [{"role": "text", "content": str(count)}]
        with NamedSession(self.folder, "plans") as session:
            session.save(Saved(self.root, self.tokens[:count], "text", text))

    def begin(self):
        self.do(70)

    def check(self):
        damaged = []
        store = BlockFolder(self.folder / "blocks", 1 << 20, damaged.append)
        for block in chain(self.root, self.tokens):
            found = store.read(block, per_token(24))
            assert found is None or found[1] == self.rows(found[0])
        assert not damaged, damaged
        with NamedSession(self.folder, "plans") as session:
            assert session.saved is not None and len(session.saved.tokens) in (70, 200)
        return {name: sums for name, sums in digests(self.folder).items() if "lock" not in name}


WORKS = {"quantize": Quantizing, "session": Saving}


@contextmanager
def prepare(folder, given):
    assert forked(partial(write_checkpoint, folder / "source", shards=2, **SMALL)) == 0
    yield folder


def run(place, part, aim):
    name, _, power = part.partition("-")
    folder, wrong, killed, change = place / "work", [], 0, 1
    work = WORKS[name](place / "source", folder)

    def child(die_at=0, after=None):
        def work_and_die():
            die_at_change(die_at, folder if power and die_at else None)
            work.do()

        return forked(work_and_die, after)

    def clean():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        assert forked(work.begin) == 0

    clean()
    started = time.perf_counter()
    assert child() == 0
    duration, work.wanted = time.perf_counter() - started, work.check()
    while aim.goes_on(killed) and (change or not power):
        clean()
        what = f"change {change}" if change else "a random moment"
        for _ in range(1 if power else aim.chance.choice((1, 1, 3))):
            moment = {"die_at": change} if change else {"after": aim.chance.random() * duration}
            if not os.WIFSIGNALED(child(**moment)):
                change = 0  # there are no more changes
                break
            killed, change = killed + 1, change and change + 1
            try:
                work.check()
            except Exception as problem:
                wrong.append(f"{what}: {problem!r}")
        if child() or work.check() != work.wanted:
            wrong.append(f"{what}: does not resume to the same bytes")
    return {"killed": killed, "wrong": wrong}


PARTS = [name + how for name in WORKS for how in ("", "-power")]
ATTACK = Attack(run, PARTS, "kills", 500, prepare=prepare, disk=memory())
