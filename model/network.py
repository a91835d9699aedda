"""The DeepSeek-V2 network (arXiv 2405.04434): Multi-head Latent Attention and DeepSeekMoE, read top
to bottom.

Shape legend: T tokens of this call, D hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim,
R kv_lora_rank, V v_head_dim, W = R + P latent row, X elements of a cached one, C = P / 2, S cached
positions, B one block of them, E routed experts, K experts a token. A pass is over the tokens of
one sequence, or over one token of each of several (T of them, each with a cache of its own).
Activations are float32; what a weight is made of (fp32, int8, NF4, on which device) is known only
to ``Ops``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from slotmoe.model.config import Config, Rope
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import (
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    LAYER_PARTS,
    layer_tensor,
    mlp_parts,
)

Experts = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``experts(layer, x_TD, weights_TK, indices_TK) -> y_TD``: the weighted sum of each token's
experts, in gate order.

It may have an attribute ``on_device``.  While that is true, a call with one token asks nothing of
the host: it reads the indices on the device alone, where every expert is, and its work may be
recorded once and repeated without calling it again. It may have a method ``here()``, which says
where the experts are, as ``Ops.decoder`` takes it, or None while it wants to be called for every
layer; then ``used(layer, indices_NK)`` tells it what the gates of N MoE layers from ``layer`` on
have chosen instead.
"""

OnDevice = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_MAX_BLOCK = (
    4096  # cached rows widened to float32 at once, so that no temporary grows with the context
)
_MAX_SCORES = 1 << 22
# DeepSeek's code builds both latent norms with the default epsilon, whatever rms_norm_eps says
_LATENT_EPS = 1e-6


class Ops(Protocol):
    """What the network asks of its weights; ``slotmoe.quant.backends.base`` has the
    implementations."""

    name: str
    # its attention kernel wants the absorbed form always, so that decode and prefill compute the
    # same
    absorbs: bool

    def linear(self, x_TK: Tensor, weight: Any) -> Tensor:
        """``x @ weight.T``, float32 [T, N]."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, float32 [T, D]."""

    def mlp(self, x_TD: Tensor, gate_proj: Any, up_proj: Any, down_proj: Any) -> Tensor:
        """``down(silu(gate(x)) * up(x))``, float32 [T, D]."""

    def embed(self, ids_T: Tensor, weight: Any) -> Tensor:
        """Rows ``ids`` of the embedding table, float32 [T, D]."""

    def rotate(self, x_THP: Tensor, table_TC: Tensor) -> Tensor:
        """Interleaved pairs (x0, x1), (x2, x3), ... times the complex table [T, C]: float32 [T, H,
        P]."""

    def absorb_query(self, q_THN: Tensor, kv_b: Any) -> Tensor:
        """Each head's query times its first N rows of ``kv_b_proj``: float32 [T, H, R]."""

    def absorb_value(self, o_THR: Tensor, kv_b: Any, N: int) -> Tensor:
        """Each head's latent output through its rows of ``kv_b_proj`` past the first N: float32 [T,
        H, V]."""

    def expand(self, latent_BR: Tensor, kv_b: Any) -> Tensor:
        """Keys and values of all heads, float32 [B, H * (N + V)]."""

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        """Elements and dtype of a token's row in the latent cache, X of them."""

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        """Write float32 latent rows to rows of the cache."""

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        """Causal attention of the last T of S positions over the cached rows, float32 [T, H, R];
        None if these ops have no kernel for it, their rows are plain [S, W], and the network's
        blockwise attention shall serve."""

    def fuse(
        self,
        layer: Layer,
        sizes: tuple[int, int, int, int, int],
        eps: float,
        latent_eps: float,
        scale: float,
    ) -> FusedLayer | None:
        """The layer's weights bound for decoding one token in few calls; None if these ops go op by
        op.  ``sizes`` are H, N, P, R, V."""

    def step(
        self, function: OnDevice
    ) -> Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]] | None:
        """A decode step as one piece of work for the device, or None.  ``function(ids_1,
        position_1, layers_LSW)`` computes it without the host, the position being a tensor; the
        result takes ``(ids_1, position, layers_LSW)``."""

    def route(
        self, logits_TE: Tensor, groups: int, kept: int, top_k: int, factor: float | None
    ) -> tuple[Tensor, Tensor] | None:
        """What ``route`` gives, of ``groups`` groups (1: no groups); ``factor`` None renormalises.
        None if these ops have no kernel for it."""

    def decoder(
        self,
        fused: Sequence[Any],
        groups: int,
        kept: int,
        top_k: int,
        factor: float | None,
        intermediate: int,
    ) -> Callable[..., tuple[int, Tensor, Tensor, Tensor, Tensor, Sequence[float]]] | None:
        """All layers of one token in one call, as far as their experts are there, or None if these
        ops have no such kernel.

        The result takes ``(first, h_1D, table_1C, layers_LSX, position, *here)`` and goes through
        the layers from ``first`` on.  It returns the layer that it could not finish, or their
        number; ``h_1D`` as it is there, behind the attention; ``x_1D`` and ``weights_1K`` for the
        experts of that layer; the choices of all gates on the way, ``indices_NK``; and the seconds
        that attention, gates, experts and the rest of the feed-forward took.  ``fused`` are the
        layers as ``fuse`` gave them, the others are ``route``'s and the experts' intermediate size.
        """


