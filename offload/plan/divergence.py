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
    total = 0.0
    for wanted in ({"codec": codec, "bits": bits}, {"resident": resident}):
        if wanted in ({"resident": "bf16"}, {"codec": "int4", "bits": "4"}):
            continue
        rows = [row for row in measured()["rows"] if wanted.items() <= row.items()]
        # What learns nothing is the same with a calibration text.
        rows.sort(key=lambda row: row["calibrated"] != calibrated)
        if not rows:
            return None
        total += rows[0]["kl_divergence"]
    return total
