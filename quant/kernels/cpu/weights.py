"""Weights bound for native calls that do several things: each is checked once, when it is made, and
holds the memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see `slotmoe.quant.kernels.cpu.
bindings`; of attention: A heads, N and P columns of a query head without and with rotation, R the
latent's, V a value head's.
"""

import ctypes
from collections.abc import Sequence
from itertools import starmap

import torch
from torch import Tensor

from slotmoe.border import Geometry, Indexer, Layer, Mla, Router
from slotmoe.quant.codecs.codec import BLOCK, KINDS, SCALES, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.signatures import INT8, SOURCE_TYPES, Bound, tensor_spec
from slotmoe.quant.shapes import latent_bytes, record_bytes
from slotmoe.quant.weights import Weight

# Kinds of a native matrix beside `KINDS`, which are coded; a dense one is 6 + its source type.
_INT8, _DENSE = 0, 6
_SCORINGS = "softmax", "sigmoid", "sqrtsoftplus"  # `Scoring` of api.h


def _coded(bits: int, coding: str) -> list[str]:
    scales = SCALES[coding]
    shape = f"[N/16,K/64+{scales.extra},{scales.width}]"
    codes = f"codes:u8[N/16,K/64,{2 * BLOCK * bits}]"
    return [codes, f"scales:{scales.dtype.lower()}{shape}", "levels:f32[16]"]


_MEMORY = {  # what a kind of matrix consists of
    _INT8: [f"w:{INT8}", "scale:f32[N]"],
    **{kind: _coded(*code) for code, kind in KINDS.items()},
    **{_DENSE + source: ["w:source[N,K]"] for source in SOURCE_TYPES.values()},
}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Matrix(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "kind n k") + _fields(ctypes.c_void_p, "data scale levels")


class _Mlp(ctypes.Structure):
    _fields_ = [*_fields(_Matrix, "gate up down"), ("limit", ctypes.c_float)]


class _Indexer(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "heads width topk halves"),
        *_fields(ctypes.c_float, "scale unused"),
        *_fields(_Matrix, "query weights key"),
        *_fields(ctypes.c_void_p, "key_norm key_bias"),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "heads n p r v halves"),
        *_fields(ctypes.c_float, "eps latent_eps scale unused"),
        *_fields(ctypes.c_void_p, "input_norm query_norm latent_norm next_norm"),
        *_fields(_Matrix, "query query_b latent out gate"),
        *_fields(ctypes.c_void_p, "gate_bias kv_b kv_b_scale indexer"),
        *_fields(ctypes.c_int64, "keys topk"),
    ]


class _Layer(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "attention mlp")


class NativeRouter(ctypes.Structure):
    """A `Router`.  Raises `ValueError` unless it can choose among so many experts."""

    _fields_ = [
        *_fields(ctypes.c_int64, "groups kept top_k group_best scoring normalized"),
        ("factor", ctypes.c_double),
    ]

    def __init__(self, router: Router, experts: int) -> None:
        groups, kept, top_k, factor, normalized, group_best, scoring = router
        fits = groups >= 1 and experts % groups == 0 and 1 <= kept <= groups
        size = experts // groups if fits else 0
        if not 1 <= top_k <= kept * size or not 1 <= group_best <= min(2, size):
            asked = f"{kept} of {groups} groups by {group_best} of their experts"
            raise ValueError(f"{asked} and top {top_k} don't fit {experts} experts")
        kind = _SCORINGS.index(scoring)
        super().__init__(groups, kept, top_k, group_best, kind, normalized, factor)


class _Record(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "hidden intermediate gate_up down"),
        *_fields(ctypes.c_void_p, "gate_up_levels down_levels"),
        ("limit", ctypes.c_float),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "layers hidden experts"),
        ("layer", ctypes.c_void_p),
        ("router", NativeRouter),
    ]


