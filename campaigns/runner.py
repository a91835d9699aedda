"""What campaigns share: what a module offers, how long it runs, its chance, progress and report."""

import argparse
import json
import math
import os
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


class Aim:
    """When a run of one part ends, and its chance, which the seed and the part alone decide."""

    def __init__(self, label: str, given: argparse.Namespace):
        self.given, self.count, self._label = given, given.count, label
        self.chance = random.Random(f"{label} {given.seed}")
        self._out = open(os.dup(2), "w")  # libFuzzer takes stderr away
        self.begin()

    def begin(self):
        """The time begins now."""
        self._began = self._shown = time.monotonic()

    def close(self):
        self._out.close()

    def goes_on(self, done: int) -> bool:
        """Whether more is wanted after ``done`` cases.  Shows how far it is now and then."""
        now = time.monotonic()
        if now - self._shown > (1 if self._out.isatty() else 60):
            self._shown = now
            end = "\r" if self._out.isatty() else "\n"
            seconds = f"{now - self._began:,.0f} s"
            line = f"{self._label}: {done:,} of {self.count:,}, {seconds}  "
            print(line, end=end, file=self._out, flush=True)
        return done < self.count and now - self._began < self.given.seconds


@dataclass(frozen=True)
class Attack:
    """What the module of a campaign offers as ``ATTACK``.

    ``prepare(folder, given)`` makes what all ``parts`` attack, and ends it.  ``run(place, part,
    aim)`` attacks one part; its report has the list ``wrong``, and an exception is wrong too.  It
    ends after ``count`` of ``each``, or after ``seconds``.  ``options`` are argparse's words for
    more options, and ``disk`` is where the folder is made.
    """

    run: Callable[[Any, str, Aim], dict[str, Any]]
    parts: Collection[str]
    each: str = ""
    count: int = 0
    seconds: float = math.inf
    prepare: Callable[[Path, argparse.Namespace], AbstractContextManager[Any]] = (
        lambda folder, given: nullcontext(folder)
    )
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    disk: str | None = None


def parse(name: str, about: str | None, attack: Attack, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m campaigns {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(attack.parts)}")
    today, most = date.today().toordinal(), attack.seconds
    add("--seed", type=int, default=today, help="of all chance [today's number]")
    limit = "no limit" if most == math.inf else f"{most:.0f}"
    add("--seconds", type=float, default=most, help=f"for each part [{limit}]")
    parser.set_defaults(count=0)
    if attack.each:
        count = attack.count
        add("--count", type=int, default=count, help=f"{attack.each} [{count:,}]")
    for option, words_of in attack.options.items():
        add(f"--{option}", **words_of)
    given = parser.parse_args(words)
    for part in given.parts:
        if part not in attack.parts:
            parser.error(f"no part {part!r}; there are {', '.join(attack.parts)}")
    return given


def play(name: str, attack: Attack, given: argparse.Namespace) -> bool:
    """Attack each part and print its report, a line of JSON; whether nothing was wrong."""
    good = True
    with tempfile.TemporaryDirectory(dir=attack.disk) as folder:
        os.environ["SLOTMOE_CACHE"] = f"{folder}/cache"
        with attack.prepare(Path(folder), given) as place:
            for part in given.parts or attack.parts:
                try:
                    with closing(Aim(f"{name} {part}", given)) as aim:
                        found = attack.run(place, part, aim)
                except Exception as problem:
                    traceback.print_exc()
                    found = {"wrong": [repr(problem)]}
                report = {"campaign": name, "part": part, "seed": given.seed, **found}
                print(json.dumps(report), flush=True)
                if found["wrong"]:
                    good = False
                    again = f"python -m campaigns {name} {shlex.quote(part)} --seed {given.seed}"
                    print(f"again: {again}", file=sys.stderr)
    return good
