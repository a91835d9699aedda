"""Two or three processes at one thing: a destination, a cache, a session, a folder of sessions, an
export's predictor.  ``python -m tests.faults.races`` runs it.

Each begins at a moment by chance; some are stopped for a while, or ended by SIGTERM, SIGHUP or
SIGKILL at another.  A process may be refused with an error of ours and by nothing else, whatever is
there then has to be right, and one that comes alone afterwards must succeed.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.parsers import import_all, make_export
from tests.support.disk import digests, forked, memory

SECONDS = 60  # after which a process hangs
DONE, REFUSED = 0, 3
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h: orphans become this process's children
ALONE = 9  # the number of the process that comes afterwards
Tick = Callable[[], object]


class Race:
    """What several processes do in a ``folder`` at once; each calls ``tick`` whenever it has done
    what it may do many times."""

    def __init__(self, folder: Path):
        self.folder = folder

    def prepare(self) -> None:
        """What is there before, made by a child."""

    def do(self, number: int, tick: Tick) -> None:
        """What the process ``number`` does."""

    def check(self, done: int, died: int) -> None:
        """Raises where anything is wrong that is there; there were ``done`` ticks, and ``died``
        processes were ended."""


class Destination(Race):
    """The same export, made by each; whoever comes late is refused."""

    def __init__(self, folder: Path):
        import_all()
        super().__init__(folder)
        self.source, alone = folder.with_name("source"), folder.with_name("alone")
        shutil.rmtree(alone, ignore_errors=True)
        assert forked(partial(self._begin, alone)) == 0
        self.wanted = digests(alone)

    def _begin(self, alone: Path) -> None:
        from tests.support.tiny import SMALL, write_checkpoint

        write_checkpoint(self.source, shards=2, **SMALL)
        self._make(alone)

    def _make(self, place: Path) -> None:
        from slotmoe.offload.ingest.quantize import quantize

        quantize(self.source, place, workers=1)

    def do(self, number: int, tick: Tick) -> None:
        self._make(self.folder / "export")

    def check(self, done: int, died: int) -> None:
        made = self.folder / "export"
        assert not made.exists() or digests(made) == self.wanted, "wrong bytes"
        assert died or [path.name for path in self.folder.iterdir()] == ["export"], "litter"


class Cache(Destination):
    """The same, in the cache folder; whoever comes late waits, and is never refused."""

    def do(self, number: int, tick: Tick) -> None:
        from slotmoe.errors import SlotmoeError
        from slotmoe.offload.ingest.cached import cached_export

        try:
            made = cached_export(self.source, self.folder)
        except SlotmoeError as problem:
            raise AssertionError("refused") from problem
        assert digests(made) == self.wanted, "wrong bytes"

    def check(self, done: int, died: int) -> None:
        made = [path for path in self.folder.iterdir() if (path / "slotmoe.json").exists()]
        whole = [path for path in made if path.suffix != ".partial"]
        assert all(digests(path) == self.wanted for path in whole), "wrong bytes"
        assert died or len(made) == 1, "no export, or two"


class Session(Race):
    """One named session: each holder adds a token to it, and none is lost."""

    def __init__(self, folder: Path):
        import slotmoe.offload.sessions.names  # noqa: F401, once and not in every child

        super().__init__(folder)

    def do(self, number: int, tick: Tick) -> None:
        from slotmoe.offload.sessions.names import NamedSession, Saved

        text, until = [{"role": "text", "content": "x"}], time.monotonic() + 0.1
        while time.monotonic() < until:
            with NamedSession(self.folder, "plans") as session:
                before = session.saved.tokens if session.saved is not None else []
                session.save(Saved(bytes(16), [*before, 7], "text", text))
                tick()

    def check(self, done: int, died: int) -> None:
        from slotmoe.offload.sessions.names import listing

        found = [session.saved for session in listing(self.folder)]
        assert None not in found, "a damaged session"
        count = sum(len(saved.tokens) for saved in found if saved is not None)
        assert done <= count <= done + died, f"{count} of {done} tokens"


class Sessions(Session):
    """Texts in one folder, which counts the bytes of all; each process saves its own and reads
    those of others."""

    def do(self, number: int, tick: Tick) -> None:
        from slotmoe.offload.sessions.blocks import BlockFolder, chain

        store = BlockFolder(self.folder / "blocks", 1 << 16, self._refuse)
        for length in range(1, 400, 40):
            blocks = list(chain(bytes([number]) * 16, [*range(length)]))
            store.add(blocks, 24, lambda block: memoryview(bytes(24 * len(block.tokens))))
            for other in range(3):
                found = store.read(bytes([other]) * 16, 0, [*range(30)], 24)
                assert found is None or found[1] == bytes(len(found[1])), "another's latents"
            tick()

    @staticmethod
    def _refuse(remark: str) -> None:
        assert "been saving for long" in remark, remark

    def check(self, done: int, died: int) -> None:
        blocks = self.folder / "blocks"
        noted = int((blocks / "lock").read_bytes()) if (blocks / "lock").exists() else 0
        there = sum(path.stat().st_size for path in blocks.glob("??/*") if path.suffix != ".tmp")
        assert noted == there or (died and noted > there), f"{noted} bytes noted, {there} there"
        assert there <= 1 << 16, "more than the limit"


class Predictor(Race):
    """An export whose predictor each replaces by another; whoever reads gets one of them whole."""

    def __init__(self, folder: Path):
        import_all()
        super().__init__(folder)

    def prepare(self) -> None:
        make_export(self.folder)

    def do(self, number: int, tick: Tick) -> None:
        from slotmoe.quant.export.writer import write_predictor
        from tests.support.predictor import random_tensors
        from tests.support.tiny import SMALL

        sizes = SMALL["n_routed_experts"], SMALL["hidden_size"]
        for _ in range(4):
            write_predictor(self.folder / "export", random_tensors(number, *sizes))
            self.check(1, 0)
            tick()

    def check(self, done: int, died: int) -> None:
        from slotmoe.quant.export.reader import Export

        with Export.open(self.folder / "export") as export:
            assert export.predictor() is not None


RACES = {
    "destination": Destination,
    "cache": Cache,
    "session": Session,
    "sessions": Sessions,
    "predictor": Predictor,
}


def attacked(
    name: str, folder: Path, rounds: int, seed: int = 0, seconds: float = 1e9
) -> dict[str, Any]:
    """``rounds`` of a race, or fewer where ``seconds`` are over; how its processes ended, and what
    was ``wrong``."""
    race, generator = RACES[name](folder), random.Random(f"{name} {seed}")
    ends, wrong, played = Counter[str](), list[str](), 0
    until = time.monotonic() + seconds
    while played < rounds and not wrong and time.monotonic() < until:
        played += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        assert forked(race.prepare) == 0
        done, died = _round(race, generator, ends, wrong)
        if not wrong:
            _judge(partial(race.check, done, died), wrong)
        if not wrong:
            _wait_for_orphans()
            alone = _Runner(race, ALONE, 0.0, None, 0.0)
            alone.wait(ends)
            if alone.code != DONE:
                wrong.append(f"one that came alone afterwards ended with {alone.code}")
            _judge(partial(race.check, done + alone.ticks, died), wrong)
    return {"race": name, "rounds": played, **ends, "wrong": wrong}


def _wait_for_orphans() -> None:
    """Children of the dead, which may hold their locks for a moment before they begin."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


