"""The one place that knows what a weight is made of and picks who multiplies by it.

``TorchOps`` is the plain reference: it dequantizes a slice of rows and multiplies.  It works on every device and is the
oracle of the native kernels.  Shape legend: T tokens, N rows out, K columns in, D hidden_size, H heads,
R kv_lora_rank, I moe_intermediate_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant import int8, nf4
from quant.export import RecordLayout
from quant.int8 import Int8Weight
from quant.nf4 import TILE, Nf4Weight

Weight = Tensor | Int8Weight | Nf4Weight
_SLICE = 1 << 22  # weights dequantized at once, so that no temporary grows with a matrix


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` (a multiple of 16) to ``stop`` of a weight, as a view."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q[start:stop], weight.scale[start:stop])
    if isinstance(weight, Nf4Weight):
        first, last = start // TILE, -(-stop // TILE)
        return Nf4Weight(weight.codes[first:last], weight.absmax[first:last], weight.levels, (stop - start, weight.shape[1]))
    return weight[start:stop]


def dequantize(weight: Weight) -> Tensor:
    """The exact matrix, float32 [N, K], on the weight's device."""
    if isinstance(weight, Int8Weight):
        return int8.dequantize(weight)
    return nf4.dequantize(weight) if isinstance(weight, Nf4Weight) else weight.float()


class TorchOps:
    """Plain torch on any device.  ``compute`` is the dtype of matrix products: float32 on a CPU, bfloat16 on CUDA."""

    name = "torch"

    def __init__(self, compute: torch.dtype = torch.float32):
        self.compute = compute

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
            y_TN[:, start:stop] = F.linear(x_TK, dequantize(rows(weight, start, stop)).to(self.compute))
        return y_TN

    def embed(self, ids_T: Tensor, weight: Weight) -> Tensor:
        """Rows ``ids`` of the table, float32 [T, D]."""
        if isinstance(weight, Int8Weight):
            return weight.q[ids_T].float() * weight.scale[ids_T, None]
        if isinstance(weight, Nf4Weight):
            raise TypeError("an embedding table is never NF4: rows are gathered one by one")
        return weight[ids_T].float()

    def absorb_query(self, q_THN: Tensor, kv_b: Weight) -> Tensor:
        """Each head's query times its first N rows of ``kv_b_proj`` ([H * (N + V), R]): float32 [T, H, R]."""
        _, H, N = q_THN.shape
        heads_HXR = dequantize(kv_b).view(H, -1, kv_b.shape[1])
        return torch.bmm(q_THN.transpose(0, 1), heads_HXR[:, :N]).transpose(0, 1)

    def absorb_value(self, o_THR: Tensor, kv_b: Weight, N: int) -> Tensor:
        """Each head's latent output through its rows of ``kv_b_proj`` past the first N: float32 [T, H, V]."""
        _, H, R = o_THR.shape
        heads_HXR = dequantize(kv_b).view(H, -1, R)
        return torch.bmm(o_THR.transpose(0, 1), heads_HXR[:, N:].transpose(1, 2)).transpose(0, 1)

    def expand(self, latent_BR: Tensor, kv_b: Weight) -> Tensor:
        """Keys and values of all heads, float32 [B, H * (N + V)]."""
        return TorchOps.linear(self, latent_BR, kv_b)

    def mla_decode(self, q_HW: Tensor, rows_SW: Tensor, scale: float) -> Tensor | None:
        """No kernel: the network's own blockwise attention serves."""
        return None

    def experts(self, x_D: Tensor, records: list[Tensor], layout: RecordLayout, levels: Tensor) -> Tensor:
        """One token through k experts, unweighted: float32 [k, D].  ``records`` are uint8 [record_bytes] each."""
        return torch.cat([self.expert(x_D[None], record, layout, levels) for record in records])

    def expert(self, x_TD: Tensor, record: Tensor, layout: RecordLayout, levels: Tensor) -> Tensor:
        """Tokens through one expert, ``down(silu(gate(x)) * up(x))``, unweighted: float32 [T, D]."""
        gate = self.linear(x_TD, layout.weight(record, "gate_proj", levels))
        up = self.linear(x_TD, layout.weight(record, "up_proj", levels))
        return self.linear(F.silu(gate) * up, layout.weight(record, "down_proj", levels))
