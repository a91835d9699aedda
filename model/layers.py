"""One decoder layer, operation by operation: attention, then the feed-forward, each added to the
residual stream, or mixed into several (hyper-connections, DeepSeek-V4).

Shapes: T tokens of this pass, D hidden_size, G groups, E routed experts, K experts a token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.model.attention import attentions
from slotmoe.model.config import Config
from slotmoe.model.names import LAYER_PARTS, SHARED_PARTS, layer_tensor
from slotmoe.network import layer_types
from slotmoe.network.layer_types import Chunk, Geometry, Layer, Mixed, Mixing, Mla, Pending, Router
from slotmoe.quant.backends.base import Prepared, RoutedExperts, TorchBackend

T = TypeVar("T")
# DeepSeek's code builds both latent norms with the default epsilon, whatever rms_norm_eps says.
LATENT_EPS = 1e-6
# By a router's ``scoring``, what makes scores of logits.
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    **{"softmax": lambda x_TE: x_TE.softmax(dim=-1), "sigmoid": torch.sigmoid},
    "sqrtsoftplus": lambda x_TE: F.softplus(x_TE).sqrt(),
}


def as_tensor(weight: object) -> Tensor:
    """A weight that no backend has changed: a norm or a gate."""
    assert isinstance(weight, Tensor)
    return weight


def layer_of(weights: Mapping[str, Prepared], layer: int, window: int) -> Layer[Prepared]:
    """The weights of ``layer`` out of all ``weights`` by checkpoint name.  Each token sees the last
    ``window`` there, or all for 0."""
    parts = dict[str, object]()
    for field, part in chain(LAYER_PARTS.items(), SHARED_PARTS.items()):
        weight = weights.get(layer_tensor(layer, part.name))
        if weight is not None:
            parts[field] = as_tensor(weight).float() if part.role == "gate" else weight
    attention: object
    if "conv" in parts:
        attention = _filled(layer_types.Delta, parts)
    elif "k_proj" in parts:
        attention = _filled(layer_types.Grouped, parts, window=window)
    elif "kv_proj" in parts:
        keys = _filled(layer_types.Compressor, parts, "compressed_indexer_")
        indexer = _filled(
            layer_types.CompressedIndexer, parts, "compressed_indexer_", compressor=keys
        )
        compressor = _filled(layer_types.Compressor, parts, "compressor_")
        attention = _filled(layer_types.Compressed, parts, compressor=compressor, indexer=indexer)
    else:
        attention = _filled(Mla, parts, indexer=_filled(layer_types.Indexer, parts, "indexer_"))
    whole: Layer[Prepared] | None = _filled(
        Layer,
        parts,
        attention=attention,
        mlp=_filled(layer_types.Mlp, parts),  # of a dense layer, or of shared experts
        attention_mixing=_filled(Mixing, parts, "attn_hc_"),
        mlp_mixing=_filled(Mixing, parts, "ffn_hc_"),
    )
    assert whole is not None
    return whole


def _filled(kind: type[T], parts: dict[str, object], prefix: str = "", **given: object) -> T | None:
    """Weights of a ``kind`` of the border: a field's name is that of its part behind ``prefix``.
    None where there are no such parts."""
    found = {field: parts.get(prefix + field) for field in kind.__annotations__}
    return kind(**found | given) if any(part is not None for part in found.values()) else None


def geometry_of(config: Config) -> Geometry:
    """What a backend has to know of ``config``."""
    c, indexer, compressed, hyper, grouped, delta = config, *[None] * 5
    if (i := c.indexer) is not None:
        indexer = layer_types.IndexGeometry(i.n_heads, i.head_dim, i.topk, i.halves)
    if c.compressed is not None:
        compressed = layer_types.CompressedGeometry(
            c.compressed.sliding_window, c.compressed.o_groups
        )
    if (h := c.hyper) is not None:
        hyper = layer_types.HyperGeometry(h.mult, h.sinkhorn_iters, h.eps, c.rms_norm_eps)
    if (a := c.grouped) is not None:
        grouped = layer_types.GroupedGeometry(a.groups, a.head_dim, c.family.norm_last)
    if (d := c.delta) is not None:
        heads, widths = (d.num_key_heads, d.num_value_heads), (d.key_head_dim, d.value_head_dim)
        delta = layer_types.DeltaGeometry(*heads, *widths, d.latent > 0)
    queries = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    factors = c.rms_norm_eps, LATENT_EPS, c.softmax_scale
    rest = not c.rope_interleave, router_of(c), c.moe_intermediate_size
    sizes = *queries, c.kv_lora_rank, c.v_head_dim
    return Geometry(*sizes, *factors, *rest, indexer, compressed, hyper, grouped, delta)


def router_of(config: Config) -> Router:
    """The router that ``config`` describes."""
    c, family = config, config.family
    normalized = c.norm_topk_prob and (c.num_experts_per_tok > 1 or c.grouped is not None)
    scaled = family.scales_normalized or not normalized
    factor = c.routed_scaling_factor if scaled else 1.0
    sizes = c.n_group, c.topk_group, c.num_experts_per_tok
    return Router(*sizes, factor, normalized, family.group_best, family.scoring)


def route(
    logits_TE: Tensor, router: Router, bias_E: Tensor | None = None, chosen_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert indices int64 [T, K], best first, from the gate's logits,
    float32 [T, E].  ``bias``, float32 [E], is added to what is compared, never to a weight.
    ``chosen``, int64 [T, K], are the indices where the token's id says them."""
    scores_TE = _SCORES[router.scoring](logits_TE)
    indices_TK = _best(scores_TE, router, bias_E) if chosen_TK is None else chosen_TK
    weights_TK = scores_TE.gather(1, indices_TK)
    if router.normalized:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if router.factor != 1.0:
        weights_TK = weights_TK * router.factor
    return weights_TK, indices_TK


