"""Ctrl-C at moments by chance: in ``run``, ``chat``, ``serve`` and in Python, there also while
other threads use the runtime.

Nothing may hang, show a traceback or print anything but the beginning of the right text; afterwards
the same text comes again.
"""

import http.client
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from campaigns.models import sample_export
from campaigns.runner import Attack
from slotmoe.offload.runtime import Runtime
from tests.support.engine import whole
from tests.support.forkserver import PIPE, Forked
from tests.support.served import GREEDY, start

PROMPT, SECONDS = "It is a truth universally acknowledged, that", 30
OPTIONS = "-n 80 --temperature 0 --ram 2GiB --context 256".split()
COMMANDS = {
    "run": (["run", "EXPORT", PROMPT, *OPTIONS], b""),
    "chat": (["chat", "EXPORT", *OPTIONS], b"Hello\n/exit\n"),
}


@contextmanager
def prepare(folder, given):
    yield sample_export(folder)


def ended(child, struck):
    """What is wrong with how a process ended, and its output."""
    with ThreadPoolExecutor(1) as pool:
        out, err = pool.submit(child.communicate).result(SECONDS)
    codes = {0, 130} if struck else {0}
    if child.returncode not in codes or b"Traceback" in err:
        return [f"exit code {child.returncode}: {err.decode()[-600:]}"], out
    return [], out


def command(export, part, aim):
    """A process each time."""
    words, keys = COMMANDS[part]
    words = [export if word == "EXPORT" else word for word in words]

    def play(delay):
        with Forked(*words, stdin=PIPE) as child:
            child.stdin.write(keys)
            child.stdin.flush()
            if delay is not None:
                time.sleep(delay)
                child.send_signal(signal.SIGINT)
            return ended(child, delay is not None)

    began = time.monotonic()
    wrong, text = play(None)
    longest, done, struck = 1.1 * (time.monotonic() - began), 0, 0
    while not wrong and aim.goes_on(done):
        wrong, out = play(aim.chance.uniform(0, longest))
        struck += out != text
        if not wrong and not text.startswith(out.rstrip(b"\n")):
            wrong = [f"another text: {out!r:.300}"]
        done += 1
    again = play(None)
    wrong += again[0] or ([] if again[1] == text else ["another text afterwards"])
    return {"signals": done, "came early": struck, "wrong": wrong}


def serve(export, part, aim):
    """A server each time, from which a client reads."""
    done, wrong, texts = 0, [], set()
    body = json.dumps({**GREEDY, "prompt": PROMPT, "max_tokens": 80})
    while not wrong and aim.goes_on(done):
        child, port = start(export)
        with child:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if done % 10:
                time.sleep(aim.chance.uniform(0, 0.3))
            else:
                texts.add(json.load(client.getresponse())["choices"][0]["text"])
            child.send_signal(signal.SIGINT)
            child.stderr = child.stderr.detach()
            wrong, _ = ended(child, struck=True)
            client.close()
        done += 1
    return {"signals": done, "wrong": wrong + ["several texts"] * (len(texts) != 1)}


def python(export, part, aim):
    """Signals to this process, whose main thread generates, alone or beside four threads."""
    stop, done, struck, wrong = threading.Event(), 0, 0, []
    options = {"context": 256, "slots": 60, "sequences": 8}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Runtime.open(export, **options) as runtime, ThreadPoolExecutor(4) as pool:

        def texts():
            return [[token.id for token in text] for text in runtime.generate_all(PROMPTS)]

        def beside():
            while not stop.is_set():
                if texts() != want:
                    return ["another text in another thread"]
            return []

        want, logits = texts(), runtime.logits([5, 6, 7, 8])
        others = [pool.submit(beside) for _ in range(4 if part == "threads" else 0)]
        try:
            while not wrong and aim.goes_on(done):
                delay = aim.chance.uniform(0, 0.2)
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()
                    while True:
                        if texts() != want or not runtime.logits([5, 6, 7, 8]).equal(logits):
                            wrong = ["another text"]
                except KeyboardInterrupt:
                    struck += 1
                finally:
                    timer.cancel()  # another error has come before it
                    timer.join()
                done += 1
        finally:
            stop.set()
        wrong += [line for other in others for line in other.result(SECONDS)]
        runtime.engine.call(lambda: whole(runtime))
        if texts() != want:
            wrong.append("another text afterwards")
    return {"signals": done, "struck": struck, "wrong": wrong}


PROMPTS = [PROMPT, "Call me", "def main("]
ATTACKS = {"run": command, "chat": command, "serve": serve, "python": python, "threads": python}


def run(export, part, aim):
    return ATTACKS[part](export, part, aim)


ATTACK = Attack(run, ATTACKS, "signals", 200, prepare=prepare)
