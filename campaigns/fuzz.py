"""Changed bytes for every parser that sees a stranger's.

Each parser gets good inputs that were changed in a few places, JSON as values and the rest as
bytes.  It must return or raise an error of ours, within 2 seconds of CPU and 200 MB.  It runs in a
forked child, so that a crash is found too; the case that did it is kept.  No case may leave a file
open, and the memory of all cases together is bounded, so that leaks are found too.

Where atheris is installed, inputs that reach code for the first time are changed further.
"""

import importlib.util
import io
import json
import math
import mmap
import os
import random
import resource
import signal
import tempfile
import time
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path

from campaigns.runner import Attack
from tests.support.disk import forked, memory

SECONDS, MEMORY = 2, 200 << 20
LARGEST = 16 << 20  # bytes of a case
HANGS = 30  # seconds of wall time after which a case is given up
PARTS = (
    *("config", "index", "header", "manifest", "gguf", "resident", "experts", "session", "block"),
    *("tiktoken", "tokenizer", "template", "request"),
)
_ODD = [
    *(None, True, False, 0, -1, 1, 2, 255, 256, 300, 301, 20_000_000, 10**40, -(10**40)),
    *(power + off for power in (1 << 31, 1 << 32, 1 << 63, 1 << 64) for off in (-1, 0, 1)),
    *(-(1 << 31), -(1 << 63), 0.0, -0.5, 5e-324, 1e38, 1e308, -1e308, math.inf, math.nan),
    *("", "a", "\0", "é", "\ud800", "../x", "/etc/passwd", "9" * 5000),
    *([], {}, [[]], [{}], {"": {}}, [0] * 3000, [[[[[[[[]]]]]]]]),
]
ODD = [json.dumps(value) for value in _ODD]


def changed_value(value, chance):
    """JSON with one to three changes: another value, one less, one doubled, or two exchanged."""
    value = {"": value}
    for _ in range(chance.randint(1, 3)):
        inside, key = _place(value, chance)
        other, other_key = _place(value, chance)
        match chance.randrange(6):
            case 0 if inside is not value:
                del inside[key]
            case 1 if isinstance(inside, dict) and inside is not value:
                name = chance.choice(("", "x" * 300, "é", f"{key}_", f"{other_key}"))
                inside[name] = _copy(inside[key])
            case 2:
                inside[key] = _copy(other[other_key])
            case 3 if type(inside[key]) is int:
                inside[key] += chance.choice((-1, 1, 7, 1 << 20))
            case 4 if type(inside[key]) is str:
                inside[key] = _changed_text(inside[key], chance)
            case _:
                inside[key] = json.loads(chance.choice(ODD))
    return value.get("")


def _copy(value):
    return json.loads(json.dumps(value))  # some ten times as fast as copy.deepcopy


def _changed_text(text, chance):
    """A part of it is gone, is there twice or elsewhere, or another character."""
    start, at = chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)
    end = start + chance.choice((1, 1, 2, 8, 64))
    part, rest = text[start:end], text[:start] + text[end:]
    match chance.randrange(4):
        case 0:
            return rest
        case 1:
            return text[:at] + part + text[at:]
        case 2:
            return rest[:at] + part + rest[at:]
    return text[:at] + chance.choice("\0\n\"%'*+-.0^{}[]()|\\\u00e9\ud800") + text[at + 1 :]


def _place(value, chance):
    """A container somewhere in ``value`` and one of its keys.  A field is chosen as often as all
    that a long list beside it has."""
    inside, key = value, ""
    while chance.random() < (0.98 if inside is value else 0.8):
        if not (isinstance(inside[key], dict | list) and inside[key]):
            break
        inside = inside[key]
        keys = [*inside] if isinstance(inside, dict) else range(len(inside))
        key = chance.choice(keys)
    return inside, key


def changed_bytes(data, chance):
    """One to four changes, most of them near the beginning."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        reach = chance.choice((16, 256, len(changed)))
        at = chance.randrange(max(min(len(changed), reach), 1))
        match chance.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                number = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
                changed[at : at + 8] = number.to_bytes(8, "little")
            case 2:
                del changed[at : at + chance.choice((1, 8, 1 << 20))]
            case 3:
                start = chance.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + chance.choice((1, 8, 64))]
            case _:
                changed[at : at + 1] = chance.choice((b"{", b"[" * 2000, b'"', b",", b"\xff"))
    return bytes(changed)


def mutated(data, chance):
    """One case: of bytes, or of a JSON value, whose text is damaged now and then too."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return changed_bytes(data, chance)
    data = json.dumps(changed_value(value, chance)).encode()
    return changed_bytes(data, chance) if chance.random() < 0.1 else data


