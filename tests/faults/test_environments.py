"""Every command in every environment; a table by ``python -m tests.faults.environments``."""

import shutil

import pytest

from tests.faults.environments import COMMANDS, UNKNOWN, WORLDS, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("world"))


def check(place, world, commands):
    if WORLDS[world].prefix == UNKNOWN and shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    found = {command: place.run(WORLDS[world], command) for command in commands}
    assert {command: problem for command, (_, problem) in found.items() if problem} == {}
    if world == "as usual":
        assert [code for code, _ in found.values()] == [2 * (name == "rm") for name in found]


@pytest.mark.parametrize("world", ["no home", "few descriptors"])
def test_a_command_in_an_odd_world(place, world):
    check(place, world, ["plan"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_command_in_every_world(place, world):
    check(place, world, COMMANDS)
