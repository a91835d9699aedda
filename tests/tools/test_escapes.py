"""What strangers write commands no terminal and forges no line, whatever says it, and however."""

import contextlib
import io
import sys
from random import Random

import pytest
from rich.text import Text

from slotmoe.offload.runtime import Runtime
from slotmoe.tools.chat import Pipe
from slotmoe.tools.options import say
from slotmoe.tools.screen import commanded, guard_streams
from slotmoe.tools.tables import Console, byte_bars, table
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


@contextlib.contextmanager
def terminals(are_terminals=True):
    """Stdout and stderr are one terminal or one pipe, which this gives."""
    stream = io.StringIO()
    stream.isatty = lambda: are_terminals
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        guard_streams()
        yield stream


def test_nothing_that_is_printed_commands():
    """By whomever."""
    with terminals() as terminal:
        guard_streams()  # once more changes nothing
        assert commanded(sys.stdout) is terminal
        print("print", CODES)
        sys.stdout.write(f"write {CODES}\n")
        sys.stderr.writelines(["lines ", f"{CODES}\n"])
        say(f"say {PLANT}", PLANT)
    shown = terminal.getvalue()
    assert not obeyed(shown)
    begins = [line.split("\\x1b")[0] for line in shown.splitlines()]
    assert begins == ["print ", "write ", "lines ", "slotmoe: say x", "x"]


def test_a_pipe_gets_the_answer_as_it_is_and_a_terminal_does_not():
    for are_terminals in (True, False):
        with terminals(are_terminals) as terminal:
            Pipe().think(CODES)  # on stderr
            thought = terminal.getvalue()
            Pipe().show(iter([CODES]))
        assert not obeyed(thought)
        answer = thought if are_terminals else CODES
        assert terminal.getvalue() == f"{thought}{answer}\n"


def test_nothing_that_rich_draws_commands(monkeypatch):
    """Nor is it markup, a link or an icon, nor what others print while bars move."""
    monkeypatch.setenv("TERM", "xterm")
    with terminals() as terminal:
        Console().print(table(["a"], [["[bold]y[/]"], [Text(CODES)]], CODES))
        Console().print(f"[red]:smile: {CODES}")
        with byte_bars(f"[b]{CODES}", waiting=CODES) as (update,):
            update(1, 2)
            print(f"\x1b[35;7m\x1b]8;;http://x\x1b\\link{CODES}")
            say(CODES)
    shown = terminal.getvalue()
    assert not obeyed(shown, on_terminal=True)
    for text in ("[bold]y[/]", ":smile:", "[b]", "\\x1b]8;;http", "slotmoe: \\x1b]0;title"):
        assert text in shown, text
