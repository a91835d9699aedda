"""One token through a layer in few launches, on a CUDA device as two CUDA graphs: before and after
the choice of experts.

    begin   norm + query and latent projections | (query's second projection) | absorbed query, rotation, latent row into the
            cache | attention over splits of the context | their sum + value projection | output +
            residual | norm + router
    end     gate and up of the shared experts | down + routed experts' sum + residual

Shape legend as in ``slotmoe.model.network``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from slotmoe.quant.backends.graphs import Stretch
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.triton import mla as mla
from slotmoe.quant.kernels.triton import rows as rows
from slotmoe.quant.nf4 import Nf4Weight

if TYPE_CHECKING:
    from slotmoe.quant.backends.base import Weight
    from slotmoe.quant.backends.triton import TritonOps

INT8, NF4, DENSE = rows.INT8.value, rows.NF4.value, rows.DENSE.value


class Parts(NamedTuple):
    """A weight as the kernels take it."""

    kind: int
    data: Tensor
    scale: Tensor | None
    levels: Tensor | None


def parts(weight: Weight) -> Parts:
    """Raises ``TypeError`` for a weight that was prepared for other ops."""
    if isinstance(weight, Int8Weight):
        return Parts(INT8, weight.q, weight.scale, None)
    if isinstance(weight, Nf4Weight):
        return Parts(NF4, weight.codes, weight.absmax, weight.levels)
    if isinstance(weight, Tensor):
        return Parts(DENSE, weight, None, None)
    raise TypeError("a tiled matrix is for the native kernels alone")


def power(n: int, least: int = 16) -> int:
    """The least power of two that holds ``n``, as Triton wants its blocks."""
    return max(least, 1 << (n - 1).bit_length())


class Workspace:
    """The buffers of one token's step, which all layers share, on the device of ``layer``'s norms.

    ``where`` is the position and the address of the sequence's latent cache, read by the kernels,
    so that one graph serves every position and every sequence.
    """

    def __init__(self, layer: Any, sizes: tuple[int, int, int, int, int]):
        H, _, P, R, V = sizes
        D, self._device = len(layer.input_layernorm), layer.input_layernorm.device
        self.ids_1 = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.h_1D, self.middle_1D, self.x_1D, self.y_1D = (self.empty(1, D) for _ in range(4))
        self.table_1C = torch.empty(1, P // 2, dtype=torch.complex64, device=self._device)
        self.q_HW = self.empty(H, R + P)
        self.part, self.best, self.total = (
            self.empty(H, mla.SPLITS.value, width) for width in (R, 1, 1)
        )
        self.o_1X = self.empty(1, H * V)
        self.where = torch.zeros(2, dtype=torch.int64, device=self._device)
        self.set_by_step = False  # whether a ``Step`` has set ``where`` for all layers
        self._now = (0, 0)
        self._table: Tensor | None = None
        self._scratch: dict[tuple[str, int], Tensor] = {}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    def scratch(self, name: str, width: int) -> Tensor:
        """A row of ``width`` float32 values, the same for every layer that asks for it."""
        if (name, width) not in self._scratch:
            self._scratch[name, width] = self.empty(1, width)
        return self._scratch[name, width]

    def go_to(self, position: int, address: int) -> None:
        """Write down where the step is, unless that is there already."""
        for index, (new, old) in enumerate(zip((position, address), self._now, strict=True)):
            if new != old:
                self.where[index].fill_(new)
        self._now = (position, address)

    def turn(self, table_1C: Tensor) -> None:
        """Keep the rotation's table of this step; all layers bring the same tensor."""
        if table_1C is not self._table:
            self.table_1C.copy_(table_1C)
            self._table = table_1C


