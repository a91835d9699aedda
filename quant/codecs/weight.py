"""A weight [N, K] of any kind, in torch: a float tensor, an ``Int8Weight``, or a ``CodedWeight`` of
codes and scales (``slotmoe.quant.codecs.codec``).  A backend may prepare one of its own kind.

int8 is row-wise and symmetric: ``w[n, k] = q[n, k] * scale[n]``, |q| at most 127, scale float32.
Shape legend: N rows out, K columns in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant.codecs.codec import BLOCK, KINDS, SCALES, TILE, Codec


@dataclass(frozen=True)
class CodedWeight:
    """A [N, K] matrix in ``tiles16``: codes uint8, scales float16, uint8 or float8_e8m0fnu, levels
    float32 [16] (8 levels stand twice, 4 four times; of more than 16 evenly spread ones).  Their
    shapes and dtypes say which codec it is."""

    codes: Tensor
    scales: Tensor
    levels: Tensor
    shape: tuple[int, int]

    @property
    def kind(self) -> int:
        """What the kernels call its codec."""
        bits = self.codes.shape[2] // (2 * BLOCK)
        names = {torch.uint8: ("i4", "i8"), torch.float16: ("f16", "f16x2")}
        return KINDS[bits, names.get(self.scales.dtype, ("", "e8m0"))[self.scales.shape[2] > TILE]]

    def rows(self, start: int, stop: int) -> "CodedWeight":
        """Rows ``start`` (a multiple of 16) to ``stop``, as a view."""
        tiles = slice(start // TILE, -(-stop // TILE))
        shape = stop - start, self.shape[1]
        return CodedWeight(self.codes[tiles], self.scales[tiles], self.levels, shape)

    def dequantize(self) -> Tensor:
        """The exact matrix, float32 [N, K], on the weight's device."""
        N, K = self.shape
        codes = unpack(self.codes)
        tiles, _, columns = codes.shape
        if self.scales.dtype == torch.uint8:
            rows, blocks = _factors(self.scales)
            scales = blocks.float().transpose(1, 2) * rows[..., None]
        else:
            scales = self.scales.float().reshape(tiles, -1, TILE).transpose(1, 2)
        low = max(0, self.codes.shape[2] // (2 * BLOCK) - 4)
        levels = self.levels[(codes >> low).int()]
        if low:
            levels += codes & (1 << low) - 1
        values = levels.view(tiles, TILE, scales.shape[2], -1) * scales[..., None]
        return values.view(tiles * TILE, columns)[:N, :K]


class Placed(NamedTuple):
    """A matrix [N, K], row-major or as a ``CodedWeight``, of a kind of ``quant/kernels/vulkan``, by
    addresses on a device that torch does not know."""

    kind: int
    shape: tuple[int, int]
    data: int
    scale: int = 0
    levels: int = 0


def levels_of(codec: Codec) -> Tensor:
    """A codec's levels as a ``CodedWeight`` has them."""
    levels = codec.levels * (16 >> codec.bits) or codec.levels[:: 1 << codec.bits - 4]
    return torch.tensor(levels, dtype=torch.float32)


def possible_scales(scales: Tensor) -> bool:
    """Whether an encoder can have made a weight's scales: they are finite, powers of two at most
    2^104, so that kernels bear them, and only a row without scales has the factor 0."""
    if scales.dtype == torch.float16:
        return bool(scales.isfinite().all())
    if scales.dtype == torch.float8_e8m0fnu:
        return bool((scales.float() <= 2.0**104).all())  # which NaN is not
    rows, blocks = _factors(scales)
    return bool((rows.isfinite() & ((rows != 0) | (blocks == 0).all(1))).all())


def _factors(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Of scales of 8 or 4 bits rows' factors, float32 [tiles, 16], and int8 [tiles, blocks, 16]."""
    first = 4 * TILE // scales.shape[2]
    rows, blocks = scales[:, :first].reshape(-1, 4 * TILE).view(torch.float32), scales[:, first:]
    if first == 4:
        blocks = (torch.stack([blocks & 15, blocks >> 4], dim=2) ^ 8) - 8  # modulo 256
    return rows, blocks.view(torch.int8).reshape(len(scales), -1, TILE)


def store(codes_NK: Tensor, scales_NX: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """The two tensors that hold uint8 codes and the scales of their blocks, of a codec whose
    scales are floats and whose levels have 0; K fills blocks.  Scales are rounded."""
    N, K = codes_NK.shape
    codes_NK = F.pad(codes_NK, (0, -K % BLOCK, 0, -N % TILE), value=codec.levels.index(0))
    parts = BLOCK // SCALES[codec.scales].block
    dtype = torch.float16 if SCALES[codec.scales].dtype == "F16" else torch.float8_e8m0fnu
    scales_NX = F.pad(scales_NX, (0, -scales_NX.shape[1] % parts, 0, -N % TILE)).to(dtype)
    scales = scales_NX.view(-1, TILE, scales_NX.shape[1]).transpose(1, 2)
    codes = pack(codes_NK.view(-1, TILE, codes_NK.shape[1]), codec.bits)
    return codes, scales.reshape(len(codes), -1, parts * TILE).contiguous()


def unpack(codes: Tensor) -> Tensor:
    """uint8 [tiles, 16, columns], one code each, of the code tensor of a weight."""
    tiles, blocks, size = codes.shape
    bits = size // (2 * BLOCK)
    if bits > 4:
        upper, lower = codes.split([8 * BLOCK, size - 8 * BLOCK], dim=2)
        return unpack(upper) << bits - 4 | unpack(lower)
    words = codes.reshape(tiles, -1, TILE, 4)  # tile, word, lane, i
    if bits == 3:
        words = words.unflatten(1, (-1, 3))  # tile, group, a, lane, i
        top = words >> 6
        last = top[:, :, :1] | top[:, :, 1:2] << 2 | top[:, :, 2:] << 4
        words = torch.cat([words, last], dim=2).flatten(1, 2)
    parts = [(words >> shift if shift else words) & (1 << bits) - 1 for shift in _shifts(bits)]
    return torch.stack(parts, dim=2).permute(0, 3, 1, 2, 4).reshape(tiles, TILE, blocks * BLOCK)


def _shifts(bits: int) -> Sequence[int]:
    """Where in a byte the codes of columns lie that are 4 further each, of up to 4 bits."""
    return {4: (4, 0), 3: (0, 3)}.get(bits, range(0, 8, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """The code tensor of uint8 [tiles, 16, columns], one code each; columns a multiple of 64."""
    if bits > 4:
        lower = pack(codes & (1 << bits - 4) - 1, bits - 4)
        return torch.cat([pack(codes >> bits - 4, 4), lower], dim=2)
    tiles, _, columns = codes.shape
    # Four neighbouring columns move as one 32-bit word; no bit crosses a byte when shifted.
    words, shifts = codes.contiguous().view(torch.int32), _shifts(bits)
    parts = words.view(tiles, TILE, -1, len(shifts)).permute(3, 0, 2, 1)  # part, tile, word, lane
    packed = reduce(or_, (part << shift for part, shift in zip(parts, shifts, strict=True)))
    if bits == 3:
        packed = packed.unflatten(1, (-1, 4))  # tile, group of 32 columns, a, lane
        last = packed[:, :, 3]
        top = torch.stack([last, last >> 2, last >> 4], dim=2) & 0x03030303
        packed = packed[:, :, :3] | top << 6
    bytes_: Tensor = packed.contiguous().view(torch.uint8)
    return bytes_.view(tiles, columns // BLOCK, 2 * BLOCK * bits)


@dataclass(frozen=True)
class Int8Weight:
    """A [N, K] matrix: ``q`` int8 [N, K] row-major, ``scale`` float32 [N]."""

    q: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def rows(self, start: int, stop: int) -> "Int8Weight":
        """Rows ``start`` to ``stop``, as a view."""
        return Int8Weight(self.q[start:stop], self.scale[start:stop])

    def dequantize(self) -> Tensor:
        """The exact matrix, float32 [N, K]."""
        return self.q.float() * self.scale[:, None]


def int8_by_torch(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` and ``scale`` of a finite bf16, fp16 or fp32 matrix; a row of zeros gets scale 0."""
    weight_NK = weight_NK.float()
    scale = weight_NK.abs().amax(dim=-1) / 127
    divisor = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight_NK / divisor[:, None]).clamp_(-127, 127).to(torch.int8), scale


Weight = Tensor | Int8Weight | CodedWeight


def map_tensors(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """The same weight with ``change`` applied to each of its tensors."""
    if isinstance(weight, Tensor):
        return change(weight)
    if isinstance(weight, Int8Weight):
        return Int8Weight(change(weight.q), change(weight.scale))
    codes, scales, levels = map(change, (weight.codes, weight.scales, weight.levels))
    return CodedWeight(codes, scales, levels, weight.shape)


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` (a multiple of 16) to ``stop`` of a weight, as a view."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def dequantize(weight: Weight) -> Tensor:
    """The exact matrix, float32 [N, K], on the weight's device."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()
