"""Attention over cached rows in plain torch, on every device.

Shapes: T tokens, H heads, R kv_lora_rank, S cached positions, B a block of them, L rows of a list,
G groups of heads, Z and Y widths of a key and of a value, X rows of queries, or elements of a
cached row, J heads of an indexer, A index_head_dim; of a delta rule, J and H heads of keys and of
values, K and V values of each, Y columns of all.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.network.layer_types import Delta, DeltaGeometry, DeltaRows, GroupedRows, ListedRows
from slotmoe.quant.kernels.cpu.weights import Prepared

_GATHERED = 1 << 22  # values of cached rows, or scores, in memory at once
# Cached rows are widened to float32 in blocks, so that no temporary grows with the context.
_MAX_BLOCK = 4096
_MAX_SCORES = 1 << 22
_UNIT = 1e-6  # added to the squared length of a delta rule's queries and keys


def first_best(scores_TS: Tensor, k: int) -> Tensor:
    """The places of the ``k`` best scores that are more than -inf, the first of equals: int32
    [T, k] in ascending order, -1 behind the last."""
    T, S = scores_TS.shape
    chosen_TS = scores_TS > -torch.inf
    if k < S:
        least_T1 = scores_TS.topk(k, dim=-1).values[:, -1:]
        better_TS, equal_TS = scores_TS > least_T1, scores_TS == least_T1
        left_T1 = k - better_TS.sum(dim=-1, keepdim=True)
        chosen_TS &= better_TS | (equal_TS & (equal_TS.cumsum(dim=-1) <= left_T1))
    # What is not chosen goes to a column of its own.
    ranks_TS = torch.where(chosen_TS, chosen_TS.cumsum(dim=-1) - 1, k)
    lists_TX = torch.full((T, k + 1), -1, dtype=torch.int32, device=scores_TS.device)
    places_S = torch.arange(S, dtype=torch.int32, device=scores_TS.device)
    lists_TX.scatter_(1, ranks_TS, places_S.expand(T, S))
    return lists_TX[:, :k].contiguous()


def block_size(queries: int) -> int:
    """Cached rows that so many queries attend to at once."""
    return min(_MAX_BLOCK, max(64, _MAX_SCORES // queries))


def attend(
    q_HXZ: Tensor,
    blocks: Iterable[tuple[Tensor, Tensor]],
    S: int,
    T: int,
    window: int = 0,
    sinks_HX1: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions, by blocks in float32 (arXiv 1805.02867).

    Row x of the scaled queries is of token x % T.  ``blocks`` yields keys [H or 1, B, Z] and values
    [H or 1, B, Y] in order of position; returns float32 [H, X, Y].  With a ``window`` a token sees
    so many positions, itself among them; ``sinks`` are scores of a row without a value.
    """
    H, X = q_HXZ.shape[:2]
    position_X1 = torch.arange(S - T, S, device=q_HXZ.device).repeat(X // T)[:, None]
    best_HX1 = torch.full((H, X, 1), -torch.inf, device=q_HXZ.device)
    total_HX1 = torch.zeros_like(best_HX1)
    if sinks_HX1 is not None:
        best_HX1, total_HX1 = sinks_HX1, torch.ones_like(total_HX1)
    out_HXY: Tensor | float = 0.0
    start = 0
    for k_HBZ, v_HBY in blocks:
        end = start + k_HBZ.shape[1]
        scores_HXB = q_HXZ @ k_HBZ.transpose(1, 2)
        place_B = torch.arange(start, end, device=q_HXZ.device)
        if end > S - T + 1:  # some query stands before some key of this block
            scores_HXB = scores_HXB.masked_fill(place_B > position_X1, -torch.inf)
        if window and start < S - window:  # some key is too far behind some query
            scores_HXB = scores_HXB.masked_fill(place_B <= position_X1 - window, -torch.inf)
        # Every query sees position 0, so its best score is finite from the first block on.
        better_HX1 = torch.maximum(best_HX1, scores_HXB.amax(dim=-1, keepdim=True))
        if window:  # but for those that see none of the first blocks
            better_HX1 = better_HX1.clamp(min=torch.finfo(torch.float32).min)
        decay_HX1 = (best_HX1 - better_HX1).exp_()
        scores_HXB = (scores_HXB - better_HX1).exp_()
        total_HX1 = total_HX1 * decay_HX1 + scores_HXB.sum(dim=-1, keepdim=True)
        out_HXY = out_HXY * decay_HX1 + scores_HXB @ v_HBY
        best_HX1, start = better_HX1, end
    return out_HXY / total_HX1


class TorchAttention:
    """What a backend does with the rows that sequences keep."""

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        """Elements and dtype of a token's row in the latent cache."""
        return R + P, torch.float16

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        """Write float32 latent rows to rows of the cache; float16 saturates."""
        if rows_TX.dtype == torch.float16:
            latent_TW = latent_TW.clamp(-65504.0, 65504.0)
        rows_TX.copy_(latent_TW)

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        """Causal attention of the last T of S positions over the cached rows, [T, H, R]; None
        without a kernel: rows are then plain [S, W], and the network attends by blocks."""
        return None

    def attend(self, q_THW: Tensor, listed: ListedRows, R: int, scale: float) -> Tensor:
        """Attention of each token over the rows that its list names, float32 [T, H, R]."""
        rows_SX, more_SX, lists_TL, sinks_H = listed
        few = max(1, _GATHERED // (lists_TL.shape[1] * q_THW.shape[2]))
        parts, held = list[Tensor](), len(rows_SX)
        for q_BHW, lists_BL in zip(q_THW.split(few), lists_TL.split(few), strict=True):
            places_BL = lists_BL.long()
            rows_BLW = rows_SX[places_BL.clamp(0, held - 1)]
            if more_SX is not None and len(more_SX):
                is_more_BL = (places_BL >= held)[..., None]
                more_BLW = more_SX[(places_BL - held).clamp(min=0)]
                rows_BLW = torch.where(is_more_BL, more_BLW, rows_BLW)
            rows_BLW = rows_BLW.float()
            scores_BHL = q_BHW @ rows_BLW.transpose(1, 2) * scale
            scores_BHL = scores_BHL.masked_fill((places_BL < 0)[:, None], -torch.inf)
            if sinks_H is not None:
                sinks_BH1 = sinks_H[:, None].expand(len(q_BHW), -1, 1)
                scores_BHL = torch.cat([scores_BHL, sinks_BH1], dim=-1)
            weights_BHL = scores_BHL.softmax(dim=-1)[..., : lists_BL.shape[1]]
            parts.append(weights_BHL @ rows_BLW[..., :R])
        return torch.cat(parts)

    def grouped(self, q_THZ: Tensor, cached: GroupedRows, scale: float) -> Tensor:
        """Causal attention of the last T positions, float32 [T, H, Z], H / G heads to each group's
        rows."""
        (T, H, Z), (rows_GSX, _, window, sinks_H) = q_THZ.shape, cached
        if window:
            rows_GSX = rows_GSX[:, -(window + T - 1) :]
        G, S, _ = rows_GSX.shape
        q_GXZ = (q_THZ.transpose(0, 1) * scale).reshape(G, H // G * T, Z)
        sinks = None if sinks_H is None else sinks_H.repeat_interleave(T).view(G, -1, 1)
        rows = (rows_GBX.float() for rows_GBX in rows_GSX.split(block_size(H * T), dim=1))
        blocks = ((rows_GBX[..., Z:], rows_GBX[..., :Z]) for rows_GBX in rows)
        return attend(q_GXZ, blocks, S, T, window, sinks).view(H, T, Z).transpose(0, 1)

    def gated(self, x_TX: Tensor, gate_TX: Tensor) -> Tensor:
        """``x`` times the sigmoid of ``gate``, float32 [T, X]."""
        return x_TX * gate_TX.sigmoid()

    def delta(
        self,
        cached: DeltaRows,
        z_TX: Tensor,
        weights: Delta[Prepared],
        sizes: DeltaGeometry,
        eps: float,
    ) -> Tensor:
        """What a gated delta rule (arXiv 2412.06464) gives for the last T rows, float32 [T, X],
        normed a head and times the SiLU, or sigmoid, of ``z``.  Token by token, so that a token's
        result is that of it alone: S *= decay; S += k (x) beta (v - S k); o = S q."""
        (rows_SX, past, before_HKV, after_HKV, folded), (J, H, K, V) = cached, sizes[:4]
        n, w = len(rows_SX) - past, weights
        raw_SY, b_SH, a_SX = rows_SX.split([2 * J * K + H * V, H, len(w.dt_bias)], dim=-1)
        raw_SY = F.pad(raw_SY, (0, 0, len(w.conv) - 1 - past, 0))
        mixed_SY = sum(tap_Y * raw_SY[i : i + n] for i, tap_Y in enumerate(w.conv))
        q_SX, k_SX, v_SX = F.silu(mixed_SY).split([J * K, J * K, H * V], dim=-1)
        q_SHK, k_SHK = (
            (x_SJK * torch.rsqrt(x_SJK.square().sum(-1, keepdim=True) + _UNIT)).repeat_interleave(
                H // J, dim=1
            )
            for x_SJK in (q_SX.view(n, J, K), k_SX.view(n, J, K))
        )
        steps_SHX = F.softplus(a_SX[past:] + w.dt_bias).view(n, H, -1)  # of a head or a channel
        decay_SHX = (-w.a_log.exp()[:, None] * steps_SHX).exp()
        beta_SH = b_SH[past:].sigmoid()
        state_HKV, outputs = before_HKV.clone(), list[Tensor]()
        for at in range(n):
            k_HK1 = k_SHK[at, :, :, None]
            state_HKV *= decay_SHX[at, :, :, None]
            known_HV = (state_HKV * k_HK1).sum(dim=1)
            new_HV = (v_SX[at].view(H, V) - known_HV) * beta_SH[at, :, None]
            state_HKV += k_HK1 * new_HV[:, None]
            outputs.append((state_HKV * q_SHK[at, :, :, None]).sum(dim=1))
            if at + 1 == folded:
                after_HKV.copy_(state_HKV)
        o_THV = torch.stack(outputs[n - len(z_TX) :]) * K**-0.5
        o_THV = F.rms_norm(o_THV, (V,), w.value_norm, eps)
        return o_THV.flatten(1) * (z_TX.sigmoid() if sizes.by_channel else F.silu(z_TX))

    def index(
        self, q_TJA: Tensor, weights_TJ: Tensor, keys_SX: Tensor, counts_T: Tensor, k: int
    ) -> Tensor:
        """Which of the first ``counts``, int32 [T], of S keys score best for each token, as
        ``first_best`` has them.  A score is the sum over the J heads of a weight times the product
        with its query where that is positive (DeepSeek-V3.2, arXiv 2512.02556)."""
        S = len(keys_SX)
        few = max(1, _GATHERED // (max(1, S) * q_TJA.shape[1]))
        places_S = torch.arange(S, device=q_TJA.device)
        pairs = zip(q_TJA.split(few), weights_TJ[:, None].split(few), strict=True)
        parts = [(w_B1J @ (q_BJA @ keys_SX.float().t()).relu())[:, 0] for q_BJA, w_B1J in pairs]
        scores_TS = torch.cat(parts).masked_fill(places_S >= counts_T[:, None], -torch.inf)
        return first_best(scores_TS, k)
