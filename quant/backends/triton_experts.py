"""The routed experts of a few tokens, a layer's in one call or in several.

A layer at which a decoder has stopped has its input, its choice and its outputs in buffers that
stay, so each call for it is a captured graph.  The first call computes its shared expert too: on a
GPU it is behind the choice, beside which the host then gets what is missing.

Shapes: T tokens, D hidden_size, I the shared expert's width, E experts, K experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slotmoe.quant.backends import triton_rows as launch
from slotmoe.quant.backends.graphs import Captured, Capturing
from slotmoe.quant.backends.triton_rows import Routed, Shared


class Buffers:
    """Memory for a few tokens that stays where it is, so that graphs find it; zeros at first."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}

    def __call__(
        self, name: str, T: int, *shape: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[T, *shape], the same memory for each T."""
        if (name, T, shape) not in self._kept:
            if T < launch.ROWS:
                made = self(name, launch.ROWS, *shape, dtype=dtype)[:T]
            else:
                made = torch.zeros(T, *shape, dtype=dtype, device=self._device)
            self._kept[name, T, shape] = made
        return self._kept[name, T, shape]


@dataclass
class Awaited:
    """A layer that waits for its routed experts: their input, its choice, its shared expert, and
    where, [T, I] and [T, D], that one's outputs go; None when it has been launched."""

    x_TD: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    shared: Shared | None
    outputs: tuple[Tensor, Tensor] | None


class FewExperts:
    """``shared`` is one of the decoder's layers', whose kinds of weights are alike."""

    def __init__(self, device: torch.device):
        self.buffers = Buffers(device)
        self.shared: Shared | None = None
        self.awaited: Awaited | None = None
        self._graphs: dict[tuple[int, ...], Captured[None]] = {}

    def outputs(self, T: int, D: int, K: int) -> Tensor:
        """See ``TorchBackend.outputs``."""
        return self.buffers("outputs", T, K, D)

    def __call__(self, routed: Routed, limit: float, graph: Capturing | None) -> None:
        """See ``TorchBackend.experts``."""
        x_TD, _, slots_E, indices_TK, y_TKD = routed
        shared, outputs, waits = self.shared, None, self.awaited
        if waits is not None and _same(waits.x_TD, x_TD):
            shared, outputs, waits.outputs = waits.shared, waits.outputs, None
            graph = graph if _same(waits.indices_TK, indices_TK) else None
        else:
            graph = None

        def function(x_TD: Tensor) -> None:
            launch.experts(routed, shared, outputs, None, limit)

        key = slots_E.data_ptr(), x_TD.data_ptr(), y_TKD.data_ptr(), len(x_TD), outputs is None
        self._run(key, function, x_TD, graph)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor, graph: Capturing | None) -> Tensor:
        """See ``TorchBackend.weighted_sum``; it lasts until the next."""
        T, _, D = y_TKD.shape
        out_TD, waits = self.buffers("sum", T, D), self.awaited
        lasting = waits is not None and _same(waits.weights_TK, weights_TK)

        def function(y_TKD: Tensor) -> None:
            launch.weighted_sum(y_TKD, weights_TK, out_TD)

        self._run((y_TKD.data_ptr(), T), function, y_TKD, graph if lasting else None)
        return out_TD

    def _run(
        self,
        key: tuple[int, ...],
        function: Callable[[Tensor], None],
        given: Tensor,
        graph: Capturing | None,
    ) -> None:
        """Call ``function``, as a captured graph where ``graph`` makes one."""
        if graph is None:
            return function(given)
        if key not in self._graphs:
            self._graphs[key] = Captured(given, graph)
        self._graphs[key](function, given)


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr()
