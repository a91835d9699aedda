"""Damage to an export and to sessions that no reader may miss.

A case is one flipped bit, a cut, or two exchanged stretches of one file; then that part is read.
What comes must be an error that names the file, for a session nothing, or the very bytes that were
there: white space of the manifest, for example.
"""

import json
import os
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import product

from campaigns.models import tiny_export
from campaigns.runner import Attack
from slotmoe.errors import SlotmoeError
from slotmoe.model.config import read_config
from slotmoe.model.names import resident_shapes
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved
from slotmoe.quant.export.layout import RESIDENT, layer_file, tensor_parts
from slotmoe.quant.export.reader import Export
from tests.support.blocks import per_token
from tests.support.disk import memory
from tests.support.exported import weight_bytes

KINDS = ("flip", "flip", "flip", "cut", "swap")


def damage(good, kind, span, chance):
    """What stands where instead, or for a cut nothing from there on; the same as before in rare
    cases of a swap."""
    start, end = span
    first, second = sorted(chance.randrange(start, end) for _ in "ab")
    if kind == "cut":
        return {first: b""}
    if kind == "flip":
        return {first: bytes([good[first] ^ 1 << chance.randrange(8)])}
    size = min(chance.choice((1, 64, 4096)), second - first, end - second)
    return {first: good[second : second + size], second: good[first : first + size]}


class Target:
    """A file, the ``span`` of it that is damaged, and ``read``, which gives all that stands there
    or raises.  ``weight`` says how often it is damaged beside others."""

    def __init__(self, path, read, weight, span=None):
        self.path, self.read, self.weight, self.good = path, read, weight, path.read_bytes()
        self.wanted, self.span = read(), span or (0, len(self.good))
        assert self.wanted is not None

    def attack(self, chance):
        """One case: ``refused``, ``same`` or what was ``missed``."""
        kind = chance.choice(KINDS)
        edits = damage(self.good, kind, self.span, chance)
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


def files_of(export):
    """What is checked when an export is opened, and the small files."""

    def open_again(beside=None, size=0):
        with Export.open(export.folder) as opened:
            manifest = json.dumps(opened.manifest, sort_keys=True)
        return manifest, beside.read_bytes()[:size] if beside else b""

    yield Target(export.folder / "slotmoe.json", open_again, 3)
    for name, entry in export.manifest["files"].items():
        path, size = export.folder / name, entry.get("header_bytes", entry["bytes"])
        yield Target(path, partial(open_again, path, size), 3, (0, size))
        if "header_bytes" not in entry:
            yield Target(path, partial(export.small_file, name, 1 << 24), 5)


def records_of(export):
    size = export.layout.record_bytes

    def read(layer, expert):
        record = bytearray(size)
        export.read_range(layer, expert, 0, memoryview(record))
        export.verify_record(layer, expert, memoryview(record))
        return bytes(record)

    for layer, expert in product(export.layers, range(export.experts)):
        name = layer_file(layer)
        start = export.manifest["files"][name]["header_bytes"] + expert * size
        read_this = partial(read, layer, expert)
        yield Target(export.folder / name, read_this, 20, (start, start + size))


def tensors_of(export):
    """The resident weights."""
    weights = resident_shapes(read_config(export.folder / "config.json"))
    entry = export.manifest["files"][RESIDENT]
    for tensor, part in tensor_parts(entry).items():
        of = next(of for of in weights if f"{tensor}.".startswith(f"{of}."))
        read = partial(weight_bytes, export, of)
        yield Target(export.folder / RESIDENT, read, 5, part.span(entry["header_bytes"]))


def sessions(folder):
    """A named one, and the blocks of a text."""

    def saved():
        with NamedSession(folder, "plans") as session:
            return session.saved

    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), [1, 2], "text", [{"role": "text", "content": "Hello"}]))
    yield Target(session.path, saved, 20)
    store = BlockFolder(folder / "blocks", 1 << 20, lambda remark: None)
    blocks = list(chain(bytes(16), [*range(99)]))

    def latents(block):
        found = store.read(block, per_token(24))
        return found and (found[0], bytes(found[1]))

    store.add(blocks, per_token(24), lambda block: memoryview(bytes(range(24)) * len(block.tokens)))
    for block in blocks:
        (path,) = (folder / "blocks").rglob(f"*-{block.address.hex()}")
        yield Target(path, partial(latents, block), 100)


@contextmanager
def prepare(folder, given):
    with Export.open(tiny_export(folder)) as export:
        every = [files_of(export), records_of(export), tensors_of(export)]
        yield [target for targets in (*every, sessions(folder / "sessions")) for target in targets]


def run(targets, part, aim):
    weights, came, missed = [target.weight for target in targets], Counter(), []
    while aim.goes_on(came.total()):
        for target in aim.chance.choices(targets, weights, k=min(aim.count, 1000)):
            outcome = target.attack(aim.chance)
            came[outcome.partition(":")[0]] += 1
            missed += [outcome] * outcome.startswith("missed")
    return {"cases": came.total(), **came, "wrong": missed[:20]}


ATTACK = Attack(run, ["export-and-sessions"], "cases", 1_000_000, prepare=prepare, disk=memory())