class Matrix(Bound):
    """A matrix [N, K] of any kind.

    int8 is tiled: [n_tiles, n_blocks, 1024], byte 64 t + 4 lane + i of a block being row 16 tile +
    lane, column 64 block + 4 t + i, with row scales, float32 [N].
    """

    def __init__(self, kind: int, n: int, k: int, *memory: Tensor) -> None:
        if not 1 <= n < 2**31 or not 1 <= k < 2**31:
            raise ValueError(f"a matrix of {n} rows and {k} columns, expected at least 1")
        self.shape, self.kind, self.tensors, sizes = (n, k), kind, memory, {"N": n, "K": k}
        texts = zip(_MEMORY[kind], memory, strict=True)
        pointers = [tensor_spec(text).check(tensor, sizes) for text, tensor in texts]
        self.native = _Matrix(kind, n, k, *pointers)
        super().__init__(self.native, sizes, memory)

    @classmethod
    def of(cls, weight: "Weight | Matrix") -> "Matrix":
        """A tensor, float32, float16 or bfloat16, or a coded weight; what is bound stays as is.
        Raises `ValueError`."""
        if isinstance(weight, Matrix):
            return weight
        if isinstance(weight, CodedWeight):
            return cls(weight.kind, *weight.shape, weight.codes, weight.scales, weight.levels)
        assert isinstance(weight, Tensor)
        if weight.dim() != 2 or weight.dtype not in SOURCE_TYPES:
            raise ValueError(
                f"{weight.dtype} of {weight.dim()} dimensions, expected a float matrix"
            )
        return cls(_DENSE + SOURCE_TYPES[weight.dtype], *weight.shape, weight)

    @classmethod
    def int8(cls, tiles: Tensor, scale: Tensor, shape: tuple[int, int]) -> "Matrix":
        return cls(_INT8, *shape, tiles, scale)

    @property
    def coded(self) -> bool:
        """Whether it is int8 or coded."""
        return self.kind < _DENSE

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def like(self, other: "Matrix") -> bool:
        """Whether both are of one kind, and of one table of levels."""
        if self.kind != other.kind:
            return False
        levels = self.tensors[2:], other.tensors[2:]
        return all(starmap(torch.equal, zip(*levels, strict=True)))


def _fit(**matrices: tuple[Matrix | None, tuple[int, int]]) -> list[_Matrix]:
    """The matrices as structures, empty ones for None.  Raises `ValueError` unless they have these
    shapes."""
    for name, (matrix, shape) in matrices.items():
        if matrix is not None and matrix.shape != shape:
            raise ValueError(f"{name} is {matrix.shape}, expected {shape}")
    return [_Matrix() if matrix is None else matrix.native for matrix, _ in matrices.values()]


class Mlp(Bound):
    """The matrices of down(silu(gate x) * up x), gate and up [I, H], down [H, I]: all int8, or all
    of one codec.  `limit` as for backends."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix, limit: float = 0.0) -> None:
        rows, columns = gate.shape
        natives = _fit(gate=(gate, gate.shape), up=(up, gate.shape), down=(down, (columns, rows)))
        if not gate.coded or not gate.like(up) or not gate.like(down):
            raise ValueError("the matrices of an MLP must be all int8, or all of one codec")
        super().__init__(_Mlp(*natives, limit), {"H": columns}, gate, up, down)


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
        matrices = _fit(
            query=(query, (queries if query_b else wanted, hidden)),
            query_b=(query_b, (wanted, queries)),
            latent=(latent, (r + p, hidden)),
            out=(out, (hidden, heads * v)),
            gate=(gate, (experts, hidden)),
        )
        sizes = {"H": hidden, "Q": queries, "R": r, "M": heads * (n + v), "E": experts}
        indexer = _indexer(geometry, mla.indexer, queries, hidden) if mla.indexer else None
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
        self.topk, self.key_bytes = topk, 0
        if geometry.indexer is not None and indexer:
            self.key_bytes = latent_bytes(geometry.indexer.A, 0)
        super().__init__(native, sizes, layer, query, query_b, latent, out, gate, indexer)


def _indexer(
    geometry: Geometry, indexer: Indexer[Weight | Matrix], queries: int, hidden: int
) -> Bound:
    """Of a query's latent of so many columns.  Raises `ValueError`."""
    assert geometry.indexer is not None
    heads, width, topk, halves = geometry.indexer
    bound = Matrix.of(indexer.wq_b), Matrix.of(indexer.weights_proj), Matrix.of(indexer.wk)
    shapes = (heads * width, queries), (heads, hidden), (width, hidden)
    names, sizes = ("wq_b", "weights_proj", "wk"), {"A": width}
    native = _Indexer(
        *(heads, width, topk, halves, (heads * width) ** -0.5, 0.0),
        *_fit(**dict(zip(names, zip(bound, shapes, strict=True), strict=True))),
        tensor_spec("k_norm:f32[A]").check(indexer.k_norm, sizes),
        tensor_spec("k_norm_bias:f32[A]").check(indexer.k_norm_bias, sizes),
    )
    return Bound(native, {}, indexer, *bound)


