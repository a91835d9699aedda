"""Layers bound for the native decode call: each is checked once, when it is made, and holds the
memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see `slotmoe.quant.kernels.cpu.
bindings`; of attention: A heads, N and P columns of a query head without and with rotation, R the
latent's, V a value head's.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.border import (
    Compressed,
    Compressor,
    Geometry,
    HyperGeometry,
    Layer,
    Mixing,
    Mla,
    Router,
)
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.signatures import Bound, tensor_spec
from slotmoe.quant.kernels.cpu.weights import Matrix, Mlp, NativeMatrix, NativeRouter, fields, fit
from slotmoe.quant.shapes import latent_bytes
from slotmoe.quant.weights import Weight


class _Indexer(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "heads width topk halves"),
        *fields(ctypes.c_float, "scale unused"),
        *fields(NativeMatrix, "query weights key"),
        *fields(ctypes.c_void_p, "key_norm key_bias"),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "heads n p r v halves"),
        *fields(ctypes.c_float, "eps latent_eps scale unused"),
        *fields(ctypes.c_void_p, "input_norm query_norm latent_norm next_norm"),
        *fields(NativeMatrix, "query query_b latent out gate"),
        *fields(ctypes.c_void_p, "gate_bias kv_b kv_b_scale indexer"),
        *fields(ctypes.c_int64, "keys topk"),
    ]


class _Compressor(ctypes.Structure):
    _fields_ = [
        *fields(NativeMatrix, "kv gate"),
        *fields(ctypes.c_void_p, "bias norm"),
        *fields(ctypes.c_int64, "ratio width overlaps group layer"),
    ]


class _Compressed(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "heads z p groups window"),
        *fields(ctypes.c_float, "eps scale"),
        *fields(ctypes.c_void_p, "input_norm query_norm key_norm sinks next_norm"),
        *fields(NativeMatrix, "query query_b key out_a out_b gate"),
        *fields(ctypes.c_void_p, "gate_bias compressor index_keys indexer"),
    ]


class _Hyper(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "fn base scale"),
        *fields(ctypes.c_int64, "m iterations"),
        *fields(ctypes.c_float, "eps hc_eps"),
    ]


class _Layer(ctypes.Structure):
    _fields_ = fields(
        ctypes.c_void_p, "attention compressed attention_mixing mlp_mixing mlp experts_of"
    )


class _Model(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "layers hidden experts streams vocabulary"),
        ("layer", ctypes.c_void_p),
        ("router", NativeRouter),
    ]


class AttentionLayer(Bound):
    """The weights of one layer up to its router, `kv_b_proj` of them int8.  Its indexer, if it has
    one, is the model's `keys`-th; `topk`, unless 0, is how many rows it attends to.  Raises
    `ValueError` where they do not fit."""

    def __init__(
        self, geometry: Geometry, layer: Layer[Weight | Matrix], keys: int = 0, topk: int = 0
    ) -> None:
        mla = layer.attention
        assert isinstance(mla, Mla)
        shape, kv_b = geometry[:5], mla.kv_b_proj
        heads, n, p, r, v = shape
        if min(heads, r, v) < 1 or min(n, p) < 0 or max(shape) >= 2**31 or p % 2:
            raise ValueError(f"shape is {shape}, expected heads, N, even P, R and V")
        if (mla.q_a_layernorm is None) != (mla.q_b_proj is None):
            raise ValueError("query_norm and query_b must come together")
        query = _bound(mla.q_proj if mla.q_a_proj is None else mla.q_a_proj)
        query_b, gate = _bound(mla.q_b_proj), _bound(layer.gate)
        latent, out = Matrix.of(mla.kv_a_proj), Matrix.of(mla.o_proj)
        assert query is not None and isinstance(kv_b, Int8Weight)
        queries, hidden, wanted = query.shape[0], latent.shape[1], heads * (n + p)
        experts = gate.shape[0] if gate else 0
        matrices = fit(
            query=(query, (queries if query_b else wanted, hidden)),
            query_b=(query_b, (wanted, queries)),
            latent=(latent, (r + p, hidden)),
            out=(out, (hidden, heads * v)),
            gate=(gate, (experts, hidden)),
        )
        sizes = {"H": hidden, "Q": queries, "R": r, "M": heads * (n + v), "E": experts}
        indexer, own = None, mla.indexer
        if own is not None:
            parts, norms = (own.wq_b, own.weights_proj, own.wk), (own.k_norm, own.k_norm_bias)
            indexer = _indexer(geometry, queries, hidden, *parts, norm=norms[0], bias=norms[1])
        native = _Attention(
            *shape,
            geometry.halves,
            *(geometry.eps, geometry.latent_eps, geometry.softmax_scale, 0.0),
            tensor_spec("input_norm:f32[H]").check(layer.input_layernorm, sizes),
            tensor_spec("query_norm?:f32[Q]").check(mla.q_a_layernorm, sizes),
            tensor_spec("latent_norm:f32[R]").check(mla.kv_a_layernorm, sizes),
            tensor_spec("next_norm:f32[H]").check(layer.post_attention_layernorm, sizes),
            *matrices,
            tensor_spec("gate_bias?:f32[E]").check(layer.gate_bias, sizes),
            tensor_spec("kv_b:i8[M,R]").check(kv_b.q, sizes),
            tensor_spec("kv_b_scale:f32[M]").check(kv_b.scale, sizes),
            indexer and indexer.address,
            *(keys, topk),
        )
        self.row_bytes, sizes = latent_bytes(r, p), {"H": hidden, "C": p // 2, "E": experts}
        self.topk, self.key_bytes, self.window = topk, 0, 0
        if geometry.indexer is not None and indexer:
            self.key_bytes = latent_bytes(geometry.indexer.A, 0)
        super().__init__(native, sizes, layer, query, query_b, latent, out, gate, indexer)


def _indexer(
    geometry: Geometry,
    queries: int,
    hidden: int,
    *weights: Weight | Matrix | None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
) -> Bound:
    """Of a query's latent of so many columns: what makes queries, weights and, unless a compressor
    does, keys.  Raises `ValueError`."""
    assert geometry.indexer is not None
    heads, width, topk, halves = geometry.indexer
    query, of_heads, key = map(_bound, weights)
    matrices = fit(
        query=(query, (heads * width, queries)),
        weights=(of_heads, (heads, hidden)),
        key=(key, (width, hidden)),
    )
    native = _Indexer(
        *(heads, width, topk, halves, (heads * width) ** -0.5, 0.0, *matrices),
        tensor_spec("k_norm?:f32[A]").check(norm, {"A": width}),
        tensor_spec("k_norm_bias?:f32[A]").check(bias, {"A": width}),
    )
    return Bound(native, {}, query, of_heads, key, norm, bias)


@dataclass
class GroupShape:
    """Compressed rows of `layers` with one ratio, or with `index` the keys of those layers."""

    ratio: int
    width: int
    overlaps: bool
    index: bool
    layers: int = 0


class CompressedLayer(Bound):
    """The weights of one layer of DeepSeek-V4 up to its router.  What it compresses is counted in
    `groups`.  Raises `ValueError` where they do not fit."""

    topk = key_bytes = 0

    def __init__(
        self, geometry: Geometry, layer: Layer[Weight | Matrix], groups: list[GroupShape]
    ) -> None:
        weights, (heads, _, p, z, *_) = layer.attention, geometry
        assert isinstance(weights, Compressed) and geometry.compressed is not None
        window, parts = geometry.compressed
        names = "q_a_proj q_b_proj kv_proj o_a_proj o_b_proj".split()
        bound = [Matrix.of(getattr(weights, name)) for name in names]
        assert layer.gate is not None
        gate = Matrix.of(layer.gate)
        (queries, hidden), (low, _) = bound[0].shape, bound[3].shape
        shapes = (queries, hidden), (heads * z, queries), (z, hidden), (low, heads * z // parts)
        fitting = zip(
            (*bound, gate), (*shapes, (hidden, low), (gate.shape[0], hidden)), strict=True
        )
        matrices = fit(**dict(zip((*names, "gate"), fitting, strict=True)))
        compressor = keys = indexer = None
        if weights.compressor is not None:
            compressor = _compressor(weights.compressor, z, hidden, groups, index=False)
        if weights.indexer is not None:
            assert geometry.indexer is not None
            parts_of = weights.indexer.q_b_proj, weights.indexer.weights_proj, None
            indexer = _indexer(geometry, queries, hidden, *parts_of)
            width = geometry.indexer.A
            keys = _compressor(weights.indexer.compressor, width, hidden, groups, index=True)
        experts = gate.shape[0]
        sizes = {"H": hidden, "Q": queries, "Z": z, "A": heads, "E": experts}
        native = _Compressed(
            *(heads, z, p, parts, window, geometry.eps, geometry.softmax_scale),
            tensor_spec("input_norm:f32[H]").check(layer.input_layernorm, sizes),
            tensor_spec("q_a_norm:f32[Q]").check(weights.q_a_norm, sizes),
            tensor_spec("kv_norm:f32[Z]").check(weights.kv_norm, sizes),
            tensor_spec("sinks:f32[A]").check(weights.sinks, sizes),
            tensor_spec("next_norm:f32[H]").check(layer.post_attention_layernorm, sizes),
            *matrices,
            tensor_spec("gate_bias?:f32[E]").check(layer.gate_bias, sizes),
            *(part and part.address for part in (compressor, keys, indexer)),
        )
        self.row_bytes, self.window = latent_bytes(z, 0), window
        sizes = {"H": hidden, "C": p // 2, "E": experts}
        super().__init__(native, sizes, layer, bound, gate, compressor, keys, indexer)


def _compressor(
    weights: Compressor[Weight | Matrix],
    width: int,
    hidden: int,
    groups: list[GroupShape],
    index: bool,
) -> Bound:
    ratio, columns = weights.position_bias.shape
    shape = GroupShape(ratio, width, columns == 2 * width, index)
    known = [(group.ratio, group.index) for group in groups]
    if (ratio, index) not in known:
        known.append((ratio, index))
        groups.append(shape)
    at = known.index((ratio, index))
    kv, gate, bias = Matrix.of(weights.kv_proj), Matrix.of(weights.gate_proj), weights.position_bias
    matrices = fit(kv=(kv, (columns, hidden)), gate=(gate, (columns, hidden)))
    if shape.overlaps:  # the rows of the window before come first
        bias = torch.cat([bias[:, :width], bias[:, width:]])
    native = _Compressor(
        *matrices,
        tensor_spec("position_bias:f32[J,Z]").check(bias, {"Z": width}),
        tensor_spec("kv_norm:f32[Z]").check(weights.kv_norm, {"Z": width}),
        *(ratio, width, shape.overlaps, at, groups[at].layers),
    )
    groups[at].layers += 1
    return Bound(native, {}, weights, kv, gate, bias)


def hyper_layer(mixing: Mixing, hyper: HyperGeometry, eps: float, hidden: int) -> Bound:
    Q, iterations, small = hyper
    sizes = {"L": (2 + Q) * Q, "J": Q * hidden}
    fn = tensor_spec("fn:f32[L,J]").check(mixing.fn, sizes)
    base = tensor_spec("base:f32[L]").check(mixing.base, sizes)
    scale = tensor_spec("scale:f32[3]").check(mixing.scale, sizes)
    return Bound(_Hyper(fn, base, scale, Q, iterations, eps, small), {}, mixing)


def _bound(weight: Weight | Matrix | None) -> Matrix | None:
    return None if weight is None else Matrix.of(weight)


class BoundLayer(NamedTuple):
    """A layer of a `Decoder`: `mlp` is that of shared experts or a dense one, `mixings` are those
    at attention and at the feed-forward, `experts_of` as in `slotmoe.border.Layer`."""

    attention: AttentionLayer | CompressedLayer
    mlp: Mlp | None
    mixings: tuple[Bound, Bound] | None = None
    experts_of: Tensor | None = None


class Decoder(Bound):
    """All layers of a model for one token of each sequence, with `streams` residual streams; at
    least one layer has a router.  `groups` are the compressed rows of all layers.  Raises
    `ValueError` where the layers do not fit together or the router does not fit their experts."""

    def __init__(
        self,
        layers: Sequence[BoundLayer],
        router: Router,
        streams: int = 1,
        groups: Sequence[GroupShape] = (),
    ) -> None:
        if not layers:
            raise ValueError("there are no layers")
        attentions = [layer.attention for layer in layers]
        experts = max(part.sizes["E"] for part in attentions)
        sizes, self.row_bytes = attentions[0].sizes | {"E": experts}, attentions[0].row_bytes
        for part in attentions:
            same = part.sizes | {"E": experts} == sizes and part.row_bytes == self.row_bytes
            if not same or part.sizes["E"] not in (0, experts):
                raise ValueError("the layers have different sizes, or numbers of experts")
        self.routed = [part.sizes["E"] > 0 for part in attentions]
        self.streams, self.groups = streams, groups
        self.indexers = sum(part.key_bytes > 0 for part in attentions)
        self.key_bytes = max(part.key_bytes for part in attentions)
        self.topk = max(part.topk for part in attentions)
        self.window = max(part.window for part in attentions)
        natives, table = (_Layer * len(layers))(), {"K": router.top_k}
        for bound, layer in zip(natives, layers, strict=True):
            attention, mlp, mixings, experts_of = layer
            if mlp is not None and mlp.sizes["H"] != sizes["H"]:
                raise ValueError(f"an MLP's size is different from the layers' {sizes['H']}")
            kind = "attention" if isinstance(attention, AttentionLayer) else "compressed"
            setattr(bound, kind, attention.address)
            bound.mlp = mlp and mlp.address
            if mixings is not None:
                bound.attention_mixing, bound.mlp_mixing = (part.address for part in mixings)
            bound.experts_of = tensor_spec("experts_of?:i32[V,K]").check(experts_of, table)
        counts = len(layers), sizes["H"], experts, streams, table.get("V", 0)
        start = ctypes.addressof(natives)
        native = _Model(*counts, start, NativeRouter(router, experts))
        sizes |= {"M": sum(self.routed), "K": router.top_k}
        super().__init__(native, sizes, list(layers), natives)

    def routers_from(self, first: int, resumed: bool) -> int:
        """How many routers are left from layer `first` on, without its own if the call is
        `resumed` from its experts.  Raises `ValueError`."""
        if not 0 <= first < len(self.routed):
            raise ValueError(f"first is {first}, expected one of {len(self.routed)} layers")
        if resumed and not self.routed[first]:
            raise ValueError(f"layer {first} has no experts: x and experts must be None")
        return sum(self.routed[first:]) - resumed
