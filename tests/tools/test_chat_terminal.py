"""``slotmoe chat`` on a terminal: keys, history, answers as Markdown, and Ctrl-C at any time."""

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from slotmoe.model.sampling import Sampling
from slotmoe.tools.chat import COMMANDS, talk
from slotmoe.tools.chat.conversation import Dialogue
from slotmoe.tools.chat.terminal import Terminal, finished, markdown
from tests.support.forkserver import OnTerminal


@pytest.fixture
def terminal(tmp_path):
    """A ``Terminal`` that keeps its history in a file, what is typed there by its
    ``keys.send_text``, and what it printed."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        printed = io.StringIO()
        console = Console(file=printed, width=60, height=20)
        made = Terminal(tmp_path / "cache" / "history", list(COMMANDS), lambda: "status", console)
        made.keys, made.printed = keys, printed
        yield made


@pytest.fixture(scope="module")
def context():
    return 256


@pytest.fixture
def chat(processes, runtime):
    return Dialogue(runtime, 24, Sampling())


KEYS = {
    "hello\r": "hello",
    "one\x1b\rtwo\ntree\x1b[Dh\r": "one\ntwo\ntrehe",  # Alt-Enter, Ctrl-J, then an arrow
    "\r  \rhello\r": "  hello",  # nothing is not sent
    "\x1b[200~two\nlines\x1b[201~\r": "two\nlines",  # pasted
    "dropped\x03kept\r": "kept",
    "\x04": None,
    "x\x01\x04\x04": None,  # deletes first
}


def test_keys_and_history(terminal, tmp_path):
    for typed, wanted in KEYS.items():
        terminal.keys.send_text(typed)
        assert terminal.read() == wanted
    assert terminal.printed.getvalue() == ""
    path = tmp_path / "cache" / "history"
    assert path.stat().st_mode & 0o777 == 0o600
    terminal.keys.send_text("\x1b[A\x1b[A\r")
    assert Terminal(path, [], str, Console(file=io.StringIO())).read() == "two\nlines"
    terminal.keys.send_text("\x03\x04")
    assert terminal.read() is None
    assert "Ctrl-D" in terminal.printed.getvalue()  # how to leave


def test_refused_message_can_be_edited(terminal, chat):
    terminal.keys.send_text(f"{'word ' * 300}\r")
    terminal.keys.send_text("\x15short\r/nonsense\r\x03/exit\r")
    talk(chat, terminal, Path())
    assert [exchange.user for exchange in chat.exchanges] == ["short"]
    printed = terminal.printed.getvalue()
    assert "--context" in printed and "/nonsense: no such command" in printed


LINES = """# Title

Some *words*
1. one
   - inner
| a | b |
|---|---|
| 1 | 2 |
```python

```
[an address](https://example.org/a) of 5 * 3
    code
> quote
---
- a
""".splitlines(keepends=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=14))
def test_finished_blocks_never_change(lines):
    def parsed(*texts):
        tokens = [token for text in texts for token in markdown(text).parsed]
        return [(token.type, token.content) for token in tokens]

    text = "".join(lines)
    for end in range(1, len(lines)):
        done = finished("".join(lines[:end]))
        assert parsed(text[:done], text[done:]) == parsed(text)


@pytest.mark.usefixtures("processes")
def test_interrupt_on_a_real_terminal(sample_export):
    options = "--temperature 0 -n 1000 --context 1024".split()
    with OnTerminal("chat", sample_export, *options) as terminal:
        terminal.until("loading ")
        terminal.until("context 0 of 1,024")
        terminal.send("Tell me of the kings of England, and of their wars, at length.\r")
        terminal.until("tokens/s")
        terminal.send("typed meanwhile")
        shown = terminal.until("tokens/s")
        terminal.send("\x03")
        assert b"typed" not in shown + terminal.until("stopped")
        terminal.until("of 1,024")  # the prompt is back, with its status line
        terminal.send("\x15/stats\r")
        terminal.until("1 of 1 exchanges")
        terminal.until("of 1,024")
        terminal.send("\x04")
        terminal.rest()
        assert terminal.wait() == 0
