"""What a ``quantize`` leaves that was stopped, and what the same command makes of it when a file
has changed since: the same bytes, or one line whose way out makes them."""

import json
import os
import shutil
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

from slotmoe.errors import SlotmoeError
from slotmoe.offload.ingest.calibration import Calibration
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.manifest import manifest_checksum
from tests.support.disk import Stop, tree
from tests.support.gguf import write_gguf
from tests.support.hub import HUB, NAME, Repo, make

TEXT = [[0, *range(5 + start, 20 + start)] for start in range(6)]
LUT = EXPERT_CODECS["lut", "4"]


def from_hub(folder, destination, **options):
    """With a text among its ``options``."""
    text = options.pop("calibration", None)
    HUB.add(NAME, Repo(folder))
    return make(destination, ready=lambda _: text, **options)


def from_gguf(folder, destination, **options):
    quantize(folder.parent / "model.gguf", destination, **options)


# By name: how the export is made of the checkpoint in a folder.
WAYS = {
    "hub-calibrated": partial(from_hub, codecs=LUT, calibration=TEXT, keep_source=True),
    "hub": from_hub,
    "calibrated": partial(quantize, codecs=LUT, calibration=TEXT, resident="mixed"),
    "plain": quantize,
    "gguf": from_gguf,
}


class Resumes:
    """A way to make an export of the checkpoint in ``source``, stopped at ``stages`` moments, or at
    each: ``left`` has the files of each and their bytes, in order."""

    def __init__(self, way, source, place, stages=None):
        if way == "gguf":
            write_gguf(source, source.parent / "model.gguf")
        self.way, self.source, self.place = WAYS[way], source, place
        shutil.rmtree(place, ignore_errors=True)
        calls = self.stopped(None)
        self.wanted = self.found()
        step, self.left = -(-calls // (stages or calls)), []
        for at in range(1, calls + 1, step):
            shutil.rmtree(place)
            self.stopped(at)
            files = tree(place)
            if files not in (self.wanted, *self.left[-1:]):
                self.left.append(files)

    def make(self, **options):
        self.place.mkdir(exist_ok=True)
        with patch.object(Calibration, "announcement", lambda _: ""):  # it measures for a while
            self.way(self.source, self.place / "export", workers=1, **options)

    def found(self):
        """The files of the export."""
        return {name: data for name, data in tree(self.place).items() if name[:7] == "export/"}

    def stopped(self, at):
        """Make it, but for the ``at``-th change of the disk and what comes after; the number of
        changes."""
        calls = 0

        def counted(function, *arguments, **options):
            nonlocal calls
            calls += 1
            if at is not None and calls >= at:
                raise Stop
            return function(*arguments, **options)

        with ExitStack() as patches:
            for name in ("fsync", "rename", "replace", "unlink", "ftruncate"):
                wrapped = partial(counted, getattr(os, name))
                patches.enter_context(patch.object(os, name, wrapped))
            with suppress(Stop):
                self.make()
        return calls

    def resumed(self, files):
        """What is wrong after the command was run again where ``files`` were left; None if nothing
        is.  Anything but a ``SlotmoeError`` is raised."""
        shutil.rmtree(self.place, ignore_errors=True)
        for name, data in files.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(data)
        try:
            self.make()
        except SlotmoeError as problem:
            said = str(problem)
            if "\n" in said or ("again" not in said and "--overwrite" not in said):
                return f"no way out in {said!r}"
            self.make(overwrite="--overwrite" in said)
        return None if self.found() == self.wanted else "other bytes"

    def opened(self, files):
        """Which of the ``files`` that were left are opened by the resume, by its own account."""
        seen, reading = set(), True

        def hear(event, arguments):
            if event == "open" and reading and isinstance(arguments[0], str | bytes | Path):
                seen.add(os.fsdecode(arguments[0]))

        sys.addaudithook(hear)
        self.resumed(files)
        reading = False
        return [name for name in files if str(self.place / name) in seen]


SIGNED = ("state.json", "plan.json", "slotmoe.json")  # each with a checksum of all that it says
KINDS = ("flip", "flip", "digit", "zeros", "nan", "cut", "longer", "gone", "swap")
GONE = object()
STRANGE = (
    *(None, True, "", "x", "\ud800\x1b[1m", [], [[]], {}, {"": None}, -1, 0, 1, 0.5, -1e300),
    *(1e300, 1 << 40, 10**400, float("nan"), float("inf"), GONE),
)


def damaged(data, kind, chance, others=()):
    """The bytes of a file with a damage; None of one that is gone."""
    data, at = bytearray(data), chance.randrange(len(data)) if data else 0
    if kind == "gone":
        return None
    if kind == "longer" or not data:
        return bytes(data + chance.randbytes(5000))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "swap" and others:
        return chance.choice(others)
    if kind == "digit" and (places := [i for i, byte in enumerate(data) if byte in b"0123456789"]):
        data[chance.choice(places)] = chance.choice(b"0123456789")
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "nan":
        at -= at % 4
        data[at : at + 4] = b"\0\0\xc0\x7f"[: len(data) - at]
    else:
        data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def places(value, chance, *before):
    """The places in JSON; of many in one object or list that are alike, one."""
    keys = range(len(value)) if isinstance(value, list) else value
    found = [key for key in keys if key != "checksum"] if isinstance(value, list | dict) else []
    for key in found if len(found) < 8 else [chance.choice(found)]:
        yield (*before, key)
        yield from places(value[key], chance, *before, key)


def resigned(data, strange, *places):
    """A signed file with the value ``strange`` at the end of these ``places``, one in another."""
    values = inside = json.loads(data)
    values.pop("checksum", None)
    for place in places[:-1]:
        inside = inside[place]
    if strange is GONE:
        del inside[places[-1]]
    else:
        inside[places[-1]] = strange
    return json.dumps({"checksum": manifest_checksum(values), **values}).encode()
