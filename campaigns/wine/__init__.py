"""slotmoe on Windows, as far as Wine shows it: a Windows Python that has this tree's wheel does
what this Python does, and both must come to the same.

The Windows Python is made once and stays in the folder of --wine, 1.3 GB.  docs/install.md lists
what Wine cannot show.
"""

import os
from contextlib import contextmanager
from pathlib import Path

from campaigns.runner import Attack
from campaigns.wine import commands, console, files, live
from campaigns.wine.environment import Pair, made

# By part: ``part(pair, aim)`` gives its report.
PARTS = {**commands.PARTS, **console.PARTS, **files.PARTS, **live.PARTS}


@contextmanager
def prepare(folder, given):
    with made(given.wine.resolve(), given.wheel) as (python, kernels):
        yield folder, python, kernels


def run(place, part, aim):
    folder, *windows = place
    with Pair(folder / part, *windows) as pair:
        return PARTS[part](pair, aim)


HOME = os.environ.get("SLOTMOE_WINE") or Path.home() / ".cache" / "slotmoe-wine"
WINE = {"type": Path, "metavar": "FOLDER", "default": Path(HOME)}
WINE["help"] = f"of the Windows Python [$SLOTMOE_WINE, or {HOME}]"
WHEEL = {"type": Path, "metavar": "FILE", "help": "to install [what scripts/wheels makes]"}
OPTIONS = {"wine": WINE, "wheel": WHEEL}
ATTACK = Attack(run, PARTS, "kills", 8, prepare=prepare, options=OPTIONS)