@contextmanager
def prepare(folder, given):
    """Imports everything once, and not in every child."""
    guided = importlib.util.find_spec("atheris") is not None and not given.blind
    instrumented = nullcontext()
    if guided:
        import atheris

        instrumented = atheris.instrument_imports(include=["slotmoe"])
    with redirect_stderr(io.StringIO()), instrumented:
        from campaigns.parsers import PARSERS
    yield folder, PARSERS, guided


def run(place, name, aim):
    """Ends at the first problem, whose input is kept."""
    folder, parsers, guided = place
    with tempfile.TemporaryDirectory(dir=folder) as work:
        report, case = Path(work) / "report.json", mmap.mmap(-1, LARGEST)  # cheaper than a file
        child = Child(parsers[name], case, report, aim)
        code = os.waitstatus_to_exitcode(forked(partial(child.attack, Path(work), guided)))
        found = {"cases": 0, "refused": 0, "problem": f"the process ended with {code}"}
        if report.exists():
            found = json.loads(report.read_text())
    problem = found.pop("problem")
    if problem:
        kept = Path(tempfile.gettempdir()) / f"slotmoe-fuzz-{name}"
        kept.write_bytes(case[8 : 8 + int.from_bytes(case[:8], "little")])
        found["kept"] = str(kept)
    return {"guided": guided, **found, "wrong": [problem] * bool(problem)}


class Child:
    """One case after the other, until something is wrong or no more is wanted: then the ``report``
    is written and the process ends.  ``case`` is shared with the parent: a number and so many
    bytes."""

    def __init__(self, parser, case, report, aim):
        self.parser, self.case, self.report, self.aim = parser, case, report, aim
        self.lowest, self.found = 0, {"cases": 0, "refused": 0, "problem": ""}

    def attack(self, folder, guided):
        values, self.parse = self.parser(folder)
        corpus = [it if isinstance(it, bytes) else json.dumps(it).encode() for it in values]
        for good in corpus:  # which also imports what is imported late
            assert self.parse(good) is not False, "the good input is refused"
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if guided:
            self.guided(corpus, folder / "corpus")
        while True:
            self.one(mutated(self.aim.chance.choice(corpus), self.aim.chance))

    def guided(self, corpus, folder):
        """By libFuzzer, which keeps what reaches code for the first time and chooses among it."""
        import atheris

        folder.mkdir()
        for number, good in enumerate(corpus):
            (folder / str(number)).write_bytes(good)

        def change(data, longest, seed):
            return mutated(data, random.Random(seed))[:longest]

        # What happens in a case is ours to judge.
        limits = ["-timeout=0", "-rss_limit_mb=0", "-malloc_limit_mb=0", f"-max_len={LARGEST >> 2}"]
        signals = ("abrt", "bus", "fpe", "ill", "int", "segv", "term", "xfsz")
        unhandled = [f"-handle_{name}=0" for name in signals]
        command = ["fuzz", *limits, *unhandled, "-mutate_depth=1"]
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)  # libFuzzer talks much
        seed = f"-seed={self.aim.given.seed + 1}"
        atheris.Setup([*command, seed, str(folder)], self.one, custom_mutator=change)
        atheris.Fuzz()

    def one(self, data):
        if not self.lowest:  # before the first case: what is open, and the memory that is taken
            self.lowest = lowest_descriptor()
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        found, self.case[: 8 + len(data)] = self.found, len(data).to_bytes(8, "little") + data
        signal.alarm(HANGS)
        started = time.process_time()
        try:
            found["refused"] += not self.parse(data)
        except BaseException as problem:
            found["problem"] = repr(problem)[:300]
        took = time.process_time() - started
        found["cases"] += 1
        if took > SECONDS:
            found["problem"] = f"took {took:.1f} s of CPU"
        if lowest_descriptor() > self.lowest:
            found["problem"] = found["problem"] or "left a file open"
        if found["problem"] or not self.aim.goes_on(found["cases"]):
            signal.alarm(0)
            self.report.write_text(json.dumps(found))
            os._exit(0)


def lowest_descriptor():
    """The lowest that is free: one that is left open makes it grow."""
    number = os.dup(2)
    os.close(number)
    return number


BLIND = {"blind": {"action": "store_true", "help": "even where atheris is installed"}}
HOW = {"seconds": 600, "prepare": prepare, "options": BLIND, "disk": memory()}
ATTACK = Attack(run, PARTS, "cases of each parser", 1_000_000, **HOW)
