"""Text that would command a terminal, in every string of what strangers write.

Titles, colours, the clipboard, the other direction and forged lines stand in each key and value of
a checkpoint, a GGUF file, an export, a session, a trace and a request, in names of files and
folders, and in what a hub answers.  Whatever reads that says no such character, and JSON parses.
"""

import os
from contextlib import contextmanager

from campaigns.runner import Attack
from slotmoe.offload.runtime import Runtime
from tests.support import escapes
from tests.support.hub import HOME, HUB, TOKEN
from tests.support.served import Served


@contextmanager
def prepare(folder, given):
    os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_HOME": HOME.name, "HF_TOKEN": TOKEN}
    os.environ |= {"NO_PROXY": "127.0.0.1", **escapes.prepare(folder)}
    yield folder


def served(place, most, chance):
    options = {"ram": "2GiB", "context": 256, "sequences": 8}
    with (
        Runtime.open(place / "export", **options) as runtime,
        Served(runtime, is_logged=True) as server,
    ):
        yield from escapes.ask(server.port, most, chance)


def run(place, part, aim):
    done, wrong = 0, []
    if part == "requests":
        problems = (("a request", problem) for problem in served(place, aim.count, aim.chance))
    else:
        lines = escapes.PARTS[part](place, aim.count, aim.chance)
        problems = ((words, escapes.wrong(words)) for words in lines)
    for words, problem in problems:
        done += 1
        wrong += [f"{words}: {problem}"] * bool(problem)
    return {"commands": done, "wrong": wrong}


PARTS = [*escapes.PARTS, "requests"]
ATTACK = Attack(run, PARTS, "variants of each file", 1_000_000, prepare=prepare)
