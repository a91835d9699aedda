"""The requests under way, and a step of them: propose rows, compute them, let samplers accept.

A step is one pass, so an expert that is brought for one request serves all: over a token of every
request whose prompt is read, and over pieces of other prompts, which stand in a line
(``slotmoe.offload.policy.passes``).  The latents that a finished request leaves behind, and where
there are sessions those on disk, are reused by later prompts of its owner that begin alike.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from traceback import print_exception, walk_tb

from torch import Tensor

from slotmoe.errors import ConfigError, SlotmoeError, informs
from slotmoe.model.generate import Delta
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.passes import Passes, Row, Sequence
from slotmoe.offload.engine.requests import Request
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.policy.passes import PIECE, allowance, place, shares
from slotmoe.offload.sessions.blocks import shared_prefix
from slotmoe.offload.sessions.store import Sessions

# Where the world may fail: disks and records, sessions, devices, the system.
_PLACES = ("offload.experts.", "quant.export.", "offload.sessions.", "offload.devices.", "system.")


class UnwantedError(Exception):
    """Nobody waits for the pass or the call under way."""


@dataclass
class Totals:
    """Counts since the start: of tokens, and of requests by how they ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: Counter[str] = field(default_factory=Counter)


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
        self._line: list[Request] = []  # those of them whose prompt is on its way in
        self._at: dict[Request, Row] = {}  # what the pass under way is for
        self._logits: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()  # of a row, one by one
        self.is_long = False  # whether that pass is long enough to be asked about at each layer
        self.seconds = 1.0  # a request's usual time from its start to its end
        self.totals = Totals()

    def wants(self, arrived: Iterable[Request], reached: int) -> bool:
        """Whether the pass under way, which has ``reached`` so many tokens, is wanted; a long one
        only if none that ``arrived`` overtakes all prompts and would wait for more than is lost."""
        if self.is_long:
            tokens = sum(len(row.ids) for row in self._at.values())
            for request, row in self._at.items():
                request.read = row.sequence.length + reached * len(row.ids) // tokens
            is_early = 0 < 2 * reached < tokens  # and not behind the last layer
            if is_early and any(self._overtakes_all(request, reached) for request in arrived):
                for request in self._line:
                    request.allows -= reached
                return False
        return not all(request.unwanted for request in self._at)

    def step(self) -> None:
        """Propose rows, compute them in a pass, and let samplers accept."""
        for request in [*self.running, *self.waiting]:
            if finish := request.unwanted:
                self._finish(request, request.end(finish))
        for request in [*self.waiting]:
            if self._may_start(request):
                self.waiting.remove(request)
                try:
                    self._start(request)
                except Exception as problem:
                    self._blame(problem, request)
        rows: dict[Request, Row] = {}  # to call a type of a list or dict takes ten times as long
        for request, sequence in self.running.items():
            if request not in self._line:
                assert request.answer is not None
                rows[request] = Row(sequence, request.answer.ids[-1:])
        if self._line:
            self._add_pieces(rows)
        if self._compute(rows):
            for request, row in rows.items():
                try:
                    (self._read if row.is_prompt else self._accept)(request, row)
                except Exception as problem:
                    self._blame(problem, request)
        self.totals.steps += 1

    # Which prompts are read

    def _may_start(self, request: Request) -> bool:
        """Whether there is room, and no prompt in the line will soon hold more of this one's."""
        if len(self.running) >= self.at_once:
            return False
        held = len(request.prompt) - self._unread(request)
        return not any(
            max(held + PIECE, self.running[other].length)
            < shared_prefix(other.prompt, request.reusable)
            for other in self._line
            if other.owner == request.owner
        )

    def _left(self, request: Request) -> int:
        return len(request.prompt) - self.running[request].length

    def _place(self, left: int, costs: int) -> int:
        return place(left, costs, [(self._left(other), other.allows) for other in self._line])

    def _overtakes_all(self, request: Request, lost: int) -> bool:
        """Whether a request that starts now is read first, where so many tokens are lost by it."""
        left = self._unread(request)
        return self._may_start(request) and not self._place(left, left + PIECE + lost)

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
        """Give a request a free sequence, in it what some sequence and the disk hold of it."""
        shared = self._shared(request)
        source = max(shared, key=shared.__getitem__, default=None)
        length = 0 if source is None else shared[source]

        def cost(sequence: Sequence) -> tuple[bool, bool]:
            """The source if most of it is kept, an empty one, or the one unused for longest."""
            return sequence is not source or 2 * length < sequence.length, sequence.length > 0

        taken = min(self._free, key=cost)
        self._free.remove(taken)
        self.running[request], request.started = taken, time.monotonic()
        taken.take(source or taken, length)
        taken.owner = request.owner
        if self.sessions is not None and request.first and request.hidden is None:
            length += self.sessions.restore(taken, request.reusable, request.owner)
        request.reused = request.read = length
        self.totals.reused_tokens += length
        left = self._left(request)
        costs, request.allows = left + PIECE, allowance(left)
        at = self._place(left, costs)
        for other in self._line[at:]:
            other.allows -= costs
        self._line.insert(at, request)

    # Passes

    def _add_pieces(self, rows: dict[Request, Row]) -> None:
        """Propose the next tokens of prompts beside ``rows`` that decode."""
        budget = PIECE if rows else self._model.plan.prefill_chunk
        # From a disk, a pass over a few tokens takes as long as one over many.
        free = PIECE if self._model.experts.slots.complete else PREFILL_CHUNK
        counts = shares([self._left(request) for request in self._line], budget, free)
        self.is_long = sum(counts) > PIECE
        for request, count in zip(self._line, counts, strict=False):
            sequence, prompt = self.running[request], request.prompt
            end = sequence.length + count
            chooses = end == len(prompt) and request.answer is not None and not request.scored
            ids = prompt[sequence.length : end]
            rows[request] = Row(sequence, ids, is_prompt=True, wanted=chooses)

    def _read(self, request: Request, row: Row) -> None:
        """A piece of the prompt is appended; after the last one comes the first token."""
        sequence = row.sequence
        request.read, before = sequence.length, sequence.length - len(row.ids)
        self.totals.prompt_tokens += len(row.ids)
        if request.hidden is not None:
            request.hidden(row.hidden_TD[max(0, request.first - before) :].clone())
        if request.scored and not self._score(request, row, before):
            return
        if self._left(request):
            return self.keep(request, sequence, len(row.ids))
        self._line.remove(request)
        request.first_token = time.monotonic()
        # The next prompt may go on from here without the last token, which is where this answer
        # begins to reason; and the same prompt may come again.
        sequence.mark(sequence.length - 1)
        self._accept(request, row)

    def _score(self, request: Request, row: Row, before: int) -> bool:
        """Let each row of logits score the next token, the last one choose; whether it goes on."""
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

    def _compute(self, rows: dict[Request, Row]) -> bool:
        """Whether a pass came to its end.  What the world did to it ends its requests, and the next
        pass finds everything as it was before; a defect ends the engine."""
        self._at = rows
        try:
            if rows:
                self.passes.run([*rows.values()])
            return True
        except UnwantedError:
            pass
        except Exception as problem:
            self._blame(problem, *rows)
        finally:
            self._at, self.is_long = {}, False
        return False

    def _accept(self, request: Request, row: Row) -> None:
        """Let the sampler choose a token, and one more as long as it chooses what was drafted."""
        if (answer := request.answer) is None:
            return self._finish(request, request.end("stop"))
        if row.logits_RV is not self._logits[0]:  # one text's lie always in the same memory
            self._logits = row.logits_RV, row.logits_RV.unbind()
        added = len(row.ids)
        for logits_V, drafted in zip_longest(self._logits[1], row.draft):
            before = len(answer.ids)
            try:
                piece = answer.take(logits_V)
                self.totals.answer_tokens += len(answer.ids) - before
                if piece.finish is None:
                    request.emit(piece)
            except Exception as problem:  # of the sampler, or of who gets the answer
                return self._fail(request, problem)
            if piece.finish is not None:
                return self._finish(request, piece)
            if answer.ids[-1] != drafted or request.unwanted:
                break
            self.passes.accept(row, drafted)
            added += 1
        self.keep(request, row.sequence, added)

    # Ends

    def _blame(self, problem: Exception, *requests: Request) -> None:
        """End what meets something from outside; a defect ends the engine."""
        if not _is_from_outside(problem):
            raise problem
        for request in requests:
            self._fail(request, problem)

    def _fail(self, request: Request, problem: Exception) -> None:
        """End a request that could not be answered; the others go on."""
        request.problem = problem
        finish, error = "refused" if isinstance(problem, ConfigError) else "error", str(problem)
        if not (isinstance(problem, SlotmoeError) or _is_from_outside(problem)):
            informs(print_exception)(problem)
            error = "the answer failed; the server's log says how"
        self._finish(request, request.end(finish, error))

    def _finish(self, request: Request, piece: Delta) -> None:
        sequence = self.running.pop(request, None)
        if sequence is None:
            self.waiting.remove(request)
        else:
            self._free.append(sequence)
            self.seconds += 0.2 * (time.monotonic() - request.started - self.seconds)
            self.keep(request, sequence)
        if request in self._line:
            self._line.remove(request)
        self.end(request, piece)

    def end(self, request: Request, piece: Delta) -> None:
        self.totals.finished[piece.finish or ""] += 1
        with suppress(Exception):  # of who gets the answer, whom nothing more can be told
            request.emit(piece)

    def keep(self, request: Request, sequence: Sequence, added: int | None = None) -> None:
        """Keep on disk what a sequence holds, or the blocks that so many tokens have filled.  Where
        the world prevents it, it is computed again."""
        try:
            if added is None:
                sequence.mark(sequence.length)
            if self.sessions is not None and request.hidden is None:
                self.sessions.keep(sequence, request.owner, added)
        except Exception as problem:
            self._blame(problem)


def _is_from_outside(problem: Exception) -> bool:
    """Whether the world is to blame, and not this program: memory is short, wherever, or a place
    that deals with a disk, a record or a device says that it failed."""
    is_memory = isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem)
    if is_memory or isinstance(problem, MemoryError):
        return True
    modules = [str(frame.f_globals["__name__"]) for frame, _ in walk_tb(problem.__traceback__)]
    place = next((name for name in reversed(modules) if name.startswith("slotmoe.")), "")
    is_its_word = isinstance(problem, SlotmoeError | OSError)
    return is_its_word and f"{place}.".startswith(tuple(f"slotmoe.{name}" for name in _PLACES))
