"""Continuous batching: several requests at once on the sequences of one ``Runtime``.

One step decodes a token of every running request in one pass, so an expert that is brought for one
serves all, then takes a piece of one waiting prompt, so that none starves.  The latents that a
finished request leaves behind are reused by a later prompt of the same owner that begins with the
same tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field, replace

from torch import Tensor

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.model.generate import Answer, Delta
from slotmoe.offload.runtime import Runtime, Sequence, shared_prefix

# Tokens of a prompt between two decode steps; a whole prefill pass where nothing decodes.
_SHARED_PIECE = 64


class QueueFullError(Exception):
    """No sequence is free and as many requests wait as may."""


@dataclass(eq=False)
class Job:
    """A prompt and where its answer goes: the scheduler's thread calls ``emit`` with each piece,
    the last time with a finish.

    Besides those of ``Answer``, ``Delta.finish`` is ``shutdown``, ``error``, or ``refused`` for a
    grammar that can't be followed to its end, where the scheduler ended it.  Only prompts of the
    same ``owner`` share latents.  The tokens of a prompt that is ``scored`` are all computed, and
    noted in ``answer.read`` with their log-probabilities before the first piece.  Times are
    ``time.monotonic()``.
    """

    prompt: list[int]
    answer: Answer
    emit: Callable[[Delta], None]
    owner: str = ""
    scored: bool = False
    cancelled: bool = False  # set when the answer is no longer wanted: it ends within one step
    reused: int = 0  # tokens of the prompt that were cached already
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0


@dataclass(eq=False)
class _Place:
    """A sequence, the request that runs on it, and whose latents it holds."""

    sequence: Sequence
    owner: str = ""
    used: float = 0.0
    job: Job | None = None

    @property
    def running(self) -> Job:
        assert self.job is not None
        return self.job


@dataclass
class Totals:
    """Counts since the start: of tokens, and of requests by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Runs the requests that are submitted, one on each of the runtime's sequences, in a thread of
    its own; ``waiting`` more may queue.

    ``ended`` is called when the thread ends, by ``close`` or because the model failed; ``problem``
    is then what failed.  Nothing else may use the runtime's sequences meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        sequences: int,
        waiting: int,
        ended: Callable[[], None] = lambda: None,
    ):
        self._runtime, self._limit, self._ended = runtime, sequences + waiting, ended
        self._places = [_Place(sequence) for sequence in runtime.sequences[:sequences]]
        self._waiting: deque[Job] = deque()
        self._filling: _Place | None = None  # whose prompt is on its way in
        self._work = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # a request's usual time from its start to its end
        self.totals = Totals()
        self.problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="slotmoe-scheduler", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequenced[Job]) -> None:
        """Queue all of ``jobs`` or none.  Raises ``QueueFullError``."""
        with self._work:
            if self._closing or not self._thread.is_alive():
                raise QueueFullError
            if self.running + len(self._waiting) + len(jobs) > self._limit:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._work.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests that have a sequence."""
        return sum(place.job is not None for place in self._places)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def retry_after(self) -> int:
        """Seconds after which the queue likely has room, 1 to 60."""
        return min(60, max(1, round(self._seconds / len(self._places))))

    def close(self) -> None:
        """End every request after the present step, and the thread."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Ask for that, without waiting."""
        with self._work:
            self._closing = True
            self._work.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._work:
                    while not (self._closing or self._waiting or self.running):
                        self._work.wait()
                    if self._closing:
                        return
                self._step()
        except BaseException as problem:
            self.problem = problem
        finally:
            self._end_all()
            self._ended()

    def _step(self) -> None:
        self._end_cancelled()
        running = [p for p in self._places if p.job is not None and p is not self._filling]
        if running:
            self._decode(running)
        with self._work:  # so that ``submit`` counts a request as waiting or as running
            if self._filling is None and self._waiting and self.running < len(self._places):
                self._start(self._waiting.popleft())
        if self._filling is not None:
            self._fill(self._filling, shared=bool(running))
        self.totals.steps += 1

    def _end_cancelled(self) -> None:
        for place in self._places:
            if place.job is not None and place.job.cancelled:
                self._finish(place, place.job.answer.end("cancelled"))
        with self._work:
            cancelled = [job for job in self._waiting if job.cancelled]
            for job in cancelled:
                self._waiting.remove(job)
        for job in cancelled:
            self._emit(job, job.answer.end("cancelled"))

    def _start(self, job: Job) -> None:
        """Give a request a free sequence, and in it what some sequence holds of its prompt."""
        source, length = None, 0
        for place in self._places if not job.scored else ():
            # The prompt's last token is computed in any case: its logits are needed.
            shared = shared_prefix(place.sequence.tokens, job.prompt[:-1])
            if place.owner == job.owner and (source is None or shared > length):
                source, length = place, shared

        def cost(place: _Place) -> tuple[bool, bool, float]:
            """The source itself if most of it is kept, else an empty one, else the one unused for
            longest."""
            held = place.sequence.length
            return place is not source or 2 * length < held, bool(held), place.used

        taken = min((place for place in self._places if place.job is None), key=cost)
        taken.sequence.take((source or taken).sequence, length)
        taken.owner, taken.job = job.owner, job
        job.reused, job.started, self._filling = length, time.monotonic(), taken
        self.totals.reused_tokens += length

    def _fill(self, place: _Place, shared: bool) -> None:
        """Append a piece of the prompt; after the last one comes the first token."""
        job, sequence = place.running, place.sequence
        count = _SHARED_PIECE if shared else self._runtime.plan.prefill_chunk
        piece = job.prompt[sequence.length : sequence.length + count]
        logits_V = self._score(place, piece) if job.scored else sequence.append(piece)[0]
        self.totals.prompt_tokens += len(piece)
        if sequence.length == len(job.prompt):
            self._filling, job.first = None, time.monotonic()
            self._take(place, logits_V)

    def _score(self, place: _Place, ids: list[int]) -> Tensor:
        """Append a piece of the prompt; each row of logits scores the prompt's next token.  Returns
        the last row."""
        job, position = place.running, place.sequence.length
        if position == 0:
            job.answer.score(job.prompt[0], None)
        for rows_RV in place.sequence.append_rows(ids):
            for logits_V in rows_RV.cpu():
                position += 1
                if position < len(job.prompt):
                    job.answer.score(job.prompt[position], logits_V)
        return rows_RV[-1]

    def _decode(self, places: list[_Place]) -> None:
        ids = [place.running.answer.ids[-1] for place in places]
        if len(places) == 1:
            logits_TV = places[0].sequence.append(ids)
        else:
            logits_TV = self._runtime.append_each([place.sequence for place in places], ids)
        for place, logits_V in zip(places, logits_TV.cpu(), strict=True):
            self._take(place, logits_V)

    def _take(self, place: _Place, logits_V: Tensor) -> None:
        """Choose the request's next token."""
        job = place.running
        before = len(job.answer.ids)
        try:
            piece = job.answer.take(logits_V.cpu())
        except SlotmoeError as problem:
            finish = "refused" if isinstance(problem, ConfigError) else "error"
            piece = job.answer.end(finish, str(problem))
        self.totals.answer_tokens += len(job.answer.ids) - before
        if piece.finish is None and place.sequence.length == self._runtime.context:
            rest = job.answer.end("length")
            piece = replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)
        if piece.finish is None:
            self._emit(job, piece)
        else:
            self._finish(place, piece)

    def _finish(self, place: _Place, piece: Delta) -> None:
        job = place.running
        place.job, place.used = None, time.monotonic()
        if self._filling is place:
            self._filling = None
        self._seconds += 0.2 * (place.used - job.started - self._seconds)
        self._emit(job, piece)

    def _emit(self, job: Job, piece: Delta) -> None:
        if piece.finish is not None:
            count = self.totals.finished.get(piece.finish, 0)
            self.totals.finished[piece.finish] = count + 1
        job.emit(piece)

    def _end_all(self) -> None:
        finish, error = "shutdown", ""
        if self.problem is not None:
            finish, error = "error", "the model failed; see the server's log"
        with self._work:
            self._closing = True
            running = [place.job for place in self._places if place.job is not None]
            jobs = [*running, *self._waiting]
            self._waiting.clear()
        for job in jobs:
            self._emit(job, job.answer.end(finish, error))
