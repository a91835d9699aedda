"""Weights and layers bound for native calls that do several things: each is checked once, when it
is made, and holds the memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see bindings.py; of attention:
A heads, R the latent's columns or a head's, Q the query's latent, X all queries, Y all values.
"""

import ctypes
from collections.abc import Sequence
from itertools import starmap

import torch
from torch import Tensor

from slotmoe.network.layer_types import (
    Compressed,
    Compressor,
    Delta,
    Ends,
    Geometry,
    Grouped,
    Layer,
    Mixing,
    Mla,
    Router,
)
from slotmoe.network.shapes import SWIGLU, Activation, Groups, GroupShape, latent_bytes
from slotmoe.quant.codecs.codec import BLOCK, KINDS, SCALES
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, Placed, Weight
from slotmoe.quant.kernels.cpu import signatures
from slotmoe.quant.kernels.cpu.signatures import C_TYPES, Bound, TensorSpec, tensor_spec

# Kinds of a native matrix beside `KINDS`, which are coded; a dense one is 9 + its source type.  The
# last is int8 in rows, of which no products are made.
INT8, _DENSE, _ROWS = 0, 9, 12
_SCORINGS = "softmax", "sigmoid", "sqrtsoftplus"  # `Scoring` of api.h


def _coded(bits: int, coding: str) -> list[str]:
    scales = SCALES[coding]
    shape = f"[N/16,K/64+{scales.extra},{scales.width}]"
    codes = f"codes:u8[N/16,K/64,{2 * BLOCK * bits}]"
    return [codes, f"scales:{scales.dtype.lower()}{shape}", "levels:f32[16]"]


_MEMORY = {  # what a kind of matrix consists of
    INT8: [f"w:{signatures.INT8}", "scale:f32[N]"],
    **{kind: _coded(*code) for code, kind in KINDS.items()},
    **{_DENSE + source: ["w:source[N,K]"] for source in signatures.SOURCE_TYPES.values()},
    _ROWS: ["w:i8[N,K]", "scale:f32[N]"],
}


class NativeMatrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "levels")),
    ]


class Matrix(Bound):
    """A matrix [N, K] of any kind.

    int8 is tiled: [n_tiles, n_blocks, 1024], byte 64 t + 4 lane + i of a block being row 16 tile +
    lane, column 64 block + 4 t + i, with row scales, float32 [N], and up to 131,072 columns.
    """

    def __init__(self, kind: int, n: int, k: int, *memory: Tensor) -> None:
        self.shape, self.kind, self.tensors, sizes = (n, k), kind, memory, {"N": n, "K": k}
        texts = zip(_MEMORY[kind], memory, strict=True)
        pointers = [tensor_spec(text).check(tensor, sizes) for text, tensor in texts]
        super().__init__(NativeMatrix(kind, n, k, *pointers), sizes, memory)

    @classmethod
    def of(cls, weight: object) -> "Matrix":
        """Of float32, float16, bfloat16, a coded weight or int8 by rows; what is bound stays.
        Raises `ValueError`."""
        if isinstance(weight, Matrix):
            return weight
        if isinstance(weight, Int8Weight):
            return cls(_ROWS, *weight.shape, weight.q, weight.scale)
        if isinstance(weight, CodedWeight):
            return cls(weight.kind, *weight.shape, weight.codes, weight.scales, weight.levels)
        assert isinstance(weight, Tensor)
        if weight.dim() != 2 or weight.dtype not in signatures.SOURCE_TYPES:
            found = f"{weight.dtype} of {weight.dim()} dimensions"
            raise ValueError(f"{found}, expected a float matrix")
        return cls(_DENSE + signatures.SOURCE_TYPES[weight.dtype], *weight.shape, weight)

    @property
    def coded(self) -> bool:
        """Whether it is int8 or coded."""
        return self.kind < _DENSE

    def like(self, other: "Matrix") -> bool:
        """Whether both are of one kind, and of one table of levels."""
        levels = zip(self.tensors[2:], other.tensors[2:], strict=True)
        return self.kind == other.kind and all(starmap(torch.equal, levels))


