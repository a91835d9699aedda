"""Ctrl-C and SIGTERM at moments by chance, in the life of each command and of a server's answer.

Nothing may hang, show a traceback or print anything but the beginning of the right text; what is
ended says so and leaves no process behind; afterwards the same text comes again.  Every second
command is a process of its own, with all its imports; the others are forked, and begin behind them.
"""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from campaigns.models import sample_export
from campaigns.runner import Attack
from tests.support.forkserver import PIPE, Forked
from tests.support.served import GREEDY, start
from tests.support.tiny import SAMPLE, SMALL, write_checkpoint

PROMPT, SECONDS = "It is a truth universally acknowledged, that", 60
OPTIONS = "--ram 2GiB --context 256"
COMMANDS = {
    "run": f"run EXPORT Hello -n 80 --temperature 0 {OPTIONS} --session x --session-dir WORK/s",
    "chat": f"chat EXPORT -n 80 --temperature 0 {OPTIONS} --session x --session-dir WORK/s",
    "start": f"serve EXPORT --port 0 {OPTIONS}",
    "quantize": "quantize CHECKPOINT WORK/export",
    "verify": "verify EXPORT",
    "synth": "synth CHECKPOINT/config.json WORK/export",
    "plan": "plan v2-lite",
    "bench": f"bench EXPORT --prompt-tokens 64 --decode-tokens 16 --repetitions 1 {OPTIONS}",
    "eval": "eval EXPORT --text TEXT --reference EXPORT --window 128",
    "profile": f"profile EXPORT hello -n 40 {OPTIONS} -o WORK/report",
    "list": "list",
    "rm": "rm --sessions --all --session-dir WORK",
    "doctor": "doctor",
}
SAME = {"run", "chat", "list"}  # whose output is the same each time; plan says what is free
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def prepare(folder, given):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    with ExitStack() as stack:
        for _ in range(given.busy):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        places = {name.upper(): folder / name for name in ("checkpoint", "text", "work")}
        write_checkpoint(places["CHECKPOINT"], **SMALL)
        places["TEXT"].write_text((SAMPLE / "config.json").read_text() * 3)
        yield {"EXPORT": sample_export(folder), **places}


def judged(code, codes, err):
    """What is wrong with how a process ended."""
    said = err.decode()[-600:]
    if code not in codes or "Traceback" in said:
        return [f"exit code {code}: {said}"]
    return [f"no line: {said}"] * (code == 130 and "\nslotmoe: interrupted" not in said)


def answers(pid):
    """Whether a command's handlers are set by now, or it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    except (OSError, StopIteration):
        return True
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


class Play:
    """Runs a command, which gets a signal or not."""

    def __init__(self, places, part):
        words, self.part, self.work = COMMANDS[part], part, places["WORK"]
        for name, place in places.items():
            words = words.replace(name, str(place))
        self.words = words.split()
        self.slowest, self.lives, self.text = 0.0, {}, None

    def __call__(self, is_forked, number=None, share=0.0):
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), PIPE)
        command = [sys.executable, "-m", "slotmoe", *self.words]
        child = Forked(*self.words, stdin=PIPE) if is_forked else subprocess.Popen(command, **pipes)
        with child, ThreadPoolExecutor(1) as pool:
            while not answers(child.pid):
                time.sleep(0.0005)
            began = time.monotonic()
            reading = pool.submit(child.communicate, b"Hello\n")
            if number is None and self.part == "start":
                time.sleep(3)
                child.send_signal(signal.SIGINT)
            elif number is not None:
                time.sleep(share * self.lives[is_forked])
                beside = self._children(child.pid)
                child.send_signal(number)
                began = time.monotonic()
            out, err = reading.result(SECONDS)
        spent, code = time.monotonic() - began, child.returncode
        if number is None:
            self.lives[is_forked] = 1.05 * spent
            self.text = out
            return [] if code in (0, 130) else [f"exit code {code}: {err.decode()[-600:]}"], code
        self.slowest = max(self.slowest, spent)
        return self._judge(number, code, out, err, beside), code

    def _judge(self, number, code, out, err, beside):
        if gone := psutil.wait_procs(beside, timeout=5)[1]:
            return [f"left behind: {gone}"]
        if wrong := judged(code, (0, CODES[number]), err):
            return wrong
        begins = self.text.startswith(out.rstrip(b"\n"))
        if self.part in SAME and not (out == self.text if code == 0 else begins):
            return [f"exit code {code}, another text: {out!r:.300}"]
        spare = self.part in ("start", "bench")  # a line of figures wraps, or does not
        if code == 0 and out.count(b"\n") < self.text.count(b"\n") - spare:
            return [f"exit code 0, less text: {out!r:.300}"]
        return []

    def _children(self, pid):
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return []


def command(places, part, aim):
    """A process each time."""
    play, done, codes = Play(places, part), 0, {}
    wrong = [line for is_forked in (False, True) for line in play(is_forked)[0]]
    while not wrong and aim.goes_on(done):
        number = signal.SIGTERM if done % 8 == 7 else signal.SIGINT
        share = aim.chance.random()
        wrong, code = play(done % 2 == 1, number, share)
        wrong = [f"after {share:.3f} of its life, forked {done % 2}: {line}" for line in wrong]
        codes[code] = codes.get(code, 0) + 1
        done += 1
    if not wrong and part in SAME:
        text = play.text
        wrong = play(True)[0] or ["another text afterwards"] * (play.text != text)
    return {"signals": done, "codes": codes, "slowest": round(play.slowest, 2), "wrong": wrong}


def serve(places, part, aim):
    """A server each time, from which a client reads."""
    done, wrong, texts = 0, [], set()
    body = json.dumps({**GREEDY, "prompt": PROMPT, "max_tokens": 80})
    while not wrong and aim.goes_on(done):
        child, port = start(places["EXPORT"])
        with child, ThreadPoolExecutor(1) as pool:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if done % 10:
                time.sleep(aim.chance.uniform(0, 0.3))
            else:
                texts.add(json.load(client.getresponse())["choices"][0]["text"])
            child.send_signal(signal.SIGINT)
            child.stderr = child.stderr.detach()
            _, err = pool.submit(child.communicate).result(SECONDS)
            wrong = judged(child.returncode, {130}, err)
            client.close()
        done += 1
    return {"signals": done, "wrong": wrong + ["several texts"] * (len(texts) != 1)}


def run(places, part, aim):
    return (serve if part == "serve" else command)(places, part, aim)


OPTIONS_OF = {"busy": {"type": int, "default": 0, "help": "loops that take the processor [0]"}}
ATTACK = Attack(run, [*COMMANDS, "serve"], "signals", 40, prepare=prepare, options=OPTIONS_OF)
