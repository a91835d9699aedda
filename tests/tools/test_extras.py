"""Commands whose libraries are extras say which extra is missing."""

import sys

import pytest

from slotmoe.errors import ConfigError
from slotmoe.tools import options
from slotmoe.tools.cli import main
from slotmoe.tools.options import require_extra


@pytest.fixture
def hide(monkeypatch):
    """Make modules look as if they were not installed."""
    find_spec = options.find_spec

    def make(*names):
        monkeypatch.setattr(options, "find_spec", lambda n: None if n in names else find_spec(n))

    return make


def test_installed_libraries_pass():
    require_extra("serve", "json", "email.message")


def test_all_missing_libraries_are_named(hide):
    hide("json", "csv")
    with pytest.raises(
        ConfigError,
        match=r"needs libraries that are not installed \(json, csv\): "
        r"pip install 'slotmoe\[serve\]'",
    ):
        require_extra("serve", "json", "re", "csv")


@pytest.mark.parametrize(
    ("arguments", "library"),
    [
        *((["serve", "sample"], name) for name in ("fastapi", "uvicorn", "llguidance")),
        (["chat", "sample"], "prompt_toolkit"),
    ],
)
def test_command_without_its_libraries_ends_in_one_line(
    hide, monkeypatch, capsys, arguments, library
):
    hide(library)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"slotmoe: this command needs libraries that are not installed ({library}): "
        f"pip install 'slotmoe[{arguments[0]}]'\n"
    )


def test_chat_through_pipes_needs_no_extra(hide, monkeypatch, capsys):
    hide("prompt_toolkit")
    monkeypatch.setattr("slotmoe.tools.chat.open_runtime", lambda *_: 1 / 0)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit):
        main(["chat", "sample"])
    assert "ZeroDivisionError" in capsys.readouterr().err
