"""How the quantized weights of a checkpoint are encoded, as its ``quantization_config`` says.
Without torch: ``slotmoe.model.checkpoint.places`` decodes them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from msgspec import Struct

from slotmoe.jsonfile import Json, typed

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
    "mxfp4 blocks": Method("_blocks", "_scales", "U8", 2, 17 / 32),
    **dict.fromkeys(BITSANDBYTES, Method("", ".absmax", "U8", 2, 0.5)),
}


@dataclass(frozen=True)
class Encoding:
    """Weights stored as codes of a method; every block of ``rows`` x ``columns`` weights has a
    scale of its own, 0 standing for all rows or columns of a matrix.  ``dtype`` is what they are
    decoded to, where the scales don't say it.  Routed experts may have an encoding of their own.
    ``blocks``: codes have a dimension of 16 bytes a scale, which is a byte too (gpt-oss)."""

    name: str
    rows: int
    columns: int
    dtype: str = "bfloat16"
    of_experts: "Encoding | None" = None
    blocks: bool = False

    @property
    def method(self) -> Method:
        return METHODS[f"{self.name} blocks" if self.blocks else self.name]

    @property
    def flat(self) -> bool:
        """Whether codes and scales are written without the dimensions of their matrix."""
        return self.name in BITSANDBYTES


class _Fp8(Struct):
    expert_dtype: Literal["fp8", "fp4"]
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    weight_block_size: tuple[Literal[128], Literal[128]] | None = (128, 128)


class _Weights(Struct):  # of compressed-tensors: what is decoded here
    num_bits: Literal[4]
    type: Literal["int"]
    symmetric: Literal[True]
    strategy: Literal["group"]
    group_size: Literal[32]
    actorder: None = None  # columns in their own order


_Group = TypedDict("_Group", {"weights": _Weights})


class _CompressedTensors(Struct):
    format: Literal["pack-quantized"]
    config_groups: dict[str, _Group]


class _Bitsandbytes(Struct):
    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_quant_storage: Literal["uint8"] = "uint8"


class _Mxfp4(Struct):
    pass


_KINDS: dict[str, type[Struct]] = {"fp8": _Fp8, "bitsandbytes": _Bitsandbytes, "mxfp4": _Mxfp4}
_KINDS["compressed-tensors"] = _CompressedTensors
_Dtype = TypedDict("_Dtype", {"dtype": Literal["bfloat16", "float16", "float32"]})


def parse_encoding(config: Json) -> Encoding | None:
    """The encoding that a ``config.json`` names; None where it is absent.  Raises ``ValueError``,
    which names the key, for what is not decoded here."""
    place = "quantization_config"
    if not config.get(place):
        return None
    settings: Json = {"expert_dtype": config.get("expert_dtype", "fp8")}
    settings |= typed(config[place], Json, place)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _KINDS:
        problem = f"{place}.quant_method {method!r:.40} is not supported, only {', '.join(_KINDS)}"
        raise ValueError(f"{problem}; give the original checkpoint")
    match typed(settings, _KINDS[method], place):
        case _Bitsandbytes(bnb_4bit_quant_type=name):
            plain = typed({"dtype": config.get("torch_dtype"), **config}, _Dtype)
            return Encoding(name, 1, 64, plain["dtype"])
        case _Fp8(expert_dtype=dtype, weight_block_size=block):
            experts = Encoding("mxfp4", 1, 32) if dtype == "fp4" else None
            size = 128 if block else 0
            return Encoding("fp8", size, size, of_experts=experts)
        case _Mxfp4():
            return Encoding("mxfp4", 1, 32, blocks=True)
    return Encoding("int4", 1, 32)
