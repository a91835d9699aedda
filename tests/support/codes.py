"""Coded matrices rebuilt from docs/export-format.md with numpy alone, one weight at a time, and
random ones."""

import numpy as np
import torch

from slotmoe.quant.codecs.codec import INT4, MXFP4, NF4
from slotmoe.quant.codecs.encode import nearest, quantize_lut, quantize_nf4
from slotmoe.quant.codecs.weight import CodedWeight, levels_of, store

# Of the tensor beside the codes.
SUFFIXES = {"f16": "absmax", **dict.fromkeys(("f16x2", "i8", "i4", "e8m0"), "scales")}


def parts_of(codec, codes, scales, n, k):
    """Codes, scales of blocks and factors of rows, each [n, k] or one number, of a codec as the
    manifest holds it and the two tensors of a weight."""
    row, column = np.indices((n, k))
    tile, lane = row // 16, row % 16
    block, c = column // 64, column % 64
    bits, p = codec["bits"], 4 * lane + c % 4
    if bits >= 4:
        byte = codes[tile, block, c // 8 * 64 + p]
        code = np.where(c % 8 < 4, byte >> 4, byte & 15)
    if bits == 5:
        lowest = codes[tile, block, 512 + c // 32 * 64 + p] >> c % 32 // 4
        code = 2 * code + (lowest & 1)
    elif bits in (2, 6):
        byte = codes[tile, block, (512 if bits == 6 else 0) + c // 16 * 64 + p]
        low = byte >> c % 16 // 4 * 2 & 3
        code = 4 * code + low if bits == 6 else low
    elif bits == 3:
        first = c // 32 * 192 + 4 * lane + c % 4
        a = c % 32 // 8
        highest = [codes[tile, block, first + 64 * which] >> 6 for which in range(3)]
        last = highest[0] | highest[1] << 2 | highest[2] << 4
        pair = np.where(a < 3, codes[tile, block, first + 64 * np.minimum(a, 2)], last)
        code = np.where(c % 8 < 4, pair, pair >> 3) & 7
    rows = np.float32(1)
    if codec["scales"] == "f16":
        scale = scales.view(np.float16)[tile, block, lane].astype(np.float32)
    elif codec["scales"] == "f16x2":
        scale = scales.view(np.float16)[tile, block, c // 32 * 16 + lane].astype(np.float32)
    elif codec["scales"] == "e8m0":
        exponent = scales.view(np.uint8)[tile, block, c // 32 * 16 + lane].astype(int) - 127
        scale = np.ldexp(np.float32(1), exponent)
    else:
        first = 2 if codec["scales"] == "i8" else 4
        factors = np.ascontiguousarray(scales[:, :first]).reshape(-1, 64).view(np.float32)
        rows, blocks = factors[tile, lane], scales[:, first:]
        if first == 2:
            whole = blocks.view(np.int8)[tile, block, c // 32 * 16 + lane]
        else:
            half = np.where(c < 32, blocks[tile, block, lane] & 15, blocks[tile, block, lane] >> 4)
            whole = np.where(half < 8, half, half.astype(int) - 16)
        scale = whole.astype(np.float32)
    return code, scale, rows


def values(codec, codes, scales, n, k):
    """float32 [n, k], likewise."""
    code, scale, rows = parts_of(codec, codes, scales, n, k)
    return np.array(codec["levels"], np.float32)[code] * (scale * rows)


def random_codes(rng, codec, n, k, size=1.0):
    """A ``CodedWeight`` of random bytes, whose levels times scales are at most about ``size``, and
    its values as float64 [n, k]."""
    codes = rng.integers(0, 256, codec.codes_shape(n, k), dtype=np.uint8)
    shape, largest = codec.scales_shape(n, k), size / max(map(abs, codec.levels))
    if codec.scales in ("f16", "f16x2"):
        scales = (rng.uniform(-largest, largest, shape)).astype(np.float16)
    elif codec.scales == "e8m0":
        top = 127 + int(np.floor(np.log2(largest)))
        scales = rng.integers(top - 6, top + 1, shape, dtype=np.uint8)
        scales[rng.random(shape) < 0.05] = 0  # a denormal
    else:
        scales = rng.integers(-127, 128, shape, dtype=np.int8).view(np.uint8)
        rows = rng.uniform(0.5, 1, (shape[0], 16)) * largest / (8 if codec.scales == "i4" else 127)
        first = 64 // shape[2]
        scales[:, :first] = rows.astype(np.float32).view(np.uint8).reshape(-1, first, shape[2])
    parts = torch.from_numpy(codes), torch.from_numpy(scales)
    exact = values(codec.describe(), codes, scales, n, k).astype(np.float64)
    if codec.scales == "e8m0":
        parts = parts[0], parts[1].view(torch.float8_e8m0fnu)
    return CodedWeight(*parts, levels_of(codec), (n, k)), exact


def quantize_coded(weight_NK, codec):
    """Codes and scales of a bf16, fp16 or fp32 matrix."""
    if codec == INT4:
        weight_NK = torch.nn.functional.pad(weight_NK.float(), (0, -weight_NK.shape[1] % 32))
        groups_NXB = weight_NK.unflatten(1, (-1, 32))
        scales_NX = (groups_NXB.abs().amax(2) / 7.5).half().float()
        codes_NXB = (groups_NXB / scales_NX.clamp(min=1e-9)[..., None]).round().clamp(-8, 7) + 8
        return store(codes_NXB.flatten(1).to(torch.uint8), scales_NX, codec)
    if codec == MXFP4:
        weight_NK = torch.nn.functional.pad(weight_NK.float(), (0, -weight_NK.shape[1] % 32))
        groups_NXB = weight_NK.unflatten(1, (-1, 32))
        scales_NX = (groups_NXB.abs().amax(2) / 6).clamp(min=2.0**-126).log2().ceil().exp2()
        codes_NXB = nearest(groups_NXB / scales_NX[..., None], torch.tensor(codec.levels))
        return store(codes_NXB.flatten(1).to(torch.uint8), scales_NX, codec)
    return quantize_nf4(weight_NK) if codec == NF4 else quantize_lut(weight_NK, codec)[:2]
