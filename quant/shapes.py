"""Shapes and bytes of quantized weights, without torch: a plan needs them before a download."""

import math
import re

from slotmoe.quant.codecs.codec import INT5, INT6, LUT4, NF4, Codec, ExpertCodecs

ALIGNMENT = 4096
WIDENED = ("norm", "gate")  # roles of weights that are small and used in float32
TABLE = "table"  # the role of integers, which are kept as they are, in 32 bits
TABLE_NAME = ".tid2eid"  # how the names of such weights end
RESIDENT_MODES = ("bf16", "int8", "int6", "int5", "mixed", "nf4")
_CODED = {  # by mode and role
    **{"int6": {"matrix": INT6}, "int5": {"matrix": INT5}, "mixed": {"matrix": LUT4}},
    "nf4": {"matrix": NF4, "sensitive": NF4},
}
FITTED = {codec.name: codec for codec in (INT6, INT5, LUT4)}
# A mode, or int8 and behind it what has another code: ``KIND@FIRST-LAST=CODE``, see ``kind_of``.
_CODES = f"(none|int8|{'|'.join(FITTED)})"
FITTED_MODE = rf"^({'|'.join(RESIDENT_MODES)}|int8( [\w.]{{1,80}}@\d{{1,5}}-\d{{1,5}}={_CODES})+)$"
LEVELS_BYTES = 128  # two tables of 16 levels, the experts'
# Triton kernels: tokens of a pass that the decoder takes at most, programs that share a token's
# context, and rows of partial sums of several tokens' attention.
FEW_ROWS, SPLITS, PART_ROWS = 8, 64, 8192
SPANS = 16  # native kernels: parts that a token's attention is summed in, each in memory


def record_bytes(
    hidden_size: int, moe_intermediate_size: int, codecs: ExpertCodecs, biases: bool = False
) -> int:
    """Bytes of one expert's codes and scales, and of its ``biases``."""
    gate_or_up = codecs.gate_up.nbytes(moe_intermediate_size, hidden_size)
    matrices = 2 * gate_or_up + codecs.down.nbytes(hidden_size, moe_intermediate_size)
    return matrices + biases * 4 * (2 * moe_intermediate_size + hidden_size)


def padded(size: int) -> int:
    """Bytes of an expert's record in the export, or of another read that is ``ALIGNMENT``'s."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def kind_of(name: str) -> tuple[int, str]:
    """Layer (0 if in none) and kind of a resident tensor: what of a layer has one code always, and
    so the three matrices of an MLP."""
    inner = re.sub(r"\.(gate|up|down)_proj|\.weight|^model\.(?!layers)", "", name)
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", inner)
    return (int(found[1]), found[2]) if found else (0, inner)


def resident_quantization(role: str, mode: str, name: str = "") -> str | Codec:
    """How a resident weight of this role is stored under ``--resident mode``, or a ``FITTED_MODE``
    by its name: ``none`` (as in the source), int8 or by a codec.  Roles are ``norm``, ``gate``,
    ``table``, ``embedding``, ``absorbed``, ``sensitive`` and ``matrix``.

    Norms and the router gate keep the source's precision.  The embedding is gathered by row, and
    an absorbed matrix is used by column, which tiles of codes don't serve: both are at least int8.
    """
    mode, *others = mode.split()
    if role in (*WIDENED, TABLE):
        return "none"
    layer, kind = kind_of(name) if others else (0, "")
    for other in others:
        of, first, last, code = re.split("[@=-]", other)
        if of == kind and int(first) <= layer <= int(last):
            return FITTED.get(code, code)
    return "none" if mode == "bf16" else _CODED.get(mode, {}).get(role, "int8")


def resident_bytes(role: str, shape: tuple[int, ...], mode: str, name: str = "") -> int:
    """Bytes of a resident weight in memory; unquantized in bf16, ``WIDENED`` in float32."""
    quantization = resident_quantization(role, mode, name)
    if isinstance(quantization, Codec):
        N, K = shape
        return quantization.nbytes(N, K)
    if quantization == "int8":
        return math.prod(shape) + 4 * shape[0]
    return math.prod(shape) * (4 if role in (*WIDENED, TABLE) else 2)
