"""Mutated bytes for every parser that sees a stranger's.  ``python -m tests.faults.fuzz`` runs it.

Each parser gets good inputs that were changed in a few places, JSON as values and the rest as
bytes.  It must return or raise an error of ours, within 2 seconds of CPU and 200 MB.  It runs in a
forked child, so that a crash is found too; the case that did it is kept.  No case may leave a file
open, and the memory of all cases together is bounded, so that leaks are found too.

Where atheris is installed, inputs that reach code for the first time are changed further.
"""

import argparse
import importlib.util
import io
import json
import mmap
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.parsers import PARSERS, SLOW, import_all
from tests.support.disk import forked, memory

SECONDS, MEMORY = 2, 200 << 20
LARGEST = 16 << 20  # bytes of a case
HANGS = 30  # seconds of wall time after which a case is given up
_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 255, 1 << 31, 1 << 63, 1 << 64, 10**40, -(10**40)),
    *(0.0, -0.5, 1e-320, 1e308, "", "a", "\0", "é", "\ud800", "../x", "/etc/passwd", "9" * 5000),
    *([], {}, [[]], [{}], {"": {}}, [0] * 3000, [[[[[[[[]]]]]]]]),
]
ODD = [json.dumps(value) for value in _ODD]


def changed_value(text: str, generator: random.Random) -> Any:
    """JSON with one to three changes: another value, one less, one doubled, or two exchanged."""
    value = {"": json.loads(text)}
    for _ in range(generator.randint(1, 3)):
        inside, key = _place(value, generator)
        other, other_key = _place(value, generator)
        match generator.randrange(6):
            case 0 if inside is not value:
                del inside[key]
            case 1 if isinstance(inside, dict) and inside is not value:
                name = generator.choice(("", "x" * 300, "é", f"{key}_", f"{other_key}"))
                inside[name] = _copy(inside[key])
            case 2:
                inside[key] = _copy(other[other_key])
            case 3 if type(inside[key]) is int:
                inside[key] += generator.choice((-1, 1, 7, 1 << 20))
            case 4 if type(inside[key]) is str:
                inside[key] = _changed_text(inside[key], generator)
            case _:
                inside[key] = json.loads(generator.choice(ODD))
    return value.get("")


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))  # some ten times as fast as copy.deepcopy


def _changed_text(text: str, generator: random.Random) -> str:
    """A part of it is gone, is there twice or elsewhere, or another character."""
    start, at = generator.randrange(len(text) + 1), generator.randrange(len(text) + 1)
    end = start + generator.choice((1, 1, 2, 8, 64))
    part, rest = text[start:end], text[:start] + text[end:]
    match generator.randrange(4):
        case 0:
            return rest
        case 1:
            return text[:at] + part + text[at:]
        case 2:
            return rest[:at] + part + rest[at:]
    return text[:at] + generator.choice("\0\n\"%'*+-.0^{}[]()|\\\u00e9\ud800") + text[at + 1 :]


def _place(value: dict[str, Any], generator: random.Random) -> tuple[Any, Any]:
    """A container somewhere in ``value`` and one of its keys.  A field is chosen as often as all
    that a long list beside it has."""
    inside: Any = value
    key: Any = ""
    while generator.random() < (0.98 if inside is value else 0.8):
        if not (isinstance(inside[key], dict | list) and inside[key]):
            break
        inside = inside[key]
        keys = [*inside] if isinstance(inside, dict) else range(len(inside))
        key = generator.choice(keys)
    return inside, key


def changed_bytes(data: bytes, generator: random.Random) -> bytes:
    """One to four changes, most of them near the beginning."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        reach = generator.choice((16, 256, len(changed)))
        at = generator.randrange(max(min(len(changed), reach), 1))
        match generator.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                number = generator.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
                changed[at : at + 8] = number.to_bytes(8, "little")
            case 2:
                del changed[at : at + generator.choice((1, 8, 1 << 20))]
            case 3:
                start = generator.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + generator.choice((1, 8, 64))]
            case _:
                changed[at : at + 1] = generator.choice((b"{", b"[" * 2000, b'"', b",", b"\xff"))
    return bytes(changed)


def mutated(good: bytes | str, generator: random.Random) -> bytes:
    """One case: of bytes, or of the text of a JSON value, which is damaged now and then too."""
    if isinstance(good, bytes):
        return changed_bytes(good, generator)
    data = json.dumps(changed_value(good, generator)).encode()
    return changed_bytes(data, generator) if generator.random() < 0.1 else data


def run(
    name: str, folder: Path, seconds: float, seed: int, most: int = 1 << 60, guided: bool = False
) -> dict[str, Any]:
    """Fuzz one parser: how many ``cases``, how many of them were ``refused``, and the ``problem``
    that ended it, whose input is ``folder/case``.  ``guided`` by the code that they reach."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    case = mmap.mmap(-1, LARGEST)  # shared with the child, and costs less than a file

    def attack() -> None:
        with PARSERS[name](folder) as (values, parse):
            corpus = [good if isinstance(good, bytes) else json.dumps(good) for good in values]
            attack = _Attack(parse, case, report, most, time.monotonic() + seconds)
            attack.begin(corpus)
            attack.guided(corpus, folder, seed) if guided else attack.blind(corpus, name, seed)

    code = os.waitstatus_to_exitcode(forked(attack))
    size = int.from_bytes(case[:8], "little")
    (folder / "case").write_bytes(case[8 : 8 + size])
    if report.exists():
        return dict(json.loads(report.read_text()))
    return {"cases": 0, "refused": 0, "problem": f"the process ended with {code}"}


