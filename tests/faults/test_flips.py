"""No damage to an export or a session is missed; a million by ``python -m tests.faults.flips``."""

import pytest

from slotmoe.offload.sessions import names
from slotmoe.offload.sessions.blocks import BlockFolder
from slotmoe.quant.export.folder import Folder
from slotmoe.quant.export.reader import Export
from tests.faults.flips import Targets, attacked


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return Targets(tmp_path_factory.mktemp("flips"))


def test_no_damage_is_missed(targets):
    found = attacked(targets, 1000, 60, 0)
    assert found["problems"] == [] and found["refused"] > 900


def unchecked(folder, path, block, token_bytes):
    return memoryview(path.read_bytes())[len(block.head(token_bytes)) : -16]


PLANTED = {
    "tensors and records": (Export, "_verify", lambda *_: None),
    "headers": (Folder, "verify_header", lambda *_: None),
    "small files": (Export, "small_file", lambda at, name, _: (at.folder / name).read_bytes()),
    "blocks": (BlockFolder, "_latents", unchecked),
    "named sessions": (names, "_checksum", lambda values: values.get("checksum", "")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_found(name, targets, monkeypatch):
    """A check that is taken out."""
    monkeypatch.setattr(*PLANTED[name])
    assert attacked(targets, 1000, 60, 0)["problems"]