def _best(scores_TE: Tensor, router: Router, bias_E: Tensor | None) -> Tensor:
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if router.topk_group < router.n_group:
        choice_TGE = choice_TE.unflatten(-1, (router.n_group, -1))
        best_TG = choice_TGE.topk(router.group_best, dim=-1).values.sum(dim=-1)
        kept = best_TG.topk(router.topk_group, dim=-1).indices
        mask_TG = torch.zeros(best_TG.shape, dtype=torch.bool, device=scores_TE.device)
        mask_TG.scatter_(1, kept, True)
        choice_TE = choice_TGE.masked_fill(~mask_TG[..., None], -math.inf).flatten(-2)
    return choice_TE.topk(router.top_k, dim=-1).indices


class LayerByLayer:
    """Runs layers operation by operation, for any number of tokens and every backend."""

    def __init__(
        self, geometry: Geometry, layers: Sequence[Layer[Prepared]], backend: TorchBackend
    ):
        self._geometry, self._layers, self._backend = geometry, layers, backend
        self._attentions = attentions(geometry, backend)

    def run_layers(
        self, chunk: Chunk, experts: RoutedExperts | None = None, stop: int | None = None
    ) -> Pending | None:
        """See ``slotmoe.quant.backends.base.Runner``; ``experts`` are never asked."""
        backend, eps, router = self._backend, self._geometry.eps, self._geometry.router
        if chunk.x_TD is not None:
            self._feed_forward(chunk)
        while chunk.layer < (len(self._layers) if stop is None else stop):
            layer = self._layers[chunk.layer]
            x_TD, mixed = self._input(chunk, layer.attention_mixing)
            x_TD = backend.rms_norm(x_TD, layer.input_layernorm, eps)
            y_TD = self._attentions[type(layer.attention)](chunk, layer.attention, x_TD)
            self._add(chunk, y_TD, mixed)
            if chunk.timer is not None:
                chunk.timer.mark("attention")
            x_TD, chunk.mixed = self._input(chunk, layer.mlp_mixing)
            chunk.x_TD = x_TD = backend.rms_norm(x_TD, layer.post_attention_layernorm, eps)
            if layer.gate is not None:
                logits_TE, chosen_TK = backend.linear(x_TD, layer.gate), None
                if layer.logit_bias is not None:
                    logits_TE = logits_TE + layer.logit_bias
                if layer.experts_of is not None:
                    assert chunk.ids_T is not None
                    chosen_TK = layer.experts_of[chunk.ids_T].long()
                inputs = logits_TE, router, layer.gate_bias, chosen_TK
                choice = backend.route(*inputs) or route(*inputs)
                if chunk.timer is not None:
                    chunk.timer.mark("gate")
                return Pending(chunk.layer, x_TD, *choice)
            self._feed_forward(chunk)
        return None

    def _feed_forward(self, chunk: Chunk) -> None:
        """Add what the layer's routed experts gave and what its own MLP gives, and go on."""
        mlp, y_TD = self._layers[chunk.layer].mlp, chunk.routed_TD
        if mlp is not None:
            assert chunk.x_TD is not None
            shared_TD = self._backend.mlp(chunk.x_TD, mlp)
            y_TD = shared_TD if y_TD is None else y_TD + shared_TD
        assert y_TD is not None
        self._add(chunk, y_TD, chunk.mixed)
        chunk.layer, chunk.x_TD, chunk.routed_TD, chunk.mixed = chunk.layer + 1, None, None, None
        if chunk.timer is not None:
            chunk.timer.mark("shared experts and dense layers")

    def _input(self, chunk: Chunk, mixing: Mixing | None) -> tuple[Tensor, Mixed | None]:
        """What a block reads of the residual streams, and how they take in what it gives."""
        if mixing is None:
            return chunk.h_TD, None
        assert self._geometry.hyper is not None
        return self._backend.mix(chunk.h_TD, mixing, self._geometry.hyper)

    def _add(self, chunk: Chunk, y_TD: Tensor, mixed: Mixed | None) -> None:
        """Add what a block gives to the residual stream, in its place."""
        if mixed is None:
            chunk.h_TD += y_TD
        else:
            chunk.h_TD.copy_(self._backend.add_mixed(y_TD, chunk.h_TD, mixed))
