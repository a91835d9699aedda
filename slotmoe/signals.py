"""What SIGINT (Ctrl-C), SIGTERM and SIGHUP (Ctrl-Break, a closed window) do to a command.

Python raises ``KeyboardInterrupt`` between any two lines, where destructors lose it and imports
break.  So a signal ends the process itself, unless a command has something to finish: what a file's
final name holds is whole at any moment.  This is imported before all else, and imports little.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

if sys.platform == "win32":
    import ctypes
    from time import sleep

    ENDING = (signal.SIGINT, signal.SIGBREAK)
    _handlers: dict[int, Any] = dict.fromkeys(ENDING, signal.SIG_DFL)
    _handler, _handle = _handlers.__getitem__, _handlers.__setitem__
    _end = partial(os.kill, os.getpid())  # libraries may wait at an exit, for threads that are gone

    def _strike(event: int) -> bool:
        """Windows calls this in a thread of its own; Python's handlers come in the main thread,
        after whatever lock or file it waits for."""
        number = signal.SIGBREAK if event else signal.SIGINT
        if _handlers[number] == signal.SIG_DFL:
            _end(128 + number)
        _handlers[number](number, None)
        while event > 1:  # a window closes, and ends the process when this returns
            sleep(1)
        return True

    _KERNEL = ctypes.WinDLL("kernel32")
    _STRIKE = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)(_strike)
else:
    ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _handler, _handle, _end = signal.getsignal, signal.signal, os._exit


def take() -> None:
    """From now on a signal ends this process as ``leave`` does, and does nothing from the last exit
    handler on, soon after which Python forgets its own."""
    Stopping(leave, once=False).__enter__()
    if sys.platform == "win32":
        _KERNEL.SetConsoleCtrlHandler(_STRIKE, True)
        atexit.register(_KERNEL.SetConsoleCtrlHandler, _STRIKE, False)
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in ENDING])


def leave(number: int, remark: str = "") -> None:
    """End the process now, as by the signal ``number``; after Ctrl-C with a line."""
    _handle(number, signal.SIG_DFL)  # another one does not wait for a reader of stderr
    try:
        if os.isatty(2) and os.environ.get("TERM") != "dumb":
            os.write(2, b"\x1b[?25h")  # the cursor, which a bar hides
        if number == signal.SIGINT:
            os.write(2, os.fsencode(f"\nslotmoe: interrupted{remark}\n"))
    finally:
        _end(128 + number)


class Stopping:
    """As a context manager: a signal is noted as ``number``, and ``stop`` called with it.  For
    ``once``, the next acts as before.  What is ignored stays so (nohup, a shell's background)."""

    def __init__(self, stop: Callable[[int], object], once: bool = True):
        self._stop, self._once, self.number = stop, once, 0

    def __enter__(self) -> "Stopping":
        before = [(number, _handler(number)) for number in ENDING]
        self._before = [each for each in before if each[1] != signal.SIG_IGN]
        for number, _ in self._before:
            _handle(number, self._take)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before:
            _handle(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._once:
            self.__exit__()
        self.number = number
        self._stop(number)

    def check(self) -> None:
        """Raises ``KeyboardInterrupt`` or ``SystemExit`` after a signal."""
        if number := self.number:
            raise KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
