"""Mutated bytes for every parser that sees a stranger's.  ``python -m tests.faults.fuzz`` runs it.

Each parser gets good inputs that were changed in a few places, JSON as values and the rest as
bytes.  It must return or raise an error of ours, within 2 seconds of CPU and 200 MB.  It runs in a
forked child, so that a crash is found too; the case that did it is kept.  No case may leave a file
open, and the memory of all cases together is bounded, so that leaks are found too.
"""

import argparse
import json
import mmap
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        match generator.randrange(5):
            case 0 if inside is not value:
                del inside[key]
            case 1 if isinstance(inside, dict) and inside is not value:
                name = generator.choice(("", "x" * 300, "é", f"{key}_", f"{other_key}"))
                inside[name] = _copy(inside[key])
            case 2:
                inside[key] = _copy(other[other_key])
            case 3 if type(inside[key]) is int:
                inside[key] += generator.choice((-1, 1, 7, 1 << 20))
            case _:
                inside[key] = json.loads(generator.choice(ODD))
    return value.get("")


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))  # some ten times as fast as copy.deepcopy


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


def run(name: str, folder: Path, seconds: float, seed: int, most: int = 1 << 60) -> dict[str, Any]:
    """Fuzz one parser: how many ``cases``, how many of them were ``refused``, and the ``problem``
    that ended it, whose input is ``folder/case``."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    case = mmap.mmap(-1, LARGEST)  # shared with the child, and costs less than a file

    def attack() -> None:
        with PARSERS[name](folder) as (values, parse):
            corpus = [good if isinstance(good, bytes) else json.dumps(good) for good in values]
            found = _attack(corpus, parse, case, seconds, random.Random(f"{name} {seed}"), most)
        report.write_text(json.dumps(found))
        os._exit(0)

    code = os.waitstatus_to_exitcode(forked(attack))
    size = int.from_bytes(case[:8], "little")
    (folder / "case").write_bytes(case[8 : 8 + size])
    if report.exists():
        return dict(json.loads(report.read_text()))
    return {"cases": 0, "refused": 0, "problem": f"the process ended with {code}"}


def _attack(
    corpus: list[bytes | str],
    parse: Callable[[bytes], object],
    case: mmap.mmap,
    seconds: float,
    generator: random.Random,
    most: int,
) -> dict[str, Any]:
    for good in corpus:  # which also imports what is imported late
        assert parse(_kept(case, good)) is not False, "the good input is refused"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    lowest = _lowest_descriptor()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    found = {"cases": 0, "refused": 0, "problem": ""}
    end = time.monotonic() + seconds
    while time.monotonic() < end and found["cases"] < most:
        data = _kept(case, mutated(generator.choice(corpus), generator))
        signal.alarm(HANGS)
        started = time.process_time()
        try:
            found["refused"] += not parse(data)
        except BaseException as problem:
            found["problem"] = repr(problem)[:300]
        took = time.process_time() - started
        found["cases"] += 1
        if took > SECONDS:
            found["problem"] = f"took {took:.1f} s of CPU"
        if _lowest_descriptor() > lowest:
            found["problem"] = found["problem"] or "left a file open"
        if found["problem"]:
            break
    signal.alarm(0)
    return found


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
    given = parser.parse_args()
    failed = False
    import_all()
    for name in given.parsers or PARSERS:
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            most = given.slow_cases if name in SLOW else given.cases
            found = run(name, Path(folder), given.seconds, given.seed, most)
            if found["problem"]:
                failed = True
                kept = Path(tempfile.gettempdir()) / f"slotmoe-fuzz-{name}"
                kept.write_bytes((Path(folder) / "case").read_bytes())
                found["case"] = str(kept)
        print(json.dumps({"parser": name, **found}), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
