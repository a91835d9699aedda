"""The one place that knows what a weight is made of and picks who multiplies by it.

``TorchOps`` is the plain reference: it dequantizes a slice of rows and multiplies.  It works on
every device and is the oracle of ``NativeOps``, which computes the same things on a CPU with the
kernels of ``slotmoe.quant.kernels.cpu.bindings``. Shape legend: T tokens, N rows out, K columns in,
D hidden_size, H heads, R kv_lora_rank, I moe_intermediate_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant import int8, nf4
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu import bindings as kernels
from slotmoe.quant.kernels.cpu.weights import PackedInt8
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import TILE


@dataclass(frozen=True)
class TiledInt8Weight:
    """An int8 matrix in the order that the native kernels read, with its row scales, float32
    [N]."""

    tiles: PackedInt8
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tiles.n, self.tiles.k


Weight = Tensor | Int8Weight | Nf4Weight | TiledInt8Weight
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
_SLICE = 1 << 22  # weights dequantized at once, so that no temporary grows with a matrix
_CACHED = 1 << 16  # weights whose temporaries stay in the cache


def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, wherever torch finds it."""
    return torch.empty(shape, dtype=dtype)


def map_tensors(weight: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same weight with ``change`` applied to each of its tensors."""
    if isinstance(weight, Tensor):
        return change(weight)
    if is_dataclass(weight) and not isinstance(weight, type):
        return replace(
            weight,
            **{
                field.name: map_tensors(getattr(weight, field.name), change)
                for field in fields(weight)
            },
        )
    return weight


def nbytes(weight: Any) -> int:
    """Bytes in memory of a weight and its scales."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    map_tensors(weight, count)
    return total


def gate_order_sum(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over K of weight times output, one expert after the other in the gate's order, float32
    [T, D].

    The order of additions is the gate's, never that of arrival, so the result is bitwise the same
    for every cache.
    """
    total = y_TKD[:, 0] * weights_TK[:, 0, None]
    for k in range(1, y_TKD.shape[1]):
        total = total + y_TKD[:, k] * weights_TK[:, k, None]
    return total


def quantize_nf4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``nf4.quantize``, by the native kernel where there is one; the same bytes.  Raises
    ``nf4.NotFiniteError``."""
    native = kernels.load()
    if native is None:
        return nf4.quantize(weight_NK)
    try:
        return native.quantize_nf4(weight_NK)
    except ValueError:
        raise nf4.NotFiniteError from None


def quantize_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``int8.quantize``, by the native kernel where there is one; the same bytes."""
    native = kernels.load()
    return int8.quantize(weight_NK) if native is None else native.quantize_int8(weight_NK)


def squared_error(source_NK: Tensor, weight: Int8Weight | Nf4Weight) -> tuple[float, float]:
    """Sum of the squared differences between a matrix and what was made of it, and sum of the
    matrix's squares, in float64.

    Native kernels and torch agree to its last digits.
    """
    native = kernels.load()
    if native is None:
        N, K = source_NK.shape
        step = max(TILE, _CACHED // K // TILE * TILE)
        errors, squares = [], []
        for start in range(0, N, step):
            source = source_NK[start : start + step].double().flatten()
            error = source - dequantize(rows(weight, start, min(start + step, N))).flatten()
            errors.append(error.dot(error).item())
            squares.append(source.dot(source).item())
        return math.fsum(errors), math.fsum(squares)
    if isinstance(weight, Int8Weight):
        return native.int8_error(source_NK, weight.q, weight.scale)
    return native.nf4_error(source_NK, weight.codes, weight.absmax, weight.levels)


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` (a multiple of 16) to ``stop`` of a weight, as a view."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q[start:stop], weight.scale[start:stop])
    if isinstance(weight, Nf4Weight):
        first, last = start // TILE, -(-stop // TILE)
        return Nf4Weight(
            weight.codes[first:last],
            weight.absmax[first:last],
            weight.levels,
            (stop - start, weight.shape[1]),
        )
    if isinstance(weight, TiledInt8Weight):
        raise TypeError("a tiled matrix is for the native kernels alone")
    return weight[start:stop]


def dequantize(weight: Weight) -> Tensor:
    """The exact matrix, float32 [N, K], on the weight's device."""
    if isinstance(weight, Int8Weight):
        return int8.dequantize(weight)
    if isinstance(weight, Nf4Weight):
        return nf4.dequantize(weight)
    if isinstance(weight, TiledInt8Weight):
        raise TypeError("a tiled matrix is for the native kernels alone")
    return weight.float()


class TorchOps:
    """Plain torch on any device.  ``compute`` is the dtype of matrix products: float32 on a CPU,
    bfloat16 on CUDA."""

    name = "torch"
    absorbs = False

    def __init__(self, compute: torch.dtype = torch.float32):
        self.compute = compute

    @property
    def threads(self) -> int:
        """CPU threads that the products use."""
        return torch.get_num_threads()

    def timing(self) -> AbstractContextManager[dict[str, float]]:
        """Seconds spent in each kernel while this is open; torch's operations can't be told apart,
        so here none."""
        return nullcontext({})

    def prepare(self, role: str, weight: Weight, empty: Empty = new) -> Weight:
        """A copy of the weight in the form that these ops want to multiply with, in memory from
        ``empty(shape, dtype)``; ``role`` as in ``slotmoe.quant.shapes``."""
        copied: Weight = map_tensors(
            weight, lambda tensor: empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
        )
        return copied

    def read_bandwidth(self, memory: Tensor) -> float:
        """Bytes a second (median of 5) at which all threads together read ``memory``, uint8, whose
        pages exist."""
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            self._read(memory)
            seconds.append(time.perf_counter() - started)
        return memory.nbytes / median(seconds[1:])

    def _read(self, memory: Tensor) -> None:
        memory[: memory.nbytes // 8 * 8].view(torch.int64).sum()

    def linear(self, x_TK: Tensor, weight: Weight) -> Tensor:
        """``x @ weight.T``, float32 [T, N]."""
        x_TK = x_TK.to(self.compute)
        N, K = weight.shape
        step = max(TILE, _SLICE // K // TILE * TILE)
        if step >= N:
            return F.linear(x_TK, dequantize(weight).to(self.compute)).float()
        y_TN = torch.empty(len(x_TK), N, dtype=torch.float32, device=x_TK.device)
        for start in range(0, N, step):
            stop = min(start + step, N)
            y_TN[:, start:stop] = F.linear(
                x_TK, dequantize(rows(weight, start, stop)).to(self.compute)
            )
        return y_TN

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, float32 [T, D]."""
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)

    def mlp(self, x_TD: Tensor, gate_proj: Weight, up_proj: Weight, down_proj: Weight) -> Tensor:
        """``down(silu(gate(x)) * up(x))``, float32 [T, D]."""
        return self.linear(
            F.silu(self.linear(x_TD, gate_proj)) * self.linear(x_TD, up_proj), down_proj
        )

    def embed(self, ids_T: Tensor, weight: Weight) -> Tensor:
        """Rows ``ids`` of the table, float32 [T, D]."""
        if isinstance(weight, Int8Weight):
            return weight.q[ids_T].float() * weight.scale[ids_T, None]
        if isinstance(weight, Tensor):
            return weight[ids_T].float()
        raise TypeError("an embedding table is gathered row by row, so it is never NF4 or tiled")

    def rotate(self, x_THP: Tensor, table_TC: Tensor) -> Tensor:
        """Interleaved pairs (x0, x1), (x2, x3), ... times the complex table [T, P / 2]: float32 [T,
        H, P]."""
        pairs = torch.view_as_complex(x_THP.contiguous().view(*x_THP.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table_TC[:, None]).flatten(-2)

    def absorb_query(self, q_THN: Tensor, kv_b: Weight) -> Tensor:
        """Each head's query times its first N rows of ``kv_b_proj`` ([H * (N + V), R]): float32 [T,
        H, R]."""
        _, H, N = q_THN.shape
        heads_HXR = dequantize(kv_b).view(H, -1, kv_b.shape[1])
        return torch.bmm(q_THN.transpose(0, 1), heads_HXR[:, :N]).transpose(0, 1)

    def absorb_value(self, o_THR: Tensor, kv_b: Weight, N: int) -> Tensor:
        """Each head's latent output through its rows of ``kv_b_proj`` past the first N: float32 [T,
        H, V]."""
        _, H, R = o_THR.shape
        heads_HXR = dequantize(kv_b).view(H, -1, R)
        return torch.bmm(o_THR.transpose(0, 1), heads_HXR[:, N:].transpose(1, 2)).transpose(0, 1)

    def expand(self, latent_BR: Tensor, kv_b: Weight) -> Tensor:
        """Keys and values of all heads, float32 [B, H * (N + V)]."""
        return TorchOps.linear(self, latent_BR, kv_b)

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        """Elements and dtype of a token's row in the latent cache."""
        return R + P, torch.float16

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        """Write float32 latent rows to rows of the cache; float16 saturates instead of overflowing
        to infinity."""
        rows_TX.copy_(
            latent_TW.clamp(-65504.0, 65504.0) if rows_TX.dtype == torch.float16 else latent_TW
        )

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        """No kernel: the network's own blockwise attention serves."""
        return None

    def fuse(
        self,
        layer: Any,
        sizes: tuple[int, int, int, int, int],
        eps: float,
        latent_eps: float,
        scale: float,
    ) -> Any:
        """No kernel: the network goes op by op."""
        return None

    def step(self, function: Callable[[Tensor, Tensor, Tensor], Any]) -> Any:
        """No graphs: the network runs a step's parts one by one."""
        return None

    def route(
        self, logits_TE: Tensor, groups: int, kept: int, top_k: int, factor: float | None
    ) -> tuple[Tensor, Tensor] | None:
        """No kernel: the network's own gate serves."""
        return None

    def decoder(
        self,
        fused: Sequence[Any],
        groups: int,
        kept: int,
        top_k: int,
        factor: float | None,
        intermediate: int,
    ) -> Any:
        """No kernel: the network goes layer by layer."""
        return None

    def experts(
        self,
        x_D: Tensor,
        records: list[Tensor],
        weights_K: Tensor,
        layout: RecordLayout,
        levels: Tensor,
    ) -> Tensor:
        """One token through its k experts and their weighted sum in the order given: float32 [D].

        ``records`` are uint8 [record_bytes] each.
        """
        return gate_order_sum(
            self.experts_each(x_D, records, layout, levels)[None], weights_K[None]
        )[0]

    def experts_each(
        self, x_D: Tensor, records: list[Tensor], layout: RecordLayout, levels: Tensor
    ) -> Tensor:
        """One token through some experts, unweighted: float32 [len(records), D]."""
        return torch.cat([self.expert(x_D[None], record, layout, levels) for record in records])

    def expert(self, x_TD: Tensor, record: Tensor, layout: RecordLayout, levels: Tensor) -> Tensor:
        """Tokens through one expert, ``down(silu(gate(x)) * up(x))``, unweighted: float32 [T,
        D]."""
        return self.mlp(x_TD, *(layout.weight(record, name, levels) for name in PROJECTIONS))

    def experts_by_slot(
        self,
        x_TD: Tensor,
        slab: Tensor,
        slots_TK: Tensor,
        layout: RecordLayout,
        levels: Tensor,
        y_TKD: Tensor,
    ) -> None:
        """Each token through those of its experts that are in the slab: their unweighted outputs,
        into ``y`` (float32 [T, K, D]).

        ``slab`` is uint8 [S, record_bytes], a record a row.  ``slots`` (int32 [T, K], on the
        device) names each expert's row; -1 says that it is not there, and its output is left as it
        is.  A call takes all of an expert's uses; experts may come in several calls.  With kernels
        an entry's output depends on its token and record alone, bitwise; torch's products depend on
        the number of rows in their last bits.  With a table of a layer's experts, int32 [E],
        ``slots`` is ``table_E[indices_TK]``: on CUDA nothing then leaves the device, and a CUDA
        graph can hold the call.
        """
        for slot in slots_TK[slots_TK >= 0].unique().tolist():
            uses = (slots_TK == slot).nonzero(as_tuple=True)
            y_TKD[uses] = self.expert(x_TD[uses[0]], slab[slot], layout, levels)

    def experts_grouped(
        self,
        x_TD: Tensor,
        tokens_N: Tensor,
        starts_G1: Tensor,
        slots_G: Tensor,
        slab: Tensor,
        layout: RecordLayout,
        levels: Tensor,
    ) -> Tensor:
        """Many tokens, grouped by expert: the unweighted outputs, float32 [N, D], of the rows
        ``x[tokens]``.

        Group g is rows ``starts[g]`` to ``starts[g + 1]`` of ``tokens`` and goes through the record
        in row ``slots[g]`` of ``slab`` (uint8 [S, record_bytes]).  ``tokens`` is int64 [N],
        ``starts`` int32 [G + 1] from 0 to N without descending, ``slots`` int32 [G], none negative,
        all on the device.  A row's output does not depend on the other rows or groups, bitwise.
        """
        y_ND = torch.empty(len(tokens_N), x_TD.shape[1], device=x_TD.device)
        starts = starts_G1.tolist()
        for start, stop, slot in zip(starts, starts[1:], slots_G.tolist(), strict=False):
            if start < stop:
                y_ND[start:stop] = self.expert(
                    x_TD[tokens_N[start:stop]], slab[slot], layout, levels
                )
        return y_ND

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """``gate_order_sum``, in one launch where these ops have one, float32 [T, D]."""
        return gate_order_sum(y_TKD, weights_TK)
