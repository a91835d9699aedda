"""Codecs, without torch: how a matrix is coded, as the export's manifest describes it.

A weight is ``levels[code] * scale``.  A codec says how many bits a code has, what the levels are,
and how scales are stored.  Codes stand in the layout ``tiles16``, which lets a kernel form 16 rows'
dot products before it converts or scales anything:

    W [N, K], zero-padded to N = 16 * n_tiles rows and K = 64 * n_blocks columns
    codes  U8 [n_tiles, n_blocks, 128 * bits]; byte p = 4 * lane + i (lane < 16, i < 4) of each 64
           belongs to row 16 * tile + lane
        4 bits: the high nibble of byte 64 * t + p (t < 8) is the code of column
            64 * block + 8 * t + i, its low nibble that of the column 4 further
        3 bits: bits 0 to 2 of byte 192 * g + 64 * a + p (g < 2, a < 3) are the code of column
            64 * block + 32 * g + 8 * a + i, bits 3 to 5 that of the column 4 further; bits 6 and 7
            are bits 2 a and 2 a + 1 of such a pair of codes for a = 3
        2 bits: bits 2 a and 2 a + 1 (a < 4) of byte 64 * g + p (g < 4) are the code of column
            64 * block + 16 * g + 4 * a + i
        5 bits: the upper 4 as above, then in 128 bytes bit a (a < 8) of byte 64 * g + p (g < 2) is
            the lowest of column 64 * block + 32 * g + 4 * a + i
        6 bits: the upper 4 as above, then in 256 bytes the lowest 2, as codes of 2 bits
    scales as ``SCALES`` says; of any sign

docs/export-format.md has every byte.  Shape legend: N rows out, K columns in.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from slotmoe.jsonfile import Json

LAYOUT = "tiles16"
TILE = 16  # rows that are stored together
BLOCK = 64  # columns that are stored together


class Scales(NamedTuple):
    """A coding of scales: ``block`` columns of a row share one; they are the tensor ``NAME`` +
    ``suffix``, [n_tiles, n_blocks + ``extra``, ``width``], and whole numbers up to ``most``, if
    any, under a factor of the row."""

    block: int
    suffix: str
    dtype: str
    extra: int
    width: int
    most: int = 0


SCALES = {
    # One number a block: [n_tiles, n_blocks, 16].
    "f16": Scales(64, ".absmax", "F16", 0, TILE),
    # Of each 64 columns a number for the first 32 of each row and one for the last 32.
    "f16x2": Scales(32, ".scales", "F16", 0, 2 * TILE),
    # Bytes [n_tiles, n_blocks + 2, 32]: of each tile first the rows' F32 factors, 16 of them, then
    # of each 64 columns an I8 for the first 32 of each row and one for the last 32; a block's scale
    # is the product, in float32.
    "i8": Scales(32, ".scales", "U8", 2, 2 * TILE, 127),
    # Bytes [n_tiles, n_blocks + 4, 16]: as i8, but of each 64 columns a byte for each row, its low
    # half an I4 for the first 32, its high half one for the last 32.
    "i4": Scales(32, ".scales", "U8", 4, TILE, 7),
    # As f16x2, each a byte that stands for 2^(byte - 127).
    "e8m0": Scales(32, ".scales", "F8_E8M0", 0, 2 * TILE),
}
# Which pairs of bits and scales there are, and what the native kernels call them.
KINDS = {(4, "f16"): 1, (4, "i8"): 2, (3, "i8"): 3, (4, "f16x2"): 4, (4, "e8m0"): 5}
TRITON_KINDS = frozenset(KINDS.values())  # which Triton's have too
KINDS |= {(2, "i4"): 6, (5, "i8"): 7, (6, "i8"): 8}


@dataclass(frozen=True)
class Codec:
    """``bits`` a code, 2^bits ``levels`` ascending, -0 before 0, and the coding of ``scales``.
    More than 16 levels are the whole numbers from -2^(bits - 1)."""

    name: str
    bits: int
    scales: str
    levels: tuple[float, ...]

    @property
    def kind(self) -> int:
        """What the native kernels call it."""
        return KINDS[self.bits, self.scales]

    @property
    def fitted(self) -> bool:
        """Whether scales are chosen by the error, which a calibration text weighs."""
        return SCALES[self.scales].most > 0

    @property
    def learned(self) -> bool:
        """Whether each model has levels of its own."""
        return self.fitted and self.bits <= 4

    def codes_shape(self, N: int, K: int) -> tuple[int, int, int]:
        """Shape of the code tensor of a [N, K] matrix."""
        return -(-N // TILE), -(-K // BLOCK), 2 * BLOCK * self.bits

    def scales_shape(self, N: int, K: int) -> tuple[int, int, int]:
        """Shape of the scale tensor of a [N, K] matrix."""
        coding = SCALES[self.scales]
        return -(-N // TILE), -(-K // BLOCK) + coding.extra, coding.width

    def tensors(self, name: str, N: int, K: int) -> dict[str, tuple[str, tuple[int, int, int]]]:
        """Dtype and shape of the tensors that hold the [N, K] matrix ``name``, by their names."""
        coding = SCALES[self.scales]
        scales = coding.dtype, self.scales_shape(N, K)
        return {name: ("U8", self.codes_shape(N, K)), name + coding.suffix: scales}

    def nbytes(self, N: int, K: int) -> int:
        """Bytes of a [N, K] matrix."""
        size = 2 if SCALES[self.scales].dtype == "F16" else 1
        return math.prod(self.codes_shape(N, K)) + size * math.prod(self.scales_shape(N, K))

    def describe(self) -> Json:
        """The codec as the manifest holds it, under its name."""
        coding = {"block": SCALES[self.scales].block, "scales": self.scales}
        return {"bits": self.bits, **coding, "levels": list(self.levels)}


# QLoRA's (arXiv 2305.14314), as bitsandbytes has it.
NF4 = Codec("nf4", 4, "f16", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
# Levels of least squared error on a model's weights, each block with the scale, of either sign,
# that serves it best.  Integers of 8 bits, so that kernels lose nothing.
LUT4 = Codec(
    "lut4", 4, "i8", (-118, -90, -70, -54, -39, -27, -15, -3, 9, 20, 32, 45, 60, 76, 96, 127)
)
LUT3 = Codec("lut3", 3, "i8", (-127, -80, -48, -22, 3, 28, 58, 97))
LUT2 = Codec("lut2", 2, "i4", (-127, -44, 19, 91))
INT5, INT6 = (Codec(f"int{b}", b, "i8", tuple(range(-1 << b - 1, 1 << b - 1))) for b in (5, 6))
# What checkpoints hold that were trained in 4 bits, so that their codes are kept.
INT4 = Codec("int4", 4, "f16x2", tuple(range(-8, 8)))
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4 = Codec("mxfp4", 4, "e8m0", (*(-level for level in reversed(_E2M1)), *_E2M1))


class ExpertCodecs(NamedTuple):
    """How an expert's projections are coded: gate and up alike, and down."""

    gate_up: Codec
    down: Codec

    def of(self, projection: str) -> Codec:
        return self.down if projection == "down_proj" else self.gate_up

    def names(self) -> dict[str, str]:
        """As the manifest holds them."""
        return {"gate_up": self.gate_up.name, "down": self.down.name}

    @classmethod
    def of_manifest(cls, manifest: Json) -> "ExpertCodecs":
        codecs, names = manifest_codecs(manifest), manifest["quantization"]["experts"]
        return cls(codecs[names["gate_up"]], codecs[names["down"]])


