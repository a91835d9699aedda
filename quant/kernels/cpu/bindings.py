"""Native CPU kernels for quantized weights and latent attention, through ctypes.

`load()` gives the kernels, or None where the binary is missing (no compiler at install) or foreign
to this machine; the caller then falls back to torch. A binary built from other
declarations is refused (`layout`). Tensors are contiguous CPU tensors unless said otherwise, and
checked before the native side sees a pointer: a wrong dtype, shape, size or alignment is a
`ValueError`, of caches and `decode`'s tensors, from backends, an `AssertionError`.

Shapes: T tokens; W [N, K]; H hidden size; I expert's intermediate size; k experts of a token; E
experts of a layer; A heads; R and P columns of a latent, without and with rotation.  Results do not
depend on the number of threads, and a row's result does not depend on the rows computed with it.

The layout `tiles16` of codes is that of `quant/codecs/codec.py`.  An expert record is gate, up and
down codes, then gate, up and down scales, 64-byte-aligned, then their biases if it has any, then
any padding.
"""

import ctypes
import hashlib
import importlib.machinery
import os
from collections.abc import Sequence
from functools import cache
from operator import sub
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from slotmoe.errors import ConfigError
from slotmoe.network.shapes import SWIGLU, Activation, GroupShape, latent_bytes
from slotmoe.network.state import Empty, Group
from slotmoe.quant.codecs.codec import BLOCK, NF4, TILE, ExpertCodecs
from slotmoe.quant.codecs.weight import Int8Weight
from slotmoe.quant.kernels.cpu.signatures import (
    CHECKSUM,
    SIGNATURES,
    Bound,
    NativeFunction,
    check,
    tensor_spec,
)
from slotmoe.quant.kernels.cpu.weights import (
    ACTIVATION,
    INT8,
    STRUCTURES,
    Absorbed,
    Matrix,
    Structure,
)
from slotmoe.quant.shapes import record_bytes
from slotmoe.system import cores

INSTRUCTIONS = "SLOTMOE_INSTRUCTIONS"  # names an instruction set
_Chosen = ctypes.c_double * 3
STAGES = ("attention", "gate", "experts", "shared experts and dense layers", "head")
"""Whose seconds `decode` gives."""


