"""The engine: one thread that owns a model, its sequences and its experts.

A request goes in, deltas come out; several requests are answered at once.  One step decodes a token
of every running request in one pass, so an expert that is brought for one serves all, then takes a
piece of one waiting prompt, so that none starves.  A short prompt overtakes a long one, which gets
a piece after each that did.  The latents that a finished request leaves behind are reused by a
later prompt of the same owner that begins with the same tokens; where there are sessions, also
those that are on disk.

Nobody else touches what the engine owns, and no signal reaches its thread.  So its state changes
only where the code says so, and a pass ends early in two ways: its own code raises, or ``_look``,
which is called at each layer's end, sees that nobody wants the pass any more.
"""

import contextlib
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError, SlotmoeError
from slotmoe.model.generate import Delta
from slotmoe.offload.engine.forced import Forced
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.passes import Passes, Row
from slotmoe.offload.engine.requests import Request, Sampler, wait_for
from slotmoe.offload.engine.sequence import Sequence
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.sessions.blocks import shared_prefix
from slotmoe.offload.sessions.store import Sessions
from slotmoe.offload.tiers.disk import STUCK_SECONDS
from slotmoe.offload.tiers.pages import give_back_memory, trim_memory

T = TypeVar("T")
IDLE_SECONDS = 1.0  # without a request, after which free memory goes back to the system
# Tokens of a prompt between two decode steps; a whole prefill pass where nothing decodes.
_SHARED_PIECE = 64
_FORKED = (
    "this Runtime was opened before the process forked, and its threads stayed behind: open the "
    "model in the child"
)
_DEFECT = "the answer failed; the server's log says how"


class _UnwantedError(Exception):
    """Nobody waits for the pass or the call under way."""


@dataclass(eq=False)
class _Call(Generic[T]):
    """Something to do in the engine's thread between two steps.  ``reply`` gets the result, or what
    was raised."""

    action: Callable[[], T]
    reply: "SimpleQueue[tuple[list[T], BaseException | None]]" = field(default_factory=SimpleQueue)
    cancelled: bool = False


class _Thread(threading.Thread):
    """The engine's thread, which knows no engine once it has ended; ``is_left`` where it is stuck
    and nobody waits for it any more."""

    is_left = False

    def goes_on(self) -> bool:
        return self.is_alive() and not self.is_left


