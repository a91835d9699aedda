"""Reading ahead: the predictor names experts, the prefetcher decides which of them to read.

Shapes: T tokens, D hidden_size, M MoE layers, E routed experts, K experts a token.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from torch import Tensor

from slotmoe.offload.devices.device import Download
from slotmoe.offload.policy.prefetch import Prefetcher, Target
from slotmoe.offload.predictor import NextGate, Predictor


class Lookahead(Prefetcher):
    """A prefetcher that guesses each MoE layer's experts before its gate has chosen.

    ``active`` says, for the present pass, whether guesses pay.  While they do, the engine stops
    after every gate, so that a layer's input can correct the guesses for the next one.
    """

    def __init__(
        self,
        predictor: NextGate | Predictor,
        rows: int,
        experts: int,
        record_bytes: int,
        target: Target,
        bandwidth: Callable[[], float],
        download: Callable[[Tensor], Download],
        tables: Sequence[Tensor] = (),
    ):
        """``download`` is the device's; ``tables``, int32 [vocab, K] in RAM, have the experts of
        each token in the first MoE layers; the rest is as in ``Prefetcher``."""
        super().__init__(rows, experts, record_bytes, target, bandwidth)
        self._predictor, self._download = predictor, download
        self._token_scores_ME: Tensor | None = None
        self._tables = tables
        self.active = False

    def begin(self) -> None:
        """A pass begins: forget all guesses."""
        self.reset()
        self._token_scores_ME = None
        self.active = self.pays()

    def read_tables(self, ids: list[int]) -> None:
        """Read first what gates that go by the token choose for ``ids``; no guess replaces that."""
        for row, table in enumerate(self._tables):
            uses = Counter(table[ids].flatten().tolist())
            self._guess(row, [expert for expert, _ in uses.most_common()], "table")
        self.more(-1)

    def guess_token(self, embedding_D: Tensor, hidden_D: Tensor) -> None:
        """Guess all layers' experts for one token, from its embedding and the last hidden state
        before it, float32 [D] each, and start to read."""
        started = time.perf_counter()
        self._token_scores_ME = self._predictor.token_scores(embedding_D, hidden_D)
        likely = self._likely(self._token_scores_ME)
        for row, experts in enumerate(likely):
            if row >= len(self._tables):
                self._guess(row, experts, "token")
        self._cost.add((time.perf_counter() - started) / len(likely))
        self.more(-1)

    def guess_layer(self, row: int, layers: int, x_TD: Tensor) -> None:
        """Guess MoE layer ``row + 1``'s experts by layer ``row``'s input, and start to read."""
        if len(self._tables) <= row + 1 < layers and self.active:
            self._guess(row + 1, self._next(row, x_TD), "layer")
        self.more(row)

    def _next(self, row: int, x_TD: Tensor) -> list[int]:
        if len(x_TD) > 1:  # what any token is likely to use, most tokens first
            scores_TE = self._predictor.layer_scores(row, x_TD)
            uses = Counter(chain.from_iterable(self._likely(scores_TE)))
            return [expert for expert, _ in uses.most_common()]
        started = time.perf_counter()
        scores_ME, known = self._token_scores_ME, None
        if scores_ME is not None and row + 1 < len(scores_ME):
            known = scores_ME[row + 1]
        (experts,) = self._likely(self._predictor.layer_scores(row, x_TD[0], known)[None])
        self._cost.add(time.perf_counter() - started)
        return experts

    def _likely(self, scores_RE: Tensor) -> list[list[int]]:
        return self._predictor.likely(self._download(scores_RE).get())

    def _guess(self, row: int, experts: list[int], horizon: str) -> None:
        self.guess(row, [row * self._experts + expert for expert in experts], horizon)
