"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with an indexer
(DeepSeek-V3.2, arXiv 2512.02556) to the positions that it chooses.

Shapes: T tokens of this pass, D hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, R
kv_lora_rank, V v_head_dim, W = R + P latent row, S cached positions, B one block of them, J heads
of the indexer, A index_head_dim, L chosen positions, Z and Y widths of a key and of a value.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import cast

import torch
from torch import Tensor

from slotmoe.network.layer_types import Chunk, Geometry, Indexer, ListedRows, Mla
from slotmoe.network.state import LatentCache
from slotmoe.quant.backends.attention import attend, block_size
from slotmoe.quant.backends.base import Prepared, TorchBackend

_INDEX_EPS = 1e-6  # of the indexer's norm, whatever rms_norm_eps says


class LatentAttention:
    """MLA, each sequence over its own cache.  Only the latent row is cached; keys and values are
    absorbed into the query and output, as kernels want it, or expanded block by block, whichever
    costs less (absorbed for decode, expanded for long prefill chunks)."""

    def __init__(self, geometry: Geometry, backend: TorchBackend):
        self._geometry, self._backend = geometry, backend

    def __call__(self, chunk: Chunk, weights: Mla[Prepared], x_TD: Tensor) -> Tensor:
        """What attention gives for the tokens of ``chunk`` in its layer, float32 [T, D]."""
        H, N, P, R, V, _, latent_eps, _, halves, *_ = self._geometry
        backend, T, low = self._backend, len(x_TD), x_TD
        rms_norm = backend.rms_norm
        if weights.q_proj is not None:
            q = backend.linear(x_TD, weights.q_proj)
        else:
            assert weights.q_a_proj is not None and weights.q_b_proj is not None
            assert weights.q_a_layernorm is not None
            low = backend.linear(x_TD, weights.q_a_proj)
            low = rms_norm(low, weights.q_a_layernorm, latent_eps)
            q = backend.linear(low, weights.q_b_proj)
        if chunk.query_scale_T is not None:
            q = q * chunk.query_scale_T[:, None]
        q_THN, q_THP = q.view(T, H, N + P).split([N, P], dim=-1)
        c_TR, k_TP = backend.linear(x_TD, weights.kv_a_proj).split([R, P], dim=-1)
        # The key's rope part is rotated as one more head.
        rotated = backend.rotate(torch.cat([q_THP, k_TP[:, None]], dim=1), chunk.rope_TC, halves)
        q_THP, k_TP = rotated[:, :H], rotated[:, H]
        latent_TW = torch.cat([rms_norm(c_TR, weights.kv_a_layernorm, latent_eps), k_TP], dim=-1)
        caches, counts = [cast(LatentCache, state) for state in chunk.caches], [*chunk.counts]
        ends = [before + count for before, count in zip(chunk.before, counts, strict=True)]
        rows = [cache.extend(chunk.layer, end) for cache, end in zip(caches, ends, strict=True)]
        for rows_SX, new_TW in zip(rows, latent_TW.split(counts), strict=True):
            backend.store_latents(new_TW, R, rows_SX[-len(new_TW) :])
        if weights.indexer is not None:
            grown = zip(caches, ends, strict=True)
            keys = [cache.extend_index(chunk.layer, end) for cache, end in grown]
            chunk.lists_TL = self._choose(chunk, weights.indexer, x_TD, low, keys)

        kv_b, lists_TL = weights.kv_b_proj, chunk.lists_TL
        if backend.absorbs or lists_TL is not None or len(rows) == T:
            o_THV = self._absorbed(q_THN, q_THP, kv_b, rows, counts, lists_TL)
        else:
            each = zip(q_THN.split(counts), q_THP.split(counts), rows, strict=True)
            o_THV = torch.cat([self._cheapest(*part, kv_b) for part in each])
        return backend.linear(o_THV.reshape(T, H * V), weights.o_proj)

    def _cheapest(self, q_THN: Tensor, q_THP: Tensor, rows_SX: Tensor, kv_b: Prepared) -> Tensor:
        """What one sequence's queries give, [T, H, V], in the form that costs less."""
        H, N, P, R, V, *_ = self._geometry
        T, S = len(q_THN), len(rows_SX)
        absorbed_cost = T * H * R * (N + V) + T * S * H * (2 * R + P)
        expanded_cost = S * H * R * (N + V) + T * S * H * (N + P + V)
        if T == 1 or absorbed_cost <= expanded_cost:
            return self._absorbed(q_THN, q_THP, kv_b, [rows_SX], [T])
        q_HTZ = torch.cat([q_THN, q_THP], dim=-1).transpose(0, 1) * self._geometry.softmax_scale
        return attend(q_HTZ, self._expanded(rows_SX, T, kv_b), S, T).transpose(0, 1)

    def _absorbed(
        self,
        q_THN: Tensor,
        q_THP: Tensor,
        kv_b: Prepared,
        rows: list[Tensor],
        counts: list[int],
        lists_TL: Tensor | None = None,
    ) -> Tensor:
        """What the queries give, [T, H, V], ``counts`` of each sequence over its own rows."""
        q_THW = torch.cat([self._backend.absorb_query(q_THN, kv_b), q_THP], dim=-1)
        lists = repeat(None) if lists_TL is None else lists_TL.split(counts)
        each = zip(q_THW.split(counts), rows, lists, strict=False)
        parts = [self._over_latents(*part) for part in each]
        del q_THW, each  # which are wide, before the outputs are joined
        o_THR = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._backend.absorb_value(o_THR, kv_b, self._geometry.N)

    def _choose(
        self,
        chunk: Chunk,
        weights: Indexer[Prepared],
        x_TD: Tensor,
        low_TQ: Tensor,
        keys: list[Tensor],
    ) -> Tensor | None:
        """Store the tokens' index keys at the end of each sequence's ``keys``, and choose the
        positions that each token attends to, [T, L]; None where each attends to all."""
        geometry, backend, P = self._geometry.indexer, self._backend, self._geometry.P
        assert geometry is not None
        J, A, topk, halves = geometry
        q_TJA = backend.linear(low_TQ, weights.wq_b).view(-1, J, A)
        key_TA = backend.linear(x_TD, weights.wk)
        key_TA = backend.layer_norm(key_TA, weights.k_norm, weights.k_norm_bias, _INDEX_EPS)
        both = torch.cat([q_TJA, key_TA[:, None]], dim=1)
        rotated = backend.rotate(both[..., :P], chunk.rope_TC, halves)
        both = torch.cat([rotated, both[..., P:]], dim=-1)
        for rows_SX, new_TA in zip(keys, both[:, J].split([*chunk.counts]), strict=True):
            backend.store_latents(new_TA, A, rows_SX[-len(new_TA) :])
        if max(map(len, keys)) <= topk:
            return None
        weights_TJ = backend.linear(x_TD, weights.weights_proj) * (J * A) ** -0.5
        lists, counts = list[Tensor](), [*chunk.counts]
        each = zip(both[:, :J].split(counts), weights_TJ.split(counts), keys, strict=True)
        for q_TJA, weights_TJ, rows_SX in each:
            S, T = len(rows_SX), len(q_TJA)
            counts_T = torch.arange(S - T, S, dtype=torch.int32, device=x_TD.device) + 1
            lists.append(backend.index(q_TJA, weights_TJ, rows_SX, counts_T, topk))
        return torch.cat(lists)

    def _over_latents(self, q_THW: Tensor, rows_SX: Tensor, lists_TL: Tensor | None) -> Tensor:
        """A sequence's absorbed queries over its cached rows, or those of lists: [T, H, R]."""
        R, scale = self._geometry.R, self._geometry.softmax_scale
        if lists_TL is not None:
            return self._backend.attend(q_THW, ListedRows(rows_SX, None, lists_TL), R, scale)
        o_THR = self._backend.mla(q_THW, rows_SX, R, scale)
        if o_THR is not None:
            return o_THR
        # All heads share the keys [1, B, W] and values [1, B, R]: the latent rows themselves.
        T, H = q_THW.shape[:2]
        keys = (rows_BW.float()[None] for rows_BW in rows_SX.split(block_size(T * H)))
        blocks = ((k_1BW, k_1BW[..., :R]) for k_1BW in keys)
        return attend(q_THW.transpose(0, 1) * scale, blocks, len(rows_SX), T).transpose(0, 1)

    def _expanded(self, rows_SW: Tensor, T: int, kv_b: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of expanded keys [H, B, N + P] and values [H, B, V]."""
        H, N, P, R, V, *_ = self._geometry
        for rows_BW in rows_SW.split(block_size(T * H)):
            rows_BW = rows_BW.float()
            expanded = self._backend.expand(rows_BW[:, :R], kv_b)
            kv_HBX = expanded.view(-1, H, N + V).transpose(0, 1)
            k_HBP = rows_BW[None, :, R:].expand(H, -1, P)
            yield torch.cat([kv_HBX[..., :N], k_HBP], dim=-1), kv_HBX[..., N:]
