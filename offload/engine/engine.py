"""The engine: one thread that owns a model, its sequences and its experts.

A request goes in, deltas come out; several are answered at once (``slotmoe.offload.engine.batch``).
Nobody else touches what the engine owns, and no signal reaches its thread.  So its state changes
only where the code says so, and a pass ends early in two ways: its own code raises, or ``_look``,
which is called at each layer's end, sees that nobody wants the pass any more.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Sequenced
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError
from slotmoe.offload.devices.pages import give_back_memory
from slotmoe.offload.engine.batch import Batch, UnwantedError
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.requests import Forced, Request, Stream, wait_for
from slotmoe.offload.experts.disk import STUCK_SECONDS
from slotmoe.signals import block
from slotmoe.system import bind

T = TypeVar("T")
IDLE_SECONDS = 1.0  # without a request, after which free memory goes back to the system
_FILL_SECONDS = 0.005  # after which an idle engine looks what has come to fill slots
_FORKED = (
    "this Runtime was opened before the process forked, and its threads stayed behind: open the "
    "model in the child"
)


@dataclass(eq=False)
class _Call(Generic[T]):
    """What the engine's thread does between two steps; ``reply`` gets the result or the error."""

    action: Callable[[], T]
    reply: "SimpleQueue[tuple[list[T], BaseException | None]]" = field(default_factory=SimpleQueue)
    cancelled: bool = False


class _Life:
    """Whether the engine's thread goes on and is not left behind; this knows no engine.  A signal
    in ``Thread.is_alive`` may call a thread ended that is not (CPython 3.11)."""

    def __init__(self) -> None:
        self.goes_on, self.end = True, SimpleQueue[None]()

    def is_on(self) -> bool:
        return self.goes_on


