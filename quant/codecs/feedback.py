"""Encoding with calibration: codes and scales of least ``tr (W - Q) H (W - Q)^T``, where H is the
mean of ``x x^T`` over the inputs x that a matrix met on a text.

First error feedback, as in GPTQ (arXiv 2210.17323): columns are rounded in order, and what a column
loses is made up for by those behind it.  Then rounds of coordinate descent: each block's scale,
then each of its codes takes its best value while all others stay.  That only ever lowers the error.
The rounding inside a block runs in the native kernels where there are any, all else is matrix
products of torch, on any device.  Products sum up in an order that belongs to a machine,
so codes may differ between machines; on one machine they are the same each time.

Shape legend: N rows out, K columns in, padded to blocks; L levels, B columns that share a scale, X
blocks of a row.  Matrices stand on end, [K, N], so that a row's block is a column of 16 lanes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant.codecs import encode
from slotmoe.quant.codecs.codec import BLOCK, SCALES, TILE, Codec
from slotmoe.quant.codecs.encode import ByteScales, inverse_or_zero, nearest
from slotmoe.quant.codecs.weight import pack
from slotmoe.quant.kernels.cpu import bindings

ROUNDS = 3  # of coordinate descent
_ROOM = 1.25  # feedback makes scales larger than the best ones without it
_DAMPING = 0.01  # of H's mean diagonal, added to the diagonal


class NotPositiveError(ValueError):
    """A Hessian is not finite, or all zeros."""


@dataclass(frozen=True)
class Hessian:
    """``mean_KK`` of inputs, float32; damped and factored when it is first needed."""

    mean_KK: Tensor

    @cached_property
    def damped(self) -> Tensor:
        """Float32 [K', K'] with K filled up to blocks.  Raises ``NotPositiveError``."""
        mean = self.mean_KK
        diagonal = mean.diagonal().mean()
        if not bool(mean.isfinite().all()) or not bool(diagonal > 0):
            raise NotPositiveError
        pad = -len(mean) % BLOCK
        padded = F.pad(mean, (0, pad, 0, pad))
        extra = torch.full((len(padded),), _DAMPING, device=mean.device)
        extra[len(mean) :] = 1e-6  # what is filled up has no say
        damped: Tensor = padded + torch.diag(extra * diagonal)
        return damped

    @cached_property
    def factor(self) -> Tensor:
        """Upper triangular U with ``damped^-1 = U^T U``, float32."""
        lower = torch.linalg.cholesky(self.damped.double())
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return upper.float()


def quantize(
    weight_NK: Tensor, codec: Codec, hessian: Hessian | None = None
) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Codes, scales, and with a Hessian the sums of squares of the error and of the weights in its
    measure, of a bf16, fp16 or fp32 matrix, by ``LUT4`` or ``LUT3``.  Raises ``NotFiniteError`` and
    ``NotPositiveError``."""
    block, levels_L = SCALES[codec.scales].block, torch.tensor(codec.levels, dtype=torch.float32)
    if hessian is None:
        codes_NK, scales, squares = *encode.encode(weight_NK, levels_L, block), None
    else:
        codes_NK, scales, squares = _encode(weight_NK, hessian, levels_L, block)
    return pack(codes_NK.view(-1, TILE, codes_NK.shape[1]), codec.bits), scales.cpu(), squares


