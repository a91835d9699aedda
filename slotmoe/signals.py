"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP do to a command.

Python raises ``KeyboardInterrupt`` between any two lines, where destructors lose it and imports
break.  So a signal ends the process itself, unless a command has something to finish: what a file's
final name holds is whole at any moment.  This is imported before all else, and imports little.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from typing_extensions import Self

    Handler = Callable[[int, FrameType | None], object] | int | None

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def leave(number: int, frame: FrameType | None = None, remark: str = "") -> None:
    """End the process now, as by the signal ``number``; after Ctrl-C with a line."""
    signal.signal(number, signal.SIG_DFL)  # another one does not wait for a reader of stderr
    try:
        if os.isatty(2) and os.environ.get("TERM") != "dumb":
            os.write(2, b"\x1b[?25h")  # the cursor, which a bar hides
        if number == signal.SIGINT:
            os.write(2, os.fsencode(f"\nslotmoe: interrupted{remark}\n"))
    finally:
        os._exit(128 + number)


class Handling:
    """As a context manager: ``numbers`` call ``handler`` meanwhile, but what is ignored stays so
    (by nohup, or in a shell's background)."""

    def __init__(self, handler: Handler, numbers: tuple[signal.Signals, ...] = ENDING):
        self._handler, self._numbers = handler, numbers
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Self:
        for number in self._numbers:
            if (before := signal.getsignal(number)) != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._handler)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class Stopping(Handling):
    """Meanwhile the first signal calls ``stop`` with its number; the next one acts as before.
    ``check`` then ends what has nothing more to finish."""

    def __init__(self, stop: Callable[[int], object]):
        super().__init__(self._take)
        self._stop, self.number = stop, 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.number = number
        self._stop(number)

    def check(self) -> None:
        """Raises ``KeyboardInterrupt`` or ``SystemExit`` after a signal."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise SystemExit(128 + self.number)