class FusedLayer(Protocol):
    """A layer for one token of each sequence: what comes before its experts are chosen, and what
    comes after they are computed. Bitwise what the ops give one by one, so that decode equals
    prefill.  ``together``: whether more than one sequence may come."""

    together: bool

    def begin(
        self, h_TD: Tensor, table_TC: Tensor, rows: Sequence[Tensor], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``h + attention(norm(h))``, the norm ``x`` of that, and the router's logits [T, E] (None
        in a dense layer); writes each token's latent row at its position of its sequence's cache
        [S, X]."""

    def end(self, h_TD: Tensor, x_TD: Tensor, y_TD: Tensor | None) -> Tensor:
        """``h + (y + mlp(x))``, ``y`` being the routed experts' sum (None in a dense layer)."""


class Mlp(NamedTuple):
    gate_proj: Any
    up_proj: Any
    down_proj: Any


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; ``gate`` is None in a dense layer, ``mlp`` None where there is
    no shared expert."""

    input_layernorm: Tensor
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj: Any
    kv_a_layernorm: Tensor
    kv_b_proj: Any
    o_proj: Any
    post_attention_layernorm: Tensor
    gate: Tensor | None
    mlp: Mlp | None


Lap = Callable[..., None]
"""``lap(part, now=None)`` of a stopwatch: the time since the last lap, until ``now`` of
``time.perf_counter()``, went into ``part``."""

_PARTS = (
    "attention",
    "gate",
    "experts",
    "shared experts and dense layers",
)  # whose seconds ``Ops.decoder`` tells


def unwatched(part: str, now: float | None = None) -> None:
    """A stopwatch that nobody reads."""


def _layer(weights: Mapping[str, Any], config: Config, layer: int) -> Layer:
    def get(part: str) -> Any:
        return weights.get(layer_tensor(layer, part))

    has_mlp = not config.is_moe(layer) or config.n_shared_experts > 0
    return Layer(
        **{field: get(part) for field, part in LAYER_PARTS.items()},
        gate=get(GATE).float() if config.is_moe(layer) else None,
        mlp=Mlp(*map(get, mlp_parts(config.is_moe(layer)))) if has_mlp else None,
    )


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """RoPE's angle per position, float32 [dim / 2], blended by YaRN's ramp (arXiv 2309.00071,
    section 3.2)."""
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor == 1.0:
        return plain

    def turning_point(
        rotations: float,
    ) -> float:  # dimension that makes so many rotations over the original context
        return (
            dim
            * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(turning_point(rope.beta_fast)), 0)
    high = min(math.ceil(turning_point(rope.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def route(logits_TE: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The gate from its logits, float32 [T, E]: weights float32 [T, K] and expert indices int64 [T,
    K], best first.

    Group-limited greedy (DeepSeek-V2, section 2.2.2): softmax over all experts, keep the
    ``topk_group`` groups with the best single expert, zero the others, then top-k.
    ``norm_topk_prob`` replaces the scaling factor, as in DeepSeek's code.
    """
    scores_TE = logits_TE.softmax(dim=-1)
    if config.topk_method == "group_limited_greedy":
        groups_TGE = scores_TE.unflatten(-1, (config.n_group, -1))
        kept = groups_TGE.amax(dim=-1).topk(config.topk_group, dim=-1).indices
        mask = torch.zeros(
            groups_TGE.shape[:2], dtype=torch.bool, device=logits_TE.device
        ).scatter_(1, kept, True)
        scores_TE = groups_TGE.masked_fill(~mask[..., None], 0.0).flatten(-2)
    weights_TK, indices_TK = scores_TE.topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20), indices_TK
    if config.routed_scaling_factor != 1.0:
        weights_TK = weights_TK * config.routed_scaling_factor
    return weights_TK, indices_TK


