"""DeepSeek-V4's attention: a window of tokens, and compressed rows of all before.

Each token has one key of Z values, which all heads share and which is the value too; its last P
values are rotated.  A query sees the keys of the window, and in most layers rows that were
compressed out of every 4 (of which an indexer chooses) or every 128 tokens.  Because values are
rotated, what comes out is rotated back at the query's position.

Shapes: T tokens of this pass, D hidden_size, H heads, Z head_dim, P qk_rope_head_dim, C = P / 2, G
groups of heads, J heads of the indexer, A index_head_dim, X elements of a cached row, S rows, L
rows that a token sees, E compressed rows, Y columns of a compressor, M tokens of a compressed row.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from slotmoe.network.layer_types import (
    Chunk,
    Compressed,
    CompressedIndexer,
    Compressor,
    Geometry,
    ListedRows,
)
from slotmoe.network.state import CompressedCache, Group
from slotmoe.quant.backends.base import Prepared, TorchBackend


class CompressedAttention:
    """That attention, each sequence over its own state."""

    def __init__(self, geometry: Geometry, backend: TorchBackend):
        self._geometry, self._backend = geometry, backend

    def __call__(self, chunk: Chunk, weights: Compressed[Prepared], x_TD: Tensor) -> Tensor:
        """What attention gives for the tokens of ``chunk`` in its layer, float32 [T, D]."""
        g, backend, T = self._geometry, self._backend, len(x_TD)
        rope_TC = chunk.rope_TC if weights.compressor is None else chunk.compressed_rope_TC
        assert rope_TC is not None
        low_TQ = backend.linear(x_TD, weights.q_a_proj)
        low_TQ = backend.rms_norm(low_TQ, weights.q_a_norm, g.eps)
        q_XZ = backend.linear(low_TQ, weights.q_b_proj).view(-1, g.V)
        q_THZ = self._rotated(backend.rms_norm(q_XZ, None, g.eps).view(T, g.H, g.V), rope_TC)
        key_TZ = backend.rms_norm(backend.linear(x_TD, weights.kv_proj), weights.kv_norm, g.eps)
        key_TZ = self._rotated(key_TZ[:, None], rope_TC)[:, 0]
        assert g.compressed is not None
        outputs, start = list[Tensor](), 0
        for state, before, count in zip(chunk.caches, chunk.before, chunk.counts, strict=True):
            cache, span = cast(CompressedCache, state), slice(start, start + count)
            parts = (part[span] for part in (x_TD, low_TQ, rope_TC, q_THZ, key_TZ))
            own = _Tokens(chunk, cache, cache.length + before, *parts)
            outputs.append(self._over_rows(own, weights, g.compressed.window))
            start += count
        o_THZ = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        o_THZ = self._rotated(o_THZ, rope_TC.conj().resolve_conj())
        o_TGX = o_THZ.reshape(T, g.compressed.groups, -1)
        o_TX = backend.grouped_linear(o_TGX, weights.o_a_proj).flatten(1)
        return backend.linear(o_TX, weights.o_b_proj)

    def _rotated(self, x_THZ: Tensor, rope_TC: Tensor) -> Tensor:
        """With the last P values of each head rotated."""
        P = self._geometry.P
        rotated = self._backend.rotate(x_THZ[..., -P:], rope_TC, halves=False)
        return torch.cat([x_THZ[..., :-P], rotated], dim=-1)

    def _over_rows(self, own: "_Tokens", weights: Compressed[Prepared], window: int) -> Tensor:
        """Attention of one sequence's tokens over its rows, [T, H, Z]."""
        g, backend, cache, T = self._geometry, self._backend, own.cache, len(own.x_TD)
        new_TX = cache.window.rows.new_empty(T, cache.window.rows.shape[-1])
        backend.store_latents(own.key_TZ, g.V, new_TX)
        rows_1SX, first = cache.window.extend(own.chunk.layer, own.position, new_TX[None])
        rows_SX = rows_1SX[0]
        positions_T = torch.arange(T, dtype=torch.int32, device=new_TX.device) + own.position
        entries, counts_T, more_SX = None, None, None
        if weights.compressor is not None:
            group = cache.groups[len(weights.compressor.position_bias)]
            more_SX = self._extend(own, group, weights.compressor, g.V)
            counts_T = (positions_T + 1) // group.ratio
            if weights.indexer is not None:
                entries = self._choose(own, weights.indexer, counts_T)
        held = range(first, first + len(rows_SX))
        lists_TL = lists(positions_T, held, window, counts_T, entries)
        listed = ListedRows(rows_SX, more_SX, lists_TL, weights.sinks)
        return backend.attend(own.q_THZ, listed, g.V, g.softmax_scale)

    def _choose(
        self, own: "_Tokens", weights: CompressedIndexer[Prepared], counts_T: Tensor
    ) -> Tensor:
        """Which of the first ``counts`` compressed rows each token sees, int32 [T, topk]."""
        geometry, backend, group = self._geometry.indexer, self._backend, own.cache.index
        assert geometry is not None and group is not None
        J, A, topk, _ = geometry
        keys_SX = self._extend(own, group, weights.compressor, A)
        q_TJA = backend.linear(own.low_TQ, weights.q_b_proj).view(-1, J, A)
        q_TJA = self._rotated(q_TJA, own.rope_TC)
        weights_TJ = backend.linear(own.x_TD, weights.weights_proj) * (J * A) ** -0.5
        return backend.index(q_TJA, weights_TJ, keys_SX, counts_T, topk)

    def _extend(
        self, own: "_Tokens", group: Group, weights: Compressor[Prepared], width: int
    ) -> Tensor:
        """Append the rows that the tokens complete to the layer's; returns all, [S, X]."""
        backend, ratio, start = self._backend, group.ratio, own.position
        row, end = own.cache.row_of[own.chunk.layer], start + len(own.x_TD)
        rows_SX = group.rows[row, : end // ratio]
        both = weights.kv_proj, weights.gate_proj
        new_T2Y = torch.stack([backend.linear(own.x_TD, weight) for weight in both], dim=1)
        open_1S2Y, first = group.open.extend(row, start, new_T2Y[None])
        open_S2Y = open_1S2Y[0]
        begin, stop = start // ratio, end // ratio
        if begin == stop:
            return rows_SX
        blocks_EM2Y = open_S2Y[begin * ratio - first : stop * ratio - first]
        blocks_EM2Y = blocks_EM2Y.unflatten(0, (-1, ratio))
        bias_MY = weights.position_bias
        if group.overlaps:  # with the first half of the columns of the tokens before
            before = (begin - 1) * ratio - first
            missing = max(0, -before)  # the first row has none
            before_S2Y = open_S2Y[before + missing : stop * ratio - ratio - first, :, :width]
            if missing:
                none_S2Y = before_S2Y.new_zeros(missing, 2, width)
                none_S2Y[:, 1] = -torch.inf
                before_S2Y = torch.cat([none_S2Y, before_S2Y])
            before_EM2Y = before_S2Y.unflatten(0, (-1, ratio))
            blocks_EM2Y = torch.cat([before_EM2Y, blocks_EM2Y[..., width:]], dim=1)
            bias_MY = torch.cat([bias_MY[:, :width], bias_MY[:, width:]])
        y_EY = backend.compress(blocks_EM2Y, bias_MY, weights.kv_norm, self._geometry.eps)
        positions_E = torch.arange(begin, stop, device=y_EY.device) * ratio
        assert own.chunk.compressed_C is not None
        rope_EC = backend.rotations(positions_E.float(), own.chunk.compressed_C)
        y_EY = self._rotated(y_EY[:, None], rope_EC)[:, 0]
        backend.store_latents(y_EY, width, rows_SX[begin:])
        return rows_SX


class _Tokens(NamedTuple):
    """Those of one sequence in a chunk's layer, from ``position`` on."""

    chunk: Chunk
    cache: CompressedCache
    position: int
    x_TD: Tensor
    low_TQ: Tensor
    rope_TC: Tensor
    q_THZ: Tensor
    key_TZ: Tensor


def lists(
    positions_T: Tensor, held: range, window: int, counts_T: Tensor | None, picked_TL: Tensor | None
) -> Tensor:
    """The rows that each token sees, in order, int32 [T, L], -1 behind the last: those of the
    window, of the positions ``held``, then compressed rows, which stand behind them: the first
    ``counts``, or those among ``picked``, int32 [T, topk], that are not -1."""
    device = positions_T.device
    seen_T = (positions_T + 1).clamp(max=window)
    if picked_TL is not None:
        counts_T = (picked_TL >= 0).sum(dim=1, dtype=torch.int32)
    total_T = seen_T if counts_T is None else seen_T + counts_T
    places_L = torch.arange(int(total_T.max()), dtype=torch.int32, device=device)
    window_TL = places_L + (positions_T + 1 - seen_T - held.start)[:, None]
    behind_TL = chosen_TL = places_L - seen_T[:, None]
    if picked_TL is not None:
        chosen_TL = picked_TL.gather(1, behind_TL.clamp(0, picked_TL.shape[1] - 1).long())
    lists_TL = torch.where(behind_TL < 0, window_TL, chosen_TL + len(held))
    return lists_TL.masked_fill(places_L >= total_T[:, None], -1)
