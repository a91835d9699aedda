"""Who uses a runtime, and what ends that: Ctrl-C, ``close`` from another thread, a fork.

A pass leaves nothing behind that the next one can't repair (``Slots.recover``), so it may be
interrupted anywhere.  Ctrl-C is nevertheless held back until a layer's end, where nothing has to be
repaired; a second one comes through at once, since a disk may never answer.
"""

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from slotmoe.errors import CLOSED, ConfigError

_FORKED = (
    "this Runtime was opened before the process forked, and its threads stayed behind: open the "
    "model in the child"
)
_IN_USE = (
    "Runtime is in use by another thread; it computes for one thread at a time, so wait for that "
    "or open another"
)


class Exclusive:
    """``with`` it, a thread is the only one that uses the runtime.

    In the main thread it wraps SIGINT's handler: a signal makes ``stopping`` true, which is to be
    tested where a pass may end, and ``stop`` then calls the handler.  Blocks do not nest.  Raises
    ``ConfigError`` where another thread is inside, and after ``refuse``.
    """

    def __init__(self) -> None:
        self.stopping = False  # whether ``stop`` has to be called
        self._refusal = ""  # why nobody may use the runtime any more
        # The thread inside, by one key: ``setdefault`` is one step for all threads.  A thread that
        # an exception has thrown out of ``__enter__`` is still noted, and simply comes in again.
        self._inside: dict[str, int] = {}
        self._signalled = False
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        _ALL.add(self)

    def __enter__(self) -> None:
        self.check()
        thread = threading.get_ident()
        if self._inside.setdefault("thread", thread) != thread:
            raise ConfigError(_IN_USE)
        try:
            self.check()  # who refuses may have looked before this thread was noted
        except ConfigError:
            self._inside.clear()
            raise
        if thread == threading.main_thread().ident:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                if handler != self._note:
                    self._handler = handler
                signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *raised: object) -> None:
        handler = self._handler
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
            self._handler = None
        self._inside.clear()
        if self._signalled:
            self._deliver(handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """SIGINT's handler meanwhile."""
        if self._signalled or not self._inside:
            self._deliver(self._handler)
        else:
            self._signalled = self.stopping = True

    def _deliver(self, handler: Callable[[int, FrameType | None], Any] | None) -> None:
        self._signalled, self.stopping = False, bool(self._refusal)
        if handler is not None:
            handler(signal.SIGINT, None)

    def stop(self) -> None:
        """Where a pass may end: raise what ends it, if anything does."""
        self.check()
        if self._signalled:
            self._deliver(self._handler)

    def check(self) -> None:
        """Raises ``ConfigError`` if nobody may use the runtime any more."""
        if self._refusal:
            raise ConfigError(self._refusal)

    @property
    def forked(self) -> bool:
        """Whether this is a child's copy of a runtime of its parent's."""
        return self._refusal == _FORKED

    def refuse(self, why: str = CLOSED) -> None:
        """Refuse every use from now on; a pass under way ends where ``stopping`` is tested."""
        self._refusal, self.stopping = self._refusal or why, True

    def wait(self, seconds: float) -> None:
        """Wait so long at most until no other thread is inside."""
        until, thread = time.monotonic() + seconds, threading.get_ident()
        while self._inside.get("thread", thread) != thread and time.monotonic() < until:
            time.sleep(0.001)


_ALL: "weakref.WeakSet[Exclusive]" = weakref.WeakSet()


def _after_fork() -> None:
    for exclusive in list(_ALL):
        exclusive.refuse(_FORKED)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
