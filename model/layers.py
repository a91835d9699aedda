"""One decoder layer, operation by operation: Multi-head Latent Attention, then the feed-forward.

Shapes: T tokens of this pass, D hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, R
kv_lora_rank, V v_head_dim, W = R + P latent row, C = P / 2, S cached positions, B one block of
them, E routed experts, K experts a token, Z and Y widths of a key and of a value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor

from slotmoe.border import Backend, Experts, Geometry, Layer, Mlp, Pending, Step
from slotmoe.model.config import Config
from slotmoe.model.names import LAYER_PARTS, SHARED_PARTS, layer_tensor
from slotmoe.model.routing import route, router_of

W = TypeVar("W")
# DeepSeek's code builds both latent norms with the default epsilon, whatever rms_norm_eps says.
LATENT_EPS = 1e-6

# Cached rows are widened to float32 in blocks, so that no temporary grows with the context.
_MAX_BLOCK = 4096
_MAX_SCORES = 1 << 22


def as_tensor(weight: object) -> Tensor:
    """A weight that no backend has changed: a norm or a gate."""
    assert isinstance(weight, Tensor)
    return weight


def layer_of(weights: Mapping[str, W], layer: int) -> Layer[W]:
    """The weights of ``layer`` out of all ``weights`` by checkpoint name."""
    plain: dict[str, Tensor] = {}
    matrices: dict[str, W] = {}
    for field, part in chain(LAYER_PARTS.items(), SHARED_PARTS.items()):
        if (weight := weights.get(layer_tensor(layer, part.name))) is None:
            continue
        if part.role in ("norm", "gate"):
            tensor = as_tensor(weight)
            plain[field] = tensor.float() if part.role == "gate" else tensor
        else:
            matrices[field] = weight
    has_mlp = "gate_proj" in matrices  # of a dense layer, or of shared experts
    return Layer(
        input_layernorm=plain["input_layernorm"],
        q_proj=matrices.get("q_proj"),
        q_a_proj=matrices.get("q_a_proj"),
        q_a_layernorm=plain.get("q_a_layernorm"),
        q_b_proj=matrices.get("q_b_proj"),
        kv_a_proj=matrices["kv_a_proj"],
        kv_a_layernorm=plain["kv_a_layernorm"],
        kv_b_proj=matrices["kv_b_proj"],
        o_proj=matrices["o_proj"],
        post_attention_layernorm=plain["post_attention_layernorm"],
        gate=plain.get("gate"),
        gate_bias=plain.get("gate_bias"),
        mlp=Mlp(*(matrices[field] for field in SHARED_PARTS)) if has_mlp else None,
    )


def geometry_of(config: Config) -> Geometry:
    """What a backend has to know of ``config``."""
    c = config
    sizes = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    norms = c.rms_norm_eps, LATENT_EPS, c.softmax_scale
    router = router_of(c)
    width = c.moe_intermediate_size
    return Geometry(*sizes, c.v_head_dim, *norms, not c.rope_interleave, router, width)


class LayerByLayer(Generic[W]):
    """Runs layers operation by operation, for any number of tokens and every backend."""

    def __init__(self, geometry: Geometry, layers: Sequence[Layer[W]], backend: Backend[W]):
        self._geometry, self._layers, self._backend = geometry, layers, backend

    def run_layers(self, step: Step, experts: Experts | None) -> Pending | None:
        """See ``slotmoe.border.Runner``; ``experts`` are never asked."""
        backend, eps, router = self._backend, self._geometry.eps, self._geometry.router
        if step.x_TD is not None:
            self.feed_forward(step)
        while step.layer < len(self._layers):
            layer = self._layers[step.layer]
            x_TD = backend.rms_norm(step.h_TD, layer.input_layernorm, eps)
            step.h_TD += self._attention(step, layer, x_TD)
            step.timer.mark("attention")
            step.x_TD = x_TD = backend.rms_norm(step.h_TD, layer.post_attention_layernorm, eps)
            if layer.gate is not None:
                logits_TE = backend.linear(x_TD, layer.gate)
                inputs = logits_TE, router, layer.gate_bias
                choice = backend.route(*inputs) or route(*inputs)
                step.timer.mark("gate")
                return Pending(step.layer, x_TD, *choice)
            self.feed_forward(step)
        return None

    def feed_forward(self, step: Step) -> None:
        """Add what the layer's routed experts gave and what its own MLP gives, and go on."""
        mlp, y_TD = self._layers[step.layer].mlp, step.routed_TD
        if mlp is not None:
            assert step.x_TD is not None
            projections = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            shared_TD = self._backend.mlp(step.x_TD, *projections)
            y_TD = shared_TD if y_TD is None else y_TD + shared_TD
        assert y_TD is not None
        step.h_TD += y_TD
        step.layer, step.x_TD, step.routed_TD = step.layer + 1, None, None
        step.timer.mark("shared experts and dense layers")

    def _attention(self, step: Step, layer: Layer[W], x_TD: Tensor) -> Tensor:
        """MLA, each sequence over its own cache.  Only the latent row is cached; keys and values
        are absorbed into the query and output, or expanded block by block, whichever costs less
        (absorbed for decode, expanded for long prefill chunks)."""
        H, N, P, R, V, _, latent_eps, scale, halves, *_ = self._geometry
        backend, T = self._backend, len(x_TD)
        rms_norm = backend.rms_norm
        if layer.q_proj is not None:
            q = backend.linear(x_TD, layer.q_proj)
        else:
            assert layer.q_a_proj is not None and layer.q_b_proj is not None
            assert layer.q_a_layernorm is not None
            low = rms_norm(backend.linear(x_TD, layer.q_a_proj), layer.q_a_layernorm, latent_eps)
            q = backend.linear(low, layer.q_b_proj)
        if step.query_scale_T is not None:
            q = q * step.query_scale_T[:, None]
        q_THN, q_THP = q.view(T, H, N + P).split([N, P], dim=-1)
        c_TR, k_TP = backend.linear(x_TD, layer.kv_a_proj).split([R, P], dim=-1)
        # The key's rope part is rotated as one more head.
        rotated = backend.rotate(torch.cat([q_THP, k_TP[:, None]], dim=1), step.rope_TC, halves)
        q_THP, k_TP = rotated[:, :H], rotated[:, H]
        latent_TW = torch.cat([rms_norm(c_TR, layer.kv_a_layernorm, latent_eps), k_TP], dim=-1)
        counts = [*step.counts]
        ends = [step.behind + count for count in counts]
        rows = [cache.extend(step.layer, end) for cache, end in zip(step.caches, ends, strict=True)]
        for rows_SX, new_TW in zip(rows, latent_TW.split(counts), strict=True):
            backend.store_latents(new_TW, R, rows_SX[-len(new_TW) :])

        S = len(rows[0])
        absorbed_cost = T * H * R * (N + V) + T * S * H * (2 * R + P)
        expanded_cost = S * H * R * (N + V) + T * S * H * (N + P + V)
        several = len(rows) > 1
        if backend.absorbs or several or T == 1 or absorbed_cost <= expanded_cost:
            q_THW = torch.cat([backend.absorb_query(q_THN, layer.kv_b_proj), q_THP], dim=-1)
            parts = zip(q_THW.split(counts), rows, strict=True)
            outputs = [self._over_latents(part, rows_SX) for part, rows_SX in parts]
            o_THR = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            o_THV = backend.absorb_value(o_THR, layer.kv_b_proj, N)
        else:  # one sequence, several tokens
            q_THZ = torch.cat([q_THN, q_THP], dim=-1)
            blocks = self._expanded(rows[0], T, layer.kv_b_proj)
            o_THV = attend(q_THZ, blocks, S, scale)
        return backend.linear(o_THV.reshape(T, H * V), layer.o_proj)

    def _over_latents(self, q_THW: Tensor, rows_SX: Tensor) -> Tensor:
        """Attention of one sequence's absorbed queries over its cached rows, [T, H, R]."""
        R, scale = self._geometry.R, self._geometry.softmax_scale
        o_THR = self._backend.mla(q_THW, rows_SX, R, scale)
        if o_THR is not None:
            return o_THR
        # All heads share the keys [1, B, W] and values [1, B, R]: the latent rows themselves.
        keys = (rows_BW.float()[None] for rows_BW in rows_SX.split(self._block_size(len(q_THW))))
        blocks = ((k_1BW, k_1BW[..., :R]) for k_1BW in keys)
        return attend(q_THW, blocks, len(rows_SX), scale)

    def _block_size(self, T: int) -> int:
        return min(_MAX_BLOCK, max(64, _MAX_SCORES // (T * self._geometry.H)))

    def _expanded(self, rows_SW: Tensor, T: int, kv_b: W) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of expanded keys [H, B, N + P] and values [H, B, V]."""
        H, N, P, R, V, *_ = self._geometry
        for rows_BW in rows_SW.split(self._block_size(T)):
            rows_BW = rows_BW.float()
            expanded = self._backend.expand(rows_BW[:, :R], kv_b)
            kv_HBX = expanded.view(-1, H, N + V).transpose(0, 1)
            k_HBP = rows_BW[None, :, R:].expand(H, -1, P)
            yield torch.cat([kv_HBX[..., :N], k_HBP], dim=-1), kv_HBX[..., N:]


def attend(q_THZ: Tensor, blocks: Iterator[tuple[Tensor, Tensor]], S: int, scale: float) -> Tensor:
    """Causal attention of the last T of S positions, softmax accumulated block by block in float32
    (arXiv 1805.02867).

    ``blocks`` yields keys [H or 1, B, Z] and values [H or 1, B, Y] in order of position; returns
    float32 [T, H, Y].
    """
    T, H = q_THZ.shape[:2]
    q_HTZ = q_THZ.transpose(0, 1) * scale
    position_T = torch.arange(S - T, S, device=q_THZ.device)
    best_HT1 = torch.full((H, T, 1), -math.inf, device=q_THZ.device)
    total_HT1 = torch.zeros_like(best_HT1)
    out_HTY: Tensor | float = 0.0
    start = 0
    for k_HBZ, v_HBY in blocks:
        end = start + k_HBZ.shape[1]
        scores_HTB = q_HTZ @ k_HBZ.transpose(1, 2)
        if end > S - T + 1:  # some query stands before some key of this block
            future = torch.arange(start, end, device=q_THZ.device) > position_T[:, None]
            scores_HTB = scores_HTB.masked_fill(future, -math.inf)
        # Every query sees position 0, so its best score is finite from the first block on.
        better_HT1 = torch.maximum(best_HT1, scores_HTB.amax(dim=-1, keepdim=True))
        decay_HT1 = (best_HT1 - better_HT1).exp_()
        scores_HTB = (scores_HTB - better_HT1).exp_()
        total_HT1 = total_HT1 * decay_HT1 + scores_HTB.sum(dim=-1, keepdim=True)
        out_HTY = out_HTY * decay_HT1 + scores_HTB @ v_HBY
        best_HT1, start = better_HT1, end
    return (out_HTY / total_HT1).transpose(0, 1)
