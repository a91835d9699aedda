"""Tokens under random budgets, policies, sessions, Ctrl-C, errors and bad reads, alone or beside
four threads that use the same model: the same ids and the same bits each time.

At its end the process has the descriptors and threads of its beginning, and 5% more memory at most.
"""

import faulthandler
import gc
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from signal import SIGINT

import psutil
import pytest

from campaigns.models import sample_export
from campaigns.runner import Attack
from slotmoe.errors import CLOSED, ConfigError, ExportError
from slotmoe.offload.experts import disk
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from tests.support.engine import failing, whole

LENGTH, TEXTS, CONTEXT = 60, 12, 256
BAD_READS = 0.01  # of all; one after another is an error
WARMING = 10  # models that are opened before memory is measured
HANGS = 120  # seconds for a model
THREADS = 4


class InjectedError(MemoryError):
    """Out of a layer, as a machine without memory gives it."""


class Soak:
    """``wanted`` are the texts that an undisturbed model makes: ids and log-probabilities."""

    def __init__(self, folder, chance):
        self.export, self.sessions, self.chance = sample_export(folder), folder / "kept", chance
        lengths = [chance.randint(1, 90) for _ in range(TEXTS)]
        self.prompts = [[chance.randrange(2, 4000) for _ in range(length)] for length in lengths]
        self.counts, self.process = Counter(), psutil.Process()
        with Runtime.open(self.export, context=CONTEXT) as runtime:
            self.wanted = [[]] * TEXTS
            self.wanted = [list(self._tokens(runtime, number)) for number in range(TEXTS)]

    def _tokens(self, runtime, number, begun=0, length=LENGTH):
        """Of a text behind so many of its tokens.  Every third text is sampled."""
        how = {"temperature": 0.8, "seed": number} if number % 3 == 2 else {"temperature": 0.0}
        ids = [*self.prompts[number], *(id_ for id_, _ in self.wanted[number][:begun])]
        with closing(runtime.generate(ids, length, **how)) as stream:
            for token in stream:
                yield token.id, token.logprob

    def text(self, runtime, number, chance):
        """A text, or the rest of a greedy one behind its beginning, or its scores; now and then it
        is left in the middle."""
        wanted = self.wanted[number]
        kind = chance.choice(("whole", "whole", "rest", "left", "score"))
        begun = chance.randrange(LENGTH) if kind in ("rest", "score") and number % 3 != 2 else 0
        if kind == "score":
            ids = [*self.prompts[number], *(id_ for id_, _ in wanted[:begun])]
            found = [token.logprob for token in runtime.score(ids)][len(self.prompts[number]) :]
            assert found == [logprob for _, logprob in wanted[:begun]], f"scores of text {number}"
            return
        wanted, place = wanted[begun:], -1
        for place, token in enumerate(self._tokens(runtime, number, begun, LENGTH - begun)):
            self.counts["tokens"] += 1
            assert token == wanted[place], f"token {place} of text {number} differs"
            if kind == "left" and place >= 20:
                return
        assert place == len(wanted) - 1

    def one_model(self):
        """A few texts of a model that is opened with settings by chance."""
        faulthandler.dump_traceback_later(HANGS, exit=True)
        chance, policy = self.chance, self.chance.choice(POLICIES)
        settings = {"slots": chance.randint(14, 220), "cache_policy": policy}
        settings |= {"prefetch": chance.random() < 0.7, "threads": chance.choice((1, 2))}
        self.counts[policy] += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "HELP_BYTES", chance.choice((0, disk.HELP_BYTES)))
            patch.setattr(Export, "read_range", self._reading(Export.read_range))
            threads, ended = chance.choice((0, 0, THREADS)), threading.Event()
            settings["sequences"] = chance.randint(1, 4)
            with ThreadPoolExecutor(THREADS) as pool:
                with Runtime.open(self.export, context=CONTEXT, **settings) as runtime:
                    if chance.random() < 0.5:
                        runtime.keep_in(self.sessions, 2 << 20)
                        self.counts["with sessions"] += 1
                    others = [
                        pool.submit(self.beside, runtime, random.Random(chance.random()), ended)
                        for _ in range(threads)
                    ]
                    for _ in range(chance.randint(1, 8)):
                        self.disturbed(runtime, chance.randrange(TEXTS))
                    if chance.random() < 0.5:  # else it is closed in the middle of others' texts
                        ended.set()
                        for other in others:
                            other.result()
                        runtime.engine.call(lambda: whole(runtime))
                for other in others:
                    other.result()
        faulthandler.cancel_dump_traceback_later()

    def beside(self, runtime, chance, ended):
        """Texts in another thread, until enough or the model is closed."""
        while not ended.is_set():
            try:
                self.text(runtime, chance.randrange(TEXTS), chance)
                self.counts["texts in threads"] += 1
            except (InjectedError, ExportError):
                pass
            except ConfigError as problem:
                if str(problem) != CLOSED:
                    raise
                return

    def disturbed(self, runtime, number):
        kind = self.chance.choice(("nothing", "nothing", "ctrl-c", "error"))
        try:
            with self._event(runtime, kind):
                self.text(runtime, number, self.chance)
                self.counts["whole texts"] += 1
        except (KeyboardInterrupt, InjectedError, ExportError) as problem:
            self.counts[type(problem).__name__] += 1

    @contextmanager
    def _event(self, runtime, kind):
        if kind == "ctrl-c":
            timer = threading.Timer(self.chance.uniform(0, 0.2), os.kill, (os.getpid(), SIGINT))
            timer.start()
            try:
                yield
                time.sleep(0.02)
            finally:
                timer.cancel()
                timer.join()
            return
        left = self.chance.randint(1, 300) if kind == "error" else 0

        def raise_at():
            nonlocal left
            left -= 1
            if left == 0:
                raise InjectedError

        with failing(runtime, raise_at):
            yield

    def _reading(self, read_range):
        """Now and then a read fails, or brings other bytes."""
        chance = random.Random(self.chance.random())

        def read(export, layer, expert, start, out, folder):
            read_range(export, layer, expert, start, out, folder)
            if chance.random() < BAD_READS:
                self.counts["bad reads"] += 1
                if chance.random() < 0.5:
                    raise ExportError("a read that failed")
                out[len(out) // 2] ^= 1

        return read

    def held(self):
        """After a model of one thread: the kernels' pool stays as large as the last model's."""
        with Runtime.open(self.export, context=CONTEXT, threads=1):
            pass
        gc.collect()
        figures = {"descriptors": self.process.num_fds(), "threads": self.process.num_threads()}
        return {**figures, "bytes": self.process.memory_info().rss}


def run(folder, part, aim):
    soak = Soak(folder, aim.chance)
    for _ in range(WARMING):
        soak.one_model()
    before = soak.held()
    while aim.goes_on(soak.counts["tokens"]):
        soak.one_model()
    after = soak.held()
    names = ("descriptors", "threads")
    wrong = [f"more {name}" for name in names if after[name] > before[name]]
    if after["bytes"] > 1.05 * before["bytes"]:
        wrong.append("memory grew by more than 5%")
    return {**dict(sorted(soak.counts.items())), "before": before, "after": after, "wrong": wrong}


ATTACK = Attack(run, ["tokens"], "tokens", 20_000)
