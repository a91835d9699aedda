"""What a person at Windows has: a console, and other programs that have files open."""

import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path

from campaigns.wine.environment import ROOT

ELSEWHERE = Path(__file__).with_name("elsewhere.py")
CHAT = ("chat", "sample", "-n", 8, "--temperature", 0, "--threads", 1, "--ram", "1GiB")
# What is typed as soon as the screen shows something.
TYPED = (
    ("context 0", "Hellx\x7fo Zoë 本\r"),  # \x7f is the key Backspace
    ("tokens/s", "/help\r"),
    ("sent with two", ""),
    ("of 1,024", "\x10\x10"),  # Ctrl-P twice, to the first message
    ("Zoë 本", "\x15/exit\r"),  # Ctrl-U
)


def console(pair, aim, seconds=90):
    """``slotmoe chat`` on a console of code page 437: keys, history, colours and UTF-8."""
    ours, theirs = pty.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    given = {**terminal, "variables": {"TERM": "xterm"}, "start_new_session": True}
    screen, typed, since, until = "", list(TYPED), 0, time.monotonic() + seconds
    with pair.windows.start(*CHAT, **given) as process:
        os.close(theirs)
        while time.monotonic() < until and process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:
                screen += os.read(ours, 1 << 16).decode(errors="replace")
            if typed and typed[0][0] in screen[since:]:
                since = len(screen)
                os.write(ours, typed.pop(0)[1].encode())
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os.close(ours)
    answer = pair.linux.run(*CHAT, text="Hello Zoë 本\n".encode())[1].decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    wanted = {"typed": "Hello Zoë 本", "answered": answer.strip()[:12]}
    wrong = [f"{what}: no {text!r}" for what, text in wanted.items() if text not in plain]
    wrong += [f"{seen!r} was not on the screen" for seen, _ in typed]
    wrong += [] if "\x1b[2m" in screen else ["nothing is dim"]
    wrong += [] if process.returncode == 0 else [f"exit code {process.returncode}"]
    return {"wrong": wrong, **({"screen": plain[-1000:]} if wrong else {})}


def elsewhere(pair, aim):
    """See ``elsewhere.py``."""
    program, words = pair.windows.python, (ELSEWHERE, ROOT, pair.folder / "elsewhere")
    code, out, error = pair.windows.run(*words, program=program, seconds=600)
    if code:
        return {"wrong": [error[-1000:]]}
    return json.loads(out.decode().splitlines()[-1])


PARTS = {"console": console, "elsewhere": elsewhere}
