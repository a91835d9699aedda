"""Weights bound for native calls that do several things: each is checked once, when it is made, and
holds the memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see bindings.py.
"""

import ctypes
from itertools import starmap

import torch
from torch import Tensor

from slotmoe.border import Router
from slotmoe.quant.codecs.codec import BLOCK, KINDS, SCALES, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.kernels.cpu import signatures
from slotmoe.quant.kernels.cpu.signatures import C_TYPES, Bound, TensorSpec, tensor_spec
from slotmoe.quant.shapes import record_bytes
from slotmoe.quant.weights import Weight

# Kinds of a native matrix beside `KINDS`, which are coded; a dense one is 6 + its source type.
_INT8, _DENSE, _FINE = 0, 6, 9
_SCORINGS = "softmax", "sigmoid", "sqrtsoftplus"  # `Scoring` of api.h


def _coded(bits: int, coding: str) -> list[str]:
    scales = SCALES[coding]
    shape = f"[N/16,K/64+{scales.extra},{scales.width}]"
    codes = f"codes:u8[N/16,K/64,{2 * BLOCK * bits}]"
    return [codes, f"scales:{scales.dtype.lower()}{shape}", "levels:f32[16]"]


_MEMORY = {  # what a kind of matrix consists of
    **{kind: [f"w:{signatures.INT8}", "scale:f32[N]"] for kind in (_INT8, _FINE)},
    **{kind: _coded(*code) for code, kind in KINDS.items()},
    **{_DENSE + source: ["w:source[N,K]"] for source in signatures.SOURCE_TYPES.values()},
}


class NativeMatrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "levels")),
    ]


class Matrix(Bound):
    """A matrix [N, K] of any kind.

    int8 is tiled: [n_tiles, n_blocks, 1024], byte 64 t + 4 lane + i of a block being row 16 tile +
    lane, column 64 block + 4 t + i, with row scales, float32 [N].  `fine` activations have 15 bits
    and one scale a row, with up to 131,072 columns.
    """

    def __init__(self, kind: int, n: int, k: int, *memory: Tensor) -> None:
        self.shape, self.kind, self.tensors, sizes = (n, k), kind, memory, {"N": n, "K": k}
        texts = zip(_MEMORY[kind], memory, strict=True)
        pointers = [tensor_spec(text).check(tensor, sizes) for text, tensor in texts]
        super().__init__(NativeMatrix(kind, n, k, *pointers), sizes, memory)

    @classmethod
    def of(cls, weight: object) -> "Matrix":
        """Of float32, float16, bfloat16 or a coded weight; what is bound stays.  `ValueError`."""
        if isinstance(weight, Matrix):
            return weight
        if isinstance(weight, CodedWeight):
            return cls(weight.kind, *weight.shape, weight.codes, weight.scales, weight.levels)
        assert isinstance(weight, Tensor)
        if weight.dim() != 2 or weight.dtype not in signatures.SOURCE_TYPES:
            found = f"{weight.dtype} of {weight.dim()} dimensions"
            raise ValueError(f"{found}, expected a float matrix")
        return cls(_DENSE + signatures.SOURCE_TYPES[weight.dtype], *weight.shape, weight)

    @classmethod
    def int8(
        cls, tiles: Tensor, scale: Tensor, shape: tuple[int, int], fine: bool = False
    ) -> "Matrix":
        return cls(_FINE if fine else _INT8, *shape, tiles, scale)

    @property
    def coded(self) -> bool:
        """Whether it is int8 or coded."""
        return self.kind < _DENSE or self.kind == _FINE

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

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
            if isinstance(value, ctypes.Array):
                parts.append(ctypes.addressof(value))
            elif spec is None:
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
    "heads n r v query:i8[A,R/16,N/64,1024] value:i8[A,V/16,R/64,1024] query_scale:f32[A,N]"
    " value_scale:f32[A,V] ones:f32[R]"
)
_MLP = Structure("gate:matrix[I,H] up:matrix[I,H] down:matrix[H,I] limit:float")
_RECORD = Structure(
    "hidden intermediate gate_up down gate_up_levels:pointer down_levels:pointer limit:float"
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
    and its values', int8 in tiles as in `Matrix`, with activations that are `fine`.  `memory` and
    its shapes are those of `_ABSORBED`."""

    def __init__(self, *memory: Tensor) -> None:
        query_scale, value_scale, ones = memory[2:]
        (heads, n), v, r = query_scale.shape, value_scale.shape[1], len(ones)
        sizes = {"A": heads, "N": n, "R": r, "V": v}
        self.shape = heads * (n + v), r
        super().__init__(_ABSORBED.bind(sizes, heads, n, r, v, *memory).native, sizes, memory)


Prepared = Weight | Matrix | Absorbed  # the last two are bound for native calls


class Mlp(Bound):
    """Matrices gate and up [I, H], down [H, I], all int8, or one codec; `limit` as for backends."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix, limit: float = 0.0) -> None:
        if not gate.coded or not gate.like(up) or not gate.like(down):
            raise ValueError("the matrices of an MLP must be all int8, or all of one codec")
        bound = _MLP.bind({}, gate, up, down, limit)
        super().__init__(bound.native, {"H": bound.sizes["H"]}, bound)


class ExpertRecord(Bound):
    """How the records of experts are coded, [I, H] by I and H = `hidden`, with levels float32 [2,
    16]: those of gate and up, and of down; `limit` as for backends.  Raises `ValueError`."""

    def __init__(
        self, hidden: int, intermediate: int, codecs: ExpertCodecs, levels: Tensor, limit: float
    ):
        tensor_spec("levels:f32[2,16]").check(levels, {})
        kinds, starts = [codec.kind for codec in codecs], [row.data_ptr() for row in levels]
        native = _RECORD.type(hidden, intermediate, *kinds, *starts, limit)
        self.record_bytes = record_bytes(hidden, intermediate, codecs)
        self._slab: Slab | None = None  # of the last call
        super().__init__(native, {"H": hidden}, levels)

    def slab(self, slab: Tensor) -> "Slab":
        """The slab, uint8 [S, B], each row a record at a multiple of 64.  Raises `ValueError`."""
        if self._slab is None or self._slab.tensor is not slab:
            self._slab = Slab(slab, self.record_bytes)
        return self._slab


class Slab(Bound):
    """A slab of records as native calls take it."""

    def __init__(self, slab: Tensor, record_bytes: int):
        self.tensor, self.sizes, self.address = slab, dict[str, int](), slab.data_ptr()
        tensor_spec("slab:u8[S,B]").check(slab, self.sizes)
        rows, size = slab.shape
        if (rows and size < record_bytes) or size % 64 or self.address % 64:
            least = f"at least {record_bytes}, at multiples of 64"
            raise ValueError(f"a record of {size} bytes, expected {least}")
