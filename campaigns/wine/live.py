"""Commands that somebody talks to, and ends: a server, a chat through pipes, Ctrl-C and its like at
moments by chance, and a child that breaks its limits."""

import http.client
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from campaigns.models import sample_export
from tests.support.disk import digests
from tests.support.served import GREEDY, PROMPTS, USER
from tests.support.tiny import SMALL, write_checkpoint

BESIDE = Path(__file__).with_name("beside.py")
CTRL_C, CTRL_BREAK, CLOSED = 0, 1, 2  # Windows' numbers
CODES = {CTRL_C: 130, CTRL_BREAK: 149, CLOSED: 149}
SECONDS, LEAVING = 120, 12
SIZES = ("--context", 512, "--ram", "2GiB", "--threads", 2)
GREETING = "Grüße an 本, mit\tTabulator"


def program(system):
    """That a command is started by alone: pip's ``slotmoe.exe`` is a second process."""
    return [*system.python, "-m", "slotmoe"]


@contextmanager
def striker(pair):
    """A function that lets the commands which run on Windows have an event."""
    with pair.windows.start(BESIDE, "strike", program=pair.windows.python) as beside:

        def strike(event):
            beside.stdin.write(b"%d\n" % event)
            beside.stdin.flush()
            return int(beside.stdout.readline())

        assert beside.stdout.readline().strip() == b"ready"
        try:
            yield strike
        finally:
            beside.stdin.close()


