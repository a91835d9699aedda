"""The reference path: an unquantized checkpoint, all experts in memory.

Shapes: T tokens, D hidden_size, M MoE layers, E routed experts, K experts a token.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from slotmoe.model.names import expert_name
from slotmoe.quant.backends.base import Prepared, TorchBackend
from slotmoe.quant.export.layout import PROJECTIONS


class ResidentExperts:
    """Routed experts of an unquantized checkpoint, all in memory: the network's ``experts``, and
    the records that its backend multiplies with, row ``layer index * E + expert``.  ``using`` says
    when a pass has to end early."""

    def __init__(
        self,
        weights: Mapping[str, Prepared],
        layers: Sequence[int],
        experts: int,
        backend: TorchBackend,
    ):
        self._weights, self._layers, self._experts = weights, layers, experts
        self._backend = backend
        self.look: Callable[[], None] = lambda: None
        self._slots_ME = torch.arange(len(layers) * experts, dtype=torch.int32).view(-1, experts)

    def weights(self, slot: int) -> tuple[Prepared, ...]:
        """Gate, up and down projection."""
        row, expert = divmod(slot, self._experts)
        names = (expert_name(self._layers[row], expert, name) for name in PROJECTIONS)
        return tuple(self._weights[name] for name in names)

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        slots_E = self._slots_ME[self._layers.index(layer)].to(x_TD.device)
        self._backend.experts_of(self.weights, x_TD, slots_E, indices_TK, y_TKD)
        self.look()
        return self._backend.weighted_sum(y_TKD, weights_TK)

    def slot_table(self) -> None:
        """No backend computes them by itself."""

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        """Never called: see ``slot_table``."""
