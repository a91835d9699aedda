"""Exceptions at lines of prefill and decode, and real signals at random moments.
``python -m tests.faults.interrupts`` runs it.

First comes each line that a computation runs, then lines and moments by chance.  After each, no
slot may be lost, and the next computation must give the same bits within a minute.
"""

import argparse
import faulthandler
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from slotmoe.offload import loading
from slotmoe.offload.policy.prefetch import Prefetcher
from tests.support.interrupts import KINDS, compute, interrupt, lines_of, random_ctrl_c

AT_ONCE = 50
HANGS = 120  # seconds for so many


def attacked(
    export: Path, kind: str, count: int, signals: int, chance: random.Random
) -> dict[str, Any]:
    """``count`` exceptions and ``signals``; how many of them came while a computation ran.  Raises
    ``AssertionError`` where one did harm; a hang ends the process."""
    exact = kind != "hybrid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetcher, "pays", lambda self: True)  # records this small never do
        patch.setattr(loading, "HELP_BYTES", 0)
        with KINDS[kind](export, patch) as runtime:
            compute(runtime)
            times = lines_of(lambda: compute(runtime))
            lines = sorted(times)
            chosen = [(line, 1) for line in chance.sample(lines, min(count, len(lines)))]
            while len(chosen) < count:
                line = chance.choice(lines)
                chosen.append((line, chance.randint(1, times[line])))
            came, found = 0, 0
            for start in range(0, count, AT_ONCE):
                faulthandler.dump_traceback_later(HANGS, exit=True)
                came += interrupt(runtime, chosen[start : start + AT_ONCE], exact)
            for start in range(0, signals, AT_ONCE):
                faulthandler.dump_traceback_later(HANGS, exit=True)
                found += random_ctrl_c(runtime, min(AT_ONCE, signals - start), exact, chance)
            faulthandler.cancel_dump_traceback_later()
    return {"kind": kind, "lines": len(lines), "injected": count, "came": came, "signals": found}


def main() -> None:
    from slotmoe.offload.ingest.quantize import quantize
    from tests.support.tiny import SAMPLE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--count", type=int, default=2500, help="for each kind")
    parser.add_argument("--signals", type=int, default=250, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quantize(SAMPLE, Path(folder) / "export")
        for kind in given.kinds or KINDS:
            chance = random.Random(f"{kind} {given.seed}")
            found = attacked(Path(folder) / "export", kind, given.count, given.signals, chance)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
