"""Weights bound for native calls that do several things: each is checked once, when it is made, and
holds the memory that the native side then reads.

The structures are those of quant/kernels/cpu/api.h.  Shapes: see `slotmoe.quant.kernels.cpu.
bindings`; of attention: A heads, N and P columns of a query head without and with rotation, R the
latent's, V a value head's.
"""

import ctypes
from itertools import starmap

import torch
from torch import Tensor

from slotmoe.border import Router
from slotmoe.quant.codecs.codec import BLOCK, KINDS, SCALES, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.kernels.cpu.signatures import INT8, SOURCE_TYPES, Bound, tensor_spec
from slotmoe.quant.shapes import record_bytes
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


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class NativeMatrix(ctypes.Structure):
    _fields_ = fields(ctypes.c_int64, "kind n k") + fields(ctypes.c_void_p, "data scale levels")


class _Mlp(ctypes.Structure):
    _fields_ = [*fields(NativeMatrix, "gate up down"), ("limit", ctypes.c_float)]


class NativeRouter(ctypes.Structure):
    """A `Router`.  Raises `ValueError` unless it can choose among so many experts."""

    _fields_ = [
        *fields(ctypes.c_int64, "groups kept top_k group_best scoring normalized"),
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
        *fields(ctypes.c_int64, "hidden intermediate gate_up down"),
        *fields(ctypes.c_void_p, "gate_up_levels down_levels"),
        ("limit", ctypes.c_float),
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
        self.native = NativeMatrix(kind, n, k, *pointers)
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


def fit(**matrices: tuple[Matrix | None, tuple[int, int]]) -> list[NativeMatrix]:
    """The matrices as structures, empty ones for None.  Raises `ValueError` unless they have these
    shapes."""
    for name, (matrix, shape) in matrices.items():
        if matrix is not None and matrix.shape != shape:
            raise ValueError(f"{name} is {matrix.shape}, expected {shape}")
    return [NativeMatrix() if matrix is None else matrix.native for matrix, _ in matrices.values()]


class Mlp(Bound):
    """The matrices of down(silu(gate x) * up x), gate and up [I, H], down [H, I]: all int8, or all
    of one codec.  `limit` as for backends."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix, limit: float = 0.0) -> None:
        rows, columns = gate.shape
        natives = fit(gate=(gate, gate.shape), up=(up, gate.shape), down=(down, (columns, rows)))
        if not gate.coded or not gate.like(up) or not gate.like(down):
            raise ValueError("the matrices of an MLP must be all int8, or all of one codec")
        super().__init__(_Mlp(*natives, limit), {"H": columns}, gate, up, down)


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