class Engine:
    """Runs a ``batch`` of requests in a thread of its own, which calls ``ended`` when it ends: by
    ``stop``, or because of ``problem``, a defect."""

    def __init__(self, model: LoadedModel):
        self.model, self.batch = model, Batch(model)
        self._calls: deque[_Call[Any]] = deque()
        self._call: _Call[Any] | None = None  # the one under way
        # Requests, calls, and None for: look around.  An exception that strikes a client can't
        # leave this queue locked, as it can a condition.
        self._inbox: SimpleQueue[Request | _Call[Any] | None] = SimpleQueue()
        self._refusal = ""  # why nothing is taken any more
        self.problem: BaseException | None = None
        self.ended: Callable[[], None] = lambda: None
        model.experts.look = self._look
        self._life = _Life()
        self._thread = threading.Thread(target=self._run, name="slotmoe-engine", daemon=True)
        self._thread.start()
        _ALL.add(self)

    # For other threads

    def check(self) -> None:
        """Raises ``ConfigError`` if nothing is taken any more."""
        if self._refusal:
            raise ConfigError(self._refusal)

    def submit(self, *requests: Request) -> None:
        """Answer ``requests`` when sequences are free.  Raises ``ConfigError`` after ``stop``."""
        self.check()
        try:
            for request in requests:
                request.wake = partial(self._inbox.put, None)
                request.alive = self._life.is_on
                self._inbox.put(request)
            if not self._life.goes_on:  # it may have looked into the inbox before
                self._empty_inbox(self._refuse)
        except BaseException:  # Ctrl-C, at any line
            for request in requests:
                request.cancel()
            raise

    def hidden(self, ids: list[int], first: int) -> Tensor:
        """Read ``ids``: the residual stream after the last layer behind those from ``first`` on,
        float32 [T, D] on the device.  Raises what the engine could not do."""
        parts = list[Tensor]()
        self._read(Stream(ids, None, hidden=parts.append, first=first))
        return torch.cat(parts)

    def force(self, prompt: list[int], ids: Sequenced[int] = (), keeps: bool = False) -> Forced:
        """Read ``prompt``, of which what a sequence holds is not computed again, and decode ``ids``
        after it.  Raises what the engine could not do."""
        forced = Forced(ids, keeps)
        self._read(Stream(prompt, forced))
        return forced

    def empty(self, depth: int = 0) -> list[int]:
        """Empty all sequences, and let the first hold ``depth`` unknown tokens with random latents:
        for measurements.  Returns the beginning of a prompt that goes on from there."""

        def empty() -> None:
            for sequence in self.batch.sequences:
                sequence.take(sequence, 0)
            self.batch.sequences[0].fill(depth, self.model.backend)

        self.call(empty)
        return [-1] * depth

    def _read(self, stream: Stream) -> None:
        self.submit(stream.request)
        stream.read()

    def call(self, action: Callable[[], T]) -> T:
        """What ``action`` gives or raises, between two steps; ``ConfigError`` after ``stop``."""
        self.check()
        call = _Call(action)
        try:
            self._inbox.put(call)
            if not self._life.goes_on:
                self._empty_inbox(self._refuse)
            result, problem = wait_for(call.reply, self._life.is_on)
        except BaseException:
            call.cancelled = True
            self._inbox.put(None)
            raise
        if problem is not None:
            raise problem
        return result[0]

    @property
    def alive(self) -> bool:
        return self._life.goes_on

    def refuse(self, why: str) -> None:
        """Take nothing any more."""
        self._refusal = self._refusal or why

    def stop(self) -> None:
        """End every request and call within a layer, and the thread; this does not wait."""
        self.refuse(CLOSED)
        self._inbox.put(None)

    def close(self) -> None:
        """``stop``, wait, and release files and memory; a thread that a disk keeps stays behind.
        A forked child only closes files: threads, locks and the GPU are the parent's."""
        self.stop()
        if self._refusal == _FORKED:
            return self.model.source.close()
        if self.model.store is not None:
            self.model.store.stop()
        if threading.current_thread() is not self._thread:
            with suppress(Empty):
                self._life.end.get(timeout=STUCK_SECONDS if self._life.goes_on else 0.0)
                self._thread.join()
        self._life.goes_on = False
        self.model.opened.close()

    # The thread

    def _run(self) -> None:
        bind(self.model.device.placement.cpus)
        # Ctrl-C is this process's, not that of a compiler of GPU kernels, which it would end too.
        block()
        try:
            with torch.inference_mode(), self.model.device.current():
                while self._has_work():
                    while self._calls:
                        self._answer(self._calls.popleft())
                    self.batch.step()
        except BaseException as problem:
            self.problem = problem
            self.refuse(f"the engine failed ({problem!r:.200}); open the model again")
        finally:
            self._end_all()
            self.model.experts.look = lambda: None
            self.ended()
            self._life.end.put(None)

    def _has_work(self) -> bool:
        """Wait for some; False if none will come.  Soon after the last, memory is given back."""
        patience: float | None = IDLE_SECONDS
        while True:
            if not self._inbox.empty():
                self._receive()
            if self._refusal:
                return False
            if self._calls or self.batch.running or self.batch.waiting:
                return True
            fills = self.model.experts.slots.fill_behind(idle=True)
            try:
                self._sort(self._inbox.get(timeout=_FILL_SECONDS if fills else patience))
            except Empty:
                if not fills:
                    give_back_memory()
                    patience = None

    def _receive(self) -> list[Request]:
        """Take what has come in; the requests of it."""
        before = len(self.batch.waiting)
        self._empty_inbox(self._sort)
        return list(self.batch.waiting)[before:]

    def _sort(self, item: "Request | _Call[Any] | None") -> None:
        if isinstance(item, Request):
            self.batch.waiting.append(item)
        elif item is not None:
            self._calls.append(item)

    def _look(self) -> None:
        """A layer ends or waits for a disk: end the pass or call if nobody wants it any more."""
        if self._inbox.empty() and not (self.batch.is_long or self._call):
            return
        arrived, call, batch = self._receive(), self._call, self.batch
        wanted = not call.cancelled if call else batch.wants(arrived, self.model.experts.reached)
        if self._refusal or not wanted:
            raise UnwantedError

    def _answer(self, call: "_Call[Any]") -> None:
        self._call, result, problem = call, list[Any](), None
        try:
            self._look()
            result = [call.action()]
        except BaseException as raised:
            problem = ConfigError(CLOSED) if isinstance(raised, UnwantedError) else raised
        self._call = None
        call.reply.put((result, problem))

    def _end_all(self) -> None:
        """End what is under way and what waits."""
        for request, sequence in self.batch.running.items():
            if self.problem is None:
                self.batch.keep(request, sequence)
            self._refuse(request)
        self.batch.running.clear()
        for left in (self.batch.waiting, self._calls):
            while left:
                self._refuse(left.popleft())
        self._life.goes_on = False  # who puts something in from now on looks at this
        self._empty_inbox(self._refuse)

    def _empty_inbox(self, take: "Callable[[Request | _Call[Any] | None], None]") -> None:
        with suppress(Empty):
            while True:
                take(self._inbox.get_nowait())

    def _refuse(self, item: "Request | _Call[Any] | None") -> None:
        if isinstance(item, _Call):
            item.reply.put(([], ConfigError(self._refusal)))
        elif isinstance(item, Request):
            finish, error = "shutdown", ""
            if self.problem is not None:
                finish, error = "error", "the model failed; see the server's log"
                item.problem = self.problem
            self.batch.end(item, item.end(finish, error))


_ALL: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_ALL):
        engine.refuse(_FORKED)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
