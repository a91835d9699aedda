"""One token through the layers in few launches, as CUDA graphs on a CUDA device.

Where every expert has a slot, one graph holds all layers: nothing in it waits for the host.  Else a
layer is two graphs, before and after the host knows the choice of experts:

    begin   norm + query and latent projections | (query's second projection) | absorbed query,
            rotation, latent row into the cache | attention over splits of the context | their sum +
            value projection | output + residual | norm + router
    end     gate and up of the shared experts | down + routed experts' sum + residual

Shapes as in ``slotmoe.model.network``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from slotmoe.quant.backends.base import SlotTable
from slotmoe.quant.backends.graphs import Captured
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.triton import mla, rows

INT8, DENSE = rows.INT8.value, rows.DENSE.value


class Operand(NamedTuple):
    """A weight as the kernels take it."""

    kind: int
    data: Tensor
    scale: Tensor | None
    levels: Tensor | None


def operand(weight: Any) -> Operand:
    """Raises ``TypeError`` for a weight that was prepared for another backend."""
    if isinstance(weight, Int8Weight):
        return Operand(INT8, weight.q, weight.scale, None)
    if isinstance(weight, CodedWeight):
        return Operand(weight.kind, weight.codes, weight.scales, weight.levels)
    if isinstance(weight, Tensor):
        return Operand(DENSE, weight, None, None)
    raise TypeError("a tiled matrix is for the native kernels alone")


def power(n: int) -> int:
    """The least power of two that holds ``n`` and 16, as Triton wants its blocks."""
    return max(16, 1 << (n - 1).bit_length())


class Workspace:
    """The buffers of one token's step, which all layers share.

    ``location`` is the position and the address of the sequence's latent cache.  The kernels read
    it, so one graph serves every position and every sequence.
    """

    def __init__(self, device: torch.device, hidden: int, geometry: Any):
        H, _, P, R, V, *_ = geometry
        self._device = device
        self.embedded_1D, self.h_1D, self.middle_1D, self.x_1D, self.y_1D = (
            self.empty(1, hidden) for _ in range(5)
        )
        self.rope_1C = torch.empty(1, P // 2, dtype=torch.complex64, device=device)
        self.query_scale_1 = torch.ones(1, device=device)
        self.q_HW = self.empty(H, R + P)
        splits = mla.SPLITS.value
        self.part, self.best, self.total = (self.empty(H, splits, width) for width in (R, 1, 1))
        self.o_1X = self.empty(1, H * V)
        self.location = torch.zeros(2, dtype=torch.int64, device=device)
        self._scratch: dict[tuple[str, int], Tensor] = {}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    def scratch(self, name: str, width: int) -> Tensor:
        """A row of ``width`` float32 values, the same for every layer that asks for it."""
        if (name, width) not in self._scratch:
            self._scratch[name, width] = self.empty(1, width)
        return self._scratch[name, width]

    def begin(self, rope_1C: Tensor, query_scale_1: Tensor | None, cache: Any) -> None:
        """A step at the end of ``cache``, float16, begins.  Values change by kernels, never by
        copies from the host."""
        if query_scale_1 is not None:
            self.query_scale_1.copy_(query_scale_1)
        layers_LSW = cache.layers
        assert layers_LSW.dtype == torch.float16 and layers_LSW.is_contiguous()
        self.rope_1C.copy_(rope_1C)
        self.location[0].fill_(cache.length)
        self.location[1].fill_(layers_LSW.data_ptr())


class TritonDecoder:
    """Runs layers for one token of one sequence; the interface is that of
    ``slotmoe.model.network.Runner``.  Results last until the next call."""

    sequences = 1  # buffers are one token's

    def __init__(self, backend: Any, geometry: Any, layers: Sequence[Any]):
        norm = layers[0].input_layernorm
        self._workspace = Workspace(norm.device, len(norm), geometry)
        self._layers = [_Layer(backend, self._workspace, geometry, layer) for layer in layers]
        self._backend, self._router = backend, geometry.router
        self._whole: dict[int, Captured] = {}  # by the bytes of a layer in the latent cache

    def run_layers(self, step: Any, experts: Any) -> tuple[int, Tensor, Tensor, Tensor] | None:
        """See ``slotmoe.model.network.Runner``."""
        (cache,) = step.caches
        layer_bytes = cache.layers[0].nbytes
        if step.layer == 0 and step.x_TD is None:
            self._workspace.begin(step.rope_TC, step.query_scale_T, cache)
            table = experts.slot_table()
            if table.complete:
                cache.extend(0, 1)
                self._run_all(step, layer_bytes, table, experts)
                return None
        if step.x_TD is not None:
            self._end(step)
        while step.layer < len(self._layers):
            cache.extend(step.layer, 1)
            layer = self._layers[step.layer]
            step.h_TD, step.x_TD, logits_1E = layer.begin(step.h_TD, step.layer * layer_bytes)
            step.timer.mark("attention")
            if logits_1E is not None:
                choice = self._backend.route(logits_1E, self._router, layer.gate_bias)
                step.timer.mark("gate")
                return step.layer, step.x_TD, *choice
            self._end(step)
        return None

    def _end(self, step: Any) -> None:
        step.h_TD = self._layers[step.layer].end(step.h_TD, step.x_TD, step.routed_TD)
        step.layer, step.x_TD, step.routed_TD = step.layer + 1, None, None
        step.timer.mark("shared experts and dense layers")

    def _run_all(self, step: Any, layer_bytes: int, table: SlotTable, experts: Any) -> None:
        """All layers as one graph.  It serves all caches whose layers have ``layer_bytes`` each and
        keeps the addresses of all that it has touched, the slot table's too."""
        if layer_bytes not in self._whole:
            # Layers write ``h_1D``, so the first one reads another buffer.
            buffers = (self._workspace.embedded_1D,)
            self._whole[layer_bytes] = Captured(buffers, self._backend.graph)
        function = partial(self._all_layers, table, layer_bytes)
        step.h_TD, indices_M1K = self._whole[layer_bytes](function, step.h_TD)
        step.layer = len(self._layers)
        experts.passed(0, indices_M1K)
        step.timer.mark("captured layers")

    def _all_layers(
        self, table: SlotTable, layer_bytes: int, h_1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the last layer, [1, D], and the chosen experts, [M, 1, K]."""
        chosen: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            y_1D = None
            h_1D, x_1D, logits_1E = layer.begin(h_1D, index * layer_bytes)
            if logits_1E is not None:
                choice = self._backend.route(logits_1E, self._router, layer.gate_bias)
                weights_1K, indices_1K = choice
                y_1KD = torch.empty(*indices_1K.shape, x_1D.shape[1], device=x_1D.device)
                slots_E = table.slots_ME[len(chosen)]
                self._backend.experts(x_1D, table.records, slots_E, indices_1K, y_1KD)
                y_1D = self._backend.weighted_sum(y_1KD, weights_1K)
                chosen.append(indices_1K)
            h_1D = layer.end(h_1D, x_1D, y_1D)
        return h_1D, torch.stack(chosen)


class _Layer:
    """A layer's weights bound to the workspace."""

    def __init__(self, backend: Any, workspace: Workspace, geometry: Any, layer: Any):
        self._backend, self._workspace, self._layer = backend, workspace, layer
        self._geometry, self._sizes = geometry, geometry[:5]
        self.gate_bias = layer.gate_bias
        # By where the layer begins in its cache, which depends on the context's size.
        self._before: dict[int, Captured] = {}
        self._logits_1E = None if layer.gate is None else workspace.empty(1, len(layer.gate))
        routed = () if layer.gate is None else (workspace.y_1D,)
        buffers = workspace.middle_1D, workspace.x_1D, *routed
        self._after = Captured(buffers, backend.graph)

    def begin(self, h_1D: Tensor, layer_at: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """``h + attention(norm(h))``, the norm of that, and the router's logits [1, E], None in a
        dense layer.  The layer's rows begin ``layer_at`` bytes into the latent cache."""
        workspace = self._workspace
        if layer_at not in self._before:
            self._before[layer_at] = Captured((workspace.h_1D,), self._backend.graph)
        self._before[layer_at](partial(self._attention, layer_at=layer_at), h_1D)
        return workspace.middle_1D, workspace.x_1D, self._logits_1E

    def end(self, h_1D: Tensor, x_1D: Tensor, y_1D: Tensor | None) -> Tensor:
        """``h + (y + mlp(x))``, ``y`` being the routed experts' sum, None in a dense layer."""
        inputs = (h_1D, x_1D) if y_1D is None else (h_1D, x_1D, y_1D)
        self._after(self._feed_forward, *inputs)
        return self._workspace.h_1D

    def _attention(self, h_1D: Tensor, layer_at: int) -> None:
        workspace, layer, row = self._workspace, self._layer, self._backend.row
        H, N, P, R, _ = self._sizes
        width, latent_width = H * (N + P), R + P
        norm = layer.input_layernorm, self._geometry.eps
        if layer.q_a_proj is None:
            both = workspace.scratch("both", width + latent_width)
            q = row(h_1D, layer.q_proj, both, layer.kv_a_proj, norm)
            latent = q[:, width:]
        else:
            Q = layer.q_a_proj.shape[0]
            low = workspace.scratch("low", Q + latent_width)
            row(h_1D, layer.q_a_proj, low, layer.kv_a_proj, norm)
            q, latent = workspace.scratch("q", width), low[:, Q:]
            row(low, layer.q_b_proj, q, norm=(layer.q_a_layernorm, self._geometry.latent_eps))
        self._attend(q, latent, layer_at)
        row(workspace.o_1X, layer.o_proj, workspace.middle_1D, add=(h_1D,))
        norm = layer.post_attention_layernorm, self._geometry.eps
        if layer.gate is not None:
            logits_1E = self._logits_1E
            row(workspace.middle_1D, layer.gate, logits_1E, norm=norm, normed=workspace.x_1D)
        else:
            workspace.x_1D.copy_(self._backend.rms_norm(workspace.middle_1D, *norm))

    def _attend(self, q: Tensor, latent: Tensor, layer_at: int) -> None:
        """From the projections to each head's value, through the cache."""
        workspace, layer, (H, N, P, R, V) = self._workspace, self._layer, self._sizes
        location, sums = workspace.location, (workspace.part, workspace.best, workspace.total)
        _, kv_b, scale, _ = operand(layer.kv_b_proj)
        BR, BV, splits, scaled = 64, 16, mla.SPLITS.value, scale is not None
        mla.queries[(triton.cdiv(R, BR), H + 1)](
            q, latent, torch.view_as_real(workspace.rope_1C), workspace.query_scale_1,
            layer.kv_a_layernorm, self._geometry.latent_eps, kv_b, scale, location, layer_at,
            workspace.q_HW, H, N, P, R, N + V,
            SCALED=scaled, HALVES=self._geometry.halves, WIDTH=power(N), BR=BR, LATENT=power(R),
            PAIRS=power(P // 2),
        )  # fmt: skip
        mla.attend[(splits, triton.cdiv(H, 16), 1)](
            workspace.q_HW, None, location, layer_at, 0, self._geometry.softmax_scale, *sums,
            1, H, R, P,
            LOCATED=True, HEADS=16, LATENT=power(R), ROPE=power(P),
        )  # fmt: skip
        mla.values[(triton.cdiv(V, BV), H, 1)](
            *sums, location, kv_b, scale, workspace.o_1X, H, N, V, R,
            PARTS=True, SCALED=scaled, LATENT=power(R), BV=BV,
        )  # fmt: skip

    def _feed_forward(self, h_1D: Tensor, x_1D: Tensor, *y_1D: Tensor) -> None:
        workspace, mlp = self._workspace, self._layer.mlp
        if mlp is None:
            torch.add(h_1D, y_1D[0], out=workspace.h_1D)
            return
        act = workspace.scratch("act", mlp.gate_proj.shape[0])
        self._backend.row_gate_up(x_1D, mlp.gate_proj, mlp.up_proj, act)
        self._backend.row(act, mlp.down_proj, workspace.h_1D, add=(h_1D, *y_1D))
