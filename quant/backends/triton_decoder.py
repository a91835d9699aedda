"""One token through the layers in few launches, as CUDA graphs on a CUDA device.

Where every expert has a slot, one graph holds all layers: nothing in it waits for the host.  The
routed experts are then in the launches of ``end``.  Else a graph goes from one choice of experts to
the next, so the host starts one for each layer that has experts:

    end     gate and up of the shared expert | down + routed experts' sum + residual
    begin   norm + query and latent projections | (query's second projection) | absorbed query,
            rotation, latent row into the cache | attention over splits of the context | their sum +
            value projection | output + residual | norm + router + choice

Shapes as in ``slotmoe.model.network``.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slotmoe.border import Cache, Experts, Geometry, Layer, Mla, Pending, Step
from slotmoe.quant.backends import triton_rows as launch
from slotmoe.quant.backends.base import Prepared, Records, SlotTable
from slotmoe.quant.backends.graphs import Captured, Capturing
from slotmoe.quant.backends.triton_rows import Ending, Routed, Shared, operand, power
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.kernels.triton import mla


class Place(NamedTuple):
    """Between attention and feed-forward: ``h + attention(norm(h))``, and the norm of that."""

    h_1D: Tensor
    x_1D: Tensor


class Workspace:
    """The buffers of one token's step, which all layers share.

    ``location`` is the position and the address of the sequence's latent cache.  The kernels read
    it, so one graph serves every position and every sequence.  ``places`` are taken in turn: a
    graph that begins behind one of them ends in the other.
    """

    def __init__(self, norm_D: Tensor, geometry: Geometry, swiglu_limit: float):
        (H, _, P, R, V), router = geometry[:5], geometry.router
        self.geometry, self.swiglu_limit = geometry, swiglu_limit
        self._device = device = norm_D.device
        hidden = len(norm_D)
        self.embedded_1D, self.h_1D = self.empty(1, hidden), self.empty(1, hidden)
        self.places = [Place(self.empty(1, hidden), self.empty(1, hidden)) for _ in range(2)]
        self.rope_1C = torch.empty(1, P // 2, dtype=torch.complex64, device=device)
        self.query_scale_1 = torch.ones(1, device=device)
        self.q_HW = self.empty(H, R + P)
        splits = mla.SPLITS.value
        self.part, self.best, self.total = (self.empty(H, splits, width) for width in (R, 1, 1))
        self.o_1X = self.empty(1, H * V)
        self.location = torch.zeros(2, dtype=torch.int64, device=device)
        self.finished = torch.zeros(triton.cdiv(hidden, TILE), dtype=torch.int32, device=device)
        self.one_1 = torch.ones(1, device=device)
        self.no_choice_1K = torch.empty(1, router.top_k, dtype=torch.int64, device=device)
        self._scratch: dict[tuple[str, int], Tensor] = {}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    def scratch(self, name: str, width: int) -> Tensor:
        """A row of ``width`` float32 values, the same for every layer that asks for it."""
        if (name, width) not in self._scratch:
            self._scratch[name, width] = self.empty(1, width)
        return self._scratch[name, width]

    def begin(self, rope_1C: Tensor, query_scale_1: Tensor | None, cache: Cache) -> None:
        """A step at the end of ``cache``, float16, begins.  Values change by kernels alone."""
        if query_scale_1 is not None:
            self.query_scale_1.copy_(query_scale_1)
        layers_LSW = cache.layers
        assert layers_LSW.dtype == torch.float16 and layers_LSW.is_contiguous()
        self.rope_1C.copy_(rope_1C)
        self.location[0].fill_(cache.length)
        self.location[1].fill_(layers_LSW.data_ptr())


Gone = tuple[Pending | None, Tensor, Tensor | None]
"""What a graph leaves: see ``TritonDecoder._go``."""


class TritonDecoder:
    """Runs layers for one token; see ``slotmoe.border.Decoder``.  Results last until another."""

    rows = 1  # buffers are one token's

    def __init__(
        self,
        geometry: Geometry,
        layers: Sequence[Layer[Prepared]],
        sum_1D: Tensor,
        graph: Capturing | None,
        swiglu_limit: float,
    ):
        """The sum of the routed experts comes in ``sum_1D``."""
        self._workspace = Workspace(layers[0].input_layernorm, geometry, swiglu_limit)
        self._layers = [_Layer(self._workspace, layer) for layer in layers]
        self._sum_1D, self._capturing = sum_1D, graph
        # By the first layer, whether all are in it, and the bytes of a layer in the latent cache:
        # one serves all such caches.  It keeps the addresses of all that it has touched.
        self._graphs: dict[tuple[int, bool, int], Captured[Gone]] = {}
        self._records: Records | None = None

    def run_layers(self, step: Step, experts: Experts) -> Pending | None:
        """See ``slotmoe.border.Runner``."""
        (cache,) = cast(Sequence[Cache], step.caches)
        first, layer_bytes = step.layer + (step.x_TD is not None), cache.layers[0].nbytes
        given_1D, table = step.routed_TD, None
        if first == 0:
            given_1D = step.h_TD
            self._workspace.begin(step.rope_TC, step.query_scale_T, cache)
            cache.extend(0, 1)
            shown = experts.slot_table()
            assert isinstance(shown, SlotTable)
            self._records, table = shown.records, shown if shown.complete else None
        assert given_1D is not None
        where = first, table is not None, layer_bytes
        if where not in self._graphs:
            # What a graph begins with it must not write.
            begins_1D = self._sum_1D if first else self._workspace.embedded_1D
            self._graphs[where] = Captured(begins_1D, self._capturing)
        function = partial(self._go, first, layer_bytes, table)
        choice, h_1D, indices = self._graphs[where](function, given_1D)
        step.timer.mark("captured layers")
        step.routed_TD = None
        if choice is not None:
            step.layer, step.x_TD = choice.layer, choice.x_TD
            return choice
        step.layer, step.x_TD, step.h_TD = len(self._layers), None, h_1D
        if indices is not None:
            experts.passed(0, indices, None)
        return None

    def _go(self, first: int, layer_bytes: int, table: SlotTable | None, given_1D: Tensor) -> Gone:
        """From layer ``first`` on to the next choice of experts, or with a complete ``table`` to
        the end: the choice if it stops there, the residual stream, and all choices [M, 1, K] if it
        went by the table.  ``given`` is the residual stream before the first layer, else the sum of
        the routed experts of the layer before it."""
        row = sum(layer.is_moe for layer in self._layers[:first])
        before, after = self._workspace.places[row % 2 - 1], self._workspace.places[row % 2]
        workspace, h_1D, chosen = self._workspace, given_1D, list[Tensor]()
        assert self._records is not None
        if first:
            computed = None, workspace.no_choice_1K, given_1D[None]
            routed = Routed(before.x_1D, self._records, *computed)
            h_1D = self._layers[first - 1].end(before, routed, workspace.one_1)
        for index, layer in enumerate(self._layers[first:], first):
            choice = layer.begin(h_1D, after, index * layer_bytes)
            if choice is None:
                h_1D = layer.end(after, None, workspace.one_1)
            elif table is None:
                return Pending(index, after.x_1D, *choice), h_1D, None
            else:
                (weights_1K, indices_1K), slots_E = choice, table.slots_ME[len(chosen)]
                y_1KD = torch.empty(*indices_1K.shape, h_1D.shape[1], device=h_1D.device)
                routed = Routed(after.x_1D, table.records, slots_E, indices_1K, y_1KD)
                h_1D = layer.end(after, routed, weights_1K)
                chosen.append(indices_1K)
        return None, h_1D, torch.stack(chosen) if table is not None else None


class _Layer:
    """A layer's weights bound to the workspace."""

    def __init__(self, workspace: Workspace, layer: Layer[Prepared]):
        self._workspace, self._layer, self._geometry = workspace, layer, workspace.geometry
        assert isinstance(layer.attention, Mla)
        self._attention = layer.attention
        self._shared = None if layer.mlp is None else Shared.of(layer.mlp)
        self.is_moe = layer.gate is not None

    def begin(self, h_1D: Tensor, place: Place, layer_at: int) -> tuple[Tensor, Tensor] | None:
        """Attention and norm into ``place``; weights and indices of the chosen experts, None in a
        dense layer.  The layer's rows begin ``layer_at`` bytes into the latent cache."""
        workspace, layer, attention = self._workspace, self._layer, self._attention
        H, N, P, R, _ = self._geometry[:5]
        width, latent_width = H * (N + P), R + P
        norm = layer.input_layernorm, self._geometry.eps
        if attention.q_a_proj is None:
            assert attention.q_proj is not None
            both = workspace.scratch("both", width + latent_width)
            q = launch.row(h_1D, attention.q_proj, both, attention.kv_a_proj, norm)
            latent = q[:, width:]
        else:
            assert attention.q_b_proj is not None and attention.q_a_layernorm is not None
            Q = attention.q_a_proj.shape[0]
            low = workspace.scratch("low", Q + latent_width)
            launch.row(h_1D, attention.q_a_proj, low, attention.kv_a_proj, norm)
            q, latent = workspace.scratch("q", width), low[:, Q:]
            low_norm = attention.q_a_layernorm, self._geometry.latent_eps
            launch.row(low, attention.q_b_proj, q, norm=low_norm)
        self._attend(q, latent, layer_at)
        launch.row(workspace.o_1X, attention.o_proj, place.h_1D, add=h_1D)
        norm = layer.post_attention_layernorm, self._geometry.eps
        if layer.gate is None:
            place.x_1D.copy_(F.rms_norm(place.h_1D, norm[0].shape, *norm))
            return None
        logits_1E = workspace.scratch("logits", len(layer.gate))
        router, finished = self._geometry.router, workspace.finished
        given = place.h_1D, norm, place.x_1D, layer.gate, router, layer.gate_bias
        return launch.gate(*given, logits_1E, finished)

    def end(self, place: Place, routed: Routed | None, weights_1K: Tensor) -> Tensor:
        """``h + (experts + mlp(x))``, ``routed`` by their weights; None in a dense layer."""
        workspace, mlp, shared = self._workspace, self._layer.mlp, self._shared
        if routed is None:
            assert mlp is not None and shared is not None
            act = workspace.scratch("act", shared.width)
            launch.row_gate_up(place.x_1D, shared.gate, shared.up, act, workspace.swiglu_limit)
            return launch.row(act, mlp.down_proj, workspace.h_1D, add=place.h_1D)
        if shared is None and routed.slots_E is None:
            return torch.add(place.h_1D, routed.y_1KD[0], out=workspace.h_1D)
        ending = Ending(workspace.finished, weights_1K, place.h_1D, workspace.h_1D)
        launch.experts(routed, shared, ending, workspace.swiglu_limit)
        return workspace.h_1D

    def _attend(self, q: Tensor, latent: Tensor, layer_at: int) -> None:
        """From the projections to each head's value, through the cache."""
        workspace, (H, N, P, R, V) = self._workspace, self._geometry[:5]
        attention = self._attention
        location, sums = workspace.location, (workspace.part, workspace.best, workspace.total)
        _, kv_b, scale, _ = operand(attention.kv_b_proj)
        BR, BV, splits, scaled = 64, 16, mla.SPLITS.value, scale is not None
        mla.queries[(triton.cdiv(R, BR), H + 1)](
            q, latent, torch.view_as_real(workspace.rope_1C), workspace.query_scale_1,
            attention.kv_a_layernorm, self._geometry.latent_eps, kv_b, scale, location, layer_at,
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
