"""Several answers at once from one model: continuous batching over the latent caches of a
``Runtime``.

Each sequence has a place, a latent cache within the memory plan.  One step decodes a token of every
running answer in one pass, so an expert that was brought for one serves all, then takes a piece of
one waiting prompt, so that nobody starves. What a finished answer left in its place is reused by a
later prompt of the same owner that begins with the same tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.model.answer import Answer, Piece
from slotmoe.offload.runtime import Runtime

_SHARED_PIECE = (
    64  # tokens of a prompt between two decode steps; a whole prefill pass where nobody decodes
)


class QueueFullError(Exception):
    """No place is free and as many jobs wait as may."""


@dataclass(eq=False)
class Job:
    """A prompt and where its answer goes: ``emit(piece)`` is called from the batch's thread, the
    last time with a finish.

    Besides those of ``Answer``, ``Piece.finish`` is ``shutdown``, ``error``, or ``refused`` for a
    grammar that can't be followed to its end, where the batch ended it.  Only prompts of the same
    ``owner`` share latents.  The tokens of a prompt that is ``scored`` are all computed, and noted
    in ``answer.read`` with their log-probabilities before the first piece.  Moments are
    ``time.monotonic()``.
    """

    prompt: list[int]
    answer: Answer
    emit: Callable[[Piece], None]
    owner: str = ""
    scored: bool = False
    cancelled: bool = (
        False  # set by whoever no longer wants the answer; its place is free within one step
    )
    reused: int = 0  # tokens of the prompt that were cached already
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0


@dataclass(eq=False)
class _Place:
    index: int
    tokens: list[int] = field(default_factory=list)  # whose latents are cached
    owner: str = ""
    used: float = 0.0
    job: Job | None = None


@dataclass
class Totals:
    """Counts since the start: of tokens, and of answers by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Batch:
    """Decodes the jobs that are submitted, at most ``sequences`` at once, in a thread of its own;
    ``waiting`` more may queue.

    ``ended`` is called when the thread ends, by ``close`` or because the model failed; ``problem``
    is then what failed. Nobody else may use the runtime's sequences meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        sequences: int,
        waiting: int,
        ended: Callable[[], None] = lambda: None,
    ):
        self._runtime, self._limit, self._ended = runtime, sequences + waiting, ended
        self._places = [_Place(index) for index in range(sequences)]
        self._waiting: deque[Job] = deque()
        self._filling: _Place | None = None  # whose prompt is on its way in
        self._work = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # a job's usual time from its place to its end
        self.totals = Totals()
        self.problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="slotmoe-batch", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
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
        """Answers that have a place."""
        return sum(place.job is not None for place in self._places)

    @property
    def queued(self) -> int:
        """Jobs that wait for one."""
        return len(self._waiting)

    @property
    def retry_after(self) -> int:
        """Seconds after which a place in the queue is likely free, 1 to 60."""
        return min(60, max(1, round(self._seconds / len(self._places))))

    def close(self) -> None:
        """End every answer after the step under way, and the thread."""
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
        self._leave()
        running = [
            place for place in self._places if place.job is not None and place is not self._filling
        ]
        if running:
            self._decode(running)
        with self._work:  # so that whoever submits counts a job as waiting or as running
            if self._filling is None and self._waiting and self.running < len(self._places):
                self._place(self._waiting.popleft())
        if self._filling is not None:
            self._fill(self._filling, shared=bool(running))
        self.totals.steps += 1

    def _leave(self) -> None:
        """Free the places of those who no longer want an answer."""
        for place in self._places:
            if place.job is not None and place.job.cancelled:
                self._finish(place, place.job.answer.end("cancelled"))
        with self._work:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._emit(job, job.answer.end("cancelled"))

    def _place(self, job: Job) -> None:
        """Give ``job`` a place, and in it what some place already holds of its prompt."""
        sources = (
            [] if job.scored else [place for place in self._places if place.owner == job.owner]
        )
        shared = {place.index: _common(place.tokens, job.prompt) for place in sources}
        source = max(shared, key=shared.__getitem__, default=None)
        length = shared[source] if source is not None else 0
        free = [place for place in self._places if place.job is None]
        # The source itself if most of it serves on, else an empty place, else the one unused for
        # longest.
        taken = min(
            free,
            key=lambda one: (
                one.index != source or 2 * length < len(one.tokens),
                bool(one.tokens),
                one.used,
            ),
        )
        self._runtime.keep(taken.index, length, taken.index if source is None else source)
        taken.tokens, taken.owner, taken.job = job.prompt[:length], job.owner, job
        job.reused, job.started, self._filling = length, time.monotonic(), taken
        self.totals.reused_tokens += length

    def _fill(self, place: _Place, shared: bool) -> None:
        """Take a piece of the prompt; after the last one comes the first token."""
        job, done = place.job, len(place.tokens)
        assert job is not None
        piece = job.prompt[
            done : done + (_SHARED_PIECE if shared else self._runtime.plan.prefill_chunk)
        ]
        logits_V = self._score(place, piece) if job.scored else self._append(place, piece)[0]
        self.totals.prompt_tokens += len(piece)
        if len(place.tokens) == len(job.prompt):
            self._filling, job.first = None, time.monotonic()
            self._take(place, logits_V)

    def _score(self, place: _Place, ids: list[int]) -> torch.Tensor:
        """``_append``, each row of logits judging the prompt's next token; the last row."""
        job, done = place.job, len(place.tokens)
        assert job is not None
        if done == 0:
            job.answer.score(job.prompt[0], None)
        for rows_RV in self._runtime.append_rows(place.index, ids):
            for logits_V in rows_RV.cpu():
                done += 1
                if done < len(job.prompt):
                    job.answer.score(job.prompt[done], logits_V)
        place.tokens += ids
        return rows_RV[-1]

    def _append(self, place: _Place, ids: list[int]) -> torch.Tensor:
        logits = self._runtime.append(place.index, ids)
        place.tokens += ids
        return logits

    def _decode(self, places: list[_Place]) -> None:
        ids = [place.job.answer.ids[-1] for place in places if place.job is not None]
        if len(places) == 1:
            logits_TV = self._append(places[0], ids)
        else:
            logits_TV = self._runtime.append_each([place.index for place in places], ids)
            for place, one in zip(places, ids, strict=True):
                place.tokens.append(one)
        for place, logits_V in zip(places, logits_TV.cpu(), strict=True):
            self._take(place, logits_V)

    def _take(self, place: _Place, logits_V: torch.Tensor) -> None:
        job = place.job
        assert job is not None
        before = len(job.answer.ids)
        try:
            piece = job.answer.take(logits_V.cpu())
        except SlotmoeError as problem:
            piece = job.answer.end(
                "refused" if isinstance(problem, ConfigError) else "error", str(problem)
            )
        self.totals.answer_tokens += len(job.answer.ids) - before
        if piece.finish is None and len(place.tokens) == self._runtime.context:
            rest = job.answer.end("length")
            piece = replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)
        if piece.finish is None:
            self._emit(job, piece)
        else:
            self._finish(place, piece)

    def _finish(self, place: _Place, piece: Piece) -> None:
        job, place.job, place.used = place.job, None, time.monotonic()
        assert job is not None
        if self._filling is place:
            self._filling = None
        self._seconds += 0.2 * (place.used - job.started - self._seconds)
        self._emit(job, piece)

    def _emit(self, job: Job, piece: Piece) -> None:
        if piece.finish is not None:
            self.totals.finished[piece.finish] = self.totals.finished.get(piece.finish, 0) + 1
        job.emit(piece)

    def _end_all(self) -> None:
        finish, error = (
            ("error", "the model failed; see the server's log")
            if self.problem is not None
            else ("shutdown", "")
        )
        with self._work:
            self._closing = True
            jobs = [*(place.job for place in self._places if place.job is not None), *self._waiting]
            self._waiting.clear()
        for job in jobs:
            self._emit(job, job.answer.end(finish, error))


def _common(cached: list[int], prompt: list[int]) -> int:
    """Tokens that both begin with; the prompt's last one is always computed, since its logits are
    needed."""
    limit = min(len(cached), len(prompt) - 1)
    if cached[:limit] == prompt[:limit]:
        return limit
    return next(i for i in range(limit) if cached[i] != prompt[i])
