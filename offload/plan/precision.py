"""How weights are coded unless said, what multiplies them, and what codes were measured to lose."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.offload.plan.memory import sizes_of
from slotmoe.quant.codecs.codec import (
    DEFAULT_CODECS,
    KEPT_CODECS,
    TRITON_KINDS,
    Codec,
    ExpertCodecs,
)
from slotmoe.quant.shapes import RESIDENT_MODES

MOST_INT8 = 4 << 30  # bytes of resident weights; beyond, 4 bits leave much more to the experts


def precision_of(config: Config, wanted: str) -> str:
    """How resident weights are stored, of ``RESIDENT_MODES``.  ``auto`` is int8, closest to the
    source, up to ``MOST_INT8``.  It knows no machine, so that plan, quantize and run choose alike,
    and an export has the same bytes wherever it is made.  Raises ``ConfigError``."""
    if wanted == "auto":
        return "int8" if int8_bytes(config) <= MOST_INT8 else "mixed"
    if wanted not in RESIDENT_MODES:
        known = ", ".join(("auto", *RESIDENT_MODES))
        raise ConfigError(f"resident {wanted!r:.40} is unknown, expected one of: {known}")
    return wanted


def int8_bytes(config: Config) -> int:
    return sum(sizes_of(config, "int8", DEFAULT_CODECS).resident.values())


def gpu_kernels(resident: str, codecs: ExpertCodecs) -> str:
    """What multiplies on a GPU: torch where Triton's kernels lack a code."""
    has_all = {codec.kind for codec in codecs} <= TRITON_KINDS
    return "triton" if has_all and resident not in ("int6", "int5") else "torch"


def kernels_for(asked: str, is_gpu: bool, codecs: Mapping[str, Codec]) -> str:
    """As asked, but torch's on a GPU whose kernels lack a codec.  Raises ``ConfigError``."""
    lacking = [name for name, codec in codecs.items() if codec.kind not in TRITON_KINDS]
    if lacking and asked == "triton":
        problem = f"kernels triton: multiply no {' and '.join(lacking)}"
        raise ConfigError(f"{problem}, in which the export is coded; use kernels torch")
    return "torch" if lacking and is_gpu and asked == "auto" else asked


BY_TORCH = (
    "Triton's kernels lack these codes: torch's operations multiply on CUDA, slower than said"
)


@cache
def measured() -> Json:
    """What codes cost on the bundled sample: KL divergence in nats a token, as ``python -m bench
    codes`` writes it to ``divergence.json``: ``rows``, and points of ``llama.cpp``, whose
    ``origin`` is what measured them."""
    found: Json = json.loads(Path(__file__).with_name("divergence.json").read_bytes())
    return found


def takes_text(choice: Json) -> bool:
    """Whether ``--calibrate`` makes other codes of a ``codec`` or for ``resident`` weights."""
    return choice.get("codec") == "lut" or choice.get("resident") in ("int6", "int5", "mixed")


def expected(codec: str, bits: str, resident: str, calibrated: bool) -> float | None:
    """Of experts and resident weights together: the sum of what each does alone.  None where a
    part of it was not measured; codes that are kept, and bf16, cost nothing."""
    experts = 0.0 if codec in KEPT_CODECS else _alone({"codec": codec, "bits": bits}, calibrated)
    others = 0.0 if resident == "bf16" else _alone({"resident": resident}, calibrated)
    return None if experts is None or others is None else experts + others


def _alone(choice: Json, calibrated: bool) -> float | None:
    wanted = choice | {"calibrated": calibrated and takes_text(choice)}
    found = (row for row in measured()["rows"] if wanted.items() <= row.items())
    return next((row["kl_divergence"] for row in found), None)