def _encode(
    weight_NK: Tensor, hessian: Hessian, levels_L: Tensor, block: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Codes on the CPU, the rest on the device of ``hessian``."""
    N, K = weight_NK.shape
    H_KK = hessian.damped
    w_KN = F.pad(weight_NK.to(H_KK).t(), (0, -N % TILE, 0, len(H_KK) - K)).contiguous()
    state = _State(w_KN, hessian, levels_L.to(H_KK), block)
    state.feed_back()
    wanted_KN = H_KK @ w_KN
    gradient_KN = wanted_KN - H_KK @ state.q_KN
    for _ in range(ROUNDS):
        state.descend(gradient_KN)
    scales_XN = torch.stack(state.scales)
    units = state.q_KN.unflatten(0, (-1, block)) * inverse_or_zero(scales_XN)[:, None]
    codes_NK = nearest(units, state.levels_L).flatten(0, 1).t().to(torch.uint8).contiguous().cpu()
    error = ((w_KN - state.q_KN) * gradient_KN).sum(dtype=torch.float64).item()
    square = (w_KN * wanted_KN).sum(dtype=torch.float64).item()
    return codes_NK, state.coding.stored(scales_XN.t().contiguous()), (error, square)


class _State:
    """A matrix on its way: what its codes stand for, ``q``, and its scales by block."""

    def __init__(self, w_KN: Tensor, hessian: Hessian, levels_L: Tensor, block: int):
        self._native = bindings.load() if w_KN.is_cpu else None
        self._w_KN, self._hessian, self._block = w_KN, hessian, block
        self.levels_L, self._starts = levels_L, encode.starts_of(levels_L).to(levels_L)
        self._spans = [slice(at, at + block) for at in range(0, len(w_KN), block)]
        diagonal = hessian.damped.diagonal()
        first = [self._fit(w_KN[span], diagonal[span]) for span in self._spans]
        self.coding = ByteScales(_ROOM * torch.stack(first, dim=-1))
        self.q_KN = torch.empty_like(w_KN)
        self.scales: list[Tensor] = []

    def _fit(self, x_BN: Tensor, importance_B: Tensor) -> Tensor:
        importance_B = importance_B.contiguous()
        if self._native is not None:
            return self._native.fit_columns(x_BN, importance_B, self.levels_L, self._starts)
        return encode.fit_blocks(x_BN.t(), importance_B, self.levels_L, self._starts)

    def feed_back(self) -> None:
        """Round all columns in order."""
        u_KK, w_KN = self._hessian.factor, self._w_KN.clone()
        for span in self._spans:
            u_BB = u_KK[span, span].contiguous()
            scale_N = self.coding.round(self._fit(w_KN[span], u_BB.diagonal() ** -2))
            q_BN, error_BN = self._round(w_KN[span], u_BB, scale_N)
            self.q_KN[span] = q_BN
            self.scales.append(scale_N)
            w_KN[span.stop :].addmm_(u_KK[span, span.stop :].t(), error_BN, alpha=-1)

    def descend(self, gradient_KN: Tensor) -> None:
        """One round over all blocks; ``gradient``, H (W - Q), follows."""
        H_KK = self._hessian.damped
        for index, span in enumerate(self._spans):
            h_BB, before_BN = H_KK[span, span].contiguous(), self.q_KN[span].clone()
            gradient_BN, scale_N = gradient_KN[span].clone(), self.scales[index]
            # A better scale for the codes as they are.
            values_BN = before_BN * inverse_or_zero(scale_N)
            pull_BN = h_BB @ values_BN
            slope_N = (values_BN * gradient_BN).sum(0)
            curve_N = (values_BN * pull_BN).sum(0)
            new_N = self.coding.round(scale_N + slope_N * inverse_or_zero(curve_N))
            step_N = new_N - scale_N
            gains = (step_N * (step_N * curve_N - 2 * slope_N) < 0) & (new_N != 0)
            self.scales[index] = scale_N = torch.where(gains, new_N, scale_N)
            step_N = torch.where(gains, step_N, 0.0)
            gradient_BN -= pull_BN * step_N
            q_BN = torch.where(gains, values_BN * scale_N, before_BN)
            self._improve(q_BN, gradient_BN, h_BB, scale_N)
            self.q_KN[span] = q_BN
            gradient_KN.addmm_(H_KK[:, span], q_BN - before_BN, alpha=-1)

    def _round(self, x_BN: Tensor, u_BB: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        """What a block's codes stand for, and its errors in units of u's diagonal."""
        levels_L = self.levels_L
        if self._native is not None:
            q, errors = self._native.feed_back.results(x_BN, u_BB, scale_N, levels_L)
            return q, errors
        x_BN, inverse_N = x_BN.clone(), inverse_or_zero(scale_N)
        q_BN, error_BN = torch.empty_like(x_BN), torch.empty_like(x_BN)
        for j in range(len(x_BN)):
            q_BN[j] = levels_L[nearest(x_BN[j] * inverse_N, levels_L)] * scale_N
            error_BN[j] = (x_BN[j] - q_BN[j]) / u_BB[j, j]
            x_BN[j + 1 :] -= u_BB[j, j + 1 :, None] * error_BN[j]
        return q_BN, error_BN

    def _improve(self, q_BN: Tensor, gradient_BN: Tensor, h_BB: Tensor, scale_N: Tensor) -> None:
        """One pass over the columns of ``q``, which changes; ``gradient`` is used up."""
        levels_L, inverse_N = self.levels_L, inverse_or_zero(scale_N)
        if self._native is not None:
            self._native.descend.results(gradient_BN, h_BB, scale_N, levels_L, q_BN)
            return
        for j in range(len(q_BN)):
            wanted_N = q_BN[j] + gradient_BN[j] / h_BB[j, j]
            new_N = levels_L[nearest(wanted_N * inverse_N, levels_L)] * scale_N
            gradient_BN[j + 1 :] -= h_BB[j, j + 1 :, None] * (new_N - q_BN[j])
            q_BN[j] = new_N