@dataclass
class Totals:
    """Counts since the start: of tokens, and of requests by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Runs requests on the model's sequences, ``at_once`` of them at most, in a thread of its own.

    ``sessions`` is where latents are kept on disk, None for nowhere.  ``ended`` is called in the
    thread when it ends: by ``stop``, or because of ``problem``, a defect.
    """

    def __init__(self, model: LoadedModel):
        self.model, self.passes = model, Passes(model)
        self.sequences = self.passes.sequences()
        self._free = [*self.sequences]  # the one that is unused for longest first
        self.at_once = len(self._free)
        self.sessions: Sessions | None = None
        self._running: dict[Request, Sequence] = {}
        self._waiting: deque[Request] = deque()
        self._calls: deque[_Call[Any]] = deque()
        self._filling: Request | None = None  # whose prompt is on its way in
        self._overtaken: Request | None = None  # whose prompt goes on behind that one
        # What the pass or call under way is for, to be asked at each layer's end whether it is
        # still wanted; and whether that is asked also where nothing has come in.
        self._at: Collection[Request] | _Call[Any] = ()
        self._asking = False
        # Requests, calls, and None for: look around.  An exception that strikes a client can't
        # leave this queue locked, as it can a condition.
        self._inbox: SimpleQueue[Request | _Call[Any] | None] = SimpleQueue()
        self._refusal = ""  # why nothing is taken any more
        self._seconds = 1.0  # a request's usual time from its start to its end
        self.totals = Totals()
        self.problem: BaseException | None = None
        self.ended: Callable[[], None] = lambda: None
        (model.experts or model.network.experts).look = self._look  # BRIDGE
        self._thread = _Thread(target=self._run, name="slotmoe-engine", daemon=True)
        self._thread.start()
        _ALL.add(self)

    # For other threads

    def check(self) -> None:
        """Raises ``ConfigError`` if nothing is taken any more."""
        if self._refusal:
            raise ConfigError(self._refusal)

    def submit(self, *requests: Request) -> None:
        """Answer ``requests`` as soon as sequences are free.  Raises ``ConfigError`` after
        ``stop``."""
        self.check()
        for request in requests:
            request.wake = partial(self._inbox.put, None)
            request.alive = self._thread.goes_on
            self._inbox.put(request)
        if not self._thread.goes_on():  # it may have looked into the inbox before
            self._refuse_all()

    def hidden(self, ids: list[int], first: int) -> Tensor:
        """Read ``ids``: the residual stream after the last layer behind those from ``first`` on,
        float32 [T, D] on the device.  Raises what the engine could not do."""
        parts = list[Tensor]()
        self._finished(Request(ids, None, hidden=parts.append, first=first))
        return torch.cat(parts)

    def force(self, prompt: list[int], ids: Sequenced[int] = (), keeps: bool = False) -> Forced:
        """Read ``prompt``, of which what a sequence holds is not computed again, and decode ``ids``
        after it.  Raises what the engine could not do."""
        forced = Forced(ids, keeps)
        self._finished(Request(prompt, forced))
        return forced

    def _finished(self, request: Request) -> None:
        """Submit a request and wait for its end.  Raises what the engine could not do."""
        ended = SimpleQueue[Delta]()
        request.emit = lambda delta: ended.put(delta) if delta.finish else None
        self.submit(request)
        try:
            delta = wait_for(ended, request.alive)
        finally:
            request.cancel()
        if delta.finish not in ("stop", "length"):
            raise request.problem or ConfigError(CLOSED)

    def call(self, action: Callable[[], T]) -> T:
        """What ``action`` gives, in the engine's thread between two steps.  Raises what it raises,
        and ``ConfigError`` after ``stop``."""
        self.check()
        call = _Call(action)
        self._inbox.put(call)
        if not self._thread.goes_on():
            self._refuse_all()
        try:
            result, problem = wait_for(call.reply, self._thread.goes_on)
        except BaseException:
            call.cancelled = True
            self._inbox.put(None)
            raise
        if problem is not None:
            raise problem
        return result[0]

    @property
    def running(self) -> int:
        """Requests that have a sequence."""
        return len(self._running)

    @property
    def retry_after(self) -> int:
        """Seconds after which a sequence is likely free, 1 to 60."""
        return min(60, max(1, round(self._seconds / self.at_once)))

    @property
    def forked(self) -> bool:
        """Whether this is a child's copy of an engine of its parent's."""
        return self._refusal == _FORKED

    @property
    def alive(self) -> bool:
        return self._thread.goes_on()

    def refuse(self, why: str) -> None:
        """Take nothing any more."""
        self._refusal = self._refusal or why

    def stop(self) -> None:
        """End every request and call within a layer, and the thread; this does not wait."""
        self.refuse(CLOSED)
        self._inbox.put(None)

    def close(self) -> None:
        """``stop``, wait, and release files and memory.  A thread that a disk keeps for long stays
        behind.  In a forked child only files are closed: threads, locks and the GPU are the
        parent's."""
        self.stop()
        if self.forked:
            return self.model.source.close()
        if self.model.store is not None:
            self.model.store.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(STUCK_SECONDS)
            self._thread.is_left = self._thread.is_alive()
        self.model.opened.close()

    # The thread

    def _run(self) -> None:
        trim_memory()  # the C library gives none of what opening has freed to another thread
        try:
            with self.model.device.current():
                while self._has_work():
                    self._step()
        except BaseException as problem:
            self.problem = problem
            self.refuse(f"the engine failed ({problem!r:.200}); open the model again")
        finally:
            self._end_all()
            (self.model.experts or self.model.network.experts).look = lambda: None  # BRIDGE
            self.ended()

    def _has_work(self) -> bool:
        """Wait for some; False where there will be none.  What answers have left behind is given
        back to the system soon after the last one."""
        patience: float | None = IDLE_SECONDS
        while True:
            self._receive()
            if self._refusal:
                return False
            if self._running or self._waiting or self._calls:
                return True
            try:
                self._sort(self._inbox.get(timeout=patience))
            except Empty:
                give_back_memory()
                patience = None

    def _receive(self) -> list[Request]:
        """Take what has come in; the requests of it."""
        before = len(self._waiting)
        with contextlib.suppress(Empty):
            while True:
                self._sort(self._inbox.get_nowait())
        return list(self._waiting)[before:]

    def _sort(self, item: "Request | _Call[Any] | None") -> None:
        if isinstance(item, Request):
            self._waiting.append(item)
        elif item is not None:
            self._calls.append(item)

    def _look(self) -> None:
        """A layer is at its end, or waits for a disk: end the pass or the call if nobody wants it
        any more.  A pass over much of a prompt ends also where another request may overtake it;
        that happens once, since the next passes are short."""
        if not self._asking and self._inbox.empty():
            return
        arrived, at = self._receive(), self._at
        if isinstance(at, _Call):
            wanted = not at.cancelled
        else:
            wanted = not all(request.unwanted for request in at)
            for request in at if self._asking else ():
                request.read = self._running[request].length + (
                    self.model.experts.reached if self.model.experts else 0
                )  # BRIDGE
                request.hurried |= self._overtaking(arrived, request) is not None
                wanted = wanted and not request.hurried
        if self._refusal or not wanted:
            raise _UnwantedError

    def _step(self) -> None:
        """Propose rows, compute them in a pass, and let samplers accept: first of all that decode,
        then of one prompt."""
        while self._calls:
            self._answer(self._calls.popleft())
        self._end_unwanted()
        reading = self._filling, self._overtaken
        decoding = [request for request in self._running if request not in reading]
        if decoding:
            self._decode(decoding)
        if (starting := self._next()) is not None:
            self._waiting.remove(starting)
            self._overtaken = self._filling
            self._start(starting)
        if self._filling is not None:
            self._fill(self._filling, shared=bool(decoding))
        self.totals.steps += 1

    def _answer(self, call: "_Call[Any]") -> None:
        self._at, self._asking = call, True
        result, problem = list[Any](), None
        try:
            self._look()
            result = [call.action()]
        except BaseException as raised:
            problem = ConfigError(CLOSED) if isinstance(raised, _UnwantedError) else raised
        self._at, self._asking = (), False
        call.reply.put((result, problem))

    def _end_unwanted(self) -> None:
        for request in [*self._running, *self._waiting]:
            if finish := request.unwanted:
                self._finish(request, request.end(finish))

    # Which prompt is read

    def _next(self) -> Request | None:
        """The request that starts in this step."""
        if self._filling is not None:
            return self._overtaking(self._waiting, self._filling)
        if self._overtaken is not None:  # it gets a piece before it is overtaken again
            self._filling, self._overtaken = self._overtaken, None
            return None
        return self._waiting[0] if self._waiting and self._has_room() else None

    def _has_room(self) -> bool:
        return len(self._running) < self.at_once

    def _overtaking(self, requests: Iterable[Request], ahead: Request) -> Request | None:
        """Which of ``requests`` overtakes the request ``ahead``: one that a short pass reads, where
        that one needs more."""
        left = len(ahead.prompt) - self._running[ahead].length
        if not self._has_room() or self._overtaken is not None or left <= PREFILL_CHUNK:
            return None
        return next((one for one in requests if self._unread(one) <= PREFILL_CHUNK), None)

    def _unread(self, request: Request) -> int:
        """Tokens of the request's prompt that no sequence holds."""
        return len(request.prompt) - max(self._shared(request).values(), default=0)

    def _shared(self, request: Request) -> dict[Sequence, int]:
        """How many tokens of the request's prompt the sequences hold that it may use."""
        return {
            sequence: shared_prefix(sequence.tokens, request.reusable)
            for sequence in self.sequences
            if sequence.owner == request.owner
        }

    def _start(self, request: Request) -> None:
        """Give a request a free sequence, and in it what some sequence holds of its prompt, and the
        disk behind that."""
        shared = self._shared(request)
        source = max(shared, key=shared.__getitem__, default=None)
        length = 0 if source is None else shared[source]

        def cost(sequence: Sequence) -> tuple[bool, bool]:
            """The source itself if most of it is kept, else an empty one, else the one unused for
            longest."""
            held = sequence.length
            return sequence is not source or 2 * length < held, held > 0

        taken = min(self._free, key=cost)
        taken.take(source or taken, length)
        self._free.remove(taken)
        taken.owner, self._running[request] = request.owner, taken
        self._filling, request.started = request, time.monotonic()
        if self.sessions is not None and request.first and request.hidden is None:
            length += self.sessions.restore(taken, request.reusable, request.owner)
        request.reused = request.read = length
        self.totals.reused_tokens += length

    # Passes

    def _fill(self, request: Request, shared: bool) -> None:
        """Append a piece of the prompt; after the last one comes the first token."""
        sequence = self._running[request]
        whole = PREFILL_CHUNK if request.hurried else self.model.plan.prefill_chunk
        count = _SHARED_PIECE if shared else whole
        before, end = sequence.length, min(sequence.length + count, len(request.prompt))
        is_last = end == len(request.prompt)
        wanted = is_last and request.answer is not None and not request.scored
        row = Row(sequence, request.prompt[before:end], wanted)
        self._asking = end - before > _SHARED_PIECE
        if not self._compute([request], lambda: self.passes.prefill(row)):
            return
        self.totals.prompt_tokens += len(row.ids)
        request.read = end
        if request.hidden is not None:
            assert request.first is not None
            request.hidden(row.hidden_TD[max(0, request.first - before) :].clone())
        if request.scored and not self._score(request, row, before):
            return
        if is_last:
            self._filling, request.first_token = None, time.monotonic()
            self._accept(request, row)
        else:
            self._keep(request, sequence, len(row.ids))

    def _score(self, request: Request, row: Row, before: int) -> bool:
        """Let each row of logits of a piece score the prompt's next token; the last one chooses.
        Returns whether the answer goes on."""
        assert request.answer is not None
        scores: list[Tensor | None] = [] if before else [None]
        following = request.prompt[before + 1 - len(scores) :]
        for rows_RV in self.passes.each(row.hidden_TD):
            scores += rows_RV
            try:
                for token_id, logits_V in zip(following, scores, strict=False):
                    request.answer.score(token_id, logits_V)
            except Exception as problem:
                self._fail(request, problem)
                return False
            following, scores = following[len(scores) :], []
            row.logits_RV = rows_RV[-1:]
        return True

    def _decode(self, requests: list[Request]) -> None:
        """Append each answer's newest token, and what is drafted and comes true."""
        rows = list[Row]()
        for request in requests:
            assert request.answer is not None
            rows.append(Row(self._running[request], request.answer.ids[-1:]))
        if self._compute(requests, lambda: self.passes.decode(rows)):
            for request, row in zip(requests, rows, strict=True):
                self._accept(request, row)

    def _compute(self, requests: list[Request], run: Callable[[], None]) -> bool:
        """Whether a pass for ``requests`` came to its end.  What the world did to it ends them, and
        the next pass finds everything as it was before; a defect ends the engine."""
        self._at = requests
        try:
            run()
            return True
        except _UnwantedError:
            pass
        except Exception as problem:
            if not _is_from_outside(problem):
                raise
            for request in requests if not self._refusal else ():
                self._fail(request, problem)
        finally:
            self._at, self._asking = (), False
        return False

    def _accept(self, request: Request, row: Row) -> None:
        """Let the sampler choose from a row's logits: one token, and one more as long as it chooses
        what was drafted."""
        if request.answer is None:
            return self._finish(request, request.end("stop"))
        added = len(row.ids)
        for logits_V, drafted in zip_longest(row.logits_RV, row.draft):
            if not self._take(request, request.answer, logits_V):
                return
            if request.answer.ids[-1] != drafted or request.unwanted:
                break
            self.passes.accept(row, drafted)
            added += 1
        self._keep(request, row.sequence, added)

    def _take(self, request: Request, answer: Sampler, logits_V: Tensor) -> bool:
        """Choose the request's next token; whether the answer goes on."""
        before = len(answer.ids)
        try:
            piece = answer.take(logits_V)
        except Exception as problem:
            self._fail(request, problem)
            return False
        self.totals.answer_tokens += len(answer.ids) - before
        if piece.finish is None and self._running[request].length == self.model.plan.context:
            rest = answer.end("length")
            piece = replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)
        if piece.finish is None:
            request.emit(piece)
        else:
            self._finish(request, piece)
        return piece.finish is None

    # Ends

    def _fail(self, request: Request, problem: Exception) -> None:
        """End a request that could not be answered; the others go on."""
        request.problem = problem
        finish = "refused" if isinstance(problem, ConfigError) else "error"
        error = str(problem)
        if not _is_from_outside(problem):
            traceback.print_exception(problem)
            error = _DEFECT
        self._finish(request, request.end(finish, error))

    def _finish(self, request: Request, piece: Delta) -> None:
        sequence = self._running.pop(request, None)
        if sequence is None:
            self._waiting.remove(request)
        else:
            self._free.append(sequence)
            self._seconds += 0.2 * (time.monotonic() - request.started - self._seconds)
            self._keep(request, sequence)
        if self._filling is request:
            self._filling = None
        if self._overtaken is request:
            self._overtaken = None
        self._end(request, piece)

    def _end(self, request: Request, piece: Delta) -> None:
        count = self.totals.finished.get(piece.finish or "", 0)
        self.totals.finished[piece.finish or ""] = count + 1
        request.emit(piece)

    def _keep(self, request: Request, sequence: Sequence, added: int | None = None) -> None:
        """Keep what the request's sequence holds on disk, or the blocks that so many tokens have
        filled."""
        if self.sessions is not None and request.hidden is None:
            self.sessions.keep(sequence, request.owner, added)

    def _end_all(self) -> None:
        """End what is under way and what waits."""
        for request, sequence in self._running.items():
            if self.problem is None:
                self._keep(request, sequence)
            self._refuse(request)
        self._running.clear()
        while self._waiting:
            self._refuse(self._waiting.popleft())
        while self._calls:
            self._calls.popleft().reply.put(([], ConfigError(self._refusal)))
        self._refuse_all()

    def _refuse_all(self) -> None:
        """End what has come in."""
        with contextlib.suppress(Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, Request):
                    self._refuse(item)
                elif item is not None:
                    item.reply.put(([], ConfigError(self._refusal)))

    def _refuse(self, request: Request) -> None:
        finish, error = "shutdown", ""
        if self.problem is not None:
            finish, error = "error", "the model failed; see the server's log"
            request.problem = self.problem
        self._end(request, request.end(finish, error))


def _is_from_outside(problem: Exception) -> bool:
    """Whether the world is to blame, and not this program: a disk, a file, memory, a device."""
    if isinstance(problem, SlotmoeError | MemoryError | OSError):
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)


_ALL: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_ALL):
        engine.refuse(_FORKED)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
