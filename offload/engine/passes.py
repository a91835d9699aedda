"""The one way into a pass: sequences with their next tokens, whatever the pass is for.  Shapes: T
tokens, D hidden_size, R rows, V vocab_size."""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.mtp_drafts import HeadDrafts
from slotmoe.offload.engine.sequence import Sequence
from slotmoe.offload.policy.drafts import Drafting
from slotmoe.sizes import format_size

EACH_AT_ONCE = 16  # rows of logits made at once, each as it is alone
_NONE = torch.empty(0, 0)


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
        self._ways_out = f"a lower --vram (now {format_size(model.plan.budget)}) or --context"
        self.drafting = Drafting(model.plan.drafted) if model.draft[0] != "off" else None
        self.tokens = dict.fromkeys(("prefill_tokens", "decode_tokens"), 0)
        self.seconds = dict.fromkeys(("prefill_seconds", "decode_seconds"), 0.0)

    def sequences(self) -> list[Sequence]:
        """One for each state."""
        model, drafting = self._model, self.drafting
        if model.head is None or drafting is None:
            return [Sequence(state, None) for state in model.states]
        heads = (HeadDrafts(model, self.compute, drafting) for _ in model.states)
        return [*map(Sequence, model.states, heads)]

    def run(self, rows: Sequenced[Row]) -> None:
        """A pass over ``rows`` and drafts; where it reads a prompt, its seconds are of prefill."""
        timer = self._model.network.timer
        if timer is not None:
            timer.begin()
        started = time.perf_counter()
        decoding = [row for row in rows if not row.is_prompt]
        read = sum(len(row.ids) for row in rows if row.is_prompt)
        # With more rows the pass would go another way, and give other bits.
        room = self._model.network.rows - read - len(decoding)
        if self.drafting is not None and decoding and room > 0:
            drafts = [row.sequence.draft(row.ids[0]) for row in decoding]
            lengths = self.drafting.lengths([chances for _, chances in drafts], room)
            for row, (tokens, _), length in zip(decoding, drafts, lengths, strict=True):
                row.draft = tokens[:length]
        drafted_at = time.perf_counter()
        self._run(rows)
        if self.drafting is not None and decoding:
            count = sum(1 + len(row.draft) for row in decoding)
            seconds = None if read else time.perf_counter() - drafted_at
            self.drafting.measured(count, count - len(decoding), seconds)
        kind = "prefill" if read else "decode"
        self.tokens["prefill_tokens"] += read
        self.tokens["decode_tokens"] += len(decoding)
        self.seconds[f"{kind}_seconds"] += time.perf_counter() - started
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
        """``logits`` of rows, a few at a time, in RAM, each bitwise as it is alone."""
        for rows_RD in hidden_RD.split(EACH_AT_ONCE):
            yield self._model.device.download(self.logits(rows_RD, each=True)).get()

    def logits(self, hidden_RD: Tensor, each: bool = False) -> Tensor:
        """Logits, float32 [R, V] on the device; with ``each`` a row is bitwise as it is alone."""
        network = self._model.network
        head = network.head_each if each else network.head
        return self.compute(lambda: head(hidden_RD))

    def compute(self, step: Callable[[], Tensor]) -> Tensor:
        """What ``step`` gives, computed.  Raises ``DeviceError``."""
        return self._model.device.run(step, self._ways_out)

    def _run(self, rows: Sequenced[Row]) -> None:
        """One pass.  One that raises leaves all sequences as they were."""
        model = self._model
        ids = [[*row.ids, *row.draft] for row in rows]
        counts = [*map(len, ids)]
        ids_T = model.device.upload(torch.tensor([id for row in ids for id in row]))
        states = [row.sequence.state for row in rows]

        def step() -> Tensor:
            for row in rows:
                row.sequence.state.cut(row.sequence.length)
            guesses, ahead = model.experts.begin(len(ids_T), len(rows)), model.experts.lookahead
            if ahead is not None:
                ahead.read_tables([*chain.from_iterable(ids)])
                hidden_RD = rows[0].sequence.hidden_RD
                if guesses and hidden_RD is not None:  # the token, and the hidden state before it
                    embedding_1D = model.backend.embed(ids_T, model.network.embed_tokens)
                    last_1D = model.network.collapse(hidden_RD[-1:])
                    ahead.guess_token(embedding_1D[0], last_1D[0])
            return model.network.forward(ids_T, states, counts)

        hidden_TD = self.compute(step)
        wanted, read = list[Tensor](), list[tuple[Row, Tensor | None]]()
        for row, hidden_RD in zip(rows, hidden_TD.split(counts), strict=True):
            read += [(row, row.sequence.hidden_RD)] if row.is_prompt else []
            row.sequence.append(row.ids, hidden_RD)
            row.hidden_TD = hidden_RD[: len(row.ids)]
            wanted += [hidden_RD[len(row.ids) - 1 :]] if row.wanted else []
        for row, before_RD in read:  # with all sequences as long as their states
            row.sequence.read(before_RD, row.hidden_TD)
        if not wanted:
            return
        wanted_RD = hidden_TD if len(wanted) == len(hidden_TD) else torch.cat(wanted)
        logits_RV = model.device.download(self.logits(wanted_RD, each=len(wanted_RD) > 1)).get()
        parts = logits_RV.split([*map(len, wanted)])
        for row, part_RV in zip((row for row in rows if row.wanted), parts, strict=True):
            row.logits_RV = part_RV