class DeepseekV2:
    """The network over weights in memory.  ``weights`` maps checkpoint names to whatever ``ops``
    understands; norms and gates are float tensors.  ``experts`` computes the routed experts,
    wherever they are."""

    def __init__(self, config: Config, weights: Mapping[str, Any], ops: Ops, experts: Experts):
        self.config, self.ops, self.experts = config, ops, experts
        self.embed_tokens = weights[EMBEDDING]
        self.layers = [_layer(weights, config, layer) for layer in range(config.num_hidden_layers)]
        self.norm: Tensor = weights[FINAL_NORM]
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else weights[HEAD]
        c, sizes = (
            config,
            (
                config.num_attention_heads,
                config.qk_nope_head_dim,
                config.qk_rope_head_dim,
                config.kv_lora_rank,
                config.v_head_dim,
            ),
        )
        self.fused = [
            ops.fuse(layer, sizes, c.rms_norm_eps, _LATENT_EPS, c.softmax_scale)
            for layer in self.layers
        ]
        whole = all(fused is not None for fused in self.fused)
        self._step = ops.step(self._on_device) if whole else None
        groups, kept = (
            (c.n_group, c.topk_group) if c.topk_method == "group_limited_greedy" else (1, 1)
        )
        factor = None if c.norm_topk_prob and c.num_experts_per_tok > 1 else c.routed_scaling_factor
        self._gate = groups, kept, c.num_experts_per_tok, factor  # as ``Ops.route`` takes it
        self._decode = (
            ops.decoder(self.fused, *self._gate, config.moe_intermediate_size) if whole else None
        )
        self.frequencies = inverse_frequencies(config.rope, config.qk_rope_head_dim).to(
            self.norm.device
        )
        self.hidden_TD: Tensor | None = (
            None  # residual stream after the last layer of the latest forward
        )
        self.lap: Lap = unwatched

    @torch.inference_mode()
    def forward(self, ids_T: Tensor, cache: LatentCache, all_logits: bool = False) -> Tensor:
        """Append ``ids`` (int64 [T]) to ``cache`` and return logits, float32 [1, vocab] of the last
        token or [T, vocab].

        The cache grows only when the whole step is done, so a step that raises can be repeated.
        """
        if (
            self._step is not None
            and len(ids_T) == 1
            and getattr(self.experts, "on_device", False)
            and self.lap is unwatched
        ):
            self.hidden_TD, logits_1V = self._step(ids_T, cache.length, cache.layers)
            cache.length += 1
            return logits_1V
        h_TD = self._pass(ids_T, [cache])
        logits_TV = self.head(h_TD if all_logits else h_TD[-1:])
        self.lap("head")
        return logits_TV

    @torch.inference_mode()
    def forward_together(self, ids_T: Tensor, caches: Sequence[LatentCache]) -> Tensor:
        """Append one of ``ids`` (int64 [T]) to each of T sequences and return their logits, float32
        [T, vocab].

        With ops whose rows do not depend on each other, each row is bitwise what ``forward`` gives
        its sequence alone.
        """
        h_TD = self._pass(ids_T, caches)
        # A tied head is the embedding, row-major, and torch's product of several rows differs in
        # the last bit.
        logits_TV = torch.cat(
            [
                self.head(h_1D)
                for h_1D in h_TD.split(1 if self.config.tie_word_embeddings else len(h_TD))
            ]
        )
        self.lap("head")
        return logits_TV

    def _pass(self, ids_T: Tensor, caches: Sequence[LatentCache]) -> Tensor:
        """All layers over the T tokens of one sequence, or one token of each of several: the
        residual stream, [T, D]."""
        each = len(ids_T) // len(caches)
        starts = torch.tensor(
            [cache.length for cache in caches], device=ids_T.device, dtype=torch.float32
        )
        positions_T = (
            starts[:, None] + torch.arange(each, device=ids_T.device, dtype=torch.float32)
        ).flatten()
        table_TC = self._table(positions_T)
        h_TD = self.ops.embed(ids_T, self.embed_tokens)
        eps, rms_norm = self.config.rms_norm_eps, self.ops.rms_norm
        self.lap("rest")
        done = 0
        if self._decode is not None and len(ids_T) == 1:
            done, h_TD = self._ahead(h_TD, table_TC, caches[0])
        for index, (layer, fused) in enumerate(
            zip(self.layers[done:], self.fused[done:], strict=True), done
        ):
            if fused is not None and each == 1 and (len(caches) == 1 or fused.together):
                rows, positions = (
                    [cache.extend(index, 1) for cache in caches],
                    [cache.length for cache in caches],
                )
                h_TD = self._one_token_each(index, fused, h_TD, table_TC, rows, positions)
                continue
            h_TD = h_TD + self._attention(
                index, layer, rms_norm(h_TD, layer.input_layernorm, eps), table_TC, caches
            )
            self.lap("attention")
            h_TD = h_TD + self._feed_forward(
                index, layer, rms_norm(h_TD, layer.post_attention_layernorm, eps)
            )
        for cache in caches:
            cache.length += each
        self.hidden_TD = h_TD
        return h_TD

    def _on_device(
        self, ids_1: Tensor, position_1: Tensor, layers_LSW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A decode step for which nothing has to be known here: the residual stream, [1, D], and
        logits, float32 [1, vocab]."""
        h_1D, table_1C = self.ops.embed(ids_1, self.embed_tokens), self._table(position_1.float())
        for index, fused in enumerate(self.fused):
            assert fused is not None
            h_1D = self._one_token_each(index, fused, h_1D, table_1C, [layers_LSW[index]], [0])
        return h_1D, self.head(h_1D)

    def _table(self, positions_T: Tensor) -> Tensor:
        """The rotation of each position's pairs, complex [T, C]."""
        angles = positions_T[:, None] * self.frequencies
        return torch.polar(torch.full_like(angles, self.config.rope.table_scale), angles)

    @torch.inference_mode()
    def head(self, h_TD: Tensor) -> Tensor:
        """Logits, float32 [T, vocab], from rows of the residual stream after the last layer."""
        return self.ops.linear(
            self.ops.rms_norm(h_TD, self.norm, self.config.rms_norm_eps), self.lm_head
        )

    def _one_token_each(
        self,
        index: int,
        fused: FusedLayer,
        h_TD: Tensor,
        table_TC: Tensor,
        rows: Sequence[Tensor],
        positions: Sequence[int],
    ) -> Tensor:
        """``_attention`` and ``_feed_forward`` in as few calls as the choice of experts leaves."""
        h_TD, x_TD, logits_TE = fused.begin(h_TD, table_TC, rows, positions)
        self.lap("attention")
        y_TD = None
        if logits_TE is not None:
            weights_TK, indices_TK = self._route(logits_TE)
            self.lap("gate")
            y_TD = self.experts(index, x_TD, weights_TK, indices_TK)
        h_TD = fused.end(h_TD, x_TD, y_TD)
        self.lap("shared experts and dense layers")
        return h_TD

    def _ahead(self, h_1D: Tensor, table_1C: Tensor, cache: LatentCache) -> tuple[int, Tensor]:
        """Layers of one token in as few calls as they find their experts: how many are done, and
        the residual stream."""
        done, experts = 0, cast(Any, self.experts)
        assert self._decode is not None
        if not hasattr(experts, "here"):
            return done, h_1D
        while done < len(self.layers) and (here := experts.here()) is not None:
            cache.extend(done, 1)
            now = time.perf_counter()
            self.lap("cache and prefetch", now)
            index, h_1D, x_1D, weights_1K, indices_N1K, spent = self._decode(
                done, h_1D, table_1C, [cache.layers], [cache.length], *here
            )
            for part, seconds in zip(_PARTS, spent, strict=True):
                now += seconds
                self.lap(part, now)
            missing = index < len(self.layers)
            indices_NK = indices_N1K[:, 0]
            experts.used(done, indices_NK[:-1] if missing else indices_NK)
            if missing:
                fused = self.fused[index]
                assert fused is not None
                h_1D = fused.end(h_1D, x_1D, experts(index, x_1D, weights_1K, indices_NK[-1:]))
                self.lap("shared experts and dense layers")
            done = index + missing
        return done, h_1D

    def _route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.route(logits_TE, *self._gate) or route(logits_TE, self.config)

    def _feed_forward(self, index: int, layer: Layer, x_TD: Tensor) -> Tensor:
        if layer.gate is None:
            assert layer.mlp is not None
            y_TD = self.ops.mlp(x_TD, *layer.mlp)
        else:
            weights_TK, indices_TK = self._route(self.ops.linear(x_TD, layer.gate))
            self.lap("gate")
            y_TD = self.experts(index, x_TD, weights_TK, indices_TK)
            y_TD = y_TD if layer.mlp is None else y_TD + self.ops.mlp(x_TD, *layer.mlp)
        self.lap("shared experts and dense layers")
        return y_TD

    def _attention(
        self,
        index: int,
        layer: Layer,
        x_TD: Tensor,
        table_TC: Tensor,
        caches: Sequence[LatentCache],
    ) -> Tensor:
        """MLA, each sequence over its own cache.  Only the latent row is cached; keys and values
        are absorbed into the query and output, or expanded block by block, whichever costs less
        (absorbed for decode, expanded for long prefill chunks)."""
        c, ops, T = self.config, self.ops, len(x_TD)
        rms_norm = ops.rms_norm
        H, N, P, R, V = (
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.kv_lora_rank,
            c.v_head_dim,
        )
        if layer.q_proj is not None:
            q = ops.linear(x_TD, layer.q_proj)
        else:
            q = ops.linear(
                rms_norm(ops.linear(x_TD, layer.q_a_proj), layer.q_a_layernorm, _LATENT_EPS),
                layer.q_b_proj,
            )
        q_THN, q_THP = q.view(T, H, N + P).split([N, P], dim=-1)
        c_TR, k_TP = ops.linear(x_TD, layer.kv_a_proj).split([R, P], dim=-1)
        rotated = ops.rotate(
            torch.cat([q_THP, k_TP[:, None]], dim=1), table_TC
        )  # the key's rope part is one more head
        q_THP, k_TP = rotated[:, :H], rotated[:, H]
        latent_TW = torch.cat([rms_norm(c_TR, layer.kv_a_layernorm, _LATENT_EPS), k_TP], dim=-1)
        each = T // len(caches)
        rows = [cache.extend(index, each) for cache in caches]
        for rows_SX, part in zip(rows, latent_TW.split(each), strict=True):
            ops.store_latents(part, R, rows_SX[-each:])

        S = len(rows[0])
        absorbed_cost = T * H * R * (N + V) + T * S * H * (2 * R + P)
        expanded_cost = S * H * R * (N + V) + T * S * H * (N + P + V)
        if ops.absorbs or each == 1 or absorbed_cost <= expanded_cost:
            q_THW = torch.cat([ops.absorb_query(q_THN, layer.kv_b_proj), q_THP], dim=-1)
            outputs = [
                self._over_latents(part, rows_SX)
                for part, rows_SX in zip(q_THW.split(each), rows, strict=True)
            ]
            o_THV = ops.absorb_value(
                outputs[0] if len(outputs) == 1 else torch.cat(outputs), layer.kv_b_proj, N
            )
        else:  # one sequence, several tokens
            q_THX = torch.cat([q_THN, q_THP], dim=-1)
            o_THV = _attend(q_THX, self._expanded(rows[0], T, layer.kv_b_proj), S, c.softmax_scale)
        return ops.linear(o_THV.reshape(T, H * V), layer.o_proj)

    def _over_latents(self, q_THW: Tensor, rows_SX: Tensor) -> Tensor:
        """Attention of one sequence's absorbed queries over its cached rows, [T, H, R]."""
        o_THR = self.ops.mla(q_THW, rows_SX, self.config.kv_lora_rank, self.config.softmax_scale)
        if o_THR is None:
            o_THR = _attend(
                q_THW, self._absorbed(rows_SX, len(q_THW)), len(rows_SX), self.config.softmax_scale
            )
        return o_THR

    def _block_size(self, T: int) -> int:
        return min(_MAX_BLOCK, max(64, _MAX_SCORES // (T * self.config.num_attention_heads)))

    def _absorbed(self, rows_SW: Tensor, T: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of shared keys [1, B, W] and values [1, B, R]: the latent rows themselves."""
        for rows_BW in rows_SW.split(self._block_size(T)):
            rows_BW = rows_BW.float()[None]
            yield rows_BW, rows_BW[..., : self.config.kv_lora_rank]

    def _expanded(self, rows_SW: Tensor, T: int, kv_b: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of expanded keys [H, B, N + P] and values [H, B, V]."""
        c = self.config
        H, N, P, V = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        for rows_BW in rows_SW.split(self._block_size(T)):
            rows_BW = rows_BW.float()
            kv_HBX = (
                self.ops.expand(rows_BW[:, : c.kv_lora_rank], kv_b)
                .view(-1, H, N + V)
                .transpose(0, 1)
            )
            k_HBP = rows_BW[None, :, c.kv_lora_rank :].expand(H, -1, P)
            yield torch.cat([kv_HBX[..., :N], k_HBP], dim=-1), kv_HBX[..., N:]


def _attend(q_THX: Tensor, blocks: Iterator[tuple[Tensor, Tensor]], S: int, scale: float) -> Tensor:
    """Causal attention of the last T of S positions, softmax accumulated block by block in float32
    (arXiv 1805.02867).

    ``blocks`` yields keys [H or 1, B, X] and values [H or 1, B, Y] in order of position; returns
    [T, H, Y].
    """
    T, H = q_THX.shape[:2]
    q_HTX = q_THX.transpose(0, 1) * scale
    position_T = torch.arange(S - T, S, device=q_THX.device)
    best_HT1 = torch.full((H, T, 1), -math.inf, device=q_THX.device)
    total_HT1 = torch.zeros_like(best_HT1)
    out_HTY: Tensor | float = 0.0
    start = 0
    for k_HBX, v_HBY in blocks:
        end = start + k_HBX.shape[1]
        scores_HTB = q_HTX @ k_HBX.transpose(1, 2)
        if end > S - T + 1:  # some query stands before some key of this block
            future = torch.arange(start, end, device=q_THX.device) > position_T[:, None]
            scores_HTB = scores_HTB.masked_fill(future, -math.inf)
        # Every query sees position 0, so its best score is finite from the first block on.
        better_HT1 = torch.maximum(best_HT1, scores_HTB.amax(dim=-1, keepdim=True))
        decay_HT1 = (best_HT1 - better_HT1).exp_()
        scores_HTB = (scores_HTB - better_HT1).exp_()
        total_HT1 = total_HT1 * decay_HT1 + scores_HTB.sum(dim=-1, keepdim=True)
        out_HTY = out_HTY * decay_HT1 + scores_HTB @ v_HBY
        best_HT1, start = better_HT1, end
    return (out_HTY / total_HT1).transpose(0, 1)
