"""Encoding, without and with calibration.

``quantize_nf4`` gives NF4's codes (QLoRA, arXiv 2305.14314).  All else finds the scale of each
block and the code of each weight that give the least squared error among the levels of a table,
``weight = level * scale``, by Lloyd's alternation from several starts: with codes given,
the best scale is ``sum w l / sum l^2``; with a scale given, the best code is the nearest level.
Starts are scales of both signs with which the largest weight lies a little inside or beyond the
levels; levels that are not symmetric make the sign worth a bit.  Native kernels and torch take sums
in the same order, so they give the same bytes.

With calibration codes and scales have the least ``tr (W - Q) H (W - Q)^T``, where H is the mean of
``x x^T`` over the inputs x that a matrix met on a text.  First error feedback, as in GPTQ (arXiv
2210.17323): columns are rounded in order, and what a column loses is made up for by those behind
it.  Then coordinate descent: each block's scale, then each of its codes takes its best value while
all others stay.  That only ever lowers the error.  ``_TOGETHER`` columns are worked on by native
kernels where there are any; what all others left comes to them by one product of torch, in bfloat16
where that is fast.  Products sum up in an order that belongs to a machine, so codes may differ
between machines; on one machine they are the same each time.  In ``q`` matrices stand on end,
[K, N], so that a row's block is a column of 16 lanes.

Shape legend: N rows out, K columns in, padded to blocks; L levels, B columns that share a scale, X
blocks of a row; S columns that are worked on together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant.codecs.codec import BLOCK, NF4, SCALES, TILE, Codec, Scales
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, int8_by_torch, pack, store
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.quant.kernels.cpu.weights import Matrix

# Where the largest weight of a block comes to lie, in units of the largest level.
_FACTORS = torch.linspace(0.62, 1.15, 12, dtype=torch.float64)
_REFITS = 4  # as in encode.h
_ROUNDS, _LEAST_GAIN = 30, 2e-4  # of learning levels
# Weights that torch encodes, and sums up errors of, at once: temporaries stay in the cache.
_CHUNK, _SUMMED = 1 << 17, 1 << 16


class NotFiniteError(ValueError):
    """The weights hold NaN or infinity, or a block's largest value does not fit fp16."""


def quantize_nf4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a bf16, fp16 or fp32 matrix, as ``NF4`` stores them: the codes of
    ``bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")``, and its absmax
    rounded to fp16.  Raises ``NotFiniteError``."""
    if (native := bindings.load()) is None:
        return nf4_by_torch(weight_NK)
    try:
        return native.quantize_nf4(weight_NK)
    except ValueError:
        raise NotFiniteError from None


def nf4_by_torch(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_nf4`` by torch, in float32: a code counts midpoints below ``w * (1 / absmax)``."""
    levels = np.array(NF4.levels, np.float32)
    codes, scales = [], []
    for rows_NK in weight_NK.split(_rows(weight_NK.shape[1])):
        blocks_NXB = _blocks(rows_NK, BLOCK)
        absmax_NX = blocks_NXB.abs().amax(-1)
        if not bool((absmax_NX <= 65504.0).all()):
            raise NotFiniteError
        scaled = blocks_NXB.mul_((1.0 / absmax_NX.clamp(min=1e-38))[..., None]).numpy()
        codes_NXB, below = np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, bool)
        for midpoint in (levels[:-1] + levels[1:]) / 2:  # numpy compares 8 times as fast as torch
            np.greater(scaled, midpoint, out=below)
            np.add(codes_NXB, below.view(np.uint8), out=codes_NXB)
        codes.append(torch.from_numpy(codes_NXB).flatten(1))
        scales.append(absmax_NX)
    return store(torch.cat(codes), torch.cat(scales), NF4)


