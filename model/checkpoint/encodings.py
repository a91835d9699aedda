"""How the quantized weights of a checkpoint are encoded, as its ``quantization_config`` says.
Without torch: ``slotmoe.model.checkpoint.dequantize`` decodes them."""

from dataclasses import dataclass
from typing import Any

from slotmoe.jsonfile import Json, ListOf, ObjectOf, check, one_of

BITSANDBYTES = ("nf4", "fp4")


@dataclass(frozen=True)
class Encoding:
    """Weights stored as codes of ``method``; every block of ``rows`` x ``columns`` weights has a
    scale of its own, 0 standing for all rows or columns of a matrix.  ``dtype`` is what they are
    decoded to, where the scales don't say it."""

    method: str  # as slotmoe.model.names has their tensors' names
    rows: int
    columns: int
    dtype: str = "bfloat16"

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight's code."""
        return 1.0 if self.method == "fp8" else 0.5

    @property
    def flat(self) -> bool:
        """Whether codes and scales are written without the dimensions of their matrix."""
        return self.method in BITSANDBYTES

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix."""
        return tuple(
            -(-size // (block or size))
            for size, block in zip(shape, (self.rows, self.columns), strict=True)
        )


_GROUP = {  # a config group of compressed-tensors: what is decoded here
    "weights": {
        "num_bits": one_of(4),
        "type": one_of("int"),
        "symmetric": one_of(True),
        "strategy": one_of("group"),
        "group_size": one_of(32),
    }
}
_FP8, _INT4, _BITSANDBYTES = "fp8", "compressed-tensors", "bitsandbytes"
_KINDS: dict[str, Json] = {  # what must be so
    _FP8: {"fmt": one_of("e4m3"), "expert_dtype": one_of("fp8")},
    _INT4: {"format": one_of("pack-quantized"), "config_groups": ObjectOf(_GROUP)},
    _BITSANDBYTES: {
        "load_in_4bit": one_of(True),
        "bnb_4bit_quant_type": one_of(*BITSANDBYTES),
        "bnb_4bit_quant_storage": one_of("uint8"),
    },
}
_OPTIONAL = {"fmt", "expert_dtype", "bnb_4bit_quant_storage"}  # but if they are there
_BLOCK = ListOf(one_of(128), 2, 2)


def parse_encoding(settings: Any, dtype: Any) -> Encoding | None:
    """The encoding that ``quantization_config`` names; None where it is absent.  ``dtype`` is the
    config's.  Raises ``ValueError``, which names the key, for what is not decoded here."""
    if not settings:
        return None
    place = "quantization_config"
    check(settings, {}, place)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _KINDS:
        known = f"only {_FP8}, {_INT4} or {_BITSANDBYTES}"
        problem = f"{place}.quant_method {method!r:.40} is not supported, {known}"
        raise ValueError(f"{problem}; give the original checkpoint")
    kinds = _KINDS[method]
    required = kinds.keys() - _OPTIONAL | kinds.keys() & settings.keys()
    check(settings, {key: kinds[key] for key in sorted(required)}, place)
    if method == _BITSANDBYTES:
        check({"dtype": dtype}, {"dtype": one_of("bfloat16", "float16", "float32")})
        return Encoding(settings["bnb_4bit_quant_type"], 1, 64, dtype)
    if method == _INT4:
        for name, group in settings["config_groups"].items():
            if group["weights"].get("actorder") is not None:
                where = f"{place}.config_groups.{name:.40}.weights.actorder"
                raise ValueError(f"{where} is set, expected null: columns in their own order")
        return Encoding("int4", 1, 32)
    if settings.get("weight_block_size", [128, 128]) is None:
        return Encoding("fp8", 0, 0)
    check(settings.get("weight_block_size", [128, 128]), _BLOCK, f"{place}.weight_block_size")
    return Encoding("fp8", 128, 128)
