"""Layers bound for the native decode call: each is checked once, when it is made, and holds the
memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see bindings.py; of attention:
A heads, R the latent's columns or a head's, Q the query's latent, X all queries, Y all values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slotmoe.border import Compressed, Compressor, Geometry, Layer, Mixing, Mla
from slotmoe.quant.kernels.cpu.signatures import Bound
from slotmoe.quant.kernels.cpu.weights import ROUTER, Absorbed, Mlp, Prepared, Structure, values_of
from slotmoe.quant.shapes import latent_bytes

_INDEXER = Structure(
    "heads width topk halves scale:float unused:float"
    " query:matrix[X,Q] weights:matrix[A,H] key?:matrix[W,H] key_norm?:f32[W] key_bias?:f32[W]"
)
_ATTENTION = Structure(
    "heads n p r v halves eps:float latent_eps:float scale:float unused:float"
    " input_norm:f32[H] query_norm?:f32[Q] latent_norm:f32[R] next_norm:f32[H]"
    " query:matrix[Q,H] query_b?:matrix[X,Q] latent:matrix[W,H] out:matrix[H,Y] gate?:matrix[E,H]"
    " gate_bias?:f32[E] kv_b:bound indexer:bound keys topk"
)
_COMPRESSOR = Structure(
    "kv:matrix[Y,H] gate:matrix[Y,H] bias:f32[J,W] norm:f32[W] ratio width overlaps group layer"
)
_COMPRESSED = Structure(
    "heads z p groups window eps:float scale:float"
    " input_norm:f32[H] query_norm:f32[Q] key_norm:f32[R] sinks:f32[A] next_norm:f32[H]"
    " query:matrix[Q,H] query_b:matrix[X,Q] key:matrix[R,H] out_a:matrix[L,Y] out_b:matrix[H,L]"
    " gate:matrix[E,H] gate_bias?:f32[E] compressor:bound index_keys:bound indexer:bound"
)
_HYPER = Structure("fn:f32[L,J] base:f32[L] scale:f32[3] m iterations eps:float hc_eps:float")
_LAYER = Structure(
    "attention:bound compressed:bound attention_mixing:bound mlp_mixing:bound mlp:bound"
    " experts_of?:i32[V,K]"
)
_MODEL = Structure(f"layers hidden experts streams vocabulary layer:pointer {ROUTER}")


@dataclass
class GroupShape:
    """Compressed rows of `layers` with one ratio, or with `index` the keys of those layers."""

    ratio: int
    width: int
    overlaps: bool
    index: bool
    layers: int = 0


Groups = dict[tuple[int, bool], GroupShape]
"""By ratio, and whether they are keys of an indexer."""


def sizes_of(geometry: Geometry, layer: Layer[Prepared]) -> dict[str, int]:
    """What all layers have alike."""
    attention, (heads, n, p, r, v) = layer.attention, geometry[:5]
    sizes = {"H": len(layer.input_layernorm), "A": heads, "R": r, "C": p // 2}
    sizes["X"] = sizes["Q"] = heads * (n + p)
    if isinstance(attention, Compressed):
        assert geometry.compressed is not None
        return sizes | {"Q": len(attention.q_a_norm), "Y": heads * r // geometry.compressed.groups}
    if attention.q_a_layernorm is not None:
        sizes["Q"] = len(attention.q_a_layernorm)
    return sizes | {"W": r + p, "Y": heads * v}


def mla_layer(
    geometry: Geometry, layer: Layer[Prepared], sizes: dict[str, int], keys: int = 0, topk: int = 0
) -> Bound:
    """The weights of one layer up to its router.  Its indexer, if it has one, is the model's
    `keys`-th; `topk`, unless 0, is how many rows it attends to.  Raises `ValueError`."""
    mla, own = layer.attention, None
    assert isinstance(mla, Mla) and isinstance(mla.kv_b_proj, Absorbed)
    mla.kv_b_proj.agree({"A": geometry.H, "N": geometry.N, "R": geometry.R, "V": geometry.V})
    assert (mla.q_a_layernorm is None) == (mla.q_b_proj is None)
    if mla.indexer is not None:
        norm = mla.indexer.k_norm, mla.indexer.k_norm_bias
        parts = mla.indexer.wq_b, mla.indexer.weights_proj, mla.indexer.wk, *norm
        own = _indexer(geometry, sizes, *parts)
    return _ATTENTION.bind(
        sizes,
        *(*geometry[:5], geometry.halves),
        *(geometry.eps, geometry.latent_eps, geometry.softmax_scale, 0.0),
        *(layer.input_layernorm, mla.q_a_layernorm, mla.kv_a_layernorm),
        layer.post_attention_layernorm,
        *(mla.q_proj if mla.q_a_proj is None else mla.q_a_proj, mla.q_b_proj),
        *(mla.kv_a_proj, mla.o_proj, layer.gate, layer.gate_bias),
        *(mla.kv_b_proj, own, keys, topk),
    )


def _indexer(geometry: Geometry, sizes: dict[str, int], *weights: object) -> Bound:
    """Queries, weights and, unless a compressor makes keys, keys with their norm and bias."""
    assert geometry.indexer is not None
    heads, width, topk, halves = geometry.indexer
    own = {"H": sizes["H"], "Q": sizes["Q"], "A": heads, "W": width, "X": heads * width}
    return _INDEXER.bind(own, heads, width, topk, halves, (heads * width) ** -0.5, 0.0, *weights)


def compressed_layer(
    geometry: Geometry, layer: Layer[Prepared], sizes: dict[str, int], groups: Groups
) -> Bound:
    """The weights of one layer of DeepSeek-V4 up to its router.  What it compresses is counted in
    `groups`.  Raises `ValueError` where they do not fit `sizes`."""
    weights, (heads, _, p, z, *_) = layer.attention, geometry
    assert isinstance(weights, Compressed) and geometry.compressed is not None
    compressor = keys = indexer = None
    if weights.compressor is not None:
        compressor = _compressor(weights.compressor, z, sizes, groups, index=False)
    if weights.indexer is not None:
        assert geometry.indexer is not None
        parts = weights.indexer.q_b_proj, weights.indexer.weights_proj, None, None, None
        indexer, width = _indexer(geometry, sizes, *parts), geometry.indexer.A
        keys = _compressor(weights.indexer.compressor, width, sizes, groups, index=True)
    window, parts_of = geometry.compressed
    return _COMPRESSED.bind(
        sizes,
        *(heads, z, p, parts_of, window, geometry.eps, geometry.softmax_scale),
        *(layer.input_layernorm, weights.q_a_norm, weights.kv_norm, weights.sinks),
        *(layer.post_attention_layernorm, weights.q_a_proj, weights.q_b_proj, weights.kv_proj),
        *(weights.o_a_proj, weights.o_b_proj, layer.gate, layer.gate_bias),
        *(compressor, keys, indexer),
    )


def _compressor(
    weights: Compressor[Prepared], width: int, sizes: dict[str, int], groups: Groups, index: bool
) -> Bound:
    bias, (ratio, columns) = weights.position_bias, weights.position_bias.shape
    shape = GroupShape(ratio, width, columns == 2 * width, index)
    group = groups.setdefault((ratio, index), shape)
    if shape.overlaps:  # the rows of the window before come first
        bias = torch.cat([bias[:, :width], bias[:, width:]])
    group.layers += 1
    return _COMPRESSOR.bind(
        {"H": sizes["H"], "W": width, "Y": columns},
        *(weights.kv_proj, weights.gate_proj, bias, weights.kv_norm),
        *(ratio, width, shape.overlaps, [*groups].index((ratio, index)), group.layers - 1),
    )


def _hyper(mixing: Mixing | None, geometry: Geometry, hidden: int) -> Bound | None:
    if mixing is None or geometry.hyper is None:
        return None
    Q, iterations, small, eps = geometry.hyper
    sizes = {"L": (2 + Q) * Q, "J": Q * hidden}
    return _HYPER.bind(sizes, mixing.fn, mixing.base, mixing.scale, Q, iterations, eps, small)


class Decoder(Bound):
    """All layers of a model for one token of each sequence, each with its `mlps`, that of shared
    experts or a dense one; at least one layer has a router.  Raises `ValueError`."""

    def __init__(
        self, geometry: Geometry, layers: Sequence[Layer[Prepared]], mlps: Sequence[Mlp | None]
    ) -> None:
        sizes, groups, bound = sizes_of(geometry, layers[0]), Groups(), list[Bound]()
        sizes["K"], self.indexers, topk = geometry.router.top_k, 0, 0
        for layer, mlp in zip(layers, mlps, strict=True):
            mla = compressed = None
            if isinstance(layer.attention, Compressed):
                compressed = compressed_layer(geometry, layer, sizes, groups)
            else:
                has = layer.attention.indexer is not None
                if geometry.indexer is not None and (self.indexers or has):
                    topk = geometry.indexer.topk
                mla = mla_layer(geometry, layer, sizes, self.indexers, topk)
                self.indexers += has
            if mlp is not None:
                mlp.agree(sizes)
            mixings = layer.attention_mixing, layer.mlp_mixing
            both = [_hyper(mixing, geometry, sizes["H"]) for mixing in mixings]
            bound.append(_LAYER.bind(sizes, mla, compressed, *both, mlp, layer.experts_of))
        self.routed, self.groups = [layer.gate is not None for layer in layers], [*groups.values()]
        self.streams = geometry.hyper.Q if geometry.hyper else 1
        self.topk, self.window, rotated = topk, 0, geometry.P
        if geometry.compressed is not None:  # a row's last columns are rotated
            self.window, rotated = geometry.compressed.window, 0
        self.row_bytes = latent_bytes(geometry.R, rotated)
        self.key_bytes = latent_bytes(geometry.indexer.A, 0) if geometry.indexer else 0
        natives = (_LAYER.type * len(layers))(*(part.native for part in bound))
        hidden, experts = sizes["H"], sizes.get("E", 0)
        counts = len(layers), hidden, experts, self.streams, sizes.get("V", 0)
        model = _MODEL.bind({}, *counts, natives, *values_of(geometry.router))
        sizes = {letter: sizes[letter] for letter in ("H", "C", "E", "K")}
        sizes |= {"M": sum(self.routed), "Q": self.streams, "X": self.streams * hidden}
        super().__init__(model.native, sizes, model, bound)

    def routers_from(self, first: int, resumed: bool) -> int:
        """Routers from layer `first` on, without its own if the call is `resumed` from experts."""
        assert 0 <= first < len(self.routed) and (self.routed[first] or not resumed)
        return sum(self.routed[first:]) - resumed
