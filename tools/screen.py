"""What a person sees on a terminal, and a pipe does not get."""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_FIRST_SECONDS, _NEXT_SECONDS = 0.5, 0.2  # until the line of ``Reading`` appears, and changes
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


def tokens_read(runtime: Any, total: int) -> int:
    """How many of a prompt's ``total`` tokens a runtime has read: those of whole passes, and of the
    one under way by its share of the layers."""
    under_way: int = runtime.model.experts.reached
    held: int = runtime.sequences[0].length
    return min(held + under_way, total)


class Reading:
    """A line on stderr's terminal that says how much of a prompt is read, from half a second after
    ``begin`` until ``end``."""

    def __init__(self, runtime: Any, quiet: bool):
        self._runtime = runtime
        self._wanted = not quiet and is_terminal(sys.stderr)
        self._total, self._next, self._shown = 0, 0.0, False
        self._stop_listening: Callable[[], None] | None = None

    def begin(self, tokens: int) -> None:
        """A prompt of so many ``tokens`` is read from now on."""
        if self._wanted:
            self._total, self._next = tokens, time.perf_counter() + _FIRST_SECONDS
            self._stop_listening = self._runtime.model.experts.on_layer(self._on_layer)

    def _on_layer(self, route: Any) -> None:
        now = time.perf_counter()
        if now >= self._next:
            self._next, self._shown = now + _NEXT_SECONDS, True
            done = f"reading {tokens_read(self._runtime, self._total):,} of {self._total:,} tokens"
            print(f"\r\x1b[2K{done}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The prompt is read, or will not be."""
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._shown = False
