"""What a person sees on a terminal, and a pipe does not get."""

import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from slotmoe.offload.engine.requests import Stream

_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_FIRST_SECONDS, _NEXT_SECONDS = 0.5, 0.2  # until the line of ``wait_reading`` appears, and changes
_MOST_ECHOED = 1000  # characters of a prompt


def visible(text: str) -> str:
    """``text`` with codes for characters, but line feeds and tabs, that command a terminal."""
    return _COMMANDING.sub(lambda match: repr(match[0])[1:-1], text)


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal whose lines can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def dimmed(text: str) -> str:
    """``text`` for a terminal, dimmed unless NO_COLOR asks for no colors (https://no-color.org)."""
    return visible(text) if os.environ.get("NO_COLOR") else f"\x1b[2m{visible(text)}\x1b[22m"


def echo_of(prompt: str) -> str:
    """The prompt, or the end of a long one, as it is shown before its continuation."""
    return dimmed(prompt if len(prompt) <= _MOST_ECHOED else f"…{prompt[-_MOST_ECHOED:]}")


def wait_reading(stream: "Stream", quiet: bool) -> None:
    """Wait for the first token of ``stream``, with a line on stderr's terminal that says, from half
    a second on, how much of the prompt is read."""
    if not quiet and is_terminal(sys.stderr):
        total, seconds = len(stream.request.prompt), _FIRST_SECONDS
        try:
            while not stream.wait(seconds):
                seconds = _NEXT_SECONDS
                done = f"reading {stream.request.read:,} of {total:,} tokens"
                print(f"\r\x1b[2K{done}", end="", file=sys.stderr, flush=True)
        finally:
            if seconds == _NEXT_SECONDS:
                print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