@dataclass
class _Attack:
    """One case after the other, until something is wrong, there were the ``most``, or time is over:
    then the ``report`` is written and the process ends."""

    parse: Callable[[bytes], object]
    case: mmap.mmap
    report: Path
    most: int
    end: float
    lowest: int = 0
    found: dict[str, Any] = field(default_factory=lambda: {"cases": 0, "refused": 0, "problem": ""})

    def begin(self, corpus: list[bytes | str]) -> None:
        for good in corpus:  # which also imports what is imported late
            assert self.parse(_kept(self.case, good)) is not False, "the good input is refused"
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def blind(self, corpus: list[bytes | str], name: str, seed: int) -> NoReturn:
        generator = random.Random(f"{name} {seed}")
        while True:
            self.one(mutated(generator.choice(corpus), generator))

    def guided(self, corpus: list[bytes | str], folder: Path, seed: int) -> None:
        """By libFuzzer, which keeps what reaches code for the first time and chooses among it."""
        import atheris

        (folder / "corpus").mkdir()
        for number, good in enumerate(corpus):
            data = good if isinstance(good, bytes) else good.encode()
            (folder / "corpus" / str(number)).write_bytes(data)

        def change(data: bytes, longest: int, seed: int) -> bytes:
            return mutated(_good(data), random.Random(seed))[:longest]

        # What happens in a case is ours to judge.
        limits = ["-timeout=0", "-rss_limit_mb=0", "-malloc_limit_mb=0", f"-max_len={LARGEST >> 2}"]
        signals = ("abrt", "bus", "fpe", "ill", "int", "segv", "term", "xfsz")
        unhandled = [f"-handle_{name}=0" for name in signals]
        command = ["fuzz", *limits, *unhandled, "-mutate_depth=1", f"-seed={seed + 1}"]
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)  # libFuzzer talks much
        atheris.Setup([*command, str(folder / "corpus")], self.one, custom_mutator=change)
        atheris.Fuzz()

    def _bound(self) -> None:
        """What is open and what memory is taken before the first case, whoever took it."""
        self.lowest = _lowest_descriptor()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))

    def one(self, given: bytes) -> None:
        if not self.lowest:
            self._bound()
        data, found = _kept(self.case, given), self.found
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
        if _lowest_descriptor() > self.lowest:
            found["problem"] = found["problem"] or "left a file open"
        if found["problem"] or found["cases"] >= self.most or time.monotonic() > self.end:
            signal.alarm(0)
            self.report.write_text(json.dumps(found))
            os._exit(0)


def _good(data: bytes) -> bytes | str:
    """An input as ``mutated`` takes it."""
    try:
        text = data.decode()
        json.loads(text)
    except (ValueError, RecursionError):
        return data
    return text


def _kept(case: mmap.mmap, good: bytes | str) -> bytes:
    """The bytes of an input, which are in ``case`` from now on, behind their number."""
    data = good if isinstance(good, bytes) else good.encode()
    case[: 8 + len(data)] = len(data).to_bytes(8, "little") + data
    return data


def _lowest_descriptor() -> int:
    """The lowest that is free: one that is left open makes it grow."""
    number = os.dup(2)
    os.close(number)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parsers", nargs="*", help=f"of {', '.join(PARSERS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1 << 60, help="at most, for each parser")
    parser.add_argument("--slow-cases", type=int, default=1 << 60, help=", ".join(SLOW))
    parser.add_argument("--blind", action="store_true", help="even where atheris is installed")
    given = parser.parse_args()
    failed, guided = False, importlib.util.find_spec("atheris") is not None and not given.blind
    if guided:
        import atheris

        with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["slotmoe"]):
            import_all()
    else:
        import_all()
    for name in given.parsers or PARSERS:
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            most = given.slow_cases if name in SLOW else given.cases
            found = run(name, Path(folder), given.seconds, given.seed, most, guided)
            if found["problem"]:
                failed = True
                kept = Path(tempfile.gettempdir()) / f"slotmoe-fuzz-{name}"
                kept.write_bytes((Path(folder) / "case").read_bytes())
                found["case"] = str(kept)
        print(json.dumps({"parser": name, "guided": guided, **found}), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
