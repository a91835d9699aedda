"""What codes cost on the bundled sample: KL divergence in nats a token, from ``divergence.json``,
which ``python -m slotmoe.tools.bench codes`` makes.  Without torch."""

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def measured() -> dict[str, Any]:
    """All of it: ``rows``, and points of ``llama.cpp``."""
    path = Path(__file__).with_name("divergence.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def expected(codec: str, bits: str, resident: str, calibrated: bool) -> float | None:
    """Of experts and resident weights together: the sum of what each does alone.  None where a
    part of it was not measured; codes that are kept, and bf16, cost nothing."""
    parts: list[dict[str, Any]] = [{"codec": codec, "bits": bits}, {"resident": resident}]
    total = 0.0
    for part in parts:
        if part in ({"resident": "bf16"}, {"codec": "int4", "bits": "4"}):
            continue
        learned = part.get("codec") == "lut" or part.get("resident") == "mixed"
        part["calibrated"] = calibrated and learned
        rows = [row for row in measured()["rows"] if part.items() <= row.items()]
        if not rows:
            return None
        total += rows[0]["kl_divergence"]
    return total