def _bound(weight: Weight | Matrix | None) -> Matrix | None:
    return None if weight is None else Matrix.of(weight)


class ExpertRecord(Bound):
    """How the records of experts are coded, [I, H] by I and H = `hidden`, with levels float32 [2,
    16]: those of gate and up, and of down; `limit` as for backends.  Raises `ValueError`."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        codecs: ExpertCodecs,
        levels: Tensor,
        limit: float = 0.0,
    ):
        if not 1 <= hidden < 2**31 or not 1 <= intermediate < 2**31:
            raise ValueError(f"experts are {intermediate} by {hidden}, expected at least 1")
        tensor_spec("levels:f32[2,16]").check(levels, {})
        kinds, starts = [codec.kind for codec in codecs], [row.data_ptr() for row in levels]
        native = _Record(hidden, intermediate, *kinds, *starts, limit)
        self.record_bytes = record_bytes(hidden, intermediate, codecs)
        self._slab: Slab | None = None  # of the last call
        super().__init__(native, {"H": hidden}, levels)

    def slab(self, slab: Tensor) -> "Slab":
        """The slab, uint8 [S, B].  Raises `ValueError` unless each row holds a record at a multiple
        of 64."""
        if self._slab is None or self._slab.tensor is not slab:
            bound = Slab(slab)
            rows, size = slab.shape
            if (rows and size < self.record_bytes) or size % 64 or slab.data_ptr() % 64:
                least = f"at least {self.record_bytes}, at multiples of 64"
                raise ValueError(f"a record of {size} bytes, expected {least}")
            self._slab = bound
        return self._slab


class Slab(Bound):
    """A slab of records as native calls take it.  Raises `ValueError`."""

    def __init__(self, slab: Tensor):
        self.tensor, self.sizes = slab, dict[str, int]()
        address = tensor_spec("slab:u8[S,B]").check(slab, self.sizes)
        assert address is not None
        self.address = address


class Decoder(Bound):
    """All layers of a model for one token of each sequence: an `AttentionLayer` each, and an `Mlp`
    (shared experts or a dense one) or None; at least one layer has a router.  Raises `ValueError`
    where the layers do not fit together or the router does not fit their experts."""

    def __init__(self, layers: Sequence[tuple[AttentionLayer, Mlp | None]], router: Router) -> None:
        if not layers:
            raise ValueError("there are no layers")
        experts = max(layer.sizes["E"] for layer, _ in layers)
        sizes, self.row_bytes = layers[0][0].sizes | {"E": experts}, layers[0][0].row_bytes
        for layer, mlp in layers:
            same = layer.sizes | {"E": experts} == sizes and layer.row_bytes == self.row_bytes
            if not same or layer.sizes["E"] not in (0, experts):
                raise ValueError("the layers have different sizes, or numbers of experts")
            if mlp is not None and mlp.sizes["H"] != sizes["H"]:
                raise ValueError(f"an MLP's size is different from the layers' {sizes['H']}")
        self.routed = [layer.sizes["E"] > 0 for layer, _ in layers]
        self.indexers = sum(layer.key_bytes > 0 for layer, _ in layers)
        self.key_bytes = max(layer.key_bytes for layer, _ in layers)
        self.topk = max(layer.topk for layer, _ in layers)
        natives = (_Layer * len(layers))()
        for bound, (layer, mlp) in zip(natives, layers, strict=True):
            bound.attention, bound.mlp = layer.address, mlp and mlp.address
        counts, start = (len(layers), sizes["H"], experts), ctypes.addressof(natives)
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
