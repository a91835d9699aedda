"""Reading ahead: the next layers' gates name experts, the prefetcher decides which to read.

Shapes: T tokens, D hidden_size, E routed experts, K experts a token.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.layers import as_tensor
from slotmoe.model.names import EXPERTS_OF, GATE, LOGIT_BIAS, POST_NORM, layer_tensor
from slotmoe.offload.devices.device import Download
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.quant.backends.base import Prepared, TorchBackend

_RANKS = 6  # guesses of a token for a layer; later ones are hardly better than chance


class Lookahead(Prefetcher):
    """A prefetcher that guesses each MoE layer's experts before its gate has chosen: by its norm
    and gate on the residual stream of the layer before.

    RMSNorm is scale-free, so the residual itself is not needed: dividing the present norm's weight
    out of its output and multiplying the next one's in gives what the next norm would give.

    ``active`` says, for the present pass, whether guesses pay.  While they do, the engine stops
    after every gate, so that a layer's input tells the guesses for the next one.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Prepared],
        backend: TorchBackend,
        record_bytes: int,
        target: Slots,
        bandwidth: Callable[[], float],
        download: Callable[[Tensor], Download],
    ):
        """``download`` is the device's; the rest is as in ``Prefetcher``."""
        layers, experts = config.moe_layers, config.n_routed_experts
        super().__init__(len(layers), experts, record_bytes, target, bandwidth)
        layers = layers[: len(layers) - config.mtp]  # nothing is guessed of that head
        norms = [as_tensor(weights[layer_tensor(layer, POST_NORM)]) for layer in layers]
        self._ratios = [after / before.where(before != 0, 1.0) for before, after in pairwise(norms)]
        self._gates = [
            (weights[layer_tensor(layer, GATE)], weights.get(layer_tensor(layer, LOGIT_BIAS)))
            for layer in layers
        ]
        # Int32 [vocab, K] in RAM: the experts of each token in the first MoE layers, where gates go
        # by the token.
        names = (layer_tensor(layer, EXPERTS_OF) for layer in range(config.num_hash_layers))
        self._tables = [as_tensor(weights[name]).cpu() for name in names]
        self._backend, self._download = backend, download
        self._top_k, self.active = min(config.num_experts_per_tok, _RANKS), False

    def begin(self) -> None:
        """A pass begins: forget all guesses."""
        self.reset()
        self.active = self.pays()

    def read_tables(self, ids: list[int]) -> None:
        """Read first what gates that go by the token choose for ``ids``; no guess replaces that."""
        for moe_layer, table in enumerate(self._tables):
            uses = Counter(table[ids].flatten().tolist())
            self._guess(moe_layer, [expert for expert, _ in uses.most_common()], "table")
        self.more(-1)

    def guess_layer(self, moe_layer: int, x_TD: Tensor) -> None:
        """Guess the experts of the layer behind ``moe_layer`` by the latter's input, and start to
        read."""
        if len(self._tables) <= moe_layer + 1 < len(self._gates) and self.active:
            started = time.perf_counter()
            experts = self._likely(moe_layer + 1, x_TD * self._ratios[moe_layer])
            if len(x_TD) == 1:
                self._cost.add(time.perf_counter() - started)
            self._guess(moe_layer + 1, experts, "layer")
        self.more(moe_layer)

    def _likely(self, moe_layer: int, x_TD: Tensor) -> list[int]:
        """The experts that any token is likely to use of a layer whose gate sees this, those of
        most tokens first."""
        gate, bias = self._gates[moe_layer]
        logits_TE = self._backend.linear(x_TD, gate)
        logits_TE = logits_TE if bias is None else logits_TE + as_tensor(bias)
        best_TK = self._download(logits_TE).get().topk(self._top_k, dim=-1).indices
        return [expert for expert, _ in Counter(best_TK.flatten().tolist()).most_common()]

    def _guess(self, moe_layer: int, experts: list[int], horizon: str) -> None:
        self.guess(moe_layer, [moe_layer * self._experts + expert for expert in experts], horizon)
