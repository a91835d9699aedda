"""Weights bound for native calls that do several things: each is checked once, when it is made, and
holds the memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see `slotmoe.quant.kernels.cpu.
bindings`; of attention: A heads, N and P columns of a query head without and with rotation, R the
latent's, V a value head's.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from slotmoe.quant.codecs.codec import KINDS, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.signatures import (
    ABSMAX,
    CODES,
    CODES_3,
    HALF_SCALES,
    INT8,
    SCALES,
    Bound,
    source_type,
    tensor_spec,
)
from slotmoe.quant.shapes import latent_bytes, record_bytes

# Kinds of a native matrix beside `KINDS`, which are coded; a dense one is 5 + its source type.
_INT8, _DENSE = 0, 5
_LEVELS = "levels:f32[16]"
_MEMORY = {  # what a kind of matrix consists of
    _INT8: [f"w:{INT8}", "scale:f32[N]"],
    KINDS[4, "f16"]: [f"codes:{CODES}", f"absmax:{ABSMAX}", _LEVELS],
    KINDS[4, "i8"]: [f"codes:{CODES}", f"scales:{SCALES}", _LEVELS],
    KINDS[4, "f16x2"]: [f"codes:{CODES}", f"scales:{HALF_SCALES}", _LEVELS],
    KINDS[3, "i8"]: [f"codes:{CODES_3}", f"scales:{SCALES}", _LEVELS],
    **{_DENSE + source: ["w:source[N,K]"] for source in range(3)},
}


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Matrix(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "kind n k") + _fields(ctypes.c_void_p, "data scale levels")


class _Attention(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "heads n p r v halves"),
        *_fields(ctypes.c_float, "eps latent_eps scale unused"),
        *_fields(ctypes.c_void_p, "input_norm query_norm latent_norm next_norm"),
        *_fields(_Matrix, "query query_b latent out gate"),
        *_fields(ctypes.c_void_p, "gate_bias kv_b kv_b_scale"),
    ]


class _Layer(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "attention mlp")


class Router(ctypes.Structure):
    """What becomes of a router's logits: scores, the softmax of a token's or with `sigmoid` each
    one's own.  Of `groups` groups of experts the best `kept` take part, by the sum of their
    `group_best` best scores (1 or 2), and of their experts `top_k`; weights are scores,
    `normalized` to add up to 1, times `factor`."""

    _fields_ = [
        *_fields(ctypes.c_int64, "groups kept top_k group_best sigmoid normalized"),
        ("factor", ctypes.c_double),
    ]
    groups: int
    kept: int
    top_k: int
    group_best: int

    def __init__(
        self,
        groups: int,
        kept: int,
        top_k: int,
        factor: float = 1.0,
        normalized: bool = False,
        group_best: int = 1,
        sigmoid: bool = False,
    ) -> None:
        super().__init__(groups, kept, top_k, group_best, sigmoid, normalized, factor)

    def check(self, experts: int) -> None:
        """Raise `ValueError` unless it can choose among so many experts."""
        fits = self.groups >= 1 and experts % self.groups == 0 and 1 <= self.kept <= self.groups
        size = experts // self.groups if fits else 0
        if not 1 <= self.top_k <= self.kept * size or not 1 <= self.group_best <= min(2, size):
            asked = f"{self.kept} of {self.groups} groups by {self.group_best} of their experts"
            raise ValueError(f"{asked} and top {self.top_k} don't fit {experts} experts")


class _Record(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "hidden intermediate gate_up down"),
        *_fields(ctypes.c_void_p, "gate_up_levels down_levels"),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "layers hidden experts"),
        ("layer", ctypes.c_void_p),
        ("router", Router),
    ]


class Matrix(Bound):
    """A matrix [N, K] of any kind.

    int8 is tiled: [n_tiles, n_blocks, 1024], byte 64 t + 4 lane + i of a block being row 16 tile +
    lane, column 64 block + 4 t + i, with row scales, float32 [N].
    """

    def __init__(self, kind: int, n: int, k: int, *memory: Tensor) -> None:
        if not 1 <= n < 2**31 or not 1 <= k < 2**31:
            raise ValueError(f"a matrix of {n} rows and {k} columns, expected at least 1")
        self.shape, self.kind, self._memory = (n, k), kind, memory
        self.sizes = {"N": n, "K": k}
        texts = zip(_MEMORY[kind], memory, strict=True)
        pointers = [tensor_spec(text).check(tensor, self.sizes) for text, tensor in texts]
        self.native = _Matrix(kind, n, k, *pointers)
        self.address = ctypes.addressof(self.native)

    @classmethod
    def of_codes(cls, weight: CodedWeight) -> "Matrix":
        return cls(weight.kind, *weight.shape, weight.codes, weight.scales, weight.levels)

    @classmethod
    def int8(cls, tiles: Tensor, scale: Tensor, shape: tuple[int, int]) -> "Matrix":
        return cls(_INT8, *shape, tiles, scale)

    @classmethod
    def dense(cls, w: Tensor) -> "Matrix":
        """[N, K] float32, float16 or bfloat16."""
        kind = _DENSE + source_type(w)
        if w.dim() != 2:
            raise ValueError(f"a matrix has {w.dim()} dimensions, expected 2")
        return cls(kind, *w.shape, w)

    @property
    def coded(self) -> bool:
        """Whether it is int8 or coded."""
        return self.kind < _DENSE

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._memory)

    def check(self, name: str, *shape: int) -> None:
        """Raise `ValueError` unless it has this shape."""
        if self.shape != shape:
            raise ValueError(f"{name} is {self.shape}, expected {shape}")

    def like(self, other: "Matrix") -> bool:
        """Whether both are of one kind, and of one table of levels."""
        if self.kind != other.kind:
            return False
        levels = self._memory[2:], other._memory[2:]
        return all(starmap(torch.equal, zip(*levels, strict=True)))


class Mlp(Bound):
    """The matrices of down(silu(gate x) * up x), gate and up [I, H], down [H, I]: all int8, or all
    of one codec."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        up.check("up", *gate.shape)
        down.check("down", *gate.shape[::-1])
        if not gate.coded or not gate.like(up) or not gate.like(down):
            raise ValueError("the matrices of an MLP must be all int8, or all of one codec")
        self.sizes = {"H": gate.shape[1]}
        self._memory = gate, up, down, (_Matrix * 3)(gate.native, up.native, down.native)
        self.address = ctypes.addressof(self._memory[3])


