"""What codes cost on the bundled sample: KL divergence in nats a token, from ``divergence.json``,
where ``python -m bench codes`` writes it.  Without torch."""

import json
from functools import cache
from pathlib import Path

from slotmoe.jsonfile import Json
from slotmoe.quant.codecs.codec import KEPT_CODECS


@cache
def measured() -> Json:
    """All of it: ``rows``, and points of ``llama.cpp``, whose ``origin`` is what measured them."""
    found: Json = json.loads(Path(__file__).with_name("divergence.json").read_bytes())
    return found


def takes_text(choice: Json) -> bool:
    """Whether ``--calibrate`` makes other codes of a ``codec`` or for ``resident`` weights."""
    return choice.get("codec") == "lut" or choice.get("resident") == "mixed"


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
