"""Native CPU kernels for quantized weights and latent attention, through ctypes.

`load()` gives the kernels, or None where the binary is missing (no compiler at install) or foreign
to this machine; the caller then falls back to torch. Tensors are contiguous CPU tensors unless said
otherwise, and checked before the native side sees a pointer: a wrong dtype, shape, size or
alignment is a `ValueError`, of caches and `decode`'s tensors, from backends, an `AssertionError`.

Shapes: T tokens; W [N, K]; H hidden size; I expert's intermediate size; k experts of a token; E
experts of a layer; A heads; R and P columns of a latent, without and with rotation.  Results do not
depend on the number of threads, and a row's result does not depend on the rows computed with it.

The layout `tiles16` of codes is that of `quant/codecs/codec.py`.  An expert record is gate, up and
down codes, then gate, up and down scales, 64-byte-aligned, then any padding.
"""

import ctypes
import hashlib
import importlib.machinery
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from slotmoe.border import ListedRows
from slotmoe.errors import ConfigError
from slotmoe.quant.codecs.codec import NF4, TILE
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.layers import Decoder
from slotmoe.quant.kernels.cpu.signatures import INT8, SIGNATURES, Function, tensor_spec
from slotmoe.quant.kernels.cpu.tokens import Tokens, address, layer_rows
from slotmoe.quant.kernels.cpu.weights import Absorbed, ExpertRecord, Matrix
from slotmoe.quant.shapes import latent_bytes
from slotmoe.system import cores

ABI = 16
INSTRUCTIONS = "SLOTMOE_INSTRUCTIONS"  # names an instruction set
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
_PARTS = ("attention", "route", "experts_by_slot", "mlp")  # whose seconds `decode` measures


class Decoded(NamedTuple):
    """What `Kernels.decode` has done: every layer before `layer`, and of that one, unless it is the
    number of layers, all up to its experts, of which some have no slot.

    `h` float32 [T, H], or [T, streams H], is the residual stream there.  `indices` int64 [n, T, k]
    are the choices of the routers that were asked, this layer's the last, and `x` float32 [n, T, H]
    their inputs; `weights` float32 [T, k] are this layer's, and mean nothing where all are done.
    `seconds` are what attention, routers, experts and MLPs took."""

    layer: int
    h: Tensor
    x: Tensor
    weights: Tensor
    indices: Tensor
    seconds: list[float]