@dataclass(eq=False)
class AttentionLayer(Bound):
    """The weights of one layer up to its router.

    `shape` is A, N, P, R and V.  Without q-LoRA `query` is [A (N + P), H]; with it `query` is
    [Q, H], `query_norm` [Q], `query_b` [A (N + P), Q].  `latent` is [R + P, H], `out` [H, A V],
    `kv_b` [A (N + V), R]; `next_norm` [H] and the router's `gate` [E, H], None in a dense layer,
    stand before the feed-forward, and `gate_bias` [E] takes part in the router's choice.  Norms
    are float32; `constants` are the epsilon of those over H, that of the others, and what
    multiplies the scores; `halves` is that of `rotate`.  Raises `ValueError` where they do not fit.
    """

    shape: tuple[int, int, int, int, int]
    input_norm: Tensor
    query: Matrix
    query_norm: Tensor | None
    query_b: Matrix | None
    latent: Matrix
    latent_norm: Tensor
    kv_b: Int8Weight
    out: Matrix
    next_norm: Tensor
    gate: Matrix | None
    gate_bias: Tensor | None
    constants: tuple[float, float, float]
    halves: bool = False

    def __post_init__(self) -> None:
        heads, n, p, r, v = self.shape
        queries, hidden = self.query.shape[0], self.latent.shape[1]
        if min(heads, r, v) < 1 or min(n, p) < 0 or max(self.shape) >= 2**31 or p % 2:
            raise ValueError(f"shape is {self.shape}, expected heads, N, even P, R and V")
        if (self.query_norm is None) != (self.query_b is None):
            raise ValueError("query_norm and query_b must come together")
        self.query.check("query", queries if self.query_b else heads * (n + p), hidden)
        if self.query_b is not None:
            self.query_b.check("query_b", heads * (n + p), queries)
        self.latent.check("latent", r + p, hidden)
        self.out.check("out", hidden, heads * v)
        if self.gate is not None:
            self.gate.check("gate", self.gate.shape[0], hidden)
        experts = self.gate.shape[0] if self.gate else 0
        sizes = {"H": hidden, "Q": queries, "R": r, "M": heads * (n + v), "E": experts}
        matrices = (self.query, self.query_b, self.latent, self.out, self.gate)
        native = _Attention(
            *self.shape,
            self.halves,
            *self.constants,
            0.0,
            tensor_spec("input_norm:f32[H]").check(self.input_norm, sizes),
            tensor_spec("query_norm?:f32[Q]").check(self.query_norm, sizes),
            tensor_spec("latent_norm:f32[R]").check(self.latent_norm, sizes),
            tensor_spec("next_norm:f32[H]").check(self.next_norm, sizes),
            *[_Matrix() if matrix is None else matrix.native for matrix in matrices],
            tensor_spec("gate_bias?:f32[E]").check(self.gate_bias, sizes),
            tensor_spec("kv_b:i8[M,R]").check(self.kv_b.q, sizes),
            tensor_spec("kv_b_scale:f32[M]").check(self.kv_b.scale, sizes),
        )
        self._memory = native, *vars(self).values()  # `native` points into the others
        self.address, self.row_bytes = ctypes.addressof(native), latent_bytes(r, p)
        self.sizes = {"H": hidden, "C": p // 2, "E": experts}


class ExpertRecord(Bound):
    """How the records of experts are coded, [I, H] by I and H = `hidden`, with levels float32 [2,
    16]: those of gate and up, and of down.  Raises `ValueError`."""

    def __init__(self, hidden: int, intermediate: int, codecs: ExpertCodecs, levels: Tensor):
        if not 1 <= hidden < 2**31 or not 1 <= intermediate < 2**31:
            raise ValueError(f"experts are {intermediate} by {hidden}, expected at least 1")
        tensor_spec("levels:f32[2,16]").check(levels, {})
        kinds, starts = [codec.kind for codec in codecs], [row.data_ptr() for row in levels]
        native = _Record(hidden, intermediate, *kinds, *starts)
        self.record_bytes = record_bytes(hidden, intermediate, codecs)
        self.sizes = {"H": hidden}
        self._memory, self.address = (native, levels), ctypes.addressof(native)


class Decoder:
    """All layers of a model for one token of each sequence: an `AttentionLayer` each, and an `Mlp`
    (shared experts or a dense one) or None; at least one layer has a router.  Raises `ValueError`
    where the layers do not fit together or the router does not fit their experts."""

    def __init__(self, layers: Sequence[tuple[AttentionLayer, Mlp | None]], router: Router) -> None:
        if not layers:
            raise ValueError("there are no layers")
        sizes, self.row_bytes = layers[0][0].sizes, layers[0][0].row_bytes
        self.hidden, self.pairs = sizes["H"], sizes["C"]
        self.experts = max(layer.sizes["E"] for layer, _ in layers)
        for layer, mlp in layers:
            same = layer.sizes | {"E": sizes["E"]} == sizes and layer.row_bytes == self.row_bytes
            if not same or layer.sizes["E"] not in (0, self.experts):
                raise ValueError("the layers have different sizes, or numbers of experts")
            if mlp is not None and mlp.sizes["H"] != self.hidden:
                raise ValueError(f"an MLP's size is different from the layers' {self.hidden}")
        router.check(self.experts)
        self.top_k = router.top_k
        routed = [layer.sizes["E"] > 0 for layer, _ in layers]
        self.routed, self.moe_layers = routed, sum(routed)
        self.moe_layers_before = [sum(routed[:index]) for index in range(len(layers))]
        natives = (_Layer * len(layers))()
        for native, (layer, mlp) in zip(natives, layers, strict=True):
            native.attention, native.mlp = layer.address, mlp and mlp.address
        start, counts = ctypes.addressof(natives), (self.hidden, self.experts)
        native_model = _Model(len(layers), *counts, start, router)
        self._memory = list(layers), natives, native_model
        self.address = ctypes.addressof(native_model)

    def routers_from(self, first: int, resumed: bool) -> int:
        """How many routers are left from layer `first` on, without its own if the call is
        `resumed` from its experts.  Raises `ValueError`."""
        if not 0 <= first < len(self.routed):
            raise ValueError(f"first is {first}, expected one of {len(self.routed)} layers")
        if resumed and not self.routed[first]:
            raise ValueError(f"layer {first} has no experts: x and experts must be None")
        return self.moe_layers - self.moe_layers_before[first] - resumed
