"""Commands whose libraries are extras say which extra is missing."""

import sys

import pytest

from slotmoe.tools import options


@pytest.fixture
def hide(monkeypatch):
    """Make modules look as if they were not installed."""
    find_spec = options.find_spec

    def make(*names):
        monkeypatch.setattr(options, "find_spec", lambda n: None if n in names else find_spec(n))

    return make


def test_command_without_its_libraries_ends_in_one_line(hide, monkeypatch, slotmoe):
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    for library, command in {"fastapi": "serve", "prompt_toolkit": "chat"}.items():
        hide(library)
        code, _, err = slotmoe(command, "sample")
        assert code == 2 and err == (
            f"slotmoe: this command needs libraries that are not installed ({library}): "
            f"pip install 'slotmoe[{command}]'\n"
        )


def test_chat_through_pipes_needs_no_extra(hide, monkeypatch, slotmoe):
    hide("prompt_toolkit")
    monkeypatch.setattr("slotmoe.tools.chat.open_runtime", lambda *_: 1 / 0)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert "ZeroDivisionError" in slotmoe("chat", "sample")[2]
