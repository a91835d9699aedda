"""Native CPU kernels for quantized weights and latent attention, through ctypes.

`load()` gives the kernels, or None where the binary is missing (no compiler at install) or foreign
to this machine; the caller then falls back to torch. Tensors are contiguous CPU tensors unless said
otherwise, and everything about them is checked here, before the native side sees a pointer: a wrong
dtype, shape, size or alignment is a `ValueError`.

Shapes: T tokens; W [N, K]; H hidden size; I expert's intermediate size; k experts of a token; tiles
of 16 rows, blocks of 64 columns: Np = N rounded up to 16, Kp = K rounded up to 64.  Results do not
depend on the number of threads, and a row's result does not depend on the rows computed with it.

The NF4 layout `tiles16` is that of `slotmoe.quant.nf4`.  An expert record is gate, up and down
codes, then gate, up and down absmax, 64-byte-aligned, then any padding.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.quant.nf4 import LEVELS
from slotmoe.quant.shapes import BLOCK, TILE, absmax_shape, codes_shape, latent_bytes, nf4_bytes

__all__ = [
    "AttentionLayer",
    "Decoder",
    "Kernels",
    "Matrix",
    "Mlp",
    "PackedInt8",
    "Router",
    "load",
    "record_bytes",
]

ABI = 7
_PARTS = ("attention", "route", "experts_decode", "mlp")  # that `decode` tells the seconds of
_INT8, _NF4, _DENSE = 0, 1, 2  # kinds of a native matrix; a dense one is 2 + its source type
_SOURCE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def record_bytes(hidden: int, intermediate: int) -> int:
    """Bytes of one expert's record, without padding after it."""
    return 2 * nf4_bytes(intermediate, hidden) + nf4_bytes(hidden, intermediate)


@dataclass(frozen=True)
class PackedInt8:
    """An int8 matrix [n, k] in the order the kernels read: int8 [Np/16, Kp/64, 1024], byte 64 t + 4
    lane + i of a block being row 16 tile + lane, column 64 block + 4 t + i."""

    data: Tensor
    n: int
    k: int


def _check(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
    ndim: int | None = None,
) -> None:
    fits = tensor.shape == shape if shape is not None else tensor.dim() == ndim
    if (
        fits and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()
    ):  # the way of every good call, kept short
        return
    if (
        not isinstance(tensor, Tensor)
        or tensor.device.type != "cpu"
        or tensor.layout != torch.strided
    ):
        raise ValueError(f"{name} must be a dense CPU tensor")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {ndim}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or not least <= value < 2**31:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")


def _source(source: Tensor) -> tuple[int, int, int]:
    kind = _SOURCE_TYPES.get(source.dtype)
    if kind is None:
        raise ValueError(f"source is {source.dtype}, expected bfloat16, float16 or float32")
    _check("source", source, source.dtype, ndim=2)
    n, k = source.shape
    _count("N", n)
    _count("K", k)
    return n, k, kind


class _Matrix(ctypes.Structure):
    """`Matrix` of quant/kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "levels")),
    ]


class _Attention(ctypes.Structure):
    """`Attention` of quant/kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "n", "p", "r", "v")),
        *((name, ctypes.c_float) for name in ("eps", "latent_eps", "scale", "unused")),
        *(
            (name, ctypes.c_void_p)
            for name in ("input_norm", "query_norm", "latent_norm", "next_norm")
        ),
        *((name, _Matrix) for name in ("query", "query_b", "latent", "out", "gate")),
        *((name, ctypes.c_void_p) for name in ("kv_b", "kv_b_scale")),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of quant/kernels/api.h."""

    _fields_ = [("attention", ctypes.c_void_p), ("mlp", ctypes.c_void_p)]


class Router(ctypes.Structure):
    """What becomes of a router's logits: of `groups` groups of experts the best `kept` take part,
    and of their experts `top_k`; weights are probabilities times `factor`, or add up to 1 if
    `renormalize` (group-limited greedy, DeepSeek-V2, section 2.2.2). `Router` of
    quant/kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("groups", "kept", "top_k", "renormalize")),
        ("factor", ctypes.c_double),
    ]
    groups: int
    kept: int
    top_k: int

    def __init__(self, groups: int, kept: int, top_k: int, factor: float | None) -> None:
        """`factor` None renormalizes."""
        super().__init__(groups, kept, top_k, factor is None, 0.0 if factor is None else factor)

    def check(self, experts: int) -> None:
        """Raise `ValueError` unless it can choose among so many experts."""
        if (
            self.groups < 1
            or experts % self.groups
            or not 1 <= self.kept <= self.groups
            or not 1 <= self.top_k <= experts
        ):
            raise ValueError(
                f"{self.kept} of {self.groups} groups and top {self.top_k} don't fit {experts} experts"
            )