class Step:
    """A whole step of one token as one graph, for a network whose experts all have slots: nothing
    in it waits for the host.

    ``function(ids_1, position_1, layers_LSW)`` computes it; the position, int64 [1], is read on the
    device.  What it returns is valid until the next step.  One graph serves all caches of one
    shape; it keeps the addresses of all it has touched.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor], Any], workspace: Workspace, graph: Any
    ):
        self._function, self._own, self._graph = function, workspace, graph
        self._stretches: dict[torch.Size, Stretch] = {}

    def __call__(self, ids_1: Tensor, position: int, layers_LSW: Tensor) -> Any:
        own, shape = self._own, layers_LSW.shape
        assert layers_LSW.storage_offset() == 0  # the layers' places are counted from there
        if (
            shape not in self._stretches
        ):  # of the layers only their places in the cache matter, and all of a shape agree on those
            call = partial(self._call, layers_LSW)
            self._stretches[shape] = Stretch(call, (own.ids_1,), self._graph)
        own.go_to(position, layers_LSW.data_ptr())
        own.set_by_step = True
        try:
            return self._stretches[shape](ids_1)
        finally:
            own.set_by_step = False

    def _call(self, layers_LSW: Tensor, ids_1: Tensor) -> Any:
        return self._function(ids_1, self._own.where[:1], layers_LSW)


class TritonLayer:
    """See the module; the interface is that of ``slotmoe.model.network.FusedLayer``.  Results last
    until the next call of any layer that shares the workspace."""

    together = False  # buffers are one token's

    def __init__(
        self,
        ops: TritonOps,
        workspace: Workspace,
        layer: Any,
        sizes: tuple[int, int, int, int, int],
        eps: float,
        latent_eps: float,
        scale: float,
    ):
        self._ops, self._own, self._layer, self._sizes = ops, workspace, layer, sizes
        self._eps, self._latent_eps, self._scale = eps, latent_eps, scale
        self._before: dict[
            int, Stretch
        ] = {}  # by the layer's place in its cache, which depends on the context's size
        self._logits_1E = None if layer.gate is None else workspace.empty(1, len(layer.gate))
        after = (workspace.middle_1D, workspace.x_1D) + (
            (workspace.y_1D,) if layer.gate is not None else ()
        )
        self._after = Stretch(self._feed_forward, after, ops.graph)

    def begin(
        self, h_1D: Tensor, table_1C: Tensor, rows: Sequence[Tensor], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``slotmoe.model.network.FusedLayer``; of one sequence, whose cache is float16."""
        (rows_SW,), (position,) = rows, positions
        assert rows_SW.dtype == torch.float16 and rows_SW.is_contiguous()
        at = int(rows_SW.storage_offset()) * 2
        self._own.turn(table_1C)
        if not self._own.set_by_step:
            self._own.go_to(position, rows_SW.untyped_storage().data_ptr())
        if at not in self._before:
            self._before[at] = Stretch(
                lambda h_1D: self._attention(h_1D, at), (self._own.h_1D,), self._ops.graph
            )
        self._before[at](h_1D)
        return self._own.middle_1D, self._own.x_1D, self._logits_1E

    def end(self, h_1D: Tensor, x_1D: Tensor, y_1D: Tensor | None) -> Tensor:
        """See ``slotmoe.model.network.FusedLayer``."""
        self._after(*((h_1D, x_1D) if y_1D is None else (h_1D, x_1D, y_1D)))
        return self._own.h_1D

    def _attention(self, h_1D: Tensor, at: int) -> None:
        own, ops, layer, (H, N, P, R, _) = self._own, self._ops, self._layer, self._sizes
        norm = (layer.input_layernorm, self._eps)
        if layer.q_a_proj is None:
            q = ops.row(
                h_1D, layer.q_proj, own.scratch("both", H * (N + P) + R + P), layer.kv_a_proj, norm
            )
            latent = q[:, H * (N + P) :]
        else:
            Q = layer.q_a_proj.shape[0]
            low = ops.row(
                h_1D, layer.q_a_proj, own.scratch("low", Q + R + P), layer.kv_a_proj, norm
            )
            q, latent = own.scratch("q", H * (N + P)), low[:, Q:]
            ops.row(low, layer.q_b_proj, q, norm=(layer.q_a_layernorm, self._latent_eps))
        self._attend(q, latent, at)
        ops.row(own.o_1X, layer.o_proj, own.middle_1D, add=(h_1D,))
        norm = (layer.post_attention_layernorm, self._eps)
        if layer.gate is not None:
            assert self._logits_1E is not None
            ops.row(own.middle_1D, layer.gate, self._logits_1E, norm=norm, normed=own.x_1D)
        else:
            own.x_1D.copy_(ops.rms_norm(own.middle_1D, *norm))

    def _attend(self, q: Tensor, latent: Tensor, at: int) -> None:
        """From the projections to each head's value, through the cache."""
        own, layer, (H, N, P, R, V) = self._own, self._layer, self._sizes
        _, kv_b, scale, _ = parts(layer.kv_b_proj)
        BR, BV, splits, scaled = 64, 16, mla.SPLITS.value, scale is not None
        mla.queries[(triton.cdiv(R, BR), H + 1)](
            q, latent, torch.view_as_real(own.table_1C), layer.kv_a_layernorm, self._latent_eps, kv_b, scale, own.where, at, own.q_HW,
            H, N, P, R, N + V, SCALED=scaled, WIDTH=power(N), BR=BR, LATENT=power(R), PAIRS=power(P // 2),
        )  # fmt: skip
        mla.attend[(splits, triton.cdiv(H, 16), 1)](
            own.q_HW, None, own.where, at, 0, self._scale, own.part, own.best, own.total, 1, H, R, P,
            WHERE=True, HEADS=16, LATENT=power(R), ROPE=power(P),
        )  # fmt: skip
        mla.values[(triton.cdiv(V, BV), H, 1)](
            own.part, own.best, own.total, own.where, kv_b, scale, own.o_1X, H, N, V, R,
            PARTS=True, SCALED=scaled, LATENT=power(R), BV=BV,
        )  # fmt: skip

    def _feed_forward(self, h_1D: Tensor, x_1D: Tensor, *y_1D: Tensor) -> None:
        own, mlp = self._own, self._layer.mlp
        if mlp is None:
            torch.add(h_1D, y_1D[0], out=own.h_1D)
            return
        act = self._ops.row_gate_up(
            x_1D, mlp.gate_proj, mlp.up_proj, own.scratch("act", mlp.gate_proj.shape[0])
        )
        self._ops.row(act, mlp.down_proj, own.h_1D, add=(h_1D, *y_1D))
