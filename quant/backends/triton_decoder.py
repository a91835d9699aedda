"""A few tokens through the layers in few launches, as CUDA graphs on a CUDA device.

Where every expert has a slot, one graph holds all layers: nothing in it waits for the host.  Else a
graph goes from one choice of experts to the next, so the host starts one for each layer that has
experts, and ``FewExperts`` has the graphs between:

    begin   norm + query and latent projections | (query's second projection) | absorbed query,
            rotation, latent row into the cache | attention over splits of the context | their sum +
            value projection | output + residual | norm + router + choice
    end     gate and up of all experts | down + their sum + residual

Where experts may be missing the last is one launch more, at the next graph's beginning.  A token's
bits are those that it has alone.  Shapes as in ``slotmoe.model.network``.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slotmoe.network.layer_types import Chunk, Geometry, Layer, Mla, Pending
from slotmoe.network.state import LatentCache
from slotmoe.quant.backends import triton_few as launch
from slotmoe.quant.backends.base import Prepared, RoutedExperts, SlotTable
from slotmoe.quant.backends.graphs import Captured
from slotmoe.quant.backends.triton_few import (
    Buffers,
    Ending,
    FewExperts,
    Routed,
    Shared,
    operand,
    power,
)
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.kernels.triton import mla


class Place(NamedTuple):
    """Between attention and feed-forward: ``h + attention(norm(h))``, and the norm of that."""

    h_TD: Tensor
    x_TD: Tensor

    @classmethod
    def of(cls, buffers: Buffers, number: int, T: int, D: int) -> "Place":
        return cls(*(buffers(f"{name}{number}", T, D) for name in "hx"))


class Gone(NamedTuple):
    """What a graph leaves: the choice of experts that it stops at, None at the end; the residual
    stream; and, where it went by a complete slot table, all choices."""

    choice: Pending | None
    h_TD: Tensor
    indices_MTK: Tensor | None


class Location:
    """Where each token is: its position, the address of its sequence's latent cache and the bytes
    of a layer in that.  Kernels read it, so one graph serves all of these."""

    def __init__(self, device: torch.device):
        self.told_3T = torch.zeros(3, launch.ROWS, dtype=torch.int64, device=device)
        self._caches = [(0, 0)] * launch.ROWS

    def tell(self, caches: Sequence[LatentCache], counts: Sequence[int]) -> None:
        """So many tokens of each come at the end of ``caches``, float16."""
        start = 0
        for cache, count in zip(caches, counts, strict=True):
            layers_LSW, span, length = cache.layers, slice(start, start + count), cache.length
            assert layers_LSW.dtype == torch.float16 and layers_LSW.is_contiguous()
            torch.arange(length, length + count, out=self.told_3T[0, span])
            where = layers_LSW.data_ptr(), layers_LSW[0].nbytes
            if self._caches[span] != [where] * count:
                self._caches[span] = [where] * count
                for told_T, value in zip(self.told_3T[1:], where, strict=True):
                    told_T[span].fill_(value)
            start += count


class TritonDecoder:
    """A ``Runner`` (``slotmoe.quant.backends.base``) whose results last until the next pass."""

    rows = launch.ROWS

    def __init__(
        self, geometry: Geometry, layers: Sequence[Layer[Prepared]], few: FewExperts, limit: float
    ):
        """``few`` has the routed experts, and all buffers but those that outlive the next step of
        another decoder."""
        norm = layers[0].input_layernorm
        self._few, self._geometry, self._D = few, geometry, len(norm)
        self._location, bound = Location(norm.device), (few.buffers, geometry, limit)
        self._layers = [_Layer(layer, self._location.told_3T, *bound) for layer in layers]
        moe_layers = sum(layer.is_moe for layer in self._layers)
        self._h_TD = norm.new_empty(self.rows, self._D)
        sizes = max(1, moe_layers), self.rows, geometry.router.top_k
        self._indices_MTK = torch.zeros(sizes, dtype=torch.int64, device=norm.device)
        few.buffers("query scale", self.rows).fill_(1)
        # By the first layer, the tokens, and whether all layers are in it.  A graph keeps the
        # addresses of all that it has touched.
        self._graphs: dict[tuple[int, int, bool], Captured[Gone]] = {}

    def run_layers(
        self, chunk: Chunk, experts: RoutedExperts, stop: int | None = None
    ) -> Pending | None:
        """See ``slotmoe.quant.backends.base.Runner``."""
        assert stop is None
        first, T = chunk.layer + (chunk.x_TD is not None), len(chunk.h_TD)
        given_TD, table = chunk.routed_TD, None
        if first == 0:
            given_TD = chunk.h_TD
            self._begin(chunk)
            shown = experts.slot_table()
            table = shown if shown.complete else None
        assert given_TD is not None
        where = first, T, table is not None
        if where not in self._graphs:
            # What a graph begins with it must not write.
            begins = self._few.buffers("sum" if first else "embedded", T, self._D)
            self._graphs[where] = Captured(begins, self._few.graph)
        gone = self._graphs[where](partial(self._go, first, table), given_TD)
        if chunk.timer is not None:
            chunk.timer.mark("captured layers")
        chunk.routed_TD = None
        if (choice := gone.choice) is not None:
            self._few.awaited = choice, self._layers[choice.layer].shared(T)
            chunk.layer, chunk.x_TD = choice.layer, choice.x_TD
            return choice
        chunk.layer, chunk.x_TD, chunk.h_TD = len(self._layers), None, gone.h_TD
        if gone.indices_MTK is not None:
            experts.passed(0, gone.indices_MTK, None)
        return None

    def _begin(self, chunk: Chunk) -> None:
        """A chunk begins.  Values change by kernels alone."""
        buffers, T = self._few.buffers, len(chunk.h_TD)
        self._location.tell(cast(Sequence[LatentCache], chunk.caches), chunk.counts)
        buffers("rope", T, chunk.rope_TC.shape[1], dtype=torch.complex64).copy_(chunk.rope_TC)
        if chunk.query_scale_T is not None:
            buffers("query scale", T).copy_(chunk.query_scale_T)

    def _go(self, first: int, table: SlotTable | None, given_TD: Tensor) -> Gone:
        """From layer ``first`` on to the next choice of experts, or with a complete ``table`` to
        the end.  ``given`` is the residual stream before the first layer, else the sum of the
        routed experts of the layer before it."""
        T, K, buffers = len(given_TD), self._geometry.router.top_k, self._few.buffers
        row, chosen = sum(layer.is_moe for layer in self._layers[:first]), 0
        # Places are taken in turn: a graph that begins behind one of them ends in the other.
        before, after = (Place.of(buffers, number % 2, T, self._D) for number in (row - 1, row))
        h_TD, out_TD, weights_TK = given_TD, self._h_TD[:T], buffers("weights", T, K)
        if first:
            h_TD = self._layers[first - 1].finish(before, given_TD, out_TD)
        for index, layer in enumerate(self._layers[first:], first):
            choice = weights_TK, self._indices_MTK[chosen, :T]
            layer.begin(h_TD, after, index, choice)
            if not layer.is_moe:
                h_TD = layer.dense(after, out_TD)
            elif table is None:
                return Gone(Pending(index, after.x_TD, *choice), h_TD, None)
            else:
                y_TKD, slots_E = buffers("outputs", T, K, self._D), table.slots_ME[chosen]
                routed = Routed(after.x_TD, table.records, slots_E, choice[1], y_TKD)
                h_TD = layer.end(after, routed, weights_TK, out_TD)
                chosen += 1
        return Gone(None, h_TD, None if table is None else self._indices_MTK[:, :T])


class _Layer:
    """A layer's weights bound to buffers."""

    def __init__(
        self, layer: Layer[Prepared], at: Tensor, buffers: Buffers, geometry: Geometry, limit: float
    ):
        self._buffers, self._layer, self._geometry = buffers, layer, geometry
        assert isinstance(layer.attention, Mla)
        self._attention, self._limit, self._located = layer.attention, limit, at
        self._shared = None if layer.mlp is None else Shared.of(layer.mlp)
        self._D = len(layer.input_layernorm)
        self.is_moe = layer.gate is not None

    def begin(self, h_TD: Tensor, place: Place, index: int, choice: tuple[Tensor, Tensor]) -> None:
        """Attention and norm into ``place``; weights and indices of the chosen experts, none in a
        dense layer, into ``choice``.  The layer is the ``index``-th in the latent cache."""
        buffers, layer, attention = self._buffers, self._layer, self._attention
        (H, N, P, R, V), T = self._geometry[:5], len(h_TD)
        width, latent_width = H * (N + P), R + P
        norm = layer.input_layernorm, self._geometry.eps
        if attention.q_a_proj is None:
            assert attention.q_proj is not None
            q = buffers("both", T, width + latent_width)
            launch.linear(h_TD, attention.q_proj, q, attention.kv_a_proj, norm)
            latent = q[:, width:]
        else:
            assert attention.q_b_proj is not None and attention.q_a_layernorm is not None
            Q = attention.q_a_proj.shape[0]
            low, q = buffers("low", T, Q + latent_width), buffers("q", T, width)
            launch.linear(h_TD, attention.q_a_proj, low, attention.kv_a_proj, norm)
            latent = low[:, Q:]
            low_norm = attention.q_a_layernorm, self._geometry.latent_eps
            launch.linear(low, attention.q_b_proj, q, norm=low_norm)
        o_TX = buffers("attention", T, H * V)
        self._attend(q, latent, index, o_TX)
        launch.linear(o_TX, attention.o_proj, place.h_TD, add_TN=h_TD)
        norm = layer.post_attention_layernorm, self._geometry.eps
        if layer.gate is None:
            place.x_TD.copy_(F.rms_norm(place.h_TD, norm[0].shape, *norm))
            return
        logits_TE, finished = buffers("logits", T, len(layer.gate)), self._finished(T)
        router = layer.gate, self._geometry.router, layer.gate_bias
        launch.gate(place.h_TD, norm, place.x_TD, *router, logits_TE, finished, choice)

    def dense(self, place: Place, out_TD: Tensor) -> Tensor:
        """``h + mlp(x)`` of a layer without experts."""
        mlp, shared = self._layer.mlp, self._shared
        assert mlp is not None and shared is not None
        act_TI = self._buffers("dense", len(out_TD), shared.width)
        launch.gate_up(place.x_TD, shared.gate, shared.up, act_TI, self._limit)
        return launch.linear(act_TI, mlp.down_proj, out_TD, add_TN=place.h_TD)

    def end(self, place: Place, routed: Routed, weights_TK: Tensor, out_TD: Tensor) -> Tensor:
        """``h + (experts + mlp(x))``, ``routed`` by their weights."""
        ending = Ending(self._finished(len(out_TD)), weights_TK, place.h_TD, out_TD)
        launch.experts(routed, self.shared(len(out_TD)), ending, self._limit)
        return out_TD

    def finish(self, place: Place, routed_TD: Tensor, out_TD: Tensor) -> Tensor:
        """``end`` where the experts have been computed: ``routed`` is their sum."""
        shared = self.shared(len(out_TD))
        shared_TD = shared.outputs[1] if shared and shared.outputs else None
        return launch.finish(routed_TD, shared_TD, place.h_TD, out_TD)

    def shared(self, T: int) -> Shared | None:
        """The shared expert, with outputs in buffers."""
        if (shared := self._shared) is None:
            return None
        between = self._buffers("between", T, shared.width)
        return shared._replace(outputs=(between, self._buffers("shared", T, self._D)))

    def _finished(self, T: int) -> Tensor:
        """Counters that are 0 between two launches."""
        return self._buffers("finished", T, triton.cdiv(self._D, TILE), dtype=torch.int32)

    def _attend(self, q: Tensor, latent: Tensor, index: int, o_TX: Tensor) -> None:
        """From the projections to each head's value, through the cache."""
        buffers, (H, N, P, R, V), T = self._buffers, self._geometry[:5], len(q)
        rope_TC = buffers("rope", T, P // 2, dtype=torch.complex64)
        located, splits = self._located, mla.SPLITS.value
        q_THW = buffers("queries", T, H, R + P)
        sums = [buffers(f"splits {width}", T, H, splits, width) for width in (R, 1)]
        sums.append(buffers("totals", T, H, splits))
        _, kv_b, scale, _ = operand(self._attention.kv_b_proj)
        BR, BV, scaled = 64, 16, scale is not None
        mla.queries[(T, triton.cdiv(R, BR), H + 1)](
            q, q.stride(0), latent, latent.stride(0), torch.view_as_real(rope_TC),
            buffers("query scale", T), self._attention.kv_a_layernorm, self._geometry.latent_eps,
            kv_b, scale, located, index, q_THW, H, N, P, R, N + V,
            SCALED=scaled, HALVES=self._geometry.halves, WIDTH=power(N), BR=BR, LATENT=power(R),
            PAIRS=power(P // 2),
        )  # fmt: skip
        mla.attend[(splits, triton.cdiv(H, 16), T)](
            q_THW, located, index, self._geometry.softmax_scale, *sums, H, R, P,
            HEADS=16, LATENT=power(R), ROPE=power(P),
        )  # fmt: skip
        mla.values[(T, triton.cdiv(V, BV), H)](
            *sums, located, kv_b, scale, o_TX, H, N, V, R,
            SCALED=scaled, LATENT=power(R), BV=BV,
        )  # fmt: skip