class Structure:
    """A structure of api.h in the table's words (`slotmoe.quant.kernels.cpu.signatures`): a bare
    name is an integer, and `w:matrix[N,K]` a matrix inside, an empty one for None."""

    def __init__(self, text: str) -> None:
        words, fields = text.split(), list[tuple[str, type]]()
        # None: a value, or bound
        self._specs = [TensorSpec(word) if "[" in word else None for word in words]
        for word, spec in zip(words, self._specs, strict=True):
            kind = "pointer" if spec else word.partition(":")[2]
            field = NativeMatrix if spec and spec.is_matrix else C_TYPES.get(kind, ctypes.c_int64)
            fields.append((str(len(fields)), field))  # names of several may be the same
        bases: tuple[type, ...] = (ctypes.Structure,)
        self.type: type[ctypes.Structure] = type("Native", bases, {"_fields_": fields})

    def bind(self, sizes: dict[str, int], *values: object) -> Bound:
        """The structure with its values in order; `sizes` gets what it lacks.  `ValueError`."""
        parts, matrices = list[object](), list[Matrix]()
        for spec, value in zip(self._specs, values, strict=True):
            if spec is None:
                parts.append(value.address if isinstance(value, Bound) else value)
            elif not spec.is_matrix:
                parts.append(spec.check(value, sizes))
            elif value is None and spec.optional:
                parts.append(NativeMatrix())
            else:
                matrices.append(Matrix.of(value))
                spec.fit(matrices[-1].shape, sizes)
                parts.append(matrices[-1].native)
        return Bound(self.type(*parts), sizes, values, matrices)


_ABSORBED = Structure(
    "heads n r v kind query:pointer value:pointer query_scale?:f32[A,N] value_scale?:f32[A,V]"
    " ones?:f32[R]"
)
_ABSORBED_WEIGHTS = {  # its two, of what an `Absorbed` is made of
    torch.int8: ("query:i8[A,R/16,N/64,1024]", "value:i8[A,V/16,R/64,1024]"),
    **dict.fromkeys(signatures.SOURCE_TYPES, ("query:source[A,R,N]", "value:source[A,V,R]")),
}
ACTIVATION = " limit:float alpha:float offset:float"
_MLP = Structure(
    f"gate:matrix[I,H] up:matrix[I,H] down:matrix[H,I] {ACTIVATION} output_gate?:f32[1,H]"
)
ROUTER = "groups kept top_k group_best scoring normalized factor:double"
_ROUTER = Structure(ROUTER)


def values_of(router: Router) -> tuple[float, ...]:
    """Those of `ROUTER`."""
    groups, kept, top_k, factor, normalized, group_best, scoring = router
    return groups, kept, top_k, group_best, _SCORINGS.index(scoring), normalized, factor


def bind_router(router: Router) -> Bound:
    return _ROUTER.bind({"K": router.top_k}, *values_of(router))


class Absorbed(Bound):
    """`kv_b_proj` [A (N + V), R] as attention multiplies it: of each head its query's rows, turned,
    and its values'.  int8 is in tiles as in `Matrix`, with activations of 15 bits and one scale a
    row; floats are in rows.

    Args:
        head: Rows N of the query and V of the values.
        query: int8 [A, R / 16, N / 64, 1024] or floats [A, R, N].
        value: int8 [A, V / 16, R / 64, 1024] or floats [A, V, R].
        scales: float32 [A, N], [A, V] and ones [R]; None of floats.
    """

    def __init__(
        self, head: tuple[int, int], r: int, query: Tensor, value: Tensor, *scales: Tensor | None
    ) -> None:
        heads, (n, v) = len(query), head
        sizes = {"A": heads, "N": n, "R": r, "V": v}
        kind = INT8 if query.dtype == torch.int8 else _DENSE + signatures.SOURCE_TYPES[query.dtype]
        texts = _ABSORBED_WEIGHTS[query.dtype]
        pointers = [
            tensor_spec(text).check(weight, dict(sizes))
            for text, weight in zip(texts, (query, value), strict=True)
        ]
        self.shape = heads * (n + v), r
        scales = scales or (None,) * 3
        bound = _ABSORBED.bind(sizes, heads, n, r, v, kind, *pointers, *scales)
        super().__init__(bound.native, sizes, query, value, scales)


Prepared = Weight | Placed | Matrix | Absorbed  # the last two are bound for native calls


class BoundMlp(Bound):
    """Matrices gate and up [I, H], down [H, I], all int8, or one codec; `output_gate` as in
    `layer_types.Mlp`."""

    def __init__(
        self,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        activation: Activation = SWIGLU,
        output_gate: Tensor | None = None,
    ) -> None:
        bound = _MLP.bind({}, gate, up, down, *activation, output_gate)
        super().__init__(bound.native, {"H": bound.sizes["H"]}, bound)


