"""The requests under way, and one step of them: propose rows, compute them in a pass, let samplers
accept.

A step decodes a token of every request whose prompt is read in one pass, so an expert that is
brought for one serves all, then takes a piece of one waiting prompt, so that none starves.  A short
prompt overtakes a long one, which gets a piece after each that did.  The latents that a finished
request leaves behind are reused by a later prompt of the same owner that begins with the same
tokens; where there are sessions, also those that are on disk.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from torch import Tensor

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.model.generate import Delta
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.passes import Passes, Row
from slotmoe.offload.engine.requests import Request, Sampler
from slotmoe.offload.engine.sequence import Sequence
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.sessions.blocks import shared_prefix
from slotmoe.offload.sessions.store import Sessions

# Tokens of a prompt between two decode steps; a whole prefill pass where nothing decodes.
_SHARED_PIECE = 64
_DEFECT = "the answer failed; the server's log says how"


class UnwantedError(Exception):
    """Nobody waits for the pass or the call under way."""


@dataclass
class Totals:
    """Counts since the start: of tokens, and of requests by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Batch:
    """Requests on the model's sequences, ``at_once`` of them at most.  Only the engine's thread has
    it.  ``sessions`` is where latents are kept on disk, None for nowhere."""

    def __init__(self, model: LoadedModel):
        self._model, self.passes = model, Passes(model)
        self.sequences = self.passes.sequences()
        self._free = [*self.sequences]  # the one that is unused for longest first
        self.at_once = len(self._free)
        self.sessions: Sessions | None = None
        self.running: dict[Request, Sequence] = {}
        self.waiting: deque[Request] = deque()
        self._filling: Request | None = None  # whose prompt is on its way in
        self._overtaken: Request | None = None  # whose prompt goes on behind that one
        self._at: Collection[Request] = ()  # what the pass under way is for
        self.is_long = False  # whether that pass is long enough to be asked about at each layer
        self.seconds = 1.0  # a request's usual time from its start to its end
        self.totals = Totals()

    def wants(self, arrived: Iterable[Request], reached: int) -> bool:
        """Whether the pass under way, which has ``reached`` so many tokens, is wanted.  One over
        much of a prompt is not where one of those that have ``arrived`` may overtake it; that
        happens once, since the next passes are short."""
        wanted = not all(request.unwanted for request in self._at)
        for request in self._at if self.is_long else ():
            request.read = self.running[request].length + reached
            request.hurried |= self._overtaking(arrived, request) is not None
            wanted = wanted and not request.hurried
        return wanted

    def step(self) -> None:
        """Propose rows, compute them in a pass, and let samplers accept: first of all that decode,
        then of one prompt."""
        self._end_unwanted()
        reading = self._filling, self._overtaken
        decoding = [request for request in self.running if request not in reading]
        if decoding:
            self._decode(decoding)
        if (starting := self._next()) is not None:
            self.waiting.remove(starting)
            self._overtaken = self._filling
            self._start(starting)
        if self._filling is not None:
            self._fill(self._filling, shared=bool(decoding))
        self.totals.steps += 1

    def _end_unwanted(self) -> None:
        for request in [*self.running, *self.waiting]:
            if finish := request.unwanted:
                self._finish(request, request.end(finish))

    # Which prompt is read

    def _next(self) -> Request | None:
        """The request that starts in this step."""
        if self._filling is not None:
            return self._overtaking(self.waiting, self._filling)
        if self._overtaken is not None:  # it gets a piece before it is overtaken again
            self._filling, self._overtaken = self._overtaken, None
            return None
        return self.waiting[0] if self.waiting and self._has_room() else None

    def _has_room(self) -> bool:
        return len(self.running) < self.at_once

    def _overtaking(self, requests: Iterable[Request], ahead: Request) -> Request | None:
        """Which of ``requests`` overtakes the request ``ahead``: one that a short pass reads, where
        that one needs more."""
        left = len(ahead.prompt) - self.running[ahead].length
        if not self._has_room() or self._overtaken is not None or left <= PREFILL_CHUNK:
            return None
        return next((one for one in requests if self._unread(one) <= PREFILL_CHUNK), None)

    def _unread(self, request: Request) -> int:
        """Tokens of the request's prompt that no sequence holds."""
        return len(request.prompt) - max(self._shared(request).values(), default=0)

    def _shared(self, request: Request) -> dict[Sequence, int]:
        """How many tokens of the request's prompt it may take of each sequence."""
        return {
            sequence: sequence.state.reach(shared_prefix(sequence.tokens, request.reusable))
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
        taken.owner, self.running[request] = request.owner, taken
        self._filling, request.started = request, time.monotonic()
        if self.sessions is not None and request.first and request.hidden is None:
            length += self.sessions.restore(taken, request.reusable, request.owner)
        request.reused = request.read = length
        self.totals.reused_tokens += length

    # Passes

    def _fill(self, request: Request, shared: bool) -> None:
        """Append a piece of the prompt; after the last one comes the first token."""
        sequence = self.running[request]
        whole = PREFILL_CHUNK if request.hurried else self._model.plan.prefill_chunk
        count = _SHARED_PIECE if shared else whole
        before, end = sequence.length, min(sequence.length + count, len(request.prompt))
        is_last = end == len(request.prompt)
        wanted = is_last and request.answer is not None and not request.scored
        row = Row(sequence, request.prompt[before:end], wanted)
        self.is_long = end - before > _SHARED_PIECE
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
            # The next prompt may go on from here without the last token, which is where this
            # answer begins to reason; and the same prompt may come again.
            sequence.mark(end - 1)
            self._accept(request, row)
        else:
            self.keep(request, sequence, len(row.ids))

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
            rows.append(Row(self.running[request], request.answer.ids[-1:]))
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
        except UnwantedError:
            pass
        except Exception as problem:
            if not _is_from_outside(problem):
                raise
            for request in requests:
                self._fail(request, problem)
        finally:
            self._at, self.is_long = (), False
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
        self.keep(request, row.sequence, added)

    def _take(self, request: Request, answer: Sampler, logits_V: Tensor) -> bool:
        """Choose the request's next token; whether the answer goes on."""
        before = len(answer.ids)
        try:
            piece = answer.take(logits_V)
        except Exception as problem:
            self._fail(request, problem)
            return False
        self.totals.answer_tokens += len(answer.ids) - before
        if piece.finish is None and self.running[request].length == self._model.plan.context:
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
        sequence = self.running.pop(request, None)
        if sequence is None:
            self.waiting.remove(request)
        else:
            self._free.append(sequence)
            sequence.mark(sequence.length)
            self.seconds += 0.2 * (time.monotonic() - request.started - self.seconds)
            self.keep(request, sequence)
        if self._filling is request:
            self._filling = None
        if self._overtaken is request:
            self._overtaken = None
        self.end(request, piece)

    def end(self, request: Request, piece: Delta) -> None:
        count = self.totals.finished.get(piece.finish or "", 0)
        self.totals.finished[piece.finish or ""] = count + 1
        request.emit(piece)

    def keep(self, request: Request, sequence: Sequence, added: int | None = None) -> None:
        """Keep what the request's sequence holds on disk, or the blocks that so many tokens have
        filled."""
        if self.sessions is not None and request.hidden is None:
            self.sessions.keep(sequence, request.owner, added)


def _is_from_outside(problem: Exception) -> bool:
    """Whether the world is to blame, and not this program: a disk, a file, memory, a device."""
    if isinstance(problem, SlotmoeError | MemoryError | OSError):
        return True
    return isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
