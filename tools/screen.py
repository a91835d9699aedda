"""What a person sees on a terminal, and a pipe does not get."""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from slotmoe.offload.plan.memory import format_size

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


def by_drive(drives: list[dict[str, Any]]) -> str:
    """What was read from each drive, and how fast."""
    texts = []
    for drive in drives:
        rate = drive["bytes"] / drive["seconds"] / 1e9 if drive["seconds"] else 0.0
        failed = ", then failed" * drive["failed"]
        read = f"{format_size(drive['bytes'])} at {rate:.2f} GB/s"
        texts.append(f"{visible(drive['folder'])} {read}{failed}")
    return "; ".join(texts)


class Reading:
    """A line on stderr's terminal that says how much of a prompt is read, from half a second after
    ``begin`` until ``end``."""

    def __init__(self, runtime: Any, quiet: bool):
        self._runtime = runtime
        self._wanted = not quiet and is_terminal(sys.stderr) and runtime.model.experts is not None
        self._total, self._next, self._shown = 0, 0.0, False
        self._held, self._routed = 0, 0  # tokens of earlier passes; and of this one, by layer
        self._stop_listening: Callable[[], None] | None = None

    def begin(self, tokens: int) -> None:
        """A prompt of so many ``tokens`` is read from now on."""
        if self._wanted:
            self._total, self._next = tokens, time.perf_counter() + _FIRST_SECONDS
            self._routed = 0
            self._stop_listening = self._runtime.model.experts.on_route(self._on_route)

    def done(self, route: Any) -> int:
        """Tokens that are read, at the gate that made the choice ``route``, to be called with each:
        what earlier passes read, and the share of this one's that its layers are."""
        held: int = self._runtime.sequences[0].length
        if held != self._held:
            self._held, self._routed = held, 0
        self._routed += len(route.indices)
        share = self._routed // len(self._runtime.config.moe_layers)
        return min(held + share, self._total)

    def _on_route(self, route: Any) -> None:
        now, count = time.perf_counter(), self.done(route)
        if now >= self._next:
            self._next, self._shown = now + _NEXT_SECONDS, True
            done = f"reading {count:,} of {self._total:,} tokens"
            print(f"\r\x1b[2K{done}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The prompt is read, or will not be."""
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._shown = False
