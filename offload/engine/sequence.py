"""A text on its way: tokens and their state, and a draft.  D hidden_size, R rows, T tokens."""

import torch
from torch import Tensor

from slotmoe.border import Backend
from slotmoe.model.state import SequenceState
from slotmoe.offload.engine.mtp_drafts import HeadDrafts
from slotmoe.offload.policy.drafts import MOST_DRAFTED, NGrams
from slotmoe.quant.backends.base import Prepared


class Sequence:
    """One state and the tokens that have made it, a new list after each change; an id of -1 is
    unknown.  What a pass that did not end has written behind them means nothing.  ``head`` drafts,
    or, where it is None, what the text has repeated before."""

    def __init__(self, state: SequenceState, head: HeadDrafts | None):
        self.state, self._head = state, head
        self.tokens: list[int] = []
        self.owner = ""  # whose latents they are
        # The residual stream after the last layer behind the last token of a pass, and behind those
        # that were drafted after it and accepted since, float32 [R, D]; None where it is not known.
        self.hidden_RD: Tensor | None = None
        self._drafted_RD = torch.empty(0, 0)
        self._ngrams = NGrams()

    @property
    def length(self) -> int:
        """Tokens that it holds.  Another thread may ask."""
        return len(self.tokens)

    def append(self, ids: list[int], hidden_TD: Tensor) -> None:
        """A pass has computed ``ids`` and a draft, with the residual stream ``hidden_TD``."""
        self.tokens, self._drafted_RD = self.tokens + ids, hidden_TD[len(ids) - 1 :].clone()
        self.hidden_RD = self._drafted_RD[:1]

    def read(self, before_RD: Tensor | None, hidden_TD: Tensor) -> None:
        """The head reads a prompt's appended tokens; else it reads where it drafts.  ``hidden_TD``
        is the residual stream behind them, ``before_RD`` what was known before them."""
        parts = [part for part in (before_RD, hidden_TD[:-1]) if part is not None and len(part)]
        if self._head is not None and parts:
            self._head.read(self.tokens, torch.cat(parts))

    def accept(self, id: int) -> None:
        """The next token of the draft has come."""
        assert self.hidden_RD is not None
        self.tokens = [*self.tokens, id]
        self.hidden_RD = self._drafted_RD[: len(self.hidden_RD) + 1]

    def draft(self, id: int) -> tuple[list[int], list[float]]:
        """What may come behind ``id``, as far as there is room, and how likely each token is."""
        tokens, room = [*self.tokens, id], self.state.context - self.length - 1
        if self._head is None:
            self._ngrams.read(tokens)
            return self._ngrams.draft(min(MOST_DRAFTED, room))
        if room < 1 or self.hidden_RD is None:
            return [], []
        return self._head.draft(tokens, self.hidden_RD.clone())

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens, to which the state can be cut."""
        if length < len(self.tokens):
            self.tokens, self.hidden_RD = self.tokens[:length], None

    def mark(self, length: int) -> None:
        """A text ends at ``length``, at most 16 tokens ago, and may be gone on with later."""
        self.state.cut(self.length)
        self.state.mark(self.state.reach(length))

    def take(self, source: "Sequence", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which may be this sequence."""
        if source is self:
            self.cut(length)
        else:
            self.state.copy(source.state, length)
            self.tokens, self.hidden_RD = source.tokens[:length], None

    def resume(self, ids: list[int], snapshot: Tensor) -> None:
        """Append ``ids``, whose rows were ``put`` into the state, and the ``snapshot`` behind."""
        self.state.cut(self.length)
        self.state.resume(self.length + len(ids), snapshot)
        self.tokens, self.hidden_RD = self.tokens + ids, None

    def fill(self, depth: int, backend: Backend[Prepared]) -> None:
        """Become ``depth`` unknown tokens with random rows: for measurements."""
        self.state.fill(depth, backend.store_latents)
        self.tokens, self.hidden_RD = [-1] * depth, None
