"""Shapes and bytes of quantized weights, without torch: what a plan needs to know before anything
is downloaded."""

import math

BLOCK = 64  # weights of a row that share a scale
TILE = 16  # rows that are stored together (see ``slotmoe.quant.nf4``)
ALIGNMENT = 4096
WIDENED = ("norm", "gate")  # roles of weights that are small and used in float32
RESIDENT_MODES = ("bf16", "int8", "mixed", "nf4")
IN_4_BITS = {"mixed": ("matrix",), "nf4": ("matrix", "sensitive")}  # roles, by mode


def codes_shape(N: int, K: int) -> tuple[int, int, int]:
    """Shape of the code tensor of a [N, K] matrix: ``(n_tiles, n_blocks, 512)``."""
    return -(-N // TILE), -(-K // BLOCK), TILE * BLOCK // 2


def absmax_shape(N: int, K: int) -> tuple[int, int, int]:
    """Shape of the scale tensor of a [N, K] matrix: ``(n_tiles, n_blocks, 16)``."""
    return -(-N // TILE), -(-K // BLOCK), TILE


def nf4_bytes(N: int, K: int) -> int:
    """Bytes of the codes and float16 scales of a [N, K] matrix."""
    return math.prod(codes_shape(N, K)) + 2 * math.prod(absmax_shape(N, K))


def record_bytes(hidden_size: int, moe_intermediate_size: int) -> int:
    """Bytes of one expert's codes and scales."""
    gate_or_up = nf4_bytes(moe_intermediate_size, hidden_size)
    return 2 * gate_or_up + nf4_bytes(hidden_size, moe_intermediate_size)


def padded_record_bytes(hidden_size: int, moe_intermediate_size: int) -> int:
    """Bytes of one expert's record in the export."""
    return -(-record_bytes(hidden_size, moe_intermediate_size) // ALIGNMENT) * ALIGNMENT


def resident_quantization(role: str, mode: str) -> str:
    """How a resident weight of this role is stored under ``--resident mode``: ``none`` (as in the
    source), int8 or nf4.  Roles are ``norm``, ``gate``, ``embedding``, ``absorbed``, ``sensitive``
    and ``matrix``.

    Norms and the router gate keep the source's precision.  The embedding is gathered by row, and
    an absorbed matrix is used by column, which the NF4 tiles don't serve: both are at least int8.
    """
    if mode == "bf16" or role in WIDENED:
        return "none"
    return "nf4" if role in IN_4_BITS.get(mode, ()) else "int8"


def resident_bytes(role: str, shape: tuple[int, ...], mode: str) -> int:
    """Bytes of a resident weight in memory; unquantized in bf16, ``WIDENED`` in float32."""
    quantization = resident_quantization(role, mode)
    if quantization == "nf4":
        return nf4_bytes(*shape)
    if quantization == "int8":
        return math.prod(shape) + 4 * shape[0]
    return math.prod(shape) * (4 if role in WIDENED else 2)


def latent_bytes(r: int, p: int) -> int:
    """Bytes of a row of the native kernels' latent cache: one for each of R latent and P rope
    columns, either rounded up to 4, and a scale and a sum of 4 bytes for each."""
    return -(-r // 4) * 4 + -(-p // 4) * 4 + 16
