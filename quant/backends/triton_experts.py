"""The routed experts of a few tokens, a layer's in one call or in several.

A layer at which a decoder has stopped has its input, its choice and its outputs in buffers that
stay, so each call for it is a captured graph.  The first call computes its shared expert too: on a
GPU it is behind the choice, beside which the host then gets what is missing.

Shapes: T tokens, D hidden_size, I the shared expert's width, E experts, K experts a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slotmoe.border import Pending
from slotmoe.quant.backends import triton_rows as launch
from slotmoe.quant.backends.graphs import Captured, Capturing, CudaGraphs
from slotmoe.quant.backends.triton_rows import Routed, Shared


class Buffers:
    """Memory for a few tokens that stays where it is, so that graphs find it; zeros at first."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}

    def __call__(self, key: str, T: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T, *shape], the same memory for each T."""
        if (key, T, shape) not in self._kept:
            if T < launch.ROWS:
                made = self(key, launch.ROWS, *shape, dtype=dtype)[:T]
            else:
                made = torch.zeros(T, *shape, dtype=dtype, device=self._device)
            self._kept[key, T, shape] = made
        return self._kept[key, T, shape]


class FewExperts:
    """``graph`` captures the graphs of a decode step; with None its kernels are launched singly.
    ``awaited`` is a layer that waits for its routed experts, and its shared one, without outputs
    when it has been launched; ``shared`` that of any layer, whose kinds of weights are alike."""

    def __init__(self, device: torch.device):
        self.buffers = Buffers(device)
        self.graph: Capturing | None = CudaGraphs() if device.type == "cuda" else None
        self.shared: Shared | None = None
        self.awaited: tuple[Pending, Shared | None] | None = None
        self._graphs: dict[tuple[int, ...], Captured[None]] = {}

    def __call__(self, routed: Routed, limit: float) -> None:
        """See ``TorchBackend.experts``."""
        x_TD, _, slots_E, indices_TK, y_TKD = routed
        shared, lasting = self.shared, False
        if self.awaited is not None and _same(self.awaited[0].x_TD, x_TD):
            choice, shared = self.awaited
            self.awaited = choice, shared and shared._replace(outputs=None)
            lasting = _same(choice.indices_TK, indices_TK)
        first = shared is not None and shared.outputs is not None

        def function(x_TD: Tensor) -> None:
            launch.experts(routed, shared, None, limit)

        key = slots_E.data_ptr(), x_TD.data_ptr(), y_TKD.data_ptr(), len(x_TD), first
        self._run(key, function, x_TD, lasting)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """See ``TorchBackend.weighted_sum``; it lasts until the next."""
        T, _, D = y_TKD.shape
        out_TD, waits = self.buffers("sum", T, D), self.awaited
        lasting = waits is not None and _same(waits[0].weights_TK, weights_TK)

        def function(y_TKD: Tensor) -> None:
            launch.weighted_sum(y_TKD, weights_TK, out_TD)

        self._run((y_TKD.data_ptr(), T), function, y_TKD, lasting)
        return out_TD

    def _run(
        self, key: tuple[int, ...], function: Callable[[Tensor], None], given: Tensor, lasting: bool
    ) -> None:
        """Call ``function``, of ``lasting`` tensors as a captured graph if ``graph`` makes one."""
        if self.graph is None or not lasting:
            return function(given)
        if key not in self._graphs:
            self._graphs[key] = Captured(given, self.graph)
        self._graphs[key](function, given)


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr()
