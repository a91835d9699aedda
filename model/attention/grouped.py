"""Grouped-query attention (arXiv 2305.13245): some heads of queries share one of keys and values;
and what may stand in other layers in its place, a gated delta rule (arXiv 2412.06464): all tokens
before are one matrix a head, into which each token writes and from which it reads.

Shapes: T tokens of this pass, D hidden_size, H heads, G groups of them, N heads or groups, Z
head_dim, P rotated values of it, X elements of a cached row, or columns of a delta rule, S rows.
"""

from typing import cast

import torch
from torch import Tensor

from slotmoe.network.layer_types import Chunk, Delta, DeltaRows, Geometry, Grouped, GroupedRows
from slotmoe.network.shapes import CONVOLVED
from slotmoe.network.state import GroupedCache
from slotmoe.quant.backends.base import Prepared, TorchBackend


class GroupedAttention:
    """That attention, each sequence over its own rows, of a layer's window or all."""

    def __init__(self, geometry: Geometry, backend: TorchBackend):
        self._geometry, self._backend = geometry, backend

    def __call__(self, chunk: Chunk, weights: Grouped[Prepared], x_TD: Tensor) -> Tensor:
        """What attention gives for the tokens of ``chunk`` in its layer, float32 [T, D]."""
        g, backend, T = self._geometry, self._backend, len(x_TD)
        assert g.grouped is not None
        G, Z, _ = g.grouped
        w, rope_TC = weights, chunk.rope_TC
        q_THZ = self._keyed(self._linear(x_TD, w.q_proj, w.q_bias), w.q_norm, rope_TC)
        k_TGZ = self._keyed(self._linear(x_TD, w.k_proj, w.k_bias), w.k_norm, rope_TC)
        v_TGZ = self._linear(x_TD, w.v_proj, w.v_bias).view(T, G, Z)
        rows_GTW = torch.cat([v_TGZ, k_TGZ], dim=-1).transpose(0, 1)
        outputs, start = list[Tensor](), 0
        for state, before, count in zip(chunk.caches, chunk.before, chunk.counts, strict=True):
            cache, stop = cast(GroupedCache, state), start + count
            new_GTX = cache.rows.new_empty(G, count, cache.rows.shape[-1])
            own_XW = rows_GTW[:, start:stop].reshape(G * count, 2 * Z)
            backend.store_latents(own_XW, Z, new_GTX.flatten(0, 1))
            rows_GSX, first = cache.extend(chunk.layer, cache.length + before, new_GTX)
            cached = GroupedRows(rows_GSX, first, w.window, w.sinks)
            outputs.append(backend.grouped(q_THZ[start:stop], cached, g.softmax_scale))
            start = stop
        o_THZ = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        o_TX = o_THZ.reshape(T, -1)
        if w.q_gate is not None:
            o_TX = backend.gated(o_TX, backend.linear(x_TD, w.q_gate))
        return self._linear(o_TX, w.o_proj, w.o_bias)

    def _linear(self, x_TD: Tensor, weight: Prepared, bias: Tensor | None) -> Tensor:
        y_TX = self._backend.linear(x_TD, weight)
        return y_TX if bias is None else y_TX + bias

    def _keyed(self, x_TX: Tensor, norm: Tensor | None, rope_TC: Tensor) -> Tensor:
        """Queries or keys, [T, N, Z], normed, if they are, before or behind their rotation."""
        g = self._geometry
        assert g.grouped is not None
        _, Z, norm_last = g.grouped
        if norm is not None and not norm_last:
            x_TX = self._normed(x_TX, norm)
        x_TNZ = x_TX.view(len(x_TX), -1, Z)
        rotated = self._backend.rotate(x_TNZ[..., : g.P], rope_TC, g.halves)
        x_TNZ = rotated if g.P == Z else torch.cat([rotated, x_TNZ[..., g.P :]], dim=-1)
        return self._normed(x_TNZ, norm) if norm is not None and norm_last else x_TNZ

    def _normed(self, x: Tensor, norm: Tensor) -> Tensor:
        """Each head normed, or the whole row where the weight is as wide."""
        backend, eps = self._backend, self._geometry.eps
        return backend.rms_norm(x.reshape(-1, len(norm)), norm, eps).view(x.shape)


class DeltaAttention:
    """That rule, each sequence over its own state."""

    def __init__(self, geometry: Geometry, backend: TorchBackend):
        self._geometry, self._backend = geometry, backend

    def __call__(self, chunk: Chunk, weights: Delta[Prepared], x_TD: Tensor) -> Tensor:
        """What it gives for the tokens of ``chunk`` in its layer, float32 [T, D]."""
        g, backend, w = self._geometry, self._backend, weights
        assert g.delta is not None
        latents = (w.in_proj_a_latent, w.in_proj_z_latent)
        a, z = (x_TD if weight is None else backend.linear(x_TD, weight) for weight in latents)
        inputs = ((x_TD, w.in_proj_qkv), (x_TD, w.in_proj_b), (a, w.in_proj_a))
        rows_TX = torch.cat([backend.linear(x, weight) for x, weight in inputs], dim=-1)
        z_TX = backend.linear(z, w.in_proj_z)
        outputs, start = list[Tensor](), 0
        for state, before, count in zip(chunk.caches, chunk.before, chunk.counts, strict=True):
            cache, position = state.deltas, state.length + before
            assert cache is not None
            layer = cache.of[chunk.layer]
            new_1TX = rows_TX[None, start : start + count]
            (rows_SX,), first = cache.inputs.extend(layer, position, new_1TX)
            fold = cache.states.fold(position, position + count)
            past = min(CONVOLVED - 1, fold.at)
            rows = DeltaRows(
                rows_SX[fold.at - past - first :],
                past,
                before_HKV=cache.states.rows[layer, fold.read],
                after_HKV=cache.states.rows[layer, fold.write],
                folded=fold.end - fold.at,
            )
            z_SX = z_TX[start : start + count]
            outputs.append(backend.delta(rows, z_SX, w, g.delta, g.eps))
            state.through(chunk.layer, position + count)
            start += count
        o_TX = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return backend.linear(o_TX, w.out_proj)