_INDEXER = Structure(
    "heads width topk halves scale:float unused:float"
    " query:matrix[X,Q] weights:matrix[A,H] key?:matrix[W,H] key_norm?:f32[W] key_bias?:f32[W]"
)
_ATTENTION = Structure(
    "heads n p r v halves row eps:float latent_eps:float scale:float unused:float"
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
_GROUPED = Structure(
    "heads groups z p halves norm_last window row query_normed key_normed eps:float scale:float"
    " input_norm:f32[H] next_norm:f32[H] query_norm?:f32[Q] key_norm?:f32[W] sinks?:f32[A]"
    " query_bias?:f32[X] key_bias?:f32[L] value_bias?:f32[L] out_bias?:f32[H]"
    " query:matrix[X,H] key:matrix[L,H] value:matrix[L,H] out:matrix[H,X] gate?:matrix[E,H]"
    " gate_bias?:f32[E] query_gate?:matrix[X,H]"
)
_DELTA = Structure(
    "key_heads heads k v by_channel eps:float unused:float convolution:f32[4,dC] decay:f32[dA]"
    " bias:f32[dB] norm:f32[dV] layer input_norm:f32[H] next_norm:f32[H] qkv:matrix[dC,H]"
    " z:matrix[dY,dX] b:matrix[dA,H] a:matrix[dB,dX] out:matrix[H,dY] gate?:matrix[E,H]"
    " gate_bias?:f32[E] z_latent?:matrix[dX,H] a_latent?:matrix[dX,H]"
)
_HYPER = Structure("fn:f32[L,J] base:f32[L] scale:f32[3] m iterations eps:float hc_eps:float")
_LAYER = Structure(
    "attention:bound compressed:bound attention_mixing:bound mlp_mixing:bound mlp:bound"
    " experts_of?:i32[V,K] grouped:bound logit_bias?:f32[E] delta:bound"
)
_MODEL = Structure(
    f"layers hidden experts streams vocabulary layer:pointer {ROUTER} embedding:matrix[V,H]"
    " head:matrix[V,H] pairs norm:f32[H] frequencies:f32[C] eps:float factor:float"
)
_ATTENTIONS = _INDEXER, _ABSORBED, _ATTENTION, _COMPRESSOR, _COMPRESSED, _GROUPED, _DELTA
_BOUND = Structure(ACTIVATION), _MLP, *_ATTENTIONS, _ROUTER, _HYPER, _LAYER, _MODEL
STRUCTURES: list[type] = [NativeMatrix, *(structure.type for structure in _BOUND)]
"""What C++ declares too, in the order of layout.cpp."""


Layers = Sequence[Layer[Prepared]]


def sizes_of(geometry: Geometry, layers: Layers) -> dict[str, int]:
    """What all layers have alike."""
    layer = next((one for one in layers if not isinstance(one.attention, Delta)), layers[0])
    attention, (heads, n, p, r, v) = layer.attention, geometry[:5]
    sizes = {"H": len(layer.input_layernorm), "A": heads, "R": r, "C": p // 2}
    if (delta := geometry.delta) is not None:
        sizes |= {"dA": delta.value_heads, "dV": delta.V}
    if geometry.grouped is not None:
        G, Z, _ = geometry.grouped
        return sizes | {"X": heads * Z, "L": G * Z}
    sizes["X"] = sizes["Q"] = heads * (n + p)
    if isinstance(attention, Compressed):
        assert geometry.compressed is not None
        return sizes | {"Q": len(attention.q_a_norm), "Y": heads * r // geometry.compressed.groups}
    if isinstance(attention, Mla) and attention.q_a_layernorm is not None:
        sizes["Q"] = len(attention.q_a_layernorm)
    return sizes | {"W": r + p, "Y": heads * v}


def mla_layer(
    geometry: Geometry, layer: Layer[Prepared], sizes: dict[str, int], at: int, keys: int, topk: int
) -> Bound:
    """The weights of the `at`-th layer with latents up to its router.  Its indexer, if it has one,
    is the model's `keys`-th; `topk`, unless 0, is how many rows it attends to.  `ValueError`."""
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
        *(*geometry[:5], geometry.halves, at),
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


def grouped_layer(
    geometry: Geometry, layer: Layer[Prepared], sizes: dict[str, int], row: int
) -> Bound:
    """The weights of one layer with grouped queries up to its router; `row` is the first of its
    groups' rows.  Raises `ValueError`."""
    w, grouped = layer.attention, geometry.grouped
    assert isinstance(w, Grouped) and grouped is not None
    norms = w.q_norm, w.k_norm
    return _GROUPED.bind(
        sizes,
        *(geometry.H, grouped.G, grouped.Z, geometry.P, geometry.halves, grouped.norm_last),
        *(w.window, row, *(0 if norm is None else len(norm) for norm in norms)),
        *(geometry.eps, geometry.softmax_scale),
        *(layer.input_layernorm, layer.post_attention_layernorm, *norms, w.sinks),
        *(w.q_bias, w.k_bias, w.v_bias, w.o_bias, w.q_proj, w.k_proj, w.v_proj, w.o_proj),
        *(layer.gate, layer.gate_bias, w.q_gate),
    )


def delta_layer(
    geometry: Geometry, layer: Layer[Prepared], sizes: dict[str, int], index: int
) -> Bound:
    """The weights of the ``index``-th layer with a delta rule up to its router.  `ValueError`."""
    w = layer.attention
    assert isinstance(w, Delta) and geometry.delta is not None
    return _DELTA.bind(
        sizes,
        *(*geometry.delta, geometry.eps, 0.0, w.conv, w.a_log, w.dt_bias, w.value_norm, index),
        *(layer.input_layernorm, layer.post_attention_layernorm, w.in_proj_qkv, w.in_proj_z),
        *(w.in_proj_b, w.in_proj_a, w.out_proj, layer.gate, layer.gate_bias),
        *(w.in_proj_z_latent, w.in_proj_a_latent),
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


class BoundLayers(Bound):
    """All layers of a model for one token of each sequence, each with its `mlps`, that of shared
    experts or a dense one; at least one layer has a router.  Raises `ValueError`."""

    def __init__(
        self, geometry: Geometry, layers: Layers, ends: Ends[Prepared], mlps: Sequence[object]
    ) -> None:
        sizes, groups, bound = sizes_of(geometry, layers), Groups(), list[Bound]()
        sizes["K"], deltas, indexers, topk, self.window = geometry.router.top_k, 0, 0, 0, 0
        of_groups = [0, 0]  # rows of a token, of layers without a window and with one
        for layer, mlp in zip(layers, mlps, strict=True):
            mla = compressed = grouped = delta = None
            if isinstance(layer.attention, Delta):
                delta = delta_layer(geometry, layer, sizes, deltas)
                deltas += 1
            elif isinstance(layer.attention, Compressed):
                compressed = compressed_layer(geometry, layer, sizes, groups)
            elif isinstance(layer.attention, Grouped):
                kind = int(layer.attention.window > 0)
                grouped = grouped_layer(geometry, layer, sizes, of_groups[kind])
                of_groups[kind] += grouped.sizes["L"] // geometry.R
                self.window = max(self.window, layer.attention.window)
            else:
                assert isinstance(layer.attention, Mla)
                has = layer.attention.indexer is not None
                if geometry.indexer is not None and (indexers or has):
                    topk = geometry.indexer.topk
                mla = mla_layer(geometry, layer, sizes, len(bound) - deltas, indexers, topk)
                indexers += has
            if isinstance(mlp, BoundMlp):
                mlp.agree(sizes)
            mixings = layer.attention_mixing, layer.mlp_mixing
            both = [_hyper(mixing, geometry, sizes["H"]) for mixing in mixings]
            rest = layer.experts_of, grouped, layer.logit_bias, delta
            bound.append(_LAYER.bind(sizes, mla, compressed, *both, mlp, *rest))
        routed, self.groups = [layer.gate is not None for layer in layers], [*groups.values()]
        # Routers behind each layer's, and behind none.
        self.routers_from = [sum(routed[first:]) for first in range(len(layers) + 1)]
        self.streams = geometry.hyper.Q if geometry.hyper else 1
        self.topk, rotated = topk, geometry.P
        self.attention = Grouped if geometry.grouped else Compressed if geometry.compressed else Mla
        if geometry.compressed is not None:  # a row's last columns are rotated
            self.window, rotated = geometry.compressed.window, 0
        # What a sequence has: layers, or groups of them, and bytes of a row.
        self.rows = len(layers) - deltas, latent_bytes(geometry.R, rotated)
        self.keys = indexers, latent_bytes(geometry.indexer.A, 0) if geometry.indexer else 0
        if geometry.grouped is not None:
            width = latent_bytes(geometry.R, geometry.R)
            self.rows, self.keys = (of_groups[0], width), (of_groups[1], width)
        self.inputs = self.states = 0, 0
        if (of := geometry.delta) is not None:
            self.inputs = deltas, 4 * (sizes["dC"] + sizes["dA"] + sizes["dB"])
            self.states = deltas, 4 * of.value_heads * of.K * of.V
        natives = (_LAYER.type * len(layers))(*(part.native for part in bound))
        hidden, experts = sizes["H"], sizes.get("E", 0)
        counts = len(layers), hidden, experts, self.streams, ends.head.shape[0]
        start, routers = ctypes.addressof(natives), values_of(geometry.router)
        others = sizes["C"], ends.norm_D, ends.frequencies_C, geometry.eps, ends.factor
        weights = ends.embedding, ends.head
        model = _MODEL.bind(sizes, *counts, start, *routers, *weights, *others)
        sizes = {letter: sizes[letter] for letter in ("H", "C", "E", "K", "V")}
        sizes |= {"M": sum(routed), "Q": self.streams, "X": self.streams * hidden}
        super().__init__(model.native, sizes, model, natives, bound)
