"""How the quantized weights of a checkpoint are encoded, as its ``quantization_config`` says.
Without torch: ``slotmoe.model.checkpoint.dequantize`` decodes them."""

from dataclasses import dataclass
from typing import NamedTuple

from slotmoe.jsonfile import Json, ListOf, ObjectOf, check, one_of

BITSANDBYTES = ("nf4", "fp4")


class Method(NamedTuple):
    """What follows a weight's name where its codes are, and where their scales are; the dtype of
    the codes, weights in one of them along a row, and bytes of a weight, but for few scales."""

    codes: str
    scales: str
    dtype: str
    weights: int
    weight_bytes: float


METHODS = {
    "fp8": Method("", "_scale_inv", "F8_E4M3", 1, 1.0),
    "int4": Method("_packed", "_scale", "I32", 8, 0.5),
    "mxfp4": Method("", "_scale_inv", "I8", 2, 17 / 32),
    **dict.fromkeys(BITSANDBYTES, Method("", ".absmax", "U8", 2, 0.5)),
}


@dataclass(frozen=True)
class Encoding:
    """Weights stored as codes of a method; every block of ``rows`` x ``columns`` weights has a
    scale of its own, 0 standing for all rows or columns of a matrix.  ``dtype`` is what they are
    decoded to, where the scales don't say it.  Routed experts may have an encoding of their own."""

    name: str
    rows: int
    columns: int
    dtype: str = "bfloat16"
    own_of_experts: "Encoding | None" = None

    @property
    def of_experts(self) -> "Encoding":
        return self.own_of_experts or self

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def flat(self) -> bool:
        """Whether codes and scales are written without the dimensions of their matrix."""
        return self.name in BITSANDBYTES


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
    _FP8: {"fmt": one_of("e4m3"), "expert_dtype": one_of("fp8", "fp4")},
    _INT4: {"format": one_of("pack-quantized"), "config_groups": ObjectOf(_GROUP)},
    _BITSANDBYTES: {
        "load_in_4bit": one_of(True),
        "bnb_4bit_quant_type": one_of(*BITSANDBYTES),
        "bnb_4bit_quant_storage": one_of("uint8"),
    },
}
_OPTIONAL = {"fmt", "expert_dtype", "bnb_4bit_quant_storage"}  # but if they are there
_BLOCK = ListOf(one_of(128), 2, 2)


def parse_encoding(config: Json) -> Encoding | None:
    """The encoding that a ``config.json`` names; None where it is absent.  Raises ``ValueError``,
    which names the key, for what is not decoded here."""
    place = "quantization_config"
    settings = config.get(place)
    if not settings:
        return None
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
        values = {"dtype": config.get("torch_dtype"), **config}
        check(values, {"dtype": one_of("bfloat16", "float16", "float32")})
        return Encoding(settings["bnb_4bit_quant_type"], 1, 64, values["dtype"])
    if method == _INT4:
        for name, group in settings["config_groups"].items():
            if group["weights"].get("actorder") is not None:
                where = f"{place}.config_groups.{name:.40}.weights.actorder"
                raise ValueError(f"{where} is set, expected null: columns in their own order")
        return Encoding("int4", 1, 32)
    values = {"expert_dtype": config.get("expert_dtype", "fp8"), **settings}
    check(values, {"expert_dtype": kinds["expert_dtype"]})
    experts = Encoding("mxfp4", 1, 32) if values["expert_dtype"] == "fp4" else None
    if (block := settings.get("weight_block_size", [128, 128])) is None:
        return Encoding("fp8", 0, 0, own_of_experts=experts)
    check(block, _BLOCK, f"{place}.weight_block_size")
    return Encoding("fp8", 128, 128, own_of_experts=experts)