class Server:
    """``slotmoe serve`` of ``export``, and clients on Linux."""

    def __init__(self, system, export, *more):
        words = ("serve", export, "--port", 0, "--no-log", *SIZES, *more)
        self.process = system.start(*words, program=program(system))
        line = self.process.stderr.readline().decode()
        found = re.search(r":(\d+), a page", line)
        assert found, line + self.process.communicate()[1].decode()
        self.port = int(found[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()

    def open(self, path, **body):
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        kind = {"Content-Type": "application/json"}
        client.request("POST", path, json.dumps({**GREEDY, "max_tokens": 40, **body}), kind)
        return client, client.getresponse()

    def ask(self, path="/v1/completions", **body):
        client, response = self.open(path, **body)
        data = response.read().decode()
        client.close()
        assert response.status == 200, data
        return json.loads(data) if not body.get("stream") else data

    def text(self, prompt):
        return self.ask(prompt=prompt)["choices"][0]["text"]

    def streamed(self, prompt):
        lines = self.ask(prompt=prompt, stream=True).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        return "".join(choice["text"] for event in events for choice in event["choices"])

    def leave(self, prompt):
        """In the middle of an answer."""
        client, response = self.open("/v1/completions", prompt=prompt, max_tokens=400, stream=True)
        response.read(100)
        client.close()

    def texts(self):
        """All that clients get: by themselves, eight at once, and when others have left."""
        found = [self.text(prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(8) as pool:
            together = [*pool.map(self.text, PROMPTS)], [*pool.map(self.streamed, PROMPTS)]
        for number in range(LEAVING):
            self.leave(PROMPTS[number % 8])
        assert [*together, [self.text(prompt) for prompt in PROMPTS]] == [found] * 3
        said = self.ask("/v1/chat/completions", messages=USER)["choices"][0]["message"]["content"]
        spoken = self.ask("/v1/messages", messages=USER)["content"][0]["text"]
        return [*found, said, spoken]

    def ended(self):
        """Exit code, and the rest of what it says.  The pipes have no end where Wine has started
        its desktop from that process."""
        code, said = self.process.wait(SECONDS), []
        for stream in (self.process.stdout, self.process.stderr):
            os.set_blocking(stream.fileno(), False)
            said.append(stream.read() or b"")
        return code, said[0], said[1].decode().replace("\r", "")


def serve(pair, aim):
    """Texts as Linux's server has them, whoever leaves; Ctrl-C in an answer; what was said is there
    at the next start, which Ctrl-Break ends; a port that is taken."""
    export, wrong = sample_export(pair.folder), []
    kept = [("--session-dir", pair.folder / f"sessions of {it.name}") for it in pair.systems]
    with striker(pair) as strike, Server(pair.linux, export, *kept[0]) as server:
        wanted = server.texts()
        with Server(pair.windows, export, *kept[1]) as server:
            found = server.texts()
            texts = zip(wanted, found, strict=True)
            wrong += [f"{there!r}, on Linux {here!r}" for here, there in texts if here != there]
            words = ("serve", export, "--port", server.port)
            code, _, error = pair.windows.run(*words, program=program(pair.windows))
            if code != 2 or "can't listen there" not in error:
                wrong.append(f"a port that is taken: {code}, {error}")
            client, _ = server.open("/v1/completions", prompt="a", max_tokens=480)
            strike(CTRL_C)
            client.close()
            if (ended := server.ended()) != (130, b"", "\nslotmoe: interrupted\n"):
                wrong.append(f"Ctrl-C: {ended}")
        with Server(pair.windows, export, *kept[1]) as server:
            answer = server.ask(prompt=PROMPTS[0] + found[0])
            if not answer["usage"]["prompt_tokens_details"]["cached_tokens"]:
                wrong.append(f"forgotten: {answer}")
            strike(CTRL_BREAK)
            if (ended := server.ended()) != (149, b"", ""):
                wrong.append(f"Ctrl-Break: {ended}")
    return {"texts": len(wanted), "wrong": wrong}


def chat(pair, aim):
    """Pipes are UTF-8 both ways, errors are Linux's, and so is the end when nobody reads."""
    export, wrong = sample_export(pair.folder), []
    lines = [GREETING, f"/system {GREETING}", "Hello", "/save talk.json", "/help", "/no", "Hi"]
    talk = "\n".join(lines).encode()
    begun = ("chat", export, "-n", 30, "--temperature", 0, *SIZES)
    once = ("run", export, "-", "-n", 20, "--temperature", 0, *SIZES)
    for words, text in ((begun, talk), (once, GREETING.encode())):
        wanted, found = (_said(pair, system, words, text) for system in pair.systems)
        if wanted != found:
            wrong.append(f"{words[0]} {text}: {found}, and on Linux {wanted}")
    for words in (begun, ("plan", "v2-lite")):
        ends = []
        for system in pair.systems:
            process = system.start(*words, program=program(system))
            process.stdout.close()
            process.stdout = None
            error = process.communicate(b"Hello\n" * 3, timeout=SECONDS)[1]
            ends.append((process.returncode, error))
        if ends[0] != ends[1]:
            wrong.append(f"{words[0]} without a reader: {ends[1]}, and on Linux {ends[0]}")
    return {"wrong": wrong}


def _said(pair, system, words, text):
    """Exit code, stdout, and stderr without what differs from time to time."""
    folder = pair.folder / system.name
    folder.mkdir(exist_ok=True)
    code, out, error = system.run(*words, text=text, program=program(system), cwd=folder)
    saved = folder / "talk.json"
    said = re.sub(r" · .* tokens/s · .*", "", error.replace(str(folder), ""))
    return code, out.decode(), said, saved.exists() and saved.read_text("utf-8")


def strike_one(pair, strike, words, event, seconds):
    """Exit code, stdout and stderr of a command that has an event after so many seconds."""
    process = pair.windows.start(*words, program=program(pair.windows))
    with process, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(process.communicate, b"Hello\n")
        time.sleep(seconds)
        strike(event)
        out, error = reading.result(SECONDS)
    return process.returncode, out.decode(), error.decode().replace("\r", "")


def ctrl_c(pair, aim):
    """Of each command in turn: Ctrl-C, Ctrl-Break, or its window is closed, at any moment; then it
    does as on Linux, to the same bytes."""
    export, source, made = (pair.folder / name for name in ("sample", "source", "made"))
    sample_export(pair.folder)
    write_checkpoint(source, **SMALL)
    greedy = ("-n", 80, "--temperature", 0, *SIZES)
    sessions = ("--session-dir", pair.folder / "sessions", "--session")
    commands = {
        "run": ("run", export, "Hello", *greedy, *sessions),
        "quantize": ("quantize", source, made),
        "chat": ("chat", export, *greedy),
        "profile": ("profile", export, "hello", "-n", 40, *SIZES, "-o", pair.folder / "report"),
    }

    def on_time(system, *words):
        began = time.monotonic()
        code, out, error = system.run(*words, text=b"Hello\n", program=program(system))
        assert code == 0, error
        return out.decode(), time.monotonic() - began

    wanted = {name: on_time(pair.linux, *commands[name])[0] for name in ("chat", "quantize")}
    wanted["run"] = on_time(pair.linux, *commands["run"], "linux")[0]
    bytes_made = digests(made)
    shutil.rmtree(made)
    # Before the first moment Python itself has not begun.
    _, earliest = on_time(pair.windows, "--version")
    _, life = on_time(pair.windows, *commands["run"], "whole")
    done, codes, wrong = 0, {}, []
    with striker(pair) as strike:
        while not wrong and aim.goes_on(done):
            name, event = [*commands][done % len(commands)], aim.chance.choice([CTRL_C, *CODES])
            words = (*commands[name], *([f"x{done}"] if name == "run" else []))
            seconds = aim.chance.uniform(earliest, 0.8 * life)  # others live less long
            code, out, error = strike_one(pair, strike, words, event, seconds)
            is_begun = wanted.get(name, out).startswith(out.rstrip())
            if code not in (0, CODES[event]) or "Traceback" in error or not is_begun:
                wrong.append(f"{code}, {out!r:.300}, {error[-600:]}")
            elif code == 130 and "\nslotmoe: interrupted" not in error:
                wrong.append(f"no line: {error[-600:]}")
            elif made.exists() and digests(made) != bytes_made:
                wrong.append("wrong bytes under the final name")
            wrong = [f"{name}, event {event} after {seconds:.2f} s: {it}" for it in wrong]
            codes[code] = codes.get(code, 0) + 1
            done += 1
    if not made.exists():
        on_time(pair.windows, *commands["quantize"])
    out, _ = on_time(pair.windows, *commands["run"], "afterwards")
    if out != wanted["run"] or digests(made) != bytes_made:
        wrong.append(f"afterwards: {out!r}, or other bytes")
    on_time(pair.windows, *commands["run"], "x0")  # what was kept goes on
    return {"struck": done, "life": round(life, 1), "codes": codes, "wrong": wrong}


def limits(pair, aim):
    """A child's endless loop and its like have Linux's sentences.  Wine bounds no memory."""
    said = []
    for system in pair.systems:
        code, out, error = system.run(BESIDE, "limits", program=system.python)
        said.append(json.loads(out) if not code else {"failed": error})
    wanted, found = said
    wrong = [f"{it}: {found.get(it)}, on Linux {wanted[it]}" for it in wanted]
    return {"cases": len(wanted), "wrong": wrong if wanted != found else []}


PARTS = {"serve": serve, "chat": chat, "ctrl-c": ctrl_c, "limits": limits}
