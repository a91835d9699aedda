"""What strangers write commands no terminal and forges no line, whatever says it, and however."""

import sys
from random import Random

import pytest

from slotmoe.offload.runtime import Runtime
from tests.support import escapes
from tests.support.escapes import CODES, PLANT, obeyed
from tests.support.forkserver import OnTerminal
from tests.support.hub import NAME, Repo
from tests.support.served import Served
from tests.support.tiny import SMALL, write_checkpoint


@pytest.fixture(scope="module")
def place(heavy, processes, network, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("place")
        for name, value in escapes.prepare(folder).items():
            patch.setenv(name, value)
        yield folder


@pytest.mark.parametrize("part", escapes.PARTS)
def test_commands_say_what_strangers_wrote_and_do_nothing_of_it(part, place, hub):
    """A string of each input; the campaign ``escapes`` takes all."""
    stdin = sys.stdin
    for words in escapes.PARTS[part](place, 1, Random(part)):
        assert not escapes.wrong(words), words
    sys.stdin = stdin


def test_the_server_answers_and_logs_what_clients_sent(place):
    with (
        Runtime.open(place / "export", ram="2GiB", context=256, sequences=8) as runtime,
        Served(runtime, is_logged=True) as served,
    ):
        assert not [*filter(None, escapes.ask(served.port, 1, Random(0)))]


@pytest.mark.usefixtures("processes")
def test_on_a_terminal(place, hub):
    """While bars move, which rich draws with codes, and where a prompt is dimmed."""
    write_checkpoint(place / "on-the-hub", **SMALL, **{PLANT: PLANT})
    hub.add(NAME, Repo(place / "on-the-hub"))
    export = place / "made-here"
    shown = ""
    for words in (
        ("quantize", NAME, export, "--verbose"),
        ("run", export, f"x{CODES}[bold]y", "-n", "2"),
    ):
        with OnTerminal(*words) as terminal:
            shown += terminal.rest()
            assert terminal.wait() == 0, shown
    assert not obeyed(shown, on_terminal=True)
    assert shown.count("[bold]y") == 2 and "\x1b[2mx\\x1b]0;title" in shown
