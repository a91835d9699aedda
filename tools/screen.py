"""What a person sees on a terminal, and a pipe does not get."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from slotmoe.errors import informs, one_line, visible
from slotmoe.system import ready_streams

HELP_ALL = "--help-all"  # a command's help looks for it in what the group has noted


class Screen:
    """A ``stream`` for text that strangers may have written: none of it commands a terminal."""

    def __init__(self, stream: "TextIO | Remarks"):
        self.stream: Any = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.stream.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))


class Remarks:
    """stderr, whatever has become of it: closed, without a reader, on a full disk."""

    def __init__(self, stream: TextIO):
        self._stream, self.write, self.flush = stream, informs(stream.write), informs(stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Let terminals, and stderr as it is often a log, show what is printed, by whomever, and obey
    none of it.  A pipe gets every character of a model's text."""
    ready_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Screen) and (name == "stderr" or stream.isatty()):
            setattr(sys, name, Screen(Remarks(stream) if name == "stderr" else stream))


def commanded(stream: TextIO) -> TextIO:
    """What takes codes of our own for the terminal that ``stream`` is."""
    return stream.stream if isinstance(stream, Screen) else stream


def show(*lines: str, err: bool = False) -> None:
    """Print lines, each of which stays one, on stdout or stderr."""
    print(*map(one_line, lines), sep="\n", file=sys.stderr if err else sys.stdout)


def json_of(values: object) -> str:
    """JSON, in which every control character is a code."""
    return json.dumps(values).replace("\x7f", r"\u007f")


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal whose lines can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def print_dimmed(text: str) -> None:
    """Print on a terminal, dimmed unless NO_COLOR asks for no colors (https://no-color.org)."""
    begin, end = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[22m")
    print(f"{begin}{visible(text)}{end}", end="", flush=True, file=commanded(sys.stdout))
