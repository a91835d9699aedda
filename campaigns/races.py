"""Two or three processes at one thing: a destination, a cache, a session, a folder of sessions.

Each begins at a moment by chance; some are stopped for a while, or ended by SIGTERM, SIGHUP or
SIGKILL at another.  A process may be refused with an error of ours and by nothing else, whatever is
there then has to be right, and one that comes alone afterwards must succeed.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial

from campaigns.runner import Attack
from slotmoe.errors import SlotmoeError
from slotmoe.offload.ingest.cached import cached_export
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved, listing
from tests.support.disk import digests, forked, memory, per_token
from tests.support.tiny import SMALL, write_checkpoint

HANGS = 60  # seconds
SPAN = 0.2  # seconds after its start in which a process gets a signal
DONE, REFUSED = 0, 3
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h: orphans become this process's children
ALONE = 9  # the number of the process that comes afterwards
# What gets signals ends so; SIGTERM and SIGHUP as the command line handles them.
ENDED = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}


class Destination:
    """The same export, made by each; the later ones are refused."""

    def __init__(self, place):
        self.folder, self.source, alone = place / "work", place / "source", place / "alone"
        if not alone.exists():
            assert forked(partial(write_checkpoint, self.source, shards=2, **SMALL)) == 0
            assert forked(partial(quantize, self.source, alone, workers=1)) == 0
        self.wanted = digests(alone)

    def do(self, number, tick):
        """What the process ``number`` does.  It calls ``tick`` after each of many equal things."""
        quantize(self.source, self.folder / "export", workers=1)

    def check(self, done, died):
        """Raises where anything is wrong that is there; there were ``done`` ticks, and signals
        ended ``died`` processes."""
        made = self.folder / "export"
        assert not made.exists() or digests(made) == self.wanted, "wrong bytes"
        assert died or [path.name for path in self.folder.iterdir()] == ["export"], "litter"


class Cache(Destination):
    """The same, in the cache folder; the later ones wait, and none is refused."""

    def do(self, number, tick):
        try:
            made = cached_export(self.source, self.folder)
        except SlotmoeError as problem:
            raise AssertionError("refused") from problem
        assert digests(made) == self.wanted, "wrong bytes"

    def check(self, done, died):
        made = [path for path in self.folder.iterdir() if (path / "slotmoe.json").exists()]
        whole = [path for path in made if path.suffix != ".partial"]
        assert all(digests(path) == self.wanted for path in whole), "wrong bytes"
        assert died or len(made) == 1, "no export, or two"


class Session:
    """One named session: each holder adds a token to it, and none is lost."""

    def __init__(self, place):
        self.folder = place / "work"

    def do(self, number, tick):
        text, until = [{"role": "text", "content": "x"}], time.monotonic() + 0.1
        while time.monotonic() < until:
            with NamedSession(self.folder, "plans") as session:
                before = session.saved.tokens if session.saved is not None else []
                session.save(Saved(bytes(16), [*before, 7], "text", text))
                tick()

    def check(self, done, died):
        saved = [session.saved for session in listing(self.folder)]
        assert None not in saved, "a damaged session"
        count = sum(len(session.tokens) for session in saved)
        assert done <= count <= done + died, f"{count} of {done} tokens"


class Sessions(Session):
    """Texts in one folder, which counts the bytes of all; each process saves its own and reads
    those of others."""

    def do(self, number, tick):
        store = BlockFolder(self.folder / "blocks", 1 << 16, self._refuse)
        for length in range(1, 400, 40):
            blocks = list(chain(bytes([number]) * 16, [*range(length)]))
            store.add(
                blocks, per_token(24), lambda block: memoryview(bytes(24 * len(block.tokens)))
            )
            for other in range(3):
                (wanted,) = chain(bytes([other]) * 16, [*range(30)])
                found = store.read(wanted, per_token(24))
                assert found is None or found[1] == bytes(len(found[1])), "another's latents"
            tick()

    @staticmethod
    def _refuse(remark):
        assert "another process is saving" in remark, remark

    def check(self, done, died):
        blocks = self.folder / "blocks"
        noted = int((blocks / "lock").read_bytes() or 0) if (blocks / "lock").exists() else 0
        there = sum(path.stat().st_size for path in blocks.glob("??/*") if path.suffix != ".tmp")
        assert noted == there or (died and noted > there), f"{noted} bytes noted, {there} there"
        assert there <= 1 << 16, "more than the limit"


class Runner:
    """A process that begins after some seconds, and gets a ``signal`` at a ``moment``."""

    def __init__(self, race, number, after=0.0, signal=None, moment=0.0):
        self.signal, self.moment, self.began = signal, moment, time.monotonic()
        self._ticks = os.memfd_create("ticks")
        self._child = os.fork()
        if not self._child:
            self._run(race, number, after)

    def _run(self, race, number, after):
        code = 1
        try:  # the handlers' SystemExit too must not unwind what is this process's parent's
            for kind in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(kind, lambda kind, _: sys.exit(ENDED[kind]))
            signal.alarm(HANGS)
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

    def attack(self):
        time.sleep(max(self.began + self.moment - time.monotonic(), 0))
        if self.signal is not None:
            os.kill(self._child, self.signal)
        if self.signal is signal.SIGSTOP:
            time.sleep(0.02)
            os.kill(self._child, signal.SIGCONT)

    def wait(self):
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        self.ticks = os.fstat(self._ticks).st_size
        os.close(self._ticks)
        ends = (ENDED[self.signal], -self.signal) if self.signal in ENDED else ()
        self.is_dead = self.code in ends
        names = {DONE: "done", REFUSED: "refused"}
        self.end = "dead" if self.is_dead else names.get(self.code, f"code {self.code}")


def one_round(race, chance, ends):
    shutil.rmtree(race.folder, ignore_errors=True)
    race.folder.mkdir()
    signals = (None, None, signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    runners = [
        Runner(race, number, chance.random() / 20, chance.choice(signals), SPAN * chance.random())
        for number in range(chance.choice((2, 3)))
    ]
    for runner in sorted(runners, key=lambda runner: runner.moment):
        runner.attack()
    for runner in runners:
        runner.wait()
        ends[runner.end] += 1
    strange = [runner.end for runner in runners if runner.end not in ("done", "refused", "dead")]
    assert not strange, f"processes ended with {strange}"
    done, died = sum(one.ticks for one in runners), sum(one.is_dead for one in runners)
    ends["ticks"] += done
    race.check(done, died)
    with suppress(ChildProcessError):  # children of the dead hold their locks for a moment
        while os.waitpid(-1, 0):
            pass
    alone = Runner(race, ALONE)
    alone.wait()
    assert alone.code == DONE, f"one that came alone afterwards ended with {alone.code}"
    race.check(done + alone.ticks, died)


@contextmanager
def prepare(folder, given):
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield folder


def run(place, name, aim):
    race, ends, wrong, rounds = RACES[name](place), Counter(), [], 0
    while not wrong and aim.goes_on(rounds):
        rounds += 1
        try:
            one_round(race, aim.chance, ends)
        except Exception as problem:
            wrong.append(repr(problem)[:300])
    return {"rounds": rounds, **ends, "wrong": wrong}


RACES = {"destination": Destination, "cache": Cache, "session": Session, "sessions": Sessions}
ATTACK = Attack(run, RACES, "rounds of each race", 300, prepare=prepare, disk=memory())
