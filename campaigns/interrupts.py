"""Exceptions and signals at lines of prefill and decode.

First comes each line that a computation runs, then lines and moments by chance.  After each no slot
may be lost, and the next computation must give the same bits within two minutes.  Parts that end in
"sample" attack the bundled model, the others a small one with the same experts a token in two
layers and a predictor of whole tokens: together they run more lines than either.
"""

import faulthandler
from contextlib import contextmanager
from functools import cache

import pytest

from campaigns.models import many_experts, sample_export
from campaigns.runner import Attack
from slotmoe.offload.engine import loading
from slotmoe.offload.policy.prefetch import Prefetcher
from tests.support.interrupts import KINDS, compute, interrupt, lines_of

AT_ONCE = 50
HANGS = 120  # seconds for so many


@contextmanager
def prepare(folder, given):
    make = {"small": many_experts, "sample": sample_export}
    yield cache(lambda model: make[model](folder))


def run(export_of, part, aim):
    kind, _, model = part.partition("-")
    chance, exact, done, came = aim.chance, kind != "hybrid", 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetcher, "pays", lambda self: True)  # records this small never do
        patch.setattr(loading, "HELP_BYTES", 0)
        with KINDS[kind](export_of(model or "small"), patch) as runtime:
            compute(runtime)
            times = lines_of(lambda: compute(runtime))
            lines = sorted(times)
            first = [(line, 1) for line in chance.sample(lines, len(lines))]
            while aim.goes_on(done):
                faulthandler.dump_traceback_later(HANGS, exit=True)
                chosen = first[done : done + min(AT_ONCE, aim.count - done)]
                if not chosen:
                    picked = chance.choices(lines, k=AT_ONCE)
                    chosen = [(line, chance.randint(1, times[line])) for line in picked]
                came += interrupt(runtime, chosen, exact)
                done += len(chosen)
            faulthandler.cancel_dump_traceback_later()
    return {"lines": len(lines), "exceptions": done, "came": came, "wrong": []}


PARTS = [kind + model for model in ("", "-sample") for kind in KINDS]
ATTACK = Attack(run, PARTS, "exceptions of each kind", 2500, prepare=prepare)
