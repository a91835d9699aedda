"""What a ``quantize`` that was stopped has left is damaged before it goes on.

It is stopped at each change of the disk in turn.  A case changes one file of those that are there
then: a bit, a digit, zeros, NaN, its length, another file in its place, or none.  The same command
must make the bytes of an undisturbed run, or say in one line what to do, which then makes them.  In
signed files also a value changes and the checksum with it, as a forger would: then a line or
success, whatever the bytes.
"""

import json
import shutil
from collections import Counter
from contextlib import contextmanager

import torch

from campaigns.models import few_words
from campaigns.runner import Attack
from tests.support.disk import memory
from tests.support.resumes import KINDS, SIGNED, STRANGE, WAYS, Resumes, damaged, places, resigned


@contextmanager
def prepare(folder, given):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few_words(folder / "tiny", shards=2, layers=3)
    yield folder
    torch.set_num_threads(threads)


def run(place, part, aim):
    came, wrong, chance = Counter(), [], aim.chance
    resumes = Resumes(part, place / "tiny", place / "work", aim.count)
    stages = [files for files in resumes.left if files]
    while aim.goes_on(came.total()):
        files = dict(chance.choice(stages))
        name = chance.choice(sorted(files))
        forged = name.endswith(SIGNED) and chance.random() < 0.7
        if forged:
            where = chance.choice([*places(json.loads(files[name]), chance)])
            value = chance.choice(STRANGE)
            what, changed = f"{where} = {value!r:.20}", resigned(files[name], value, *where)
        else:
            others = [data for other, data in files.items() if other != name]
            others += [left[name] for left in stages if name in left]
            what = chance.choice(KINDS)
            changed = damaged(files.pop(name), what, chance, others)
        if changed is not None:
            files[name] = changed
        try:
            outcome = resumes.resumed(files)
        except Exception as problem:
            outcome = repr(problem)
        came["forged" if forged else what] += 1
        if outcome and not (forged and outcome == "other bytes"):
            wrong.append(f"{name}: {what}: {outcome}")
    shutil.rmtree(resumes.place)
    return {"cases": came.total(), "stages": len(stages), **came, "wrong": wrong[:20]}


ATTACK = Attack(run, list(WAYS), "cases", 3000, prepare=prepare, disk=memory())
