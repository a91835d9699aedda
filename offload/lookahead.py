"""Reading ahead: the predictor names experts, the prefetcher decides which of them to read.

Shapes: T tokens, D hidden_size, M MoE layers, E routed experts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from slotmoe.offload.policy.prefetch import Accuracy, Prefetcher, total


class Predictor(Protocol):
    """Scores of experts before their gate has chosen; the higher, the likelier.  See
    ``slotmoe.offload.predictor``."""

    def token_scores(self, embedding_D: Tensor, hidden_D: Tensor) -> Tensor:
        """The experts of all MoE layers, or the first ones, from a token's embedding and the last
        hidden state before it: float32 [at most M, E]."""

    def layer_scores(self, row: int, x: Tensor, token_scores: Tensor | None = None) -> Tensor:
        """Experts of MoE layer ``row + 1``, from the input of layer ``row``, [D] or [T, D], and the
        token's scores for that layer, if any: float32 [E] or [T, E]."""

    def likely(self, scores_ME: Tensor) -> list[list[int]]:
        """Each layer's experts worth guessing, the best first."""


class Lookahead:
    """Guesses each MoE layer's experts before its gate has chosen, and reads them.

    ``active`` says, for the present pass, whether guesses pay.  While they do, the engine stops
    after every gate, so that a layer's input can correct the guesses for the next one.
    """

    def __init__(self, predictor: Predictor, prefetcher: Prefetcher, experts: int):
        self._predictor, self._prefetcher, self._experts = predictor, prefetcher, experts
        self._token_scores_ME: Tensor | None = None
        self.active = False

    def begin(self) -> None:
        """A pass begins: forget all guesses."""
        self._prefetcher.reset()
        self._token_scores_ME = None
        self.active = self._prefetcher.pays()

    def guess_token(self, embedding_D: Tensor, hidden_D: Tensor) -> None:
        """Guess all layers' experts for one token, from its embedding and the last hidden state
        before it, float32 [D] each, and start to read."""
        started = time.perf_counter()
        self._token_scores_ME = self._predictor.token_scores(embedding_D, hidden_D)
        likely = self._predictor.likely(self._token_scores_ME)
        for row, experts in enumerate(likely):
            self._prefetcher.guess(row, self._ids(row, experts), "token")
        self._prefetcher.cost((time.perf_counter() - started) / len(likely))
        self._prefetcher.pump(-1)

    def guess_layer(self, row: int, layers: int, x_TD: Tensor) -> None:
        """Guess the experts of MoE layer ``row + 1`` from the input of layer ``row``, and start to
        read."""
        if row + 1 < layers and self.active:
            self._prefetcher.guess(row + 1, self._ids(row + 1, self._next(row, x_TD)), "layer")
        self._prefetcher.pump(row)

    def _next(self, row: int, x_TD: Tensor) -> list[int]:
        if len(x_TD) > 1:  # what any token is likely to use, most tokens first
            scores_TE = self._predictor.layer_scores(row, x_TD)
            uses = Counter(chain.from_iterable(self._predictor.likely(scores_TE)))
            return [expert for expert, _ in uses.most_common()]
        started = time.perf_counter()
        scores_ME, known = self._token_scores_ME, None
        if scores_ME is not None and row + 1 < len(scores_ME):
            known = scores_ME[row + 1]
        experts = self._predictor.likely(self._predictor.layer_scores(row, x_TD[0], known)[None])
        self._prefetcher.cost(time.perf_counter() - started)
        return experts[0]

    def chosen(self, row: int, expert_ids: Collection[int], missing: int) -> None:
        """The gate of MoE layer ``row`` has chosen; reads that this refutes are given up."""
        self._prefetcher.asked(row, expert_ids, missing)

    def more(self, row: int) -> None:
        """Staging slots have become free: read on."""
        self._prefetcher.pump(row)

    def idle(self) -> None:
        """All demands of a layer are met."""
        self._prefetcher.idle()

    def stats(self) -> dict[str, Any]:
        """Counts by horizon (``slotmoe.offload.policy.prefetch.Accuracy``)."""
        return {name: asdict(counts) for name, counts in self._prefetcher.accuracy.items()}

    def by_layer(self) -> list[Accuracy]:
        """What became of the guesses for each MoE layer, of both horizons together."""
        return [total(both) for both in zip(*self._prefetcher.by_row.values(), strict=True)]

    def _ids(self, row: int, experts: list[int]) -> list[int]:
        return [row * self._experts + expert for expert in experts]