def _judge(check: Callable[[], object], wrong: list[str]) -> None:
    try:
        check()
    except Exception as problem:
        wrong.append(repr(problem)[:300])


def _round(
    race: Race, generator: random.Random, ends: Counter[str], wrong: list[str]
) -> tuple[int, int]:
    """All processes of one; how many ticks there were and how many died."""
    signals = (None, None, signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    runners = [
        _Runner(race, number, generator.random() / 20, generator.choice(signals), moment)
        for number in range(generator.choice((2, 3)))
        for moment in (generator.random() / 5,)
    ]
    for runner in sorted(runners, key=lambda runner: runner.moment):
        runner.attack()
    for runner in runners:
        runner.wait(ends)
        lawful = runner.code in (DONE, REFUSED) or runner.is_dead
        if not lawful:
            wrong.append(f"a process ended with {runner.code}")
    return sum(runner.ticks for runner in runners), sum(runner.is_dead for runner in runners)


class _Runner:
    """One process, which begins after some seconds, and gets a signal at a ``moment``."""

    def __init__(self, race: Race, number: int, after: float, attack: Any, moment: float):
        self._signal, self.moment, self._began = attack, moment, time.monotonic()
        self._ticks = os.memfd_create("ticks")
        self._child, self.code, self.ticks = os.fork(), -1, 0
        if not self._child:
            self._run(race, number, after)

    def _run(self, race: Race, number: int, after: float) -> None:
        from slotmoe.errors import SlotmoeError

        # As the command line does.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
        signal.alarm(SECONDS)
        code = 1
        try:
            time.sleep(after)
            race.do(number, lambda: os.write(self._ticks, b"."))
            code = DONE
        except SlotmoeError as problem:
            code = REFUSED
            if number == ALONE:
                print(problem, file=sys.stderr)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as problem:
            print(repr(problem), file=sys.stderr)
        finally:
            os._exit(code)

    def attack(self) -> None:
        time.sleep(max(self._began + self.moment - time.monotonic(), 0))
        if self._signal is not None:
            os.kill(self._child, self._signal)
        if self._signal is signal.SIGSTOP:
            time.sleep(0.02)
            os.kill(self._child, signal.SIGCONT)

    def wait(self, ends: Counter[str]) -> None:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        self.ticks = os.fstat(self._ticks).st_size
        os.close(self._ticks)
        lawful = {DONE: "done", REFUSED: "refused"}
        ends["dead" if self.is_dead else lawful.get(self.code, "other")] += 1

    @property
    def is_dead(self) -> bool:
        """By the signal that it got."""
        own = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
        return self._signal in own and self.code in (own[self._signal], -int(self._signal))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("races", nargs="*", help=f"of {', '.join(RACES)}; all by default")
    parser.add_argument("--rounds", type=int, default=1000, help="of each race")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each race")
    parser.add_argument("--seed", type=int, default=0)
    given, failed = parser.parse_args(), False
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(dir=memory()) as name:
        for race in given.races or RACES:
            place = Path(name) / "work"
            found = attacked(race, place, given.rounds, given.seed, given.seconds)
            failed = failed or bool(found["wrong"])
            print(json.dumps(found), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
