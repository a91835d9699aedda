"""The one way into a pass: sequences with their next tokens and drafts, whatever the pass is for.

Shapes: T tokens, D hidden_size, R rows, V vocab_size.
"""

import ctypes
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain

import torch
from torch import Tensor

from slotmoe.model.attention import new_state
from slotmoe.network.state import SequenceState
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.policy.passes import MEMORY, MOST_DRAFTED, RATE, Draft, Drafting, NGrams
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.sizes import format_size

EACH_AT_ONCE = 16  # rows of logits made at once, each as it is alone
_HEAD_CHANCE = 0.7  # that the head's token comes, before any was seen
_AGAIN = 32  # tokens after which a head that does not pay is asked again
_NONE = torch.empty(0, 0)
Compute = Callable[[Callable[[], Tensor]], Tensor]


class HeadDrafts:
    """What the head that predicts one token more (``MtpHead``) expects of one sequence.

    A row needs the residual stream behind a token, which is only there when a pass has just
    computed it.  Where one is missing the head begins anew behind it: it sees less of the text
    then, and its drafts are worse, never the text.  ``compute`` runs a step on the device.
    """

    def __init__(self, model: LoadedModel, compute: Compute, drafting: Drafting):
        assert model.head is not None
        self._model, self._head, self._drafting = model, model.head, drafting
        self._compute = compute
        rows, empty = model.backend.latent_row, model.device.empty
        self._state = new_state(self._head.config, model.plan.context, rows, empty)
        self._first = 0  # the token that the state's first row is behind
        self._tokens: list[int] = []  # the text that its rows are of
        self._chance, self._counted = _HEAD_CHANCE, 0  # that its token comes, by so many
        self._seconds, self._waited = 0.0, 0  # of asking; tokens since
        self._expected: tuple[int, int] | None = None  # where, and which token

    def read(self, tokens: list[int], hidden_RD: Tensor) -> Tensor:
        """Append rows for the R tokens before the last one of ``tokens``; ``hidden_RD`` is the
        residual stream behind them, which is overwritten.  Returns the stream behind the head."""
        first = len(tokens) - 1 - len(hidden_RD)
        row = first - self._first
        goes_on = self._tokens[: first + 1] == tokens[: first + 1]
        if not (goes_on and 0 <= row <= self._state.length and self._state.reach(row) == row):
            self._first, row = first, 0
        self._state.cut(row)
        ids_R = self._model.device.upload(torch.tensor(tokens[first + 1 :]))

        def step() -> Tensor:
            self._model.experts.go_on(len(ids_R))
            return self._head.forward(hidden_RD, ids_R, self._state)

        stream_RD = self._compute(step)
        self._tokens = tokens
        return stream_RD

    def draft(self, tokens: list[int], hidden_RD: Tensor) -> Draft:
        """The token that is expected behind ``tokens``, and how likely it is; none where asking
        does not pay.  ``hidden_RD`` as in ``read``."""
        if self._expected is not None and self._expected[0] < len(tokens):
            place, token = self._expected
            self._counted = min(self._counted + 1, MEMORY)
            self._chance += ((tokens[place] == token) - self._chance) / (self._counted + 1)
        self._expected, self._waited = None, self._waited + 1
        if self._waited <= _AGAIN and not self._drafting.pays(self._chance, self._seconds):
            return []
        started = time.perf_counter()
        stream_RD = self.read(tokens, hidden_RD)
        expected = int(self._compute(lambda: self._head.head(stream_RD))[-1].argmax())
        spent = time.perf_counter() - started
        self._expected, self._waited = (len(tokens), expected), 0
        self._seconds += RATE * (spent - self._seconds) if self._seconds else spent
        return [(expected, self._chance)]


