"""Continuous batching: several requests at once on the sequences of one ``Runtime``.

One step decodes a token of every running request in one pass, so an expert that is brought for one
serves all, then takes a piece of one waiting prompt, so that none starves.  A short prompt
overtakes a long one, which gets a piece after each that did.  The latents that a finished request
leaves behind are reused by a later prompt of the same owner that begins with the same tokens; where
the runtime has sessions, also those that are on disk.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequenced
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.model.generate import Answer, Delta
from slotmoe.offload.devices.pages import give_back_memory
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sequence import Sequence, shared_prefix

# Tokens of a prompt between two decode steps; a whole prefill pass where nothing decodes.
_SHARED_PIECE = 64
IDLE_SECONDS = 1.0  # without a request, after which free memory goes back to the system
_DEFECT = "the answer failed; the server's log says how"


class _UnwantedError(Exception):
    """Nobody waits for the pass under way."""


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
    hurried: bool = False  # others waited for its prompt: it is read in short passes from then on
    cancelled: bool = False  # set when the answer is no longer wanted: it ends within one step
    reused: int = 0  # tokens of the prompt that were cached already
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0


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
        self._free = runtime.sequences[:sequences]  # the one that is unused for longest first
        self._owners = dict.fromkeys(self._free, "")  # whose latents each sequence holds
        self._running: dict[Job, Sequence] = {}
        self._waiting: deque[Job] = deque()
        self._filling: Job | None = None  # whose prompt is on its way in
        self._overtaken: Job | None = None  # whose prompt goes on behind that one
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
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def retry_after(self) -> int:
        """Seconds after which the queue likely has room, 1 to 60."""
        return min(60, max(1, round(self._seconds / len(self._owners))))

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
            while self._has_work():
                self._step()
        except BaseException as problem:
            self.problem = problem
        finally:
            self._end_all()
            self._ended()

    def _has_work(self) -> bool:
        """Wait for some; False where there will be none.  What answers have left behind is given
        back to the system soon after the last one."""
        with self._work:
            patience: float | None = IDLE_SECONDS
            while not (self._closing or self._waiting or self.running):
                if not self._work.wait(patience) and patience is not None:
                    give_back_memory()
                    patience = None
            return not self._closing

    def _step(self) -> None:
        self._end_cancelled()
        reading = self._filling, self._overtaken
        decoding = [job for job in self._running if job not in reading]
        if decoding:
            self._decode(decoding)
        with self._work:  # so that ``submit`` counts a request as waiting or as running
            starting = self._next()
            if starting is not None:
                self._waiting.remove(starting)
                self._overtaken = self._filling
                self._start(starting)
        if self._filling is not None:
            if starting is not None:
                self._restore(self._filling)
            self._fill(self._filling, shared=bool(decoding))
        self.totals.steps += 1

    def _end_cancelled(self) -> None:
        for job in [job for job in self._running if job.cancelled]:
            self._finish(job, job.answer.end("cancelled"))
        with self._work:
            cancelled = [job for job in self._waiting if job.cancelled]
            for job in cancelled:
                self._waiting.remove(job)
        for job in cancelled:
            self._emit(job, job.answer.end("cancelled"))

    def _next(self) -> Job | None:
        """The request that starts in this step."""
        if self._filling is not None:
            return self._overtaking(list(self._waiting), self._filling)
        if self._overtaken is not None:  # it gets a piece before it is overtaken again
            self._filling, self._overtaken = self._overtaken, None
            return None
        return self._waiting[0] if self._waiting and self._free else None

    def _overtaking(self, jobs: list[Job], ahead: Job) -> Job | None:
        """Which of ``jobs`` overtakes the request ``ahead``: one that a short pass reads, where
        that one needs more."""
        left = len(ahead.prompt) - self._running[ahead].length
        if not self._free or self._overtaken is not None or left <= PREFILL_CHUNK:
            return None
        return next((job for job in jobs if self._unread(job) <= PREFILL_CHUNK), None)

    def _unread(self, job: Job) -> int:
        """Tokens of the request's prompt that no sequence holds."""
        return len(job.prompt) - max(self._shared(job).values(), default=0)

    def _shared(self, job: Job) -> dict[Sequence, int]:
        """How many tokens of the request's prompt the sequences hold that it may use."""
        # The prompt's last token is computed in any case: its logits are needed.
        return {
            sequence: shared_prefix(sequence.tokens, job.prompt[:-1])
            for sequence, owner in self._owners.items()
            if owner == job.owner and not job.scored
        }

    def _start(self, job: Job) -> None:
        """Give a request a free sequence, and in it what some sequence holds of its prompt."""
        shared = self._shared(job)
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
        self._owners[taken], self._running[job] = job.owner, taken
        job.reused, job.started, self._filling = length, time.monotonic(), job

    def _restore(self, job: Job) -> None:
        """Add what is on disk of the prompt, behind what is in memory."""
        if self._runtime.sessions is not None and not job.scored:
            sequence, wanted = self._running[job], job.prompt[:-1]
            job.reused += self._runtime.sessions.restore(sequence, wanted, job.owner)
        self.totals.reused_tokens += job.reused

    def _keep(self, job: Job, sequence: Sequence, added: int | None = None) -> None:
        """Keep what the request's sequence holds on disk, or the blocks that so many tokens have
        filled."""
        if self._runtime.sessions is not None:
            self._runtime.sessions.keep(sequence, job.owner, added)

    def _fill(self, job: Job, shared: bool) -> None:
        """Append a piece of the prompt; after the last one comes the first token."""
        sequence = self._running[job]
        whole = PREFILL_CHUNK if job.hurried else self._runtime.plan.prefill_chunk
        count = _SHARED_PIECE if shared else whole
        piece = job.prompt[sequence.length : sequence.length + count]
        try:
            with self._wanted(job, len(piece)):
                if job.scored:
                    logits_V = self._score(job, piece)
                else:
                    logits_V = self._in_ram(sequence.append(piece))[0]
        except _UnwantedError:
            return
        self.totals.prompt_tokens += len(piece)
        if logits_V is None:
            return
        self._keep(job, sequence, added=len(piece))
        if sequence.length == len(job.prompt):
            self._filling, job.first = None, time.monotonic()
            self._take(job, logits_V)

    @contextmanager
    def _wanted(self, job: Job, tokens: int) -> Iterator[None]:
        """End a pass of several steps at the next gate, by ``_UnwantedError``, when the request is
        cancelled or the scheduler closed, or when another one may overtake it.  That happens once,
        since the next passes are short."""
        seen = 0

        def look(route: object) -> None:
            nonlocal seen
            with self._work:
                arrived = list(self._waiting)[seen:]
            seen += len(arrived)
            job.hurried |= self._overtaking(arrived, job) is not None
            if job.cancelled or self._closing or job.hurried:
                raise _UnwantedError

        if tokens <= PREFILL_CHUNK:
            yield
            return
        stop = self._runtime.model.quantized("serve").on_layer(look)
        try:
            yield
        finally:
            stop()

    def _score(self, job: Job, ids: list[int]) -> Tensor | None:
        """Append a piece of the prompt; each row of logits scores the prompt's next token.  Returns
        the last row, or None if the answer failed."""
        sequence = self._running[job]
        scores: list[Tensor | None] = [None] if sequence.length == 0 else []
        following = job.prompt[sequence.length + 1 - len(scores) :]
        for computed_RV in sequence.append_rows(ids):
            rows_RV = self._in_ram(computed_RV)
            scores += rows_RV
            try:
                for token_id, logits_V in zip(following, scores, strict=False):
                    job.answer.score(token_id, logits_V)
                following, scores = following[len(scores) :], []
            except Exception:
                self._fail(job)
                return None
        return rows_RV[-1]

    def _decode(self, jobs: list[Job]) -> None:
        sequences = [self._running[job] for job in jobs]
        logits_TV = self._runtime.append_each(sequences, [job.answer.ids[-1] for job in jobs])
        for job, sequence, logits_V in zip(jobs, sequences, self._in_ram(logits_TV), strict=True):
            before = sequence.length - 1
            self._take(job, logits_V)
            while job in self._running and not job.cancelled:
                if (followed_1V := sequence.follow(job.answer.ids[-1])) is None:
                    break
                self._take(job, self._in_ram(followed_1V)[0])
            self._keep(job, sequence, added=sequence.length - before)

    def _in_ram(self, logits_TV: Tensor) -> Tensor:
        """By no copy engine of a GPU, which may have records before them."""
        return self._runtime.model.device.download(logits_TV).get()

    def _take(self, job: Job, logits_V: Tensor) -> None:
        """Choose the request's next token."""
        before = len(job.answer.ids)
        try:
            piece = job.answer.take(logits_V)
        except SlotmoeError as problem:
            finish = "refused" if isinstance(problem, ConfigError) else "error"
            piece = job.answer.end(finish, str(problem))
        except Exception:
            return self._fail(job)
        self.totals.answer_tokens += len(job.answer.ids) - before
        if piece.finish is None and self._running[job].length == self._runtime.context:
            rest = job.answer.end("length")
            piece = replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)
        if piece.finish is None:
            self._emit(job, piece)
        else:
            self._finish(job, piece)

    def _fail(self, job: Job) -> None:
        """End an answer in which an exception came up that nobody foresaw; the others go on."""
        traceback.print_exc()
        self._finish(job, Delta("", (), "error", error=_DEFECT))

    def _finish(self, job: Job, piece: Delta) -> None:
        sequence = self._running.pop(job)
        self._free.append(sequence)
        if self._filling is job:
            self._filling = None
        if self._overtaken is job:
            self._overtaken = None
        self._seconds += 0.2 * (time.monotonic() - job.started - self._seconds)
        self._emit(job, piece)
        self._keep(job, sequence)

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
            jobs = [*self._running, *self._waiting]
            self._waiting.clear()
        for job in jobs:
            self._emit(job, job.answer.end(finish, error))
        if self.problem is None:
            for job, sequence in self._running.items():
                self._keep(job, sequence)