# By ``--codec`` and ``--bits``.
EXPERT_CODECS = {
    ("lut", "5"): ExpertCodecs(INT5, INT5),
    ("lut", "4.5"): ExpertCodecs(LUT4, INT5),
    ("lut", "4"): ExpertCodecs(LUT4, LUT4),
    ("lut", "3.5"): ExpertCodecs(LUT3, LUT4),
    ("lut", "3"): ExpertCodecs(LUT3, LUT3),
    ("lut", "2.5"): ExpertCodecs(LUT2, LUT3),
    ("lut", "2"): ExpertCodecs(LUT2, LUT2),
    ("nf4", "4"): ExpertCodecs(NF4, NF4),
}
DEFAULT_CODEC = "lut"
DEFAULT_CODECS = EXPERT_CODECS[DEFAULT_CODEC, "4"]
# By the encoding of a checkpoint's experts, which then need no rounding.
KEPT_CODECS = {codec.name: ExpertCodecs(codec, codec) for codec in (INT4, MXFP4)}


def manifest_codecs(manifest: Json) -> dict[str, Codec]:
    """All codecs of a manifest, by name."""
    table = manifest["quantization"]["codecs"]
    return {
        name: Codec(name, item["bits"], item["scales"], tuple(item["levels"]))
        for name, item in table.items()
    }