class Sequence:
    """A text on its way: a state, and the ``tokens`` that have made it, in a list that only grows;
    an id of -1 is unknown.  Rows of the state behind them are garbage: a pass that failed
    may have written them.  ``head`` drafts or, where it is None, what the text has repeated."""

    def __init__(self, state: SequenceState, head: HeadDrafts | None):
        self.state, self._head = state, head
        self.tokens: list[int] = []
        self.owner = ""  # whose latents they are
        # The residual stream after the last layer behind the last token of a pass, and behind those
        # that were drafted after it and accepted since, float32 [R, D]; None where it is not known.
        self.hidden_RD: Tensor | None = None
        self._drafted_RD = _NONE
        self._ngrams, self._anew = NGrams(), True

    @property
    def length(self) -> int:
        """Tokens that it holds.  Another thread may ask."""
        return len(self.tokens)

    def append(self, ids: list[int], hidden_TD: Tensor) -> None:
        """A pass has computed ``ids`` and a draft, with the residual stream ``hidden_TD``."""
        self.tokens += ids
        if self._head is not None:
            self._drafted_RD = hidden_TD[len(ids) - 1 :].clone()
            self.hidden_RD = self._drafted_RD[:1]

    def read(self, before_RD: Tensor | None, hidden_TD: Tensor) -> None:
        """The head reads a prompt's appended tokens; else it reads where it drafts.  ``hidden_TD``
        is the residual stream behind them, ``before_RD`` what was known before them."""
        parts = [part for part in (before_RD, hidden_TD[:-1]) if part is not None and len(part)]
        if self._head is not None and parts:
            self._head.read([*self.tokens], torch.cat(parts))

    def accept(self, id: int) -> None:
        """The next token of the draft has come."""
        self.tokens.append(id)
        if self.hidden_RD is not None:
            self.hidden_RD = self._drafted_RD[: len(self.hidden_RD) + 1]

    def draft(self, id: int, most: int) -> Draft:
        """What may come behind ``id``, as far as there is room, and how likely each token is."""
        room = self.state.context - len(self.tokens) - 1
        if self._head is None:
            self._ngrams.read(self.tokens, id, self._anew)
            self._anew = False
            return self._ngrams.draft(min(most, room))
        if room < 1 or self.hidden_RD is None:
            return []
        return self._head.draft([*self.tokens, id], self.hidden_RD.clone())

    def mark(self, length: int) -> None:
        """A text ends at ``length``, at most 16 tokens ago, and may be gone on with later."""
        self.state.cut(self.length)
        self.state.mark(self.state.reach(length))

    def take(self, source: "Sequence", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which may be this sequence and whose
        state can be cut to them."""
        self._anew = True
        if source is not self:
            self.tokens = []  # its rows go, and a copy may end half-way
            self.state.copy(source.state, length)
        elif length == self.length:
            return
        self.tokens, self.hidden_RD = source.tokens[:length], None

    def resume(self, ids: list[int], snapshot: Tensor) -> None:
        """Append ``ids``, whose rows were ``put`` into the state, and the ``snapshot`` behind."""
        self.state.cut(self.length)
        self.state.resume(self.length + len(ids), snapshot)
        self.tokens, self.hidden_RD = self.tokens + ids, None

    def fill(self, depth: int, backend: TorchBackend) -> None:
        """Become ``depth`` unknown tokens with random rows: for measurements."""
        self.state.fill(depth, backend.store_latents)
        self.tokens, self.hidden_RD = [-1] * depth, None


@dataclass(slots=True)
class Row:
    """A sequence's part of a pass, which appends ``ids`` to it and computes ``draft`` behind them:
    a piece of a prompt, or the newest token of an answer, behind which a pass may draft.

    ``wanted`` says whether the logits of the last id and of the draft are: ``logits_RV``, float32
    in RAM.  ``hidden_TD`` is the residual stream behind the ids, until the next pass.
    """

    sequence: Sequence
    ids: list[int]
    is_prompt: bool = False
    wanted: bool = True
    draft: list[int] = field(default_factory=list)
    hidden_TD: Tensor = _NONE
    logits_RV: Tensor = _NONE


class Passes:
    """Runs and counts passes of an open model.  ``drafting`` is None where nothing is drafted."""

    def __init__(self, model: LoadedModel):
        self._model = model
        ways_out = f"a lower --vram (now {format_size(model.plan.budget)}) or --context"
        # What a step gives, computed; raises ``DeviceError``.
        self.compute = partial(model.device.run, ways_out=ways_out)
        self.drafting = Drafting(model.plan.drafted) if model.draft[0] != "off" else None
        self._ids = lru_cache(maxsize=MOST_DRAFTED)(_memory)
        self.tokens = dict.fromkeys(("prefill_tokens", "decode_tokens"), 0)
        self.seconds = dict.fromkeys(("prefill_seconds", "decode_seconds"), 0.0)

    def sequences(self) -> list[Sequence]:
        """One for each state."""
        model, drafting = self._model, self.drafting
        if model.head is None or drafting is None:
            return [Sequence(state, None) for state in model.states]
        return [
            Sequence(state, HeadDrafts(model, self.compute, drafting)) for state in model.states
        ]

    def run(self, rows: Sequenced[Row]) -> None:
        """A pass over ``rows`` and drafts; where it reads a prompt, its seconds are of prefill."""
        if (timer := self._model.network.timer) is not None:
            timer.begin()
        began, drafting, drafted = time.perf_counter(), self.drafting, 0
        prompts = [row for row in rows if row.is_prompt]
        decoding = [row for row in rows if not row.is_prompt] if prompts else rows
        read = sum(len(row.ids) for row in prompts) if prompts else 0
        # With more rows the pass would go another way, and give other bits.
        room = self._model.network.rows - read - len(decoding)
        if drafting is not None and decoding and room > 0:
            drafts = [row.sequence.draft(row.ids[0], drafting.most) for row in decoding]
            if any(drafts):
                chances = [[chance for _, chance in draft] for draft in drafts]
                lengths = drafting.lengths(chances, room)
                drafted = sum(lengths)
                for row, draft, length in zip(decoding, drafts, lengths, strict=True):
                    row.draft = [token for token, _ in draft[:length]]
        drafted_at = time.perf_counter()
        self._run(rows, prompts)
        ended = time.perf_counter()
        if drafting is not None and decoding:
            seconds = None if read else ended - drafted_at
            drafting.measured(len(decoding) + drafted, drafted, seconds)
        kind = "prefill" if read else "decode"
        self.tokens["prefill_tokens"] += read
        self.tokens["decode_tokens"] += len(decoding)
        self.seconds[f"{kind}_seconds"] += ended - began
        if timer is not None:
            timer.end(kind, read + len(decoding))

    def accept(self, row: Row, id: int) -> None:
        """The next token of a row's draft has come."""
        row.sequence.accept(id)
        self.tokens["decode_tokens"] += 1
        if self._model.network.timer is not None:
            self._model.network.timer.accepted()
        assert self.drafting is not None
        self.drafting.accepted += 1

    def each(self, hidden_RD: Tensor) -> Iterable[Tensor]:
        """Logits of rows, a few at a time, float32 in RAM, each bitwise as it is alone."""
        model = self._model
        for rows_RD in hidden_RD.split(EACH_AT_ONCE):
            logits_RV = self.compute(partial(model.network.head_each, rows_RD))
            yield model.device.download(logits_RV).get()

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits of the residual stream after the last layer, float32 [R, V] on the device."""
        return self.compute(partial(self._model.network.head, hidden_RD))

    def _run(self, rows: Sequenced[Row], prompts: Sequenced[Row]) -> None:
        """One pass.  One that raises leaves all sequences as they were."""
        model, network = self._model, self._model.network
        ids, states = [row.ids + row.draft for row in rows], [row.sequence.state for row in rows]
        counts, tokens = [*map(len, ids)], [*chain.from_iterable(ids)]
        memory_T, written_T = self._ids(len(tokens))
        written_T[:] = tokens  # type: ignore[assignment]
        ids_T = model.device.upload(memory_T)

        def step() -> tuple[Tensor, Tensor | None]:
            for row, state in zip(rows, states, strict=True):
                if state.length != len(row.sequence.tokens):
                    state.cut(len(row.sequence.tokens))
            model.experts.begin(len(tokens), len(rows))
            if model.experts.lookahead is not None:
                model.experts.lookahead.read_tables(tokens)
            hidden_TD = network.forward(ids_T, states, counts)
            if not prompts:
                return hidden_TD, network.head_each(hidden_TD)
            parts = zip(rows, hidden_TD.split(counts), strict=True)
            wanted = [hidden_RD[len(row.ids) - 1 :] for row, hidden_RD in parts if row.wanted]
            return hidden_TD, network.head_each(torch.cat(wanted)) if wanted else None

        hidden_TD, logits_RV = self.compute(step)
        wanted_RV, at = _NONE if logits_RV is None else model.device.download(logits_RV).get(), 0
        if len(rows) == 1 and not prompts:
            rows[0].logits_RV = wanted_RV
            return rows[0].sequence.append(rows[0].ids, hidden_TD)
        read = [(row, row.sequence.hidden_RD) for row in prompts]
        for row, hidden_RD in zip(rows, hidden_TD.split(counts), strict=True):
            row.sequence.append(row.ids, hidden_RD)
            row.hidden_TD = hidden_RD[: len(row.ids)]
            if row.wanted:
                row.logits_RV = wanted_RV[at : at + 1 + len(row.draft)]
                at += 1 + len(row.draft)
        for row, before_RD in read:  # with all sequences as long as their states
            row.sequence.read(before_RD, row.hidden_TD)


def _memory(count: int) -> tuple[Tensor, "ctypes.Array[ctypes.c_int64]"]:
    """For so many ids of a pass, also as what takes a list soonest."""
    written = (ctypes.c_int64 * count)()
    return torch.frombuffer(written, dtype=torch.int64), written
