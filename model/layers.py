"""One decoder layer, operation by operation: attention, then the feed-forward, each added to the
residual stream, or mixed into several (hyper-connections, DeepSeek-V4).

Shapes: T tokens of this pass, D hidden_size, E routed experts, K experts a token.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Generic, TypeVar

from torch import Tensor

from slotmoe import border
from slotmoe.border import Backend, Geometry, Layer, Mixed, Mixing, Mla, Pending, Step
from slotmoe.model.compressed_attention import CompressedAttention
from slotmoe.model.config import Config
from slotmoe.model.latent_attention import LatentAttention
from slotmoe.model.names import LAYER_PARTS, SHARED_PARTS, layer_tensor
from slotmoe.model.routing import route, router_of

T = TypeVar("T")
W = TypeVar("W")
# DeepSeek's code builds both latent norms with the default epsilon, whatever rms_norm_eps says.
LATENT_EPS = 1e-6


def as_tensor(weight: object) -> Tensor:
    """A weight that no backend has changed: a norm or a gate."""
    assert isinstance(weight, Tensor)
    return weight


def layer_of(weights: Mapping[str, W], layer: int) -> Layer[W]:
    """The weights of ``layer`` out of all ``weights`` by checkpoint name."""
    parts = dict[str, object]()
    for field, part in chain(LAYER_PARTS.items(), SHARED_PARTS.items()):
        weight = weights.get(layer_tensor(layer, part.name))
        if weight is not None:
            parts[field] = as_tensor(weight).float() if part.role == "gate" else weight
    attention: Mla[W] | border.Compressed[W] | None
    if "kv_proj" in parts:
        keys = _filled(border.Compressor, parts, "compressed_indexer_")
        indexer = _filled(border.CompressedIndexer, parts, "compressed_indexer_", compressor=keys)
        compressor = _filled(border.Compressor, parts, "compressor_")
        attention = _filled(border.Compressed, parts, compressor=compressor, indexer=indexer)
    else:
        attention = _filled(Mla, parts, indexer=_filled(border.Indexer, parts, "indexer_"))
    whole: Layer[W] | None = _filled(
        Layer,
        parts,
        attention=attention,
        mlp=_filled(border.Mlp, parts),  # of a dense layer, or of shared experts
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
    c, indexer, compressed, hyper = config, None, None, None
    if (i := c.indexer) is not None:
        indexer = border.IndexGeometry(i.n_heads, i.head_dim, i.topk, i.halves)
    if c.compressed is not None:
        compressed = border.CompressedGeometry(c.compressed.sliding_window, c.compressed.o_groups)
    if (h := c.hyper) is not None:
        hyper = border.HyperGeometry(h.mult, h.sinkhorn_iters, h.eps, c.rms_norm_eps)
    heads = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    factors = c.rms_norm_eps, LATENT_EPS, c.softmax_scale
    rest = not c.rope_interleave, router_of(c), c.moe_intermediate_size
    special = indexer, compressed, hyper
    return Geometry(*heads, c.kv_lora_rank, c.v_head_dim, *factors, *rest, *special)


class LayerByLayer(Generic[W]):
    """Runs layers operation by operation, for any number of tokens and every backend."""

    def __init__(self, geometry: Geometry, layers: Sequence[Layer[W]], backend: Backend[W]):
        self._geometry, self._layers, self._backend = geometry, layers, backend
        self._latent = LatentAttention(geometry, backend)
        self._compressed = CompressedAttention(geometry, backend)

    def run_layers(self, step: Step, experts: border.Experts | None) -> Pending | None:
        """See ``slotmoe.border.Runner``; ``experts`` are never asked."""
        backend, eps, router = self._backend, self._geometry.eps, self._geometry.router
        if step.x_TD is not None:
            self.feed_forward(step)
        while step.layer < len(self._layers):
            layer = self._layers[step.layer]
            x_TD, mixed = self._input(step, layer.attention_mixing)
            x_TD = backend.rms_norm(x_TD, layer.input_layernorm, eps)
            if isinstance(weights := layer.attention, Mla):
                y_TD = self._latent(step, weights, x_TD)
            else:
                y_TD = self._compressed(step, weights, x_TD)
            self._add(step, y_TD, mixed)
            if step.timer is not None:
                step.timer.mark("attention")
            x_TD, step.mixed = self._input(step, layer.mlp_mixing)
            step.x_TD = x_TD = backend.rms_norm(x_TD, layer.post_attention_layernorm, eps)
            if layer.gate is not None:
                logits_TE, chosen_TK = backend.linear(x_TD, layer.gate), None
                if layer.experts_of is not None:
                    assert step.ids_T is not None
                    chosen_TK = layer.experts_of[step.ids_T].long()
                inputs = logits_TE, router, layer.gate_bias, chosen_TK
                choice = backend.route(*inputs) or route(*inputs)
                if step.timer is not None:
                    step.timer.mark("gate")
                return Pending(step.layer, x_TD, *choice)
            self.feed_forward(step)
        return None

    def feed_forward(self, step: Step) -> None:
        """Add what the layer's routed experts gave and what its own MLP gives, and go on."""
        mlp, y_TD = self._layers[step.layer].mlp, step.routed_TD
        if mlp is not None:
            assert step.x_TD is not None
            shared_TD = self._backend.mlp(step.x_TD, mlp)
            y_TD = shared_TD if y_TD is None else y_TD + shared_TD
        assert y_TD is not None
        self._add(step, y_TD, step.mixed)
        step.layer, step.x_TD, step.routed_TD, step.mixed = step.layer + 1, None, None, None
        if step.timer is not None:
            step.timer.mark("shared experts and dense layers")

    def _input(self, step: Step, mixing: Mixing | None) -> tuple[Tensor, Mixed | None]:
        """What a block reads of the residual streams, and how they take in what it gives."""
        if mixing is None:
            return step.h_TD, None
        assert self._geometry.hyper is not None
        return self._backend.mix(step.h_TD, mixing, self._geometry.hyper)

    def _add(self, step: Step, y_TD: Tensor, mixed: Mixed | None) -> None:
        """Add what a block gives to the residual stream, in its place."""
        if mixed is None:
            step.h_TD += y_TD
        else:
            step.h_TD.copy_(self._backend.add_mixed(y_TD, step.h_TD, mixed))