class Kernels:
    """The native kernels.  Methods allocate their results, may be called from several threads (jobs
    queue), release the GIL while they run, and raise ValueError for bad arguments first."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))  # what it returns is an int, unless said otherwise
        found = getattr(self.library, "slotmoe_layout", lambda: None)()  # older ones have none
        if found != layout():
            layouts = f"layout {found}, expected {layout()}"
            remedy = "build again: pip install --no-deps -e ."
            raise ConfigError(f"{path}: built from other sources ({layouts}); {remedy}")
        self.library.slotmoe_isa.restype = self.library.slotmoe_isa_name.restype = ctypes.c_char_p
        self.library.slotmoe_read.argtypes = ctypes.c_void_p, ctypes.c_int64
        self.set_threads(cores())
        self._logits: tuple[Tensor | None, int | None, int] = None, None, 0  # that were checked
        self._functions = {name: NativeFunction(self.library, name) for name in SIGNATURES}
        vars(self).update((name, self._functions[name]) for name in {*SIGNATURES} - {*dir(Kernels)})
        self.isas = tuple(
            self.library.slotmoe_isa_name(i).decode()
            for i in range(self.library.slotmoe_isa_count())
            if self.library.slotmoe_isa_supported(i)
        )
        """Instruction sets that this machine can run, best first: among amx, amx_plain (its digits
        for any width, without AMX, for tests that ask for it), avx512vbmi, avx512vnni, avxvnni,
        avx2, neon_i8mm, neon_dot, neon, portable."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> NativeFunction: ...

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self.library.slotmoe_isa()
        return name.decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the binary: the same on machines that compute the same bits by one `isa`."""
        return hashlib.sha256(Path(self.library._name).read_bytes()).hexdigest()

    def set_isa(self, name: str) -> None:
        """Use one of `isas` from the next call on.  Raises `ConfigError`."""
        if self.library.slotmoe_set_isa(name.encode()):
            here = ", ".join(self.isas)
            raise ConfigError(f"instruction set {name!r:.40} is not one of this machine's: {here}")

    @property
    def threads(self) -> int:
        """Threads that the next call uses, the caller included."""
        return int(self.library.slotmoe_threads())

    def set_threads(self, count: int) -> None:
        """Threads from the next call on, the caller included (1 to 256)."""
        if not 1 <= count <= 256:
            raise ValueError(f"{count} threads: expected 1 to 256")
        self.library.slotmoe_set_threads(count)

    def set_cpus(self, cpus: Sequence[int]) -> None:
        """Where threads run from the next call on, the caller excepted; anywhere for none."""
        self.library.slotmoe_set_cpus((ctypes.c_int32 * len(cpus))(*cpus), len(cpus))

    def read(self, memory: Tensor) -> None:
        """Read every byte of uint8 [n] with all threads: the kernels' bound."""
        self.library.slotmoe_read(tensor_spec("memory:u8[N]").check(memory, {}), len(memory))

    def tile_int8(self, weight: Int8Weight, empty: Empty) -> Matrix:
        """A copy in the order of `linear`, in memory from `empty`."""
        tiles = self._tiles(weight.q, empty)
        scale = empty(tuple(weight.scale.shape), torch.float32).copy_(weight.scale)
        return Matrix(INT8, *weight.shape, tiles, scale)

    def tile_absorbed(self, weight: Int8Weight, head: tuple[int, int], empty: Empty) -> Absorbed:
        """The same of `kv_b_proj`, `head` of whose rows, N and V, are a head's."""
        (n, v), r = head, weight.shape[1]
        q, scale = weight.q.view(-1, n + v, r), weight.scale.view(-1, n + v)
        tiles = list[Tensor]()
        for part in (q[:, :n].transpose(1, 2), q[:, n:]):
            whole = pad(part, (0, 0, 0, -part.shape[1] % TILE)).flatten(0, 1).contiguous()
            tiles.append(self._tiles(whole, empty).unflatten(0, (len(q), -1)))
        plain = scale[:, :n], scale[:, n:], torch.ones(r)
        scales = [empty(tuple(x.shape), torch.float32).copy_(x) for x in plain]
        return Absorbed(head, r, *tiles, *scales)

    def _tiles(self, q: Tensor, empty: Empty) -> Tensor:
        n, k = q.shape
        tiles = empty((-(-n // TILE), -(-k // BLOCK), TILE * BLOCK), torch.int8)
        self.pack_int8.results(q, tiles)
        return tiles

    def linear(self, weight: Matrix, x: Tensor) -> Tensor:
        """x float32 [T, K] -> x W^T, [T, N]; or [T, G, K] -> [T, G, N / G], by G groups of rows."""
        y: Tensor = self._functions["linear"](weight, x if x.dim() == 3 else x[:, None], None, 0.0)
        return y.unflatten(1, (x.shape[1], -1)) if x.dim() == 3 else y

    def call(self, name: str, *arguments: object) -> None:
        """Call a function with its C arguments, unchecked, and raise what its status says."""
        if status := self._functions[name].native(*arguments):
            check(status)

    def choose(
        self, logits: Tensor, limits: tuple[float, ...] = (0.0, 1.0, 0, 0.0, 0.0), id: int = -1
    ) -> tuple[int, float, float]:
        """Of logits float32 [V] an id by `limits`, temperature, top-p, top-k, min-p and a number
        from 0 to 1, -1 where it is not certain, or `id`; the logarithm of its probability, and of
        the sum of all exps.  Both are NaN where nothing is chosen."""
        checked = self._logits
        if logits is not checked[0]:  # one text's lie always in the same memory
            size = len(logits)
            self._logits = checked = logits, address(logits, torch.float32, size), size
        found = _Chosen(id)
        self.call("choose", *checked[1:], *limits, found)
        chosen, logprob, total = found
        return int(chosen), logprob, total

    def quantize_nf4(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] bfloat16, float16 or float32 -> codes uint8, absmax float16 as tiles16.
        ValueError for NaN, infinity, or a block's absmax beyond float16."""
        codes, absmax = self._functions["quantize_nf4"].results(source, torch.tensor(NF4.levels))
        return codes, absmax


@cache
def load() -> Kernels | None:
    """The kernels, or None where their binary is missing or does not load.  They use the best
    instruction set, or that of ``SLOTMOE_INSTRUCTIONS``.  Raises `ConfigError`, also for a binary
    that is built from other sources."""
    # What serves every version of Python comes before what an older build has left.
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)
    paths = (Path(__file__).with_name(f"_native{suffix}") for suffix in suffixes)
    try:
        kernels = Kernels(next(filter(Path.exists, paths)))
    except (StopIteration, OSError):
        return None
    if wanted := os.environ.get(INSTRUCTIONS):
        kernels.set_isa(wanted)
    return kernels


_RECORD = Structure(
    "hidden intermediate gate_up down biases gate_up_levels:pointer down_levels:pointer"
    + ACTIVATION
)


class ExpertSlab(Bound):
    """Records of experts, uint8 [S, B], each at a multiple of 64 in it, and how these are coded:
    [I, H] by I and H = `hidden`, with levels float32 [2, 16], those of gate and up, and of down;
    with `biases` behind the scales.  Raises `ValueError`."""

    def __init__(
        self,
        slab: Tensor,
        hidden: int,
        intermediate: int,
        codecs: ExpertCodecs,
        levels: Tensor,
        activation: Activation = SWIGLU,
        biases: bool = False,
    ):
        tensor_spec("levels:f32[2,16]").check(levels, {})
        kinds, starts = [codec.kind for codec in codecs], [row.data_ptr() for row in levels]
        native = _RECORD.type(hidden, intermediate, *kinds, biases, *starts, *activation)
        super().__init__(native, {"H": hidden}, levels, slab)
        self.slab = tensor_spec("slab:u8[S,B]").check(slab, self.sizes)
        (rows, size), needed = slab.shape, record_bytes(hidden, intermediate, codecs, biases)
        if (rows and size < needed) or size % 64 or slab.data_ptr() % 64:
            least = f"at least {needed}, at multiples of 64"
            raise ValueError(f"a record of {size} bytes, expected {least}")


class Store:
    """Rows of tokens' sequences, as native calls find them: [layers, capacity, ...], each of
    `width` bytes, alike in all.  They are checked when other tensors come than the last time."""

    def __init__(self, layers: int, width: int) -> None:
        self._layers, self._width = layers, width
        self._ids: tuple[int, ...] = ()

    def bound(
        self, tensors: Sequence[Tensor], positions: Sequence[int], first: Sequence[int] = ()
    ) -> tuple[object, ...]:
        """Of each token its sequence's rows, which begin at position `first`, or at 0, and have
        room for its own position."""
        ids = (*map(id, tensors),)
        if ids != self._ids:
            self._layer_bytes, self._row_bytes, self._capacity = layer_rows(
                tensors, self._layers, self._width
            )
            self._starts = (ctypes.c_void_p * len(ids))(*map(Tensor.data_ptr, tensors))
            self._ids, self._tensors = ids, [*tensors]  # held: no other gets the id of one of these
        assert len(tensors) == len(positions)
        inside = [*map(sub, positions, first)] if first else positions
        assert min(inside) >= 0 and max(inside) < self._capacity
        return self._starts, int64s(first) if first else None, self._layer_bytes, self._row_bytes


_STORE = " start:pointers first:int64s layer_bytes row_bytes"
_GROUP = _STORE + _STORE + " table:pointer"
_TOKENS = "positions:int64s table:pointer query_scale:pointer" + _STORE + _STORE
_TOKENS += " lists:pointer ids:pointer compressed_table:pointer" + _STORE + _STORE + " folds:int64s"
TOKENS = [Structure(_TOKENS + count * _GROUP).type for count in range(4)]  # by groups


def layout() -> int:
    """What the library's `slotmoe_layout` (layout.cpp) gives where it is built from these
    declarations: a number made of signatures.txt and of the structures' sizes."""
    number = CHECKSUM
    for structure in (*STRUCTURES, _RECORD.type, TOKENS[-1]):
        number = (number * 31 + ctypes.sizeof(structure)) % 0x7FFFFFFF
    return number


NO_STORE: tuple[object, ...] = (None, None, 0, 0)
NO_DELTA = *NO_STORE, *NO_STORE, None


def latent_rows(cache: Tensor, r: int, p: int) -> tuple[int, int]:
    """Address of a cache, uint8 [capacity, latent_bytes(R, P)], and bytes from row to row."""
    return cache.data_ptr(), layer_rows([cache[None]], 1, latent_bytes(r, p))[1]


def layer_rows(caches: Sequence[Tensor], layers: int, width: int) -> tuple[int, int, int]:
    """Of caches that are alike, [layers, capacity, ...], rows of `width` bytes: the bytes from one
    layer to the next and from one row to the next, and the capacity."""
    first = caches[0]
    alike = first.shape, first.stride(), first.dtype, True
    for rows in caches:
        assert (rows.shape, rows.stride(), rows.dtype, rows.is_cpu) == alike
    row, size = first.itemsize, first.itemsize
    for count, stride in zip(first.shape[:1:-1], first.stride()[:1:-1], strict=True):
        assert stride * size == row
        row *= count
    apart = first.stride(1) * size if first.shape[1] > 1 else width
    assert (len(first), row) == (layers, width) and apart >= width
    return first.stride(0) * size, apart, first.shape[1]


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The tensor's address, None of None; asserting is quicker than the table's checks."""
    if tensor is None:
        return None
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj()
    return tensor.data_ptr()


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def compressed_rows(
    groups: Sequence[Group], positions: Sequence[int], shape: GroupShape
) -> tuple[object, ...]:
    """Compressed rows of tokens' sequences."""
    last = [max(0, (at + 1) // shape.ratio - 1) for at in positions]
    rows = Store(shape.layers, latent_bytes(shape.width, 0))
    return rows.bound([group.rows for group in groups], last)


def open_rows(
    groups: Sequence[Group], positions: Sequence[int], shape: GroupShape
) -> tuple[object, ...]:
    """Rows of their open tokens, float32 [layers, tokens, 2, columns].  Raises `ValueError`."""
    tails, ratio, windows = [group.open for group in groups], shape.ratio, 1 + shape.overlaps
    begins = [tail.first for tail in tails]
    for at, first in zip(positions, begins, strict=True):
        count = ratio * windows if (at + 1) % ratio == 0 else 1
        if max(0, at + 1 - count) < first:
            raise ValueError(f"open rows begin at {first}, but position {at} needs {count}")
    opened = Store(shape.layers, 8 * shape.width * windows)
    flat = [tail.rows.flatten(2).view(torch.uint8) for tail in tails]
    return opened.bound(flat, positions, begins)
