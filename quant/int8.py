"""Row-wise symmetric int8: ``w[n, k] = q[n, k] * scale[n]``, |q| at most 127, scale float32."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Weight:
    """A [N, K] matrix: ``q`` int8 [N, K] row-major, ``scale`` float32 [N]."""

    q: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    def rows(self, start: int, stop: int) -> "Int8Weight":
        """Rows ``start`` to ``stop``, as a view."""
        return Int8Weight(self.q[start:stop], self.scale[start:stop])

    def dequantize(self) -> Tensor:
        """The exact matrix, float32 [N, K]."""
        return self.q.float() * self.scale[:, None]


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``scale`` of a finite bf16, fp16 or fp32 matrix; a row of zeros gets scale 0."""
    weight_NK = weight_NK.float()
    scale = weight_NK.abs().amax(dim=-1) / 127
    divisor = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight_NK / divisor[:, None]).clamp_(-127, 127).to(torch.int8), scale