class Kernels:
    """The native kernels.  Methods allocate their results, may be called from several threads (jobs
    queue), release the GIL while they run, and raise ValueError for bad arguments first."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))  # what it returns is an int, unless said otherwise
        self._lib.slotmoe_isa.restype = self._lib.slotmoe_isa_name.restype = ctypes.c_char_p
        self._lib.slotmoe_read.argtypes = ctypes.c_void_p, ctypes.c_int64
        if self._lib.slotmoe_abi() != ABI:
            raise OSError(f"{path} has ABI {self._lib.slotmoe_abi()}, expected {ABI}")
        self.set_threads(cores())
        self._functions = {name: Function(self._lib, name) for name in SIGNATURES}
        functions = self._functions
        self.mlp, self.layer_norm = functions["mlp"], functions["layer_norm"]
        self.rms_norm, self.rotate = functions["rms_norm"], functions["rotate"]
        self.rotations = functions["rotations"]
        self.weighted_sum, self.compress = functions["weighted_sum"], functions["compress"]
        self.absorb_query, self.absorb_value = functions["absorb_query"], functions["absorb_value"]
        self.route = functions["route"].results
        self.experts_by_slot = functions["experts_by_slot"].results
        self.hyper_in = functions["hyper_in"].results
        self.hyper_out, self.hyper_head = functions["hyper_out"], functions["hyper_head"]
        # of slotmoe.quant.codecs.encode and slotmoe.quant.codecs.feedback
        self.quantize_int8 = functions["quantize_int8"].results
        self.int8_error, self.coded_error = functions["int8_error"], functions["coded_error"]
        self.fit_rows, self.code_rows = functions["fit_rows"], functions["code_rows"]
        self.fit_columns, self.feed_back = functions["fit_columns"], functions["feed_back"].results
        self.descend = functions["descend"].results
        self.attention = functions["attention"]  # tests hold `decode` against it
        self.isas = tuple(
            self._lib.slotmoe_isa_name(i).decode()
            for i in range(self._lib.slotmoe_isa_count())
            if self._lib.slotmoe_isa_supported(i)
        )
        """Instruction sets that this machine can run, best first: among amx, amx_plain (the same
        without AMX, for tests), avx512vbmi, avx512vnni, avxvnni, avx2, neon_i8mm, neon_dot, neon,
        portable.  The first two are used only where they are asked for."""

    def seconds(self) -> dict[str, float]:
        """Seconds spent inside each native function so far; `decode` counts as its parts."""
        return {name: item.seconds for name, item in self._functions.items() if name != "decode"}

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: bytes = self._lib.slotmoe_isa()
        return name.decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the binary: the same on machines that compute the same bits by one `isa`."""
        return hashlib.sha256(Path(self._lib._name).read_bytes()).hexdigest()

    def set_isa(self, name: str) -> None:
        """Use one of `isas` from the next call on.  Raises `ConfigError`."""
        if self._lib.slotmoe_set_isa(name.encode()):
            here = ", ".join(self.isas)
            raise ConfigError(f"instruction set {name!r:.40} is not one of this machine's: {here}")

    @property
    def threads(self) -> int:
        """Threads that the next call uses, the caller included."""
        return int(self._lib.slotmoe_threads())

    def set_threads(self, count: int) -> None:
        """Threads from the next call on, the caller included (1 to 256)."""
        if not 1 <= count <= 256:
            raise ValueError(f"{count} threads: expected 1 to 256")
        self._lib.slotmoe_set_threads(count)

    def set_cpus(self, cpus: Sequence[int]) -> None:
        """Where threads run from the next call on, the caller excepted; anywhere for none."""
        self._lib.slotmoe_set_cpus((ctypes.c_int32 * len(cpus))(*cpus), len(cpus))

    def read(self, memory: Tensor) -> None:
        """Read every byte of uint8 [n] with all threads: the kernels' bound."""
        self._lib.slotmoe_read(tensor_spec("memory:u8[N]").check(memory, {}), len(memory))

    def tile_int8(self, weight: Int8Weight, empty: Empty, fine: bool = False) -> Matrix:
        """A copy in the order of `linear`, in memory from `empty`; `fine` as in `Matrix`."""
        tiles = self._tiles(weight.q, empty)
        scale = empty(tuple(weight.scale.shape), torch.float32).copy_(weight.scale)
        return Matrix.int8(tiles, scale, weight.shape, fine)

    def tile_absorbed(self, weight: Int8Weight, head: tuple[int, int], empty: Empty) -> Absorbed:
        """The same of `kv_b_proj`, `head` of whose rows, N and V, are a head's."""
        (n, v), r = head, weight.shape[1]
        q, scale = weight.q.view(-1, n + v, r), weight.scale.view(-1, n + v)
        tiles = list[Tensor]()
        for part in (q[:, :n].transpose(1, 2), q[:, n:]):
            whole = pad(part, (0, 0, 0, -part.shape[1] % TILE)).flatten(0, 1).contiguous()
            tiles.append(self._tiles(whole, empty).unflatten(0, (len(q), -1)))
        plain = scale[:, :n], scale[:, n:], torch.ones(r)
        return Absorbed(*tiles, *(empty(tuple(x.shape), torch.float32).copy_(x) for x in plain))

    def _tiles(self, q: Tensor, empty: Empty) -> Tensor:
        sizes: dict[str, int] = {}
        tensor_spec("w:i8[N,K]").check(q, sizes)
        tiles = empty(tuple(tensor_spec(f"packed:{INT8}").shape(sizes)), torch.int8)
        self._functions["pack_int8"].results(q, tiles)
        return tiles

    def linear(self, weight: Matrix, x: Tensor) -> Tensor:
        """x float32 [T, K] -> x W^T, [T, N]; or [T, G, K] -> [T, G, N / G], by G groups of rows."""
        y: Tensor = self._functions["linear"](weight, x if x.dim() == 3 else x[:, None])
        return y.unflatten(1, (x.shape[1], -1)) if x.dim() == 3 else y

    def store_latents(self, latent: Tensor, r: int, cache: Tensor) -> None:
        """latent float32 [T, R + P], R = `r` -> T rows of a latent cache, uint8 [T, latent_bytes(R,
        P)], which may be strided.  Latent and rope columns are each rotated by an orthogonal matrix
        and rounded to 8 bits with one float32 scale (attention.h), NaN if one is not finite."""
        assert len(cache) == len(latent)
        p = latent.shape[-1] - r
        self._functions["store_latents"].results(latent, *latent_rows(cache, r, p), R=r, P=p)

    def mla(self, q: Tensor, cache: Tensor, context: int, latent: int, scale: float) -> Tensor:
        """Causal attention of the last T of `context` tokens over the latent cache: q float32 [T,
        A, R + P], R = `latent`, rows of `store_latents` -> float32 [T, A, R] = softmax(scale * q
        rows^T) rows[:, :R].  Rows past `context` are not read.  A token gives these bits alone."""
        assert len(q) <= context <= len(cache)
        p = q.shape[-1] - latent
        values = q, *latent_rows(cache, latent, p), scale
        return self._functions["mla"](*values, C=context, R=latent, P=p)

    def attend(self, q: Tensor, listed: ListedRows, latent: int, scale: float) -> Tensor:
        """As `mla`, but each token attends to the rows that its list names."""
        rows, others, lists, sinks = listed
        p, others = q.shape[-1] - latent, rows[:0] if others is None else others
        values = q, *latent_rows(rows, latent, p), *latent_rows(others, latent, p)
        sizes = {"C": len(rows), "D": len(others), "R": latent, "P": p}
        return self._functions["attend"](*values, lists, scale, sinks, **sizes)

    def index(self, q: Tensor, weights: Tensor, keys: Tensor, counts: Tensor, k: int) -> Tensor:
        """The lightning indexer: of the first counts[t] keys, int32 [T], those k that score best,
        ascending, then -1: int32 [T, k].  A score is the sum over the heads of weights[t] float32
        [T, A] times relu(q[t] float32 [T, A, R] . key); of equals the lower index comes first, and
        NaN is the lowest.  `keys` are rows of `store_latents` with P = 0."""
        values = q, weights, *latent_rows(keys, q.shape[-1], 0), counts
        return self._functions["index"](*values, S=len(keys), K=k)

    def decode(
        self,
        decoder: Decoder,
        first: int,
        h: Tensor,
        tokens: Tokens,
        slab: Tensor,
        slots: Tensor,
        record: ExpertRecord,
        x: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Decoded:
        """T tokens of one or several sequences through the layers from `first` on, up to one whose
        experts are not all in the slab: h float32 [T, H].  `slots` int32 [MoE layers, E] says which
        row of `slab` an expert's `record` is in, negative if none.

        With `x` and `experts`, layer `first` only lacks its feed-forward: h is the residual stream
        behind its attention, x the norm of that, `experts` the weighted sum of its routed experts.
        Bitwise what `attention`, `route`, `experts_by_slot`, `weighted_sum` and `mlp` give layer by
        layer, and what each token gives alone.
        """
        assert (x is None) == (experts is None)
        asked = decoder.routers_from(first, x is not None)
        t, sizes, f32 = len(tokens.positions), decoder.sizes, torch.float32
        hidden, top_k, streams, wide = (sizes[letter] for letter in "HKQX")
        bound = tokens.bound(decoder)
        inputs = (
            address(h, f32, t, wide),
            bound.address,
            address(slots, torch.int32, sizes["M"], sizes["E"]),
            record.slab(slab).address,
            *slab.shape,
            record.address,
            address(x, f32, t, hidden),
            address(experts, f32, t, hidden),
            address(tokens.post, f32, t, streams),
            address(tokens.comb, f32, t, streams, streams),
        )
        y, norms = torch.empty(t, wide), torch.empty(asked + 1, t, hidden)
        weights, indices = torch.empty(t, top_k), torch.empty(asked, t, top_k, dtype=torch.int64)
        results = [tensor.data_ptr() for tensor in (y, norms, weights, indices)]
        reached, seconds = ctypes.c_int64(), (ctypes.c_double * len(_PARTS))()
        outputs = *results, ctypes.byref(reached), seconds
        self._functions["decode"].run(decoder.address, first, t, *inputs, *outputs)
        layer = reached.value
        if layer < len(decoder.routed):
            indices = indices[: asked - sum(decoder.routed[layer + 1 :])]
        spent = seconds[:]
        for part, duration in zip(_PARTS, spent, strict=True):
            self._functions[part].seconds += duration
        return Decoded(layer, y, norms[: len(indices)], weights, indices, spent)

    def quantize_nf4(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K] bfloat16, float16 or float32 -> codes uint8, absmax float16 as tiles16.
        ValueError for NaN, infinity, or a block's absmax beyond float16."""
        codes, absmax = self._functions["quantize_nf4"].results(source, torch.tensor(NF4.levels))
        return codes, absmax


@cache
def load() -> Kernels | None:
    """The kernels, or None where their binary is missing or does not load.  They use the best
    instruction set, or that of ``SLOTMOE_INSTRUCTIONS``.  Raises `ConfigError`."""
    # What serves every version of Python comes before what an older build has left.
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)
    paths = (Path(__file__).with_name(f"_native{suffix}") for suffix in suffixes)
    try:
        kernels = Kernels(next(filter(Path.exists, paths)))
    except (StopIteration, OSError, AttributeError):
        return None
    if wanted := os.environ.get(INSTRUCTIONS):
        kernels.set_isa(wanted)
    return kernels


def latent_rows(cache: Tensor, r: int, p: int) -> tuple[int, int]:
    """Address of a cache, uint8 [capacity, latent_bytes(R, P)], and bytes from row to row."""
    return cache.data_ptr(), layer_rows([cache[None]], 1, latent_bytes(r, p))[1]
