"""Two or three processes at one thing: a destination, a cache, a session, a folder of sessions,
with one thread each or with eight.

Each begins at a moment by chance; some are stopped for a while, or ended by SIGTERM, SIGHUP or
SIGKILL at another.  A process may be refused with an error of ours and by nothing else, whatever is
there then has to be right, and one that comes alone afterwards must succeed.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial

from campaigns.beside import THREADS, one_text, read_texts, texts_alone, write_texts
from campaigns.models import tiny_export
from campaigns.runner import Attack
from slotmoe.errors import CLOSED, ConfigError, SlotmoeError
from slotmoe.offload.ingest.cached import cached_export
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved, listing
from tests.support.blocks import per_token
from tests.support.disk import digests, forked, memory
from tests.support.tiny import SMALL, write_checkpoint

HANGS = 60  # seconds
DONE, REFUSED = 0, 3
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h: orphans become this process's children
ALONE = 9  # the number of the process that comes afterwards
# What gets signals ends so; SIGTERM and SIGHUP as the command line handles them.
ENDED = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}


class Destination:
    """The same export, made by each; the later ones are refused."""

    span = 0.2  # seconds after its start in which a process gets a signal

    def __init__(self, place):
        self.folder, self.source, alone = place / "work", place / "source", place / "alone"
        if not alone.exists():
            assert forked(partial(write_checkpoint, self.source, shards=2, **SMALL)) == 0
            assert forked(partial(quantize, self.source, alone, workers=1)) == 0
        self.wanted = digests(alone)

    def prepare(self):
        """What is there before, made by a child."""

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

    span = 0.2

    def __init__(self, place):
        self.folder = place / "work"

    def prepare(self):
        pass

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
        assert "been saving for long" in remark, remark

    def check(self, done, died):
        blocks = self.folder / "blocks"
        noted = int((blocks / "lock").read_bytes()) if (blocks / "lock").exists() else 0
        there = sum(path.stat().st_size for path in blocks.glob("??/*") if path.suffix != ".tmp")
        assert noted == there or (died and noted > there), f"{noted} bytes noted, {there} there"
        assert there <= 1 << 16, "more than the limit"


class Threads(Sessions):
    """Texts of a model in one folder, in each process of eight threads that ask one ``Runtime``;
    it is closed in the middle of them, and an error now and then ends what is computed.  Each text
    and each block that is left is what the model says alone."""

    span = 2.0

    def __init__(self, place):
        super().__init__(place)
        self._alone = place / "threads"
        if not self._alone.exists():
            assert forked(self._make) == 0
        self._texts = read_texts(self._alone)
        self._known = json.loads((self._alone / "blocks").read_text())

    def _make(self):
        """The model, its texts, and the bytes of whatever may be kept of them, by address."""
        self._alone.mkdir()
        export, ids = tiny_export(self._alone), [7 * number % 299 + 1 for number in range(150)]
        prompts = [[*ids[: 13 * n], 50 + n, *ids[: 10 * n + 9]] for n in range(10)]
        texts, known = texts_alone(export, prompts, 60, context=256), {}
        write_texts(self._alone, texts)
        with Runtime.open(export, context=256) as runtime:
            runtime.keep_in(self._alone / "nothing")
            state, root = runtime.engine.batch.sequences[0].state, runtime.sessions.root()
            for text in texts:
                for said in (text.greedy, text.sampled):
                    runtime.engine.empty()
                    runtime.next_logits(tokens := [*text.prompt, *(id_ for id_, *_ in said)])
                    for block in chain(root, tokens):
                        for count in range(1, len(block.tokens) + 1):
                            saved = state.saved(block.start, block.start + count).numpy()
                            known[block.begun(count).address.hex()] = saved.tobytes().hex()
        (self._alone / "blocks").write_text(json.dumps(known))

    def do(self, number, tick):
        chance, wrong = random.Random(f"{self.seed} {number}"), []
        sequences, left = chance.randint(1, 4), chance.choice((0, chance.randint(1, 2000)))

        def raise_at(route):
            nonlocal left
            left -= 1
            if not left:
                raise MemoryError

        def work(chance):
            while not (wrong or ended.is_set()):
                try:
                    one_text(runtime, self._texts, chance)
                    tick()
                except MemoryError:
                    pass
                except ConfigError as problem:
                    return wrong.extend([problem] * (str(problem) != CLOSED))
                except Exception as problem:
                    return wrong.append(problem)

        with Runtime.open(
            self._alone / "export", context=256, sequences=sequences, threads=1
        ) as runtime:
            runtime.keep_in(self.folder, 1 << 16, self._refuse)
            runtime.engine.call(lambda: runtime.model.experts.on_layer(raise_at))
            ended = threading.Event()
            threads = [
                threading.Thread(target=work, args=[random.Random(chance.random())], daemon=True)
                for _ in range(THREADS)
            ]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.5, 2))
            if chance.random() < 0.5:
                ended.set()  # after their texts; else in the middle of them
                for thread in threads:
                    thread.join()
        for thread in threads:
            thread.join()
        assert not wrong, wrong

    def check(self, done, died):
        super().check(done, died)
        for path in (self.folder / "blocks").glob("??/*"):
            if path.suffix != ".tmp":
                wanted = bytes.fromhex(self._known[path.name.split("-")[3]])
                assert path.read_bytes()[-16 - len(wanted) : -16] == wanted, "other latents"


class Runner:
    """A process that begins after some seconds, and gets a ``signal`` at a ``moment``."""

    def __init__(self, race, number, after=0.0, signal=None, moment=0.0):
        self.signal, self.moment, self.began = signal, moment, time.monotonic()
        self._ticks = os.memfd_create("ticks")
        self._child = os.fork()
        if not self._child:
            self._run(race, number, after)

    def _run(self, race, number, after):
        for kind in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, lambda kind, _: sys.exit(ENDED[kind]))
        signal.alarm(HANGS)
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
    race.seed = chance.random()
    assert forked(race.prepare) == 0
    signals = (None, None, signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    runners = [
        Runner(
            race, number, chance.random() / 20, chance.choice(signals), race.span * chance.random()
        )
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


RACES = {
    "destination": Destination,
    "cache": Cache,
    "session": Session,
    "sessions": Sessions,
    "threads": Threads,
}
ATTACK = Attack(run, RACES, "rounds of each race", 1000, prepare=prepare, disk=memory())