class _Model(ctypes.Structure):
    """`Model` of quant/kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "experts", "intermediate")),
        ("layer", ctypes.c_void_p),
        ("router", Router),
    ]


class Matrix:
    """A matrix [n, k] of any kind, checked once and bound to its memory, which it holds: what one
    native call that does several things takes instead of tensors."""

    def __init__(
        self,
        kind: int,
        n: int,
        k: int,
        data: Tensor,
        scale: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> None:
        self.n, self.k, self.kind, self.levels, self._memory = n, k, kind, levels, (data, scale)
        pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (data, scale, levels))
        self.native = _Matrix(kind, n, k, *pointers)

    @classmethod
    def int8(cls, w: PackedInt8, scale: Tensor) -> Matrix:
        """Packed int8 [n, k] and its row scales, float32 [n]."""
        _check("w", w.data, torch.int8, (-(-w.n // TILE), -(-w.k // BLOCK), TILE * BLOCK))
        _check("scale", scale, torch.float32, (w.n,))
        return cls(_INT8, w.n, w.k, w.data, scale)

    @classmethod
    def nf4(cls, codes: Tensor, absmax: Tensor, levels: Tensor, n: int, k: int) -> Matrix:
        """Codes and absmax of [n, k] as tiles16, levels float32 [16]."""
        _count("n", n)
        _count("k", k)
        _check("codes", codes, torch.uint8, codes_shape(n, k))
        _check("absmax", absmax, torch.float16, absmax_shape(n, k))
        _check("levels", levels, torch.float32, (16,))
        return cls(_NF4, n, k, codes, absmax, levels)

    @classmethod
    def dense(cls, w: Tensor) -> Matrix:
        """[n, k] float32, float16 or bfloat16."""
        n, k, kind = _source(w)
        return cls(_DENSE + kind, n, k, w)

    def check(self, name: str, n: int, k: int) -> None:
        """Raise `ValueError` unless it is [n, k]."""
        if (self.n, self.k) != (n, k):
            raise ValueError(f"{name} is {(self.n, self.k)}, expected {(n, k)}")


class Mlp:
    """The matrices of down(silu(gate x) * up x), gate and up [I, H], down [H, I]: all int8, or all
    NF4 with one table of levels."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        up.check("up", gate.n, gate.k)
        down.check("down", gate.k, gate.n)
        if gate.kind not in (_INT8, _NF4) or not gate.kind == up.kind == down.kind:
            raise ValueError("the matrices of an MLP must be all int8 or all NF4")
        if gate.levels is not None and not all(
            torch.equal(gate.levels, one.levels) for one in (up, down) if one.levels is not None
        ):
            raise ValueError("the matrices of an MLP must share their levels")
        self.hidden, self._memory = gate.k, (gate, up, down)
        self.native = (_Matrix * 3)(gate.native, up.native, down.native)


