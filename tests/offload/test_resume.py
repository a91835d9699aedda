"""What a resume of ``quantize`` makes of files that changed since it was stopped: the same bytes,
or one line whose way out makes them."""

import json
import os
import random
import shutil
from contextlib import ExitStack, suppress
from functools import partial
from unittest.mock import patch

import pytest

from slotmoe.errors import SlotmoeError
from slotmoe.offload.ingest.calibration import Calibration
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.manifest import manifest_checksum
from tests.support.disk import Stop, tree
from tests.support.hub import HUB, NAME, Repo, make
from tests.support.params import nth
from tests.support.tiny import SMALL, write_checkpoint

TEXT = [[0, *range(5 + start, 20 + start)] for start in range(6)]
LUT = EXPERT_CODECS["lut", "4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_checkpoint(folder, shards=2, **{**SMALL, "num_hidden_layers": 3})
    return folder


def from_hub(folder, destination, calibration=None, **options):
    HUB.add(NAME, Repo(folder))
    make(destination, ready=lambda _: calibration, **options)


# By name: how the export is made of the checkpoint in a folder.
WAYS = {
    "hub-calibrated": partial(from_hub, codecs=LUT, calibration=TEXT, keep_source=True),
    "hub": from_hub,
    "calibrated": partial(quantize, codecs=LUT, calibration=TEXT, resident="mixed"),
    "plain": quantize,
}


class Resumes:
    """A way to make an export of the checkpoint in ``source``, stopped at about ``stages`` moments:
    ``left`` has the files of each and their bytes, in order."""

    def __init__(self, way, source, place, stages):
        self.way, self.source, self.place = WAYS[way], source, place
        calls = self.stopped(None)
        self.wanted, self.left = tree(place / "export"), []
        for at in range(1, calls + 1, -(-calls // stages)):
            shutil.rmtree(place)
            self.stopped(at)
            self.left.append(tree(place))

    def make(self, **options):
        self.place.mkdir(exist_ok=True)
        with patch.object(Calibration, "announcement", lambda _: ""):  # it measures for a while
            self.way(self.source, self.place / "export", workers=1, **options)

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

    def check(self, files):
        """Run the command again where ``files`` were left; whether that makes the same bytes.
        Anything that is raised but a ``SlotmoeError`` with a way out is a fault."""
        shutil.rmtree(self.place, ignore_errors=True)
        for name, data in files.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(data)
        try:
            self.make()
        except SlotmoeError as problem:
            said = str(problem)
            assert "\n" not in said and ("again" in said or "--overwrite" in said), said
            self.make(overwrite="--overwrite" in said)
        return tree(self.place / "export") == self.wanted


GONE = object()
STRANGE = (
    *(None, True, "", "x", "\ud800\x1b[1m", [], [[]], {}, {"": None}, -1, 0, 1, 0.5, -1e300),
    *(1e300, 1 << 40, 10**400, float("nan"), float("inf"), GONE),
)


def places(value, *before):
    """The places in JSON, but for its checksum."""
    for key in range(len(value)) if isinstance(value, list) else [*value]:
        if key != "checksum":
            yield (*before, key)
            if isinstance(value[key], list | dict):
                yield from places(value[key], *before, key)


def forged(data, chance):
    """A signed file with a strange value somewhere, signed anew."""
    values = inside = json.loads(data)
    del values["checksum"]
    *inner, last = chance.choice([*places(values)])
    for key in inner:
        inside = inside[key]
    inside[last] = chance.choice(STRANGE)
    if inside[last] is GONE:
        del inside[last]
    return json.dumps({"checksum": manifest_checksum(values), **values}).encode()


def damaged(data, chance):
    at = chance.randrange(len(data)) if data else 0
    return chance.choice(
        (
            data + chance.randbytes(5000),
            data[:at],
            data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :],
            data[:at] + bytes(byte ^ 4 for byte in data[at : at + 1]) + data[at + 1 :],
        )
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_damage_in_any_file_does_not_show(way, source, hub, tmp_path, nightly):
    resumes, chance = Resumes(way, source, tmp_path / "work", 3), random.Random(way)
    for files in resumes.left[1:]:
        for name, data in files.items():
            assert resumes.check(files | {name: damaged(data, chance)}), name
            assert resumes.check({other: files[other] for other in files if other != name}), name


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", nth(2, ["calibrated", "plain", "hub"]))
def test_a_forged_file_ends_in_a_line_or_an_export(way, count, source, hub, tmp_path, heavy):
    """Values of a state or a plan, made ones of a wrong type, length or range, with a right
    checksum.  Of 150 such states 85 ended in a raw error."""
    resumes, chance = Resumes(way, source, tmp_path / "work", 4), random.Random(0)
    name = "export.download/plan.json" if way == "hub" else "export.partial/state.json"
    *_, files = (left for left in resumes.left if name in left)
    for _ in range(count):
        resumes.check({**files, name: forged(files[name], chance)})
    stream = "export.partial/stream.bin"
    for files in [left for left in resumes.left if stream in left][:1]:
        assert resumes.check({**files, stream: bytes(byte ^ 4 for byte in files[stream])})
