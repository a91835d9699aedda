"""Exceptions at lines of prefill and decode, and real signals at random moments.
``python -m tests.faults.interrupts`` runs it.

First comes each line that a computation runs, then lines and moments by chance.  After each, no
slot may be lost, and the next computation must give the same bits within a minute.  The ``sample``
is the bundled model, the ``small`` one has the same experts a token in two layers and a predictor
of whole tokens: together they run more lines than either, and most attacks are on the cheaper one.
"""

import argparse
import faulthandler
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from slotmoe.offload import loading
from slotmoe.offload.policy.prefetch import Prefetcher
from tests.support.interrupts import KINDS, compute, interrupt, lines_of, random_ctrl_c

AT_ONCE = 50
HANGS = 120  # seconds for so many


def attacked(
    export: Path, kind: str, count: int, signals: int, chance: random.Random, seconds: float = 1e9
) -> dict[str, Any]:
    """``count`` exceptions and ``signals``, or fewer where ``seconds`` are over; how many of them
    came while a computation ran.  Raises ``AssertionError`` where one did harm; a hang ends the
    process."""
    exact, end = kind != "hybrid", time.monotonic() + seconds
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
            came = found = done = 0
            while done < count and time.monotonic() < end:
                faulthandler.dump_traceback_later(HANGS, exit=True)
                part = chosen[done : done + AT_ONCE]
                came, done = came + interrupt(runtime, part, exact), done + len(part)
            for start in range(0, signals, AT_ONCE):
                faulthandler.dump_traceback_later(HANGS, exit=True)
                found += random_ctrl_c(runtime, min(AT_ONCE, signals - start), exact, chance)
            faulthandler.cancel_dump_traceback_later()
    return {"kind": kind, "lines": len(lines), "injected": done, "came": came, "signals": found}


def make_small(folder: Path) -> Path:
    """An export with more experts than any kind has slots."""
    from slotmoe.offload.ingest.quantize import quantize
    from slotmoe.quant.export.writer import write_predictor
    from tests.support.predictor import random_tensors
    from tests.support.tiny import write_checkpoint

    experts = {"n_routed_experts": 64, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    write_checkpoint(folder / "checkpoint", **experts)
    quantize(folder / "checkpoint", folder / "small")
    write_predictor(folder / "small", random_tensors(0, 64))
    return folder / "small"


def main() -> None:
    from slotmoe.offload.ingest.quantize import quantize
    from tests.support.tiny import SAMPLE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--model", choices=["sample", "small"], default="small")
    parser.add_argument("--count", type=int, default=2500, help="for each kind")
    parser.add_argument("--signals", type=int, default=250, help="for each kind")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each kind's exceptions")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "sample"
        if given.model == "sample":
            quantize(SAMPLE, export)
        else:
            export = make_small(Path(folder))
        for kind in given.kinds or KINDS:
            chance = random.Random(f"{kind} {given.seed}")
            found = attacked(export, kind, given.count, given.signals, chance, given.seconds)
            print(json.dumps({"model": given.model, **found}), flush=True)


if __name__ == "__main__":
    main()
