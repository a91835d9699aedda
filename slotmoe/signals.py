"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP (Ctrl-Break, a closed window) do to a command.

Python raises ``KeyboardInterrupt`` between any two lines, where destructors lose it and imports
break.  So a signal ends the process itself, unless a command has something to finish: what a file's
final name holds is whole at any moment.  This is imported before all else, and imports little.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

if sys.platform == "win32":  # Ctrl-Break, and a closed window
    ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
else:
    ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave(number: int, remark: str = "") -> None:
    """End the process now, as by the signal ``number``; after Ctrl-C with a line."""
    signal.signal(number, signal.SIG_DFL)  # another one does not wait for a reader of stderr
    try:
        if os.isatty(2) and os.environ.get("TERM") != "dumb":
            os.write(2, b"\x1b[?25h")  # the cursor, which a bar hides
        if number == signal.SIGINT:
            os.write(2, os.fsencode(f"\nslotmoe: interrupted{remark}\n"))
    finally:
        os._exit(128 + number)


class Stopping:
    """As a context manager: a signal is noted as ``number``, and ``stop`` called with it.  For
    ``once``, the next acts as before.  What is ignored stays so (nohup, a shell's background)."""

    def __init__(self, stop: Callable[[int], object], once: bool = True):
        self._stop, self._once, self.number = stop, once, 0

    def __enter__(self) -> "Stopping":
        before = [(number, signal.getsignal(number)) for number in ENDING]
        self._before = [each for each in before if each[1] != signal.SIG_IGN]
        for number, _ in self._before:
            signal.signal(number, self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._once:
            self.__exit__()
        self.number = number
        self._stop(number)

    def check(self) -> None:
        """Raises ``KeyboardInterrupt`` or ``SystemExit`` after a signal."""
        if number := self.number:
            raise KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