class AttentionLayer:
    """The weights of one layer up to its router, checked once and bound to their memory, which it
    holds.

    Sizes: N and P columns of a query head without and with rotation, R the latent's, V a value
    head's.  Without q-LoRA `query` is [heads * (N + P), H]; with it `query` is [Q, H], `query_norm`
    [Q], `query_b` [heads * (N + P), Q].  `latent` is [R + P, H], `out` [H, heads * V], `kv_b` int8
    [heads * (N + V), R] with one float32 scale a row; `next_norm` [H] and the router's `gate` [E,
    H], None in a dense layer, stand before the feed-forward.  Norms are float32; `eps` is the
    epsilon of those over H, `latent_eps` that of the others; `scale` multiplies the scores.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        input_norm: Tensor,
        query: Matrix,
        query_norm: Tensor | None,
        query_b: Matrix | None,
        latent: Matrix,
        latent_norm: Tensor,
        kv_b: Tensor,
        kv_b_scale: Tensor,
        out: Matrix,
        next_norm: Tensor,
        gate: Matrix | None,
        *,
        eps: float,
        latent_eps: float,
        scale: float,
    ) -> None:
        heads, n, p, r, v = sizes
        for name, value, least in (
            ("heads", heads, 1),
            ("N", n, 0),
            ("P", p, 0),
            ("R", r, 1),
            ("V", v, 1),
        ):
            _count(name, value, least)
        if p % 2:
            raise ValueError(f"P is {p}, expected an even number: rotation takes pairs")
        self.hidden, self.row_bytes, self.pairs, self.experts = (
            latent.k,
            latent_bytes(r, p),
            p // 2,
            gate.n if gate else 0,
        )
        latent.check("latent", r + p, latent.k)
        out.check("out", latent.k, heads * v)
        if (query_norm is None) != (query_b is None):
            raise ValueError("query_norm and query_b must come together")
        if query_norm is None or query_b is None:
            query.check("query", heads * (n + p), latent.k)
        else:
            query.check("query", query.n, latent.k)
            query_b.check("query_b", heads * (n + p), query.n)
            _check("query_norm", query_norm, torch.float32, (query.n,))
        if gate is not None:
            gate.check("gate", gate.n, latent.k)
        _check("input_norm", input_norm, torch.float32, (latent.k,))
        _check("next_norm", next_norm, torch.float32, (latent.k,))
        _check("latent_norm", latent_norm, torch.float32, (r,))
        _check("kv_b", kv_b, torch.int8, (heads * (n + v), r))
        _check("kv_b_scale", kv_b_scale, torch.float32, (heads * (n + v),))
        self._memory = (
            input_norm,
            query,
            query_norm,
            query_b,
            latent,
            latent_norm,
            kv_b,
            kv_b_scale,
            out,
            next_norm,
            gate,
        )
        norms = (
            0 if tensor is None else tensor.data_ptr()
            for tensor in (input_norm, query_norm, latent_norm, next_norm)
        )
        matrices = (one.native if one else _Matrix() for one in (query, query_b, latent, out, gate))
        pointers = *norms, *matrices, kv_b.data_ptr(), kv_b_scale.data_ptr()
        self._native = _Attention(heads, n, p, r, v, eps, latent_eps, scale, 0.0, *pointers)
        self.address = ctypes.addressof(self._native)


class Decoder:
    """All layers of a model for one token at a time, checked once: an `AttentionLayer` each, and an
    `Mlp` (shared experts or a dense one) or None.  Layers that have a router, at least one, send x
    through experts of size `intermediate`.  Raises `ValueError` where the layers do not fit
    together or the router does not fit their experts."""

    def __init__(
        self, layers: Sequence[tuple[AttentionLayer, Mlp | None]], router: Router, intermediate: int
    ) -> None:
        if not layers:
            raise ValueError("there are no layers")
        attention, mlps = [layer for layer, _ in layers], [mlp for _, mlp in layers]
        self.hidden, self.row_bytes, self.pairs = (
            attention[0].hidden,
            attention[0].row_bytes,
            attention[0].pairs,
        )
        self.experts = max(layer.experts for layer in attention)
        self.routed = [layer.experts > 0 for layer in attention]
        self.moe_layers = sum(self.routed)
        self.moe_layers_before = [sum(self.routed[:index]) for index in range(len(layers))]
        for layer, mlp in layers:
            if (layer.hidden, layer.row_bytes, layer.pairs) != (
                self.hidden,
                self.row_bytes,
                self.pairs,
            ):
                raise ValueError("the layers have different sizes")
            if layer.experts not in (0, self.experts) or (
                mlp is not None and mlp.hidden != self.hidden
            ):
                raise ValueError(
                    "the layers have different numbers of experts, or an MLP of another size"
                )
        router.check(self.experts)
        _count("intermediate", intermediate)
        self.record_bytes, self.top_k = record_bytes(self.hidden, intermediate), router.top_k
        each = (_Layer * len(layers))()
        for one, (layer, mlp) in zip(each, layers, strict=True):
            one.attention, one.mlp = layer.address, mlp and ctypes.addressof(mlp.native)
        self._memory = attention, mlps, each
        self._native = _Model(
            len(layers), self.hidden, self.experts, intermediate, ctypes.addressof(each), router
        )
        self.address = ctypes.addressof(self._native)


class Decoded(NamedTuple):
    """What `Kernels.decode` has done: every layer before `layer`, and of that one, unless it is the
    number of layers, all up to its experts, of which some have no slot.

    `h` float32 [T, H] is the residual stream there. `x` float32 [T, H] and `weights` float32 [T, k]
    are those experts' input and weights, and mean nothing where all layers are done.  `indices`
    int64 [n, T, k] are the choices of the routers that were asked, this layer's the last; `seconds`
    are what attention, routers, experts and MLPs took."""

    layer: int
    h: Tensor
    x: Tensor
    weights: Tensor
    indices: Tensor
    seconds: list[float]


class Kernels:
    """The native kernels.  Methods allocate their results, may be called from several threads (jobs
    queue), release the GIL while they run, and raise ValueError for bad arguments before anything
    is read."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        self._timed: dict[str, float] | None = None  # seconds by name, while `timing` is open
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures = {
            "linear_nf4": [pointer, size, size, size, pointer, pointer, pointer, pointer],
            "pack_int8": [pointer, size, size, pointer],
            "linear_int8": [pointer, size, size, size, pointer, pointer, pointer],
            "rms_norm": [pointer, pointer, size, size, ctypes.c_float, pointer],
            "linear_dense": [pointer, size, size, size, pointer, number, pointer],
            "mlp": [pointer, size, pointer, pointer, pointer, pointer],
            "experts_decode": [pointer, pointer, size, pointer, size, size, pointer, pointer],
            "weighted_sum": [pointer, pointer, size, size, size, pointer],
            "experts_by_slot": [
                pointer,
                size,
                size,
                pointer,
                pointer,
                size,
                size,
                size,
                size,
                pointer,
                pointer,
            ],
            "mla": [pointer, size, size, pointer, size, size, size, size, ctypes.c_float, pointer],
            "store_latents": [pointer, size, size, size, pointer, size],
            "absorb_query": [pointer, size, size, pointer, pointer, size, size, size, pointer],
            "absorb_value": [pointer, size, size, pointer, pointer, size, size, size, pointer],
            "rotate": [pointer, pointer, size, size, size, pointer],
            "attention": [
                pointer,
                size,
                pointer,
                pointer,
                pointer,
                size,
                pointer,
                pointer,
                pointer,
                pointer,
            ],
            "route": [pointer, pointer, size, size, pointer, pointer],
            "decode": [
                *[pointer, size, size],
                *[pointer, pointer, pointer, size, size, pointer],
                *[pointer, pointer, size, size, pointer],
                *[pointer] * 8,
            ],
            "quantize_nf4": [pointer, number, size, size, pointer, pointer, pointer],
            "quantize_int8": [pointer, number, size, size, pointer, pointer],
            "nf4_error": [pointer, number, size, size, pointer, pointer, pointer, pointer],
            "int8_error": [pointer, number, size, size, pointer, pointer, pointer],
            "set_isa": [ctypes.c_char_p],
            "isa_count": [],
            "isa_supported": [number],
            "threads": [],
            "abi": [],
        }
        self._functions = {name: getattr(self._lib, f"slotmoe_{name}") for name in signatures}
        for name, arguments in signatures.items():
            self._functions[name].argtypes, self._functions[name].restype = arguments, number
        for name, arguments, result in [
            ("isa", [], ctypes.c_char_p),
            ("isa_name", [number], ctypes.c_char_p),
            ("set_threads", [number], None),
            ("read", [pointer, size], ctypes.c_uint64),
        ]:
            function = getattr(self._lib, f"slotmoe_{name}")
            function.argtypes, function.restype = arguments, result
        if self._lib.slotmoe_abi() != ABI:
            raise OSError(f"{path} has ABI {self._lib.slotmoe_abi()}, expected {ABI}")
        self.isas = tuple(
            self._lib.slotmoe_isa_name(i).decode()
            for i in range(self._lib.slotmoe_isa_count())
            if self._lib.slotmoe_isa_supported(i)
        )
        """Instruction sets that this machine can run, best first: among avx512vnni, avx2,
        portable."""

    @contextmanager
    def timing(self) -> Iterator[dict[str, float]]:
        """Seconds spent inside each native function while this is open, by name; the rest of a step
        is Python and torch."""
        seconds: dict[str, float] = {}
        plain = dict(self._functions)

        def timed(name: str, function: Callable[..., int]) -> Callable[..., int]:
            def call(*arguments: object) -> int:
                started = time.perf_counter()
                try:
                    return function(*arguments)
                finally:
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

            return call

        for name, function in plain.items():
            if name != "decode":  # which tells its parts
                setattr(self._lib, f"slotmoe_{name}", timed(name, function))
        self._timed = seconds
        try:
            yield seconds
        finally:
            self._timed = None
            for name, function in plain.items():
                setattr(self._lib, f"slotmoe_{name}", function)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self._lib.slotmoe_isa()
        return name.decode()

    def set_isa(self, name: str) -> None:
        """Use one of `isas` from the next call on (for tests and measurements)."""
        if self._lib.slotmoe_set_isa(name.encode()):
            raise ValueError(f"instruction set {name!r} is not one of {', '.join(self.isas)}")

    @property
    def threads(self) -> int:
        """Threads that the next call uses, the caller included."""
        return int(self._lib.slotmoe_threads())

    def set_threads(self, count: int) -> None:
        """Threads from the next call on, the caller included (1 to 256)."""
        if not 1 <= count <= 256:
            raise ValueError(f"{count} threads: expected 1 to 256")
        self._lib.slotmoe_set_threads(count)

    def read(self, memory: Tensor) -> None:
        """Read every byte of uint8 [n] with all threads: what the kernels' speed is held
        against."""
        _check("memory", memory, torch.uint8, ndim=1)
        self._lib.slotmoe_read(memory.data_ptr(), memory.numel())

    def linear_nf4(
        self, x: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor, n: int
    ) -> Tensor:
        """x float32 [T, K], codes and absmax of W [n, K] as tiles16, levels float32 [16] -> float32
        [T, n] = x W^T."""
        _check("x", x, torch.float32, ndim=2)
        t, k = x.shape
        _count("K", k)
        _count("n", n)
        _check("codes", codes, torch.uint8, codes_shape(n, k))
        _check("absmax", absmax, torch.float16, absmax_shape(n, k))
        _check("levels", levels, torch.float32, (16,))
        y = x.new_empty((t, n))
        pointers = codes.data_ptr(), absmax.data_ptr(), levels.data_ptr(), y.data_ptr()
        self._done(self._lib.slotmoe_linear_nf4(x.data_ptr(), t, k, n, *pointers))
        return y

    def pack_int8(
        self, w: Tensor, empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None
    ) -> PackedInt8:
        """int8 [N, K] row-major -> the order that `linear_int8` reads (a copy; once, at load), in
        memory from `empty`."""
        _check("w", w, torch.int8, ndim=2)
        n, k = w.shape
        _count("N", n)
        _count("K", k)
        shape = (-(-n // TILE), -(-k // BLOCK), TILE * BLOCK)
        data = torch.empty(shape, dtype=torch.int8) if empty is None else empty(shape, torch.int8)
        self._done(self._lib.slotmoe_pack_int8(w.data_ptr(), n, k, data.data_ptr()))
        return PackedInt8(data, n, k)

    def linear_int8(self, x: Tensor, w: PackedInt8, scale: Tensor) -> Tensor:
        """x float32 [T, K], packed int8 W [N, K], scale float32 [N] -> float32 [T, N] = x (W *
        scale)^T."""
        _check("w", w.data, torch.int8, (-(-w.n // TILE), -(-w.k // BLOCK), TILE * BLOCK))
        _check("x", x, torch.float32, ndim=2)
        if x.shape[1] != w.k:
            raise ValueError(f"x has {x.shape[1]} columns, the matrix {w.k}")
        _check("scale", scale, torch.float32, (w.n,))
        t = x.shape[0]
        y = x.new_empty((t, w.n))
        pointers = w.data.data_ptr(), scale.data_ptr(), y.data_ptr()
        self._done(self._lib.slotmoe_linear_int8(x.data_ptr(), t, w.k, w.n, *pointers))
        return y

    def linear_dense(self, x: Tensor, w: Tensor) -> Tensor:
        """x float32 [T, K], W [N, K] float32, float16 or bfloat16 -> float32 [T, N] = x W^T,
        nothing quantized."""
        _check("x", x, torch.float32, ndim=2)
        n, k, kind = _source(w)
        if x.shape[1] != k:
            raise ValueError(f"x has {x.shape[1]} columns, the matrix {k}")
        y = x.new_empty((x.shape[0], n))
        self._done(
            self._lib.slotmoe_linear_dense(
                x.data_ptr(), x.shape[0], k, n, w.data_ptr(), kind, y.data_ptr()
            )
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x float32 [T, n], weight float32 [n] -> x / sqrt(mean(x^2) + eps) * weight."""
        _check("x", x, torch.float32, ndim=2)
        t, n = x.shape
        _check("weight", weight, torch.float32, (n,))
        y = torch.empty_like(x)
        self._done(
            self._lib.slotmoe_rms_norm(x.data_ptr(), weight.data_ptr(), t, n, eps, y.data_ptr())
        )
        return y

    def mlp(
        self, x: Tensor, w: Mlp, residual: Tensor | None = None, others: Tensor | None = None
    ) -> Tensor:
        """x float32 [T, H] -> y = down(silu(gate x) * up x), float32 [T, H]; with a `residual` [T,
        H] residual + y, and with `others` [T, H] too residual + (others + y): one rounding a sum,
        as torch adds."""
        _check("x", x, torch.float32, (len(x), w.hidden))
        if residual is not None:
            _check("residual", residual, torch.float32, x.shape)
        if others is not None:
            _check("others", others, torch.float32, x.shape)
            if residual is None:
                raise ValueError("others must come with a residual")
        y = torch.empty_like(x)
        added = (None if tensor is None else tensor.data_ptr() for tensor in (residual, others))
        self._done(self._lib.slotmoe_mlp(x.data_ptr(), len(x), w.native, *added, y.data_ptr()))
        return y

    def experts_decode(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        weights: Tensor,
        intermediate: int,
        levels: Tensor,
    ) -> Tensor:
        """x float32 [H], k records uint8 [>= record_bytes], weights float32 [k] -> float32 [H].

        The sum over experts of weight * down(silu(gate x) * up x), in the order given: bitwise
        `weighted_sum` of `experts_each` over any split of the experts.
        """
        _check("weights", weights, torch.float32, (len(records),))
        y = torch.empty_like(x)
        if not records:
            return y.zero_()
        self._decode(x, records, weights.data_ptr(), intermediate, levels, y)
        return y

    def experts_each(
        self, x: Tensor, records: Sequence[Tensor], intermediate: int, levels: Tensor
    ) -> Tensor:
        """As `experts_decode`, but each expert's own output, without weights -> float32 [k, H]."""
        y = x.new_empty((len(records), x.numel()))
        self._decode(x, records, None, intermediate, levels, y)
        return y

    def _decode(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        weights: int | None,
        intermediate: int,
        levels: Tensor,
        y: Tensor,
    ) -> None:
        _check("x", x, torch.float32, ndim=1)
        hidden = x.numel()
        _count("H", hidden)
        _count("intermediate", intermediate)
        _check("levels", levels, torch.float32, (16,))
        size = record_bytes(hidden, intermediate)
        addresses = (ctypes.c_void_p * len(records))(*[_record(record, size) for record in records])
        self._done(
            self._lib.slotmoe_experts_decode(
                x.data_ptr(),
                addresses,
                len(records),
                weights,
                hidden,
                intermediate,
                levels.data_ptr(),
                y.data_ptr(),
            )
        )

    def weighted_sum(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """outputs float32 [T, k, H], weights float32 [T, k] -> float32 [T, H]: products added one
        by one in order, from zero."""
        _check("outputs", outputs, torch.float32, ndim=3)
        t, k, hidden = outputs.shape
        _count("H", hidden)
        _check("weights", weights, torch.float32, (t, k))
        y = outputs.new_empty((t, hidden))
        self._done(
            self._lib.slotmoe_weighted_sum(
                outputs.data_ptr(), weights.data_ptr(), t, k, hidden, y.data_ptr()
            )
        )
        return y

    def experts_by_slot(
        self, x: Tensor, slab: Tensor, slots: Tensor, intermediate: int, levels: Tensor, y: Tensor
    ) -> None:
        """x float32 [T, H] through those of each token's k experts that are in the slab (uint8 [S,
        >= record_bytes]), unweighted, into y float32 [T, k, H]: slots int32 [T, k] names their
        rows; where it is negative, y is left as it is.

        Each row is bitwise what `experts_each` gives for it.
        """
        _check("x", x, torch.float32, ndim=2)
        t, hidden = x.shape
        _count("H", hidden)
        _count("intermediate", intermediate)
        _check("levels", levels, torch.float32, (16,))
        _check("slots", slots, torch.int32, ndim=2)
        k = slots.shape[1]
        _check("y", y, torch.float32, (t, k, hidden))
        _check("slots", slots, torch.int32, (t, k))
        size, stride = _slab(slab, record_bytes(hidden, intermediate))
        pointers = x.data_ptr(), t, k, slots.data_ptr(), slab.data_ptr(), size, stride
        self._done(
            self._lib.slotmoe_experts_by_slot(
                *pointers, hidden, intermediate, levels.data_ptr(), y.data_ptr()
            )
        )

    def store_latents(self, latent: Tensor, r: int, cache: Tensor) -> None:
        """latent float32 [T, R + P], R = `r` -> T rows of a latent cache, uint8 [T, latent_bytes(R,
        P)] (rows may be strided).

        Each part, latent and rope columns, is rotated by an orthogonal matrix and rounded to 8 bits
        with one float32 scale (attention.h); a part with NaN or infinity gets the scale NaN.
        """
        _check("latent", latent, torch.float32, ndim=2)
        t, width = latent.shape
        _count("R", r)
        if r > width:
            raise ValueError(f"R is {r}, latent has {width} columns")
        stride = _rows(cache, latent_bytes(r, width - r))
        if len(cache) != t:
            raise ValueError(f"cache has {len(cache)} rows, latent {t}")
        self._done(
            self._lib.slotmoe_store_latents(
                latent.data_ptr(), t, r, width - r, cache.data_ptr(), stride
            )
        )

    def mla(self, q: Tensor, cache: Tensor, context: int, latent: int, scale: float) -> Tensor:
        """Causal attention of the last T of `context` tokens over the latent cache.

        q float32 [T, heads, R + P], R = `latent`; cache uint8 [capacity, latent_bytes(R, P)] of
        rows from `store_latents`, which may be strided -> float32 [T, heads, R] = softmax(scale * q
        rows^T) rows[:, :R], token t over the first `context` - T + t + 1 rows; later rows are not
        read.  Each token's result is bitwise that of a call of its own.
        """
        _check("q", q, torch.float32, ndim=3)
        tokens, heads, width = q.shape
        _count("tokens", tokens)
        _count("heads", heads)
        _count("context", context, tokens)
        if not 1 <= latent <= width:
            raise ValueError(f"latent is {latent}, q has {width} columns")
        stride = _rows(cache, latent_bytes(latent, width - latent))
        if context > cache.shape[0]:
            raise ValueError(f"context is {context}, the cache has {cache.shape[0]} rows")
        out = q.new_empty((tokens, heads, latent))
        sizes = context, stride, latent, width - latent
        self._done(
            self._lib.slotmoe_mla(
                q.data_ptr(), tokens, heads, cache.data_ptr(), *sizes, scale, out.data_ptr()
            )
        )
        return out

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """x float32 [T, heads, P], table complex64 [T, P / 2] -> the pairs (x0, x1), (x2, x3), ...
        times the table."""
        _check("x", x, torch.float32, ndim=3)
        t, heads, p = x.shape
        if p % 2:
            raise ValueError(f"x has {p} columns, expected an even number: rotation takes pairs")
        _check("table", table, torch.complex64, (t, p // 2))
        if table.is_conj():
            raise ValueError("table must be resolved, not conjugated lazily")
        out = torch.empty_like(x)
        self._done(
            self._lib.slotmoe_rotate(x.data_ptr(), table.data_ptr(), t, heads, p, out.data_ptr())
        )
        return out

    def attention(
        self,
        layer: AttentionLayer,
        h: Tensor,
        table: Tensor,
        caches: Sequence[Tensor],
        positions: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One token of each of T sequences through a layer's attention: h float32 [T, H] -> y = h +
        attention(rms_norm(h)), x = rms_norm(y), both float32 [T, H], and the router's logits x
        gate^T, float32 [T, E] or None.

        `table` complex64 [T, P / 2] is the positions' rotations; a token's latent row is written to
        its sequence's cache (uint8 [capacity, latent_bytes(R, P)], rows may be strided, alike in
        all) at its position, and rows up to it are attended to. Bitwise what rms_norm, the linear
        layers, rotate, store_latents, absorb_query, mla and absorb_value give one after the other,
        and what each token gives alone.
        """
        t = len(caches)
        _count("T", t)
        _check("h", h, torch.float32, (t, layer.hidden))
        _check("table", table, torch.complex64, (t, layer.pairs))
        if table.is_conj():
            raise ValueError("table must be resolved, not conjugated lazily")
        strides = {_rows(one, layer.row_bytes) for one in caches}
        if len(strides) > 1:
            raise ValueError(
                f"the caches' rows stand {sorted(strides)} bytes apart, expected the same in all"
            )
        _positions(positions, [len(cache) for cache in caches])
        y, x = torch.empty_like(h), torch.empty_like(h)
        logits = torch.empty(t, layer.experts, dtype=torch.float32) if layer.experts else None
        addresses, places = (
            (ctypes.c_void_p * t)(*(one.data_ptr() for one in caches)),
            (ctypes.c_int64 * t)(*positions),
        )
        inputs = layer.address, t, h.data_ptr(), table.data_ptr(), addresses, strides.pop(), places
        outputs = y.data_ptr(), x.data_ptr(), None if logits is None else logits.data_ptr()
        self._done(self._lib.slotmoe_attention(*inputs, *outputs))
        return y, x, logits

    def route(self, logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
        """logits float32 [T, E] -> weights float32 and indices int64, [T, top_k], best first, and
        of equals the lower index."""
        _check("logits", logits, torch.float32, ndim=2)
        t, experts = logits.shape
        router.check(experts)
        weights, indices = (
            logits.new_empty((t, router.top_k)),
            torch.empty((t, router.top_k), dtype=torch.int64),
        )
        pointers = (
            ctypes.byref(router),
            logits.data_ptr(),
            t,
            experts,
            weights.data_ptr(),
            indices.data_ptr(),
        )
        self._done(self._lib.slotmoe_route(*pointers))
        return weights, indices

    def decode(
        self,
        decoder: Decoder,
        first: int,
        h: Tensor,
        table: Tensor,
        caches: Sequence[Tensor],
        positions: Sequence[int],
        slab: Tensor,
        slots: Tensor,
        levels: Tensor,
        x: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Decoded:
        """One token of each of T sequences through the layers from `first` on, up to one whose
        experts are not all in the slab: h float32 [T, H].

        `table` complex64 [T, P / 2] is the positions' rotations; a token's latent rows are written
        at its position of its sequence's cache, uint8 [layers, capacity, latent_bytes(R, P)], alike
        in all. `slots` int32 [MoE layers, E] says which row of `slab` (uint8 [S, >= record_bytes],
        coded by `levels`, float32 [16]) an expert's record is in, negative if none.

        With `x` and `experts`, float32 [T, H], layer `first` only lacks its feed-forward: h is the
        residual stream behind its attention, x the norm of that, `experts` the weighted sum of its
        routed experts.  Bitwise what `attention`, `route`, `experts_by_slot`, `weighted_sum` and
        `mlp` give layer by layer, and what each token gives alone.
        """
        t, layers = len(caches), len(decoder.routed)
        _count("T", t)
        if not 0 <= first < layers:
            raise ValueError(f"first is {first}, expected one of {layers} layers")
        _check("h", h, torch.float32, (t, decoder.hidden))
        _check("table", table, torch.complex64, (t, decoder.pairs))
        if table.is_conj():
            raise ValueError("table must be resolved, not conjugated lazily")
        layer_stride, row_stride = _layer_rows(caches, layers, decoder.row_bytes)
        _positions(positions, [caches[0].shape[1]] * t)
        size, apart = _slab(slab, decoder.record_bytes)
        _check("slots", slots, torch.int32, (decoder.moe_layers, decoder.experts))
        _check("levels", levels, torch.float32, (16,))
        if x is not None and experts is not None:
            _check("x", x, torch.float32, (t, decoder.hidden))
            _check("experts", experts, torch.float32, (t, decoder.hidden))
            if not decoder.routed[first]:
                raise ValueError(f"layer {first} has no experts: x and experts must be None")
            resumed = x.data_ptr(), experts.data_ptr()
        elif x is None and experts is None:
            resumed = 0, 0
        else:
            raise ValueError("x and experts must come together")
        asked = decoder.moe_layers - decoder.moe_layers_before[first] - (x is not None)
        y, norm = torch.empty_like(h), torch.empty_like(h)
        weights = torch.empty((t, decoder.top_k))
        indices = torch.empty((asked, t, decoder.top_k), dtype=torch.int64)
        reached, seconds = ctypes.c_int64(), (ctypes.c_double * len(_PARTS))()
        self._done(
            self._lib.slotmoe_decode(
                decoder.address,
                first,
                t,
                h.data_ptr(),
                table.data_ptr(),
                (ctypes.c_void_p * t)(*[cache.data_ptr() for cache in caches]),
                layer_stride,
                row_stride,
                (ctypes.c_int64 * t)(*positions),
                slots.data_ptr(),
                slab.data_ptr(),
                size,
                apart,
                levels.data_ptr(),
                *resumed,
                y.data_ptr(),
                norm.data_ptr(),
                weights.data_ptr(),
                indices.data_ptr(),
                ctypes.byref(reached),
                seconds,
            )
        )
        layer = reached.value
        if layer < layers:
            indices = indices[: asked - decoder.moe_layers + decoder.moe_layers_before[layer] + 1]
        spent = seconds[:]
        if self._timed is not None:
            for name, part in zip(_PARTS, spent, strict=True):
                self._timed[name] = self._timed.get(name, 0.0) + part
        return Decoded(layer, y, norm, weights, indices, spent)

    def absorb_query(self, q: Tensor, kv_b: Tensor, scale: Tensor) -> Tensor:
        """q float32 [T, heads, n], kv_b int8 [heads * per_head, R], scale float32 [heads *
        per_head] -> float32 [T, heads, R]: each head's query times its first n rows of kv_b *
        scale."""
        _check("q", q, torch.float32, ndim=3)
        t, heads, n = q.shape
        per_head, r = self._per_head(heads, n, kv_b, scale)
        out = q.new_empty((t, heads, r))
        pointers = q.data_ptr(), t, heads, kv_b.data_ptr(), scale.data_ptr()
        self._done(self._lib.slotmoe_absorb_query(*pointers, n, per_head, r, out.data_ptr()))
        return out

    def absorb_value(self, latent: Tensor, kv_b: Tensor, scale: Tensor, n: int) -> Tensor:
        """latent float32 [T, heads, R], kv_b and scale as for `absorb_query` -> float32 [T, heads,
        per_head - n]: each head's latent through its rows of kv_b * scale past the first n."""
        _check("latent", latent, torch.float32, ndim=3)
        t, heads = latent.shape[:2]
        per_head, r = self._per_head(heads, n, kv_b, scale)
        if latent.shape[2] != r:
            raise ValueError(f"latent has {latent.shape[2]} columns, kv_b {r}")
        out = latent.new_empty((t, heads, per_head - n))
        pointers = latent.data_ptr(), t, heads, kv_b.data_ptr(), scale.data_ptr()
        self._done(self._lib.slotmoe_absorb_value(*pointers, n, per_head, r, out.data_ptr()))
        return out

    def _per_head(self, heads: int, n: int, kv_b: Tensor, scale: Tensor) -> tuple[int, int]:
        _count("heads", heads)
        _check("kv_b", kv_b, torch.int8, ndim=2)
        rows, r = kv_b.shape
        _check("scale", scale, torch.float32, (rows,))
        if rows % heads or not 0 <= n <= rows // heads or r < 1:
            raise ValueError(
                f"kv_b has shape {(rows, r)}, which {heads} heads with {n} rows for the query can't share"
            )
        return rows // heads, r

    def quantize_nf4(self, source: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[N, K] bfloat16, float16 or float32 -> codes uint8, absmax float16 as tiles16.

        Codes equal those of bitsandbytes' `quantize_4bit(blocksize=64, quant_type="nf4")` where K
        is a multiple of 64. ValueError when the source holds NaN or infinity, or a block's absmax
        does not fit float16.
        """
        n, k, kind = _source(source)
        levels = torch.tensor(LEVELS) if levels is None else levels
        _check("levels", levels, torch.float32, (16,))
        if not bool((levels[1:] >= levels[:-1]).all()):
            raise ValueError("levels must ascend to quantize with them")
        codes = torch.empty(codes_shape(n, k), dtype=torch.uint8)
        absmax = torch.empty(absmax_shape(n, k), dtype=torch.float16)
        pointers = levels.data_ptr(), codes.data_ptr(), absmax.data_ptr()
        self._made(self._lib.slotmoe_quantize_nf4(source.data_ptr(), kind, n, k, *pointers))
        return codes, absmax

    def quantize_int8(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] bfloat16, float16 or float32 -> int8 [N, K] row-major, scale float32 [N] = absmax
        / 127.

        A row of zeros gets scale 0.  ValueError when the source holds NaN or infinity.
        """
        n, k, kind = _source(source)
        q = torch.empty((n, k), dtype=torch.int8)
        scale = torch.empty(n)
        self._made(
            self._lib.slotmoe_quantize_int8(
                source.data_ptr(), kind, n, k, q.data_ptr(), scale.data_ptr()
            )
        )
        return q, scale

    def nf4_error(
        self, source: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor
    ) -> tuple[float, float]:
        """Sum of the squared differences between ``source``, [N, K] in any of its dtypes, and its
        NF4 weight, and sum of the source's squares; float64 throughout."""
        n, k, kind = _source(source)
        _check("codes", codes, torch.uint8, codes_shape(n, k))
        _check("absmax", absmax, torch.float16, absmax_shape(n, k))
        _check("levels", levels, torch.float32, (16,))
        sums = torch.empty((codes.shape[0], 2), dtype=torch.float64)
        pointers = levels.data_ptr(), codes.data_ptr(), absmax.data_ptr(), sums.data_ptr()
        self._done(self._lib.slotmoe_nf4_error(source.data_ptr(), kind, n, k, *pointers))
        return _total(sums)

    def int8_error(self, source: Tensor, q: Tensor, scale: Tensor) -> tuple[float, float]:
        """``nf4_error`` of an int8 weight: ``q`` int8 [N, K] row-major, ``scale`` float32 [N]."""
        n, k, kind = _source(source)
        _check("q", q, torch.int8, (n, k))
        _check("scale", scale, torch.float32, (n,))
        sums = torch.empty((n, 2), dtype=torch.float64)
        pointers = q.data_ptr(), scale.data_ptr(), sums.data_ptr()
        self._done(self._lib.slotmoe_int8_error(source.data_ptr(), kind, n, k, *pointers))
        return _total(sums)

    def _made(self, status: int) -> None:
        if status == 2:
            raise ValueError("the source holds NaN or infinity")
        if status == 3:
            raise ValueError("a block's largest magnitude is beyond float16 (65504)")
        self._done(status)

    def _done(self, status: int) -> None:
        if status == 4:
            raise MemoryError("the kernels could not allocate their working memory")
        if status:
            raise ValueError(
                "the kernels refused an argument: levels must be finite, and slots rows of the slab"
            )


def _total(sums: Tensor) -> tuple[float, float]:
    """Sums of the two columns, rounded once, so that they depend on no order."""
    errors, squares = sums.T.tolist()
    return math.fsum(errors), math.fsum(squares)


def _rows(cache: Tensor, width: int) -> int:
    """Bytes from one row to the next of a latent cache, uint8 [capacity, width]."""
    if (
        cache.dtype != torch.uint8
        or not cache.is_cpu
        or cache.dim() != 2
        or cache.shape[1] != width
    ):
        raise ValueError(
            f"cache is {cache.dtype} {tuple(cache.shape)}, expected uint8 [capacity, {width}] on the CPU"
        )
    stride = cache.stride(0) if cache.shape[0] > 1 else width
    if cache.stride(1) != 1 or stride < width:
        raise ValueError(
            f"cache has strides {cache.stride()}, expected rows of {width} adjacent bytes"
        )
    return stride


def _layer_rows(caches: Sequence[Tensor], layers: int, width: int) -> tuple[int, int]:
    """Bytes from one layer to the next and from one row to the next of caches that are alike, uint8
    [layers, capacity, width]."""
    shape, strides = caches[0].shape, caches[0].stride()
    for rows in caches:
        if rows.dtype != torch.uint8 or not rows.is_cpu or rows.dim() != 3:
            raise ValueError(f"cache is {rows.dtype} on {rows.device}, expected uint8 on the CPU")
        if rows.shape != shape or rows.stride() != strides:
            raise ValueError(f"caches {tuple(shape)} and {tuple(rows.shape)} must be alike")
    if shape[0] != layers or shape[2] != width:
        raise ValueError(f"cache is {tuple(shape)}, expected [{layers}, capacity, {width}]")
    row_stride = strides[1] if shape[1] > 1 else width
    if strides[2] != 1 or row_stride < width:
        raise ValueError(f"cache has strides {strides}, expected rows of {width} adjacent bytes")
    return strides[0], row_stride


def _positions(positions: Sequence[int], capacities: Sequence[int]) -> None:
    if len(positions) != len(capacities):
        raise ValueError(
            f"{len(positions)} positions, expected one for each of {len(capacities)} caches"
        )
    for position, capacity in zip(positions, capacities, strict=True):
        if not 0 <= position < capacity:
            raise ValueError(f"position is {position}, expected one of the cache's {capacity} rows")


def _slab(slab: Tensor, size: int) -> tuple[int, int]:
    """Number of records of a slab, uint8 [S, >= size], and bytes from one to the next."""
    _check("slab", slab, torch.uint8, ndim=2)
    count, stride = slab.shape
    if count and stride < size:
        raise ValueError(f"a record of {stride} bytes, expected at least {size}")
    if stride % 64 or slab.data_ptr() % 64:
        raise ValueError(f"records stand {stride} bytes apart, expected a multiple of 64 bytes")
    return count, stride


def _record(record: Tensor, size: int) -> int:
    _check("record", record, torch.uint8, ndim=1)
    if record.numel() < size:
        raise ValueError(f"a record of {record.numel()} bytes, expected at least {size}")
    address = record.data_ptr()
    if address % 64:
        raise ValueError("a record must start at a multiple of 64 bytes")
    return address


@cache
def load() -> Kernels | None:
    """The kernels, or None where their binary is missing or does not load."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                return Kernels(path)
            except (OSError, AttributeError):
                return None
    return None