def quantize_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``int8_by_torch``, by the native kernel where there is one; the same bytes."""
    native = bindings.load()
    q, scale = (int8_by_torch if native is None else native.quantize_int8.results)(weight_NK)
    return q, scale


def squared_error(source_NK: Tensor, weight: Int8Weight | CodedWeight) -> tuple[float, float]:
    """Sum of squared differences between a matrix and its quantized weight, and sum of the matrix's
    squares, in float64.  Native kernels and torch agree to its last digits."""
    native, errors, squares = bindings.load(), [], []
    if native is not None:
        if isinstance(weight, Int8Weight):
            sums = native.int8_error(source_NK, weight.q, weight.scale)
        else:
            sums = native.coded_error(Matrix.of(weight), source_NK)
        errors, squares = sums.T.tolist()
    else:
        N, K = source_NK.shape
        step = max(TILE, _SUMMED // K // TILE * TILE)
        for start in range(0, N, step):
            source = source_NK[start : start + step].double().flatten()
            error = source - weight.rows(start, min(start + step, N)).dequantize().flatten()
            errors.append(error.dot(error).item())
            squares.append(source.dot(source).item())
    return math.fsum(errors), math.fsum(squares)  # rounded once, so that they depend on no order


class WholeScales:
    """Scales as the codecs store them, integers up to ``most``, of 8 bits or of 4, under a float32
    factor of the row; the largest of ``scales`` [N, X] gets the largest integer."""

    def __init__(self, scales_NX: Tensor, most: int):
        self.most, self.factor_N1 = most, scales_NX.abs().amax(-1, keepdim=True) / most
        self._divisor_N1 = torch.where(self.factor_N1 > 0, self.factor_N1, 1.0)

    def _whole(self, scales: Tensor) -> Tensor:
        whole = (scales.reshape(len(scales), -1) / self._divisor_N1).round()
        return whole.clamp(-self.most, self.most)

    def round(self, scales: Tensor) -> Tensor:
        """The nearest that can be stored: of one block [N], or of all, [N, X]."""
        return (self._whole(scales) * self.factor_N1).view(scales.shape)

    def stored(self, scales_NX: Tensor) -> Tensor:
        """The scale tensor, uint8, as ``SCALES`` has it.  Raises ``NotFiniteError``."""
        if not bool(scales_NX.isfinite().all()):
            raise NotFiniteError
        whole = self._whole(scales_NX).to(torch.int8)
        blocks = whole.view(-1, TILE, whole.shape[1]).transpose(1, 2).contiguous()
        bytes_, width = blocks.view(torch.uint8), 2 * TILE
        if self.most < 8:
            first, last = bytes_.view(len(blocks), -1, 2, TILE).unbind(2)
            bytes_, width = first & 15 | last << 4, TILE
        parts = self.factor_N1.view(-1, TILE).view(torch.uint8), bytes_
        return torch.cat([part.reshape(len(blocks), -1, width) for part in parts], dim=1)


def _encode(weight_NK: Tensor, levels_L: Tensor, coding: Scales) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [N, K], and stored scales, both filled up.  Raises ``NotFiniteError``."""
    (N, K), block = weight_NK.shape, coding.block
    scales_NX = fit_scales(weight_NK, torch.ones(K), levels_L, block)
    if not bool(scales_NX.isfinite().all()):
        raise NotFiniteError
    rows, X = (0, -N % TILE), scales_NX.shape[1]
    scales_NX = F.pad(scales_NX, (0, -X % (BLOCK // block), *rows))
    whole = WholeScales(scales_NX, coding.most)
    scales_NX = whole.round(scales_NX)
    codes_NK = assign(weight_NK, scales_NX[:N, :X].contiguous(), levels_L, block)
    codes_NK = F.pad(codes_NK, (0, -X * block % BLOCK, *rows))
    return codes_NK, whole.stored(scales_NX)


def starts_of(levels_L: Tensor) -> Tensor:
    """Factors that bring a block, its largest magnitude 1, to the levels: float32."""
    ends = levels_L.double().abs().amax() / _FACTORS
    return torch.cat([ends, -ends]).float()


def fit_scales(
    weight_NK: Tensor, importance_K: Tensor, levels_L: Tensor, block: int, every: int = 1
) -> Tensor:
    """The best scale of each block, float32 [N, X], from one in ``every`` start; not finite where
    the block is not.  A weight's squared error counts ``importance`` times (float32)."""
    K, starts = weight_NK.shape[1], starts_of(levels_L)[::every].contiguous()
    if (native := bindings.load()) is not None:
        sizes = {"B": block, "X": -(-K // block)}
        return native.fit_rows(weight_NK, importance_K, levels_L, starts, **sizes)
    importance_1XB = _blocks(importance_K[None], block)
    chunks = (_blocks(rows_NK, block) for rows_NK in weight_NK.split(_rows(K)))
    return torch.cat([fit_blocks(chunk, importance_1XB, levels_L, starts) for chunk in chunks])


def assign(weight_NK: Tensor, scales_NX: Tensor, levels_L: Tensor, block: int) -> Tensor:
    """The code of each weight's nearest level, uint8 [N, X * block]; columns past K are zeros'."""
    N, K = weight_NK.shape
    assert scales_NX.shape == (N, -(-K // block))
    if (native := bindings.load()) is not None:
        columns = scales_NX.shape[1] * block
        return native.code_rows(weight_NK, scales_NX, levels_L, B=block, Y=columns)
    codes = []
    for rows_NK, scales in zip(weight_NK.split(_rows(K)), scales_NX.split(_rows(K)), strict=True):
        z = _blocks(rows_NK, block) * inverse_or_zero(scales)[..., None]
        codes.append(nearest(z, levels_L).to(torch.uint8).flatten(1))
    return torch.cat(codes)


def learn_levels(samples: Sequence[Tensor], levels_L: Tensor, block: int) -> Tensor:
    """Levels of least squared error on finite matrices [N, K], by Lloyd's alternation from
    ``levels``: whole numbers in ascending order, the largest magnitude 127.  Each matrix counts
    alike, however large its weights.  ``levels`` stay where nothing better comes out."""
    best, least, levels = levels_L, math.inf, levels_L
    for _ in range(_ROUNDS):
        # Sums of s w and of s^2 by level, s a weight's scale, over the sum of w^2 of its matrix.
        wanted, weight = torch.zeros(2, len(levels), dtype=torch.float64)
        for sample_NK in samples:
            K = sample_NK.shape[1]
            scales_NX = fit_scales(sample_NK, torch.ones(K), levels, block)
            codes = assign(sample_NK, scales_NX, levels, block)[:, :K].flatten().int()
            scales = scales_NX.repeat_interleave(block, 1)[:, :K].flatten().double()
            w = sample_NK.flatten().double()
            size = w.square().sum().clamp(min=1e-300)
            wanted += torch.bincount(codes, scales * w / size, len(levels))
            weight += torch.bincount(codes, scales.square() / size, len(levels))
        error = len(samples) + (levels * (levels * weight - 2 * wanted)).sum().item()
        if error > least * (1 - _LEAST_GAIN):
            break
        best, least = levels, error
        levels = torch.where(weight > 0, wanted / weight, levels.double()).sort().values
        levels = (levels * (127 / levels.abs().max())).float()
    best = best.round()
    return best if bool((best.diff() > 0).all()) else levels_L


def nearest(z: Tensor, levels_L: Tensor) -> Tensor:
    """Index of the level nearest to each number, the lower one of two, or of more than 16 levels,
    which are whole numbers, the even one."""
    if (half := len(levels_L) // 2) > 8:
        return z.nan_to_num().clamp(-half, half - 1).round().long() + half
    return torch.bucketize(z.contiguous(), (levels_L[1:] + levels_L[:-1]) / 2)


def inverse_or_zero(scale: Tensor) -> Tensor:
    """1 / scale, 0 where that is 0."""
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def fit_blocks(blocks: Tensor, importance: Tensor, levels_L: Tensor, starts: Tensor) -> Tensor:
    """``fit_scales`` of float32 blocks [..., B], by torch."""
    top = blocks.abs().amax(-1)
    top = torch.where(top > 1e-30, top, 0.0)
    v = blocks * inverse_or_zero(top)[..., None]
    gain, best = torch.zeros_like(top), torch.zeros_like(top)
    for start in [*starts.tolist(), *[None] * _REFITS]:
        factor = inverse_or_zero(best)[..., None] if start is None else start
        level = levels_L[nearest(v * factor, levels_L)]
        weighted = level * importance
        xl, ll = _sum(v * weighted), _sum(level * weighted)
        scale = xl / ll
        found = xl * scale
        best = torch.where(found > gain, scale, best)
        gain = torch.where(found > gain, found, gain)
    return best * top + (blocks * 0.0).sum(-1)


def _sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, one after the other as the native kernels add."""
    total = torch.zeros_like(terms[..., 0])
    for j in range(terms.shape[-1]):
        total = total + terms[..., j]
    return total


def _rows(K: int) -> int:
    """Rows that torch encodes at once."""
    return max(1, _CHUNK // K)


def _blocks(rows_NK: Tensor, block: int) -> Tensor:
    """float32 [N, X, B], the last block filled up with zeros."""
    N, K = rows_NK.shape
    padded = torch.zeros(N, -(-K // block) * block)
    padded[:, :K] = rows_NK
    return padded.view(N, -1, block)


ROUNDS = 1  # of coordinate descent; two more gain 1% of the divergence, of 3 bits 3%
_ROOM = 1.25  # feedback makes scales larger than the best ones without it
_FEWER = 2  # one start in so many: 0.4% of the error; for a row's range one in three of these
_DAMPING = 0.01  # of H's mean diagonal, added to the diagonal
_TOGETHER = 128  # columns whose change reaches all others by one product
MEASURED = 16  # of so many rows one's error counts in a report


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
        damped = F.pad(mean, (0, pad, 0, pad))
        damped.diagonal()[: len(mean)] += _DAMPING * diagonal
        damped.diagonal()[len(mean) :] = 1e-6 * diagonal  # what is filled up has no say
        return damped

    @cached_property
    def product(self) -> Tensor:
        """``damped`` as products take it."""
        return self.damped.to(fast_products(self.damped.device))

    @cached_property
    def feedback(self) -> list[tuple[Tensor, Tensor]]:
        """With ``damped = L^T L``, L lower triangular: of the rows of each ``_TOGETHER`` columns
        the inverse transposed of their square, float32 on the CPU, and that inverse times all
        before the square, as products take it."""
        flipped = self.damped.flip(0, 1).double()
        l_KK = torch.linalg.cholesky(flipped, upper=True).flip(0, 1).float()
        found = list[tuple[Tensor, Tensor]]()
        for start in range(0, len(l_KK), _TOGETHER):
            rows_SK = l_KK[start : start + _TOGETHER]
            inverse_SS = torch.linalg.inv(rows_SK[:, start : start + _TOGETHER])
            before_SK = (inverse_SS @ rows_SK[:, :start]).to(fast_products(l_KK.device))
            found.append((inverse_SS.t().contiguous().cpu(), before_SK))
        return found


def quantize_lut(
    weight_NK: Tensor, codec: Codec, hessian: Hessian | None = None
) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Codes, scales, and with a Hessian the sums of squares of the error and of the weights in its
    measure, of a bf16, fp16 or fp32 matrix, by a codec whose scales are ``fitted``.  Raises
    ``NotFiniteError`` and ``NotPositiveError``."""
    coding, levels_L = SCALES[codec.scales], torch.tensor(codec.levels, dtype=torch.float32)
    if hessian is None:
        codes_NK, scales, squares = *_encode(weight_NK, levels_L, coding), None
    else:
        codes_NK, scales, squares = _State(weight_NK, hessian, levels_L, coding).result()
    return pack(codes_NK.view(-1, TILE, codes_NK.shape[1]), codec.bits), scales.cpu(), squares


def fast_products(device: torch.device) -> torch.dtype:
    """What large products are made of where float32's bits do not matter."""
    on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # not in every torch
    return torch.bfloat16 if device.type == "cuda" or on_cpu() else torch.float32


class _State:
    """A matrix on its way, on end: its weights, what its codes stand for, ``q``, and scales; and on
    the Hessian's device what the codes leave of it."""

    def __init__(self, weight_NK: Tensor, hessian: Hessian, levels_L: Tensor, coding: Scales):
        (N, K), H_KK, block = weight_NK.shape, hessian.product, coding.block
        self._native, self._hessian, self._block = bindings.load(), hessian, block
        self._sizes = {"B": block, "M": coding.most}
        self._levels_L, self._starts = levels_L, starts_of(levels_L)[::_FEWER].contiguous()
        weight_NK = F.pad(weight_NK.cpu(), (0, len(H_KK) - K, 0, -N % TILE))
        importance_K = hessian.damped.diagonal().cpu().contiguous()
        first_NX = fit_scales(weight_NK, importance_K, levels_L, block, 3 * _FEWER)
        self._coding = WholeScales(_ROOM * first_NX, coding.most)
        self._factor_N = self._coding.factor_N1.flatten()
        self._weight_KN, self._scales_XN = weight_NK.t().contiguous(), first_NX.t().contiguous()
        self._q_KN = torch.empty_like(self._weight_KN, dtype=torch.float32)
        self._left_KN = H_KK.new_empty(self._q_KN.shape)

    def result(self) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Codes [N, K], stored scales, and sums of squares of the error and of the weights."""
        self._feed_back()
        for _ in range(ROUNDS if len(self._levels_L) > 8 else ROUNDS + 2):
            self._descend()
        codes = list[Tensor]()
        scales = self._scales_XN.split(_TOGETHER // self._block)
        for pair in zip(self._q_KN.split(_TOGETHER), scales, strict=True):
            q_NS, scales_NX = (x.t().contiguous() for x in pair)
            codes.append(assign(q_NS, scales_NX, self._levels_L, self._block))
        H_KK = self._hessian.product
        some = (x_KN[:, ::MEASURED].to(H_KK) for x_KN in (self._left_KN, self._weight_KN))
        error, square = ((H_KK @ x).float().mul_(x).sum().item() for x in some)
        stored = self._coding.stored(self._scales_XN.t().contiguous())
        return torch.cat(codes, dim=1), stored, (error, square)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Weights, ``q`` and scales of columns that see by one product what all others left."""
        parts = (x.split(_TOGETHER) for x in (self._weight_KN, self._q_KN, self._left_KN))
        scales = self._scales_XN.split(_TOGETHER // self._block)
        for w_SN, q_SN, left_SN, some_XN in zip(*parts, scales, strict=True):
            yield w_SN, q_SN, some_XN
            left_SN.copy_(w_SN - q_SN)

    def _seen(self, by_SK: Tensor) -> Tensor:
        """The product of rows, as long as the columns that count, with what these left."""
        return (by_SK @ self._left_KN[: by_SK.shape[1]]).float().cpu()

    def _feed_back(self) -> None:
        """Round all columns in order."""
        parts = zip(self._parts(), self._hessian.feedback, strict=True)
        for (w_SN, q_SN, scales_XN), (u_SS, before_SK) in parts:
            x_SN = w_SN + self._seen(before_SK)
            if self._native is not None:
                given = x_SN, u_SS, self._factor_N, self._levels_L, self._starts
                self._native.feed_back.results(*given, scales_XN, q_SN, **self._sizes)
                continue
            for j, x_N in enumerate(x_SN):
                if j % self._block == 0:
                    span = slice(j, j + self._block)
                    importance_B = u_SS.diagonal()[span].square().reciprocal()
                    scale_N = fit_blocks(x_SN[span].t(), importance_B, self._levels_L, self._starts)
                    scales_XN[j // self._block] = scale_N = self._coding.round(scale_N)
                q_SN[j] = self._nearest(x_N, scale_N)
                x_SN[j + 1 :] -= u_SS[j, j + 1 :, None] * ((x_N - q_SN[j]) / u_SS[j, j])

    def _nearest(self, x_N: Tensor, scale_N: Tensor) -> Tensor:
        return self._levels_L[nearest(x_N * inverse_or_zero(scale_N), self._levels_L)] * scale_N

    def _descend(self) -> None:
        """One round over all blocks: a better scale if there is one, then better codes."""
        H_KK, block = self._hessian.damped, self._block
        rows = zip(self._parts(), self._hessian.product.split(_TOGETHER), strict=True)
        for index, ((_, q_SN, scales_XN), by_SK) in enumerate(rows):
            columns = slice(index * _TOGETHER, index * _TOGETHER + len(by_SK))
            h_SS = H_KK[columns, columns].cpu().contiguous()
            gradient_SN = self._seen(by_SK)
            if self._native is not None:
                given = gradient_SN, h_SS, self._factor_N, self._levels_L
                self._native.descend.results(*given, scales_XN, q_SN, **self._sizes)
                continue
            for j in range(len(q_SN)):
                if j % block == 0:
                    scale_N, q_BN = scales_XN[j // block], q_SN[j : j + block]
                    values_BN = q_BN * inverse_or_zero(scale_N)
                    pull_SN = h_SS[:, j : j + block] @ values_BN
                    slope_N = (values_BN * gradient_SN[j : j + block]).sum(0)
                    curve_N = (values_BN * pull_SN[j : j + block]).sum(0)
                    best_N = scale_N + slope_N * inverse_or_zero(curve_N)
                    new_N = self._coding.round(best_N)
                    gains = ((new_N - best_N).abs() < (scale_N - best_N).abs()) & (new_N != 0)
                    gradient_SN -= pull_SN * torch.where(gains, new_N - scale_N, 0.0)
                    scale_N.copy_(torch.where(gains, new_N, scale_N))
                    q_BN.copy_(values_BN * scale_N)
                new_N = self._nearest(q_SN[j] + gradient_SN[j] / h_SS[j, j], scale_N)
                gradient_SN[j + 1 :] -= h_SS[j, j + 1 :, None] * (new_N - q_SN[j])
                q_SN[j] = new_N
