"""Run by a Windows Python, with this clone's folder and a folder to work in: files that another
program has open, and paths that Windows has and Linux has not.  Prints a line of JSON."""

# ruff: noqa: E402

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

ROOT, PLACE = sys.argv[1], Path(sys.argv[2])
sys.path.append(ROOT)  # behind slotmoe, which is installed

from slotmoe.offload import shared_files
from slotmoe.offload.machine import cache_folder
from slotmoe.quant.export.reader import Export
from slotmoe.tools.cli import main
from tests.support.hub import HUB, NAME, Repo
from tests.support.tiny import SAMPLE, write_checkpoint

SOURCE, PLAIN = PLACE / "source", PLACE / "plain"
HELD = "another program may have it open: end that, and run the same command again"
# Virus scanners look at each new file; this one lets nobody remove or rename it meanwhile.
SCANNER = """
import os, random, sys, threading, time
def hold(path):
    try:
        with open(path, "rb"):
            held.append(path)
            time.sleep(random.uniform(0.05, 0.5))
    except OSError:
        pass
def end():
    sys.stdin.read()
    print(len(held), flush=True)
    os._exit(0)
held, seen = [], set()
threading.Thread(target=end).start()
print("ready", flush=True)
while True:
    for folder, _, files in os.walk(sys.argv[1]):
        for path in (os.path.join(folder, file) for file in files):
            try:
                state = path, os.stat(path).st_mtime_ns
            except OSError:
                continue
            if state not in seen:
                seen.add(state)
                threading.Thread(target=hold, args=(path,), daemon=True).start()
    time.sleep(0.002)
"""
HOLDER = """
import sys
held = [open(path, "rb") for path in sys.argv[1:]]
print("ready", flush=True)
sys.stdin.read()
"""
ENGINE = """
import sys
from slotmoe.offload.runtime import Runtime
with Runtime.open(sys.argv[1], ram="1GiB", threads=1) as runtime:
    print("ready", flush=True)
    sys.stdin.read()
    print(runtime.next_logits([1, 2, 3]).argmax().item(), flush=True)
"""


@contextmanager
def beside(code, *words):
    """Another process that runs ``code`` meanwhile; what it says at its end is put into a list."""
    command, said = [sys.executable, "-c", code, *map(str, words)], []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline().strip() == "ready"
        try:
            yield said
            said.append(process.communicate(timeout=60)[0].strip())
        finally:
            process.kill()


def slotmoe(*words):
    """Exit code, stdout and stderr of a command in this process."""
    out, err, number = io.StringIO(), io.StringIO(), os.dup(1)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([*map(str, words)])
        except SystemExit as ending:
            code = ending.code
    os.dup2(number, 1)  # a command that fails sends it nowhere
    os.close(number)
    return code, out.getvalue(), err.getvalue()


def quantize(place, *words):
    return slotmoe("quantize", SOURCE, place, *words)


def talk(folder, model=SAMPLE):
    """A text that is kept in a session."""
    words = ("--session", "talk", "--session-dir", folder, "--threads", 1, "--ram", "1GiB")
    return slotmoe("run", model, "It was a cold night", "-n", 80, "--temperature", 0, *words)


def forget(folder):
    return slotmoe("rm", "--sessions", "talk", "--session-dir", folder)


def tree(folder):
    """Each file and its bytes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fresh(name):
    shutil.rmtree(PLACE / name, ignore_errors=True)
    (PLACE / name).mkdir(parents=True)
    return PLACE / name


def damage(export):
    """Returns the damaged file."""
    path = export / "resident.safetensors"
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(range(100)))
    return path


class Cache:
    """A cache folder with one export."""

    def __init__(self, folder):
        self.folder, name = folder, f"plain-{'a' * 12}"
        shutil.copytree(PLAIN, folder / name)
        self.export = folder / name
        os.environ["SLOTMOE_CACHE"] = str(folder)

    def remove(self):
        return slotmoe("rm", self.export.name)


def scanned(wrong):
    """A scanner looks at each new file while all is done that writes any."""
    folder = fresh("scanned")
    wanted, text = tree(PLAIN), talk(fresh("unseen"))[1]
    HUB.add(NAME, Repo(SOURCE))
    with beside(SCANNER, folder) as looked:
        cache = Cache(folder / "cache")
        steps = {
            "quantize": lambda: quantize(folder / "made"),
            "repair": lambda: (damage(folder / "made"), quantize(folder / "made"))[1],
            "overwrite": lambda: quantize(folder / "made", "--overwrite"),
            "hub": lambda: slotmoe("quantize", NAME, folder / "fetched"),
            "kept": lambda: slotmoe("quantize", NAME, folder / "kept", "--keep-source"),
            "session": lambda: talk(folder / "sessions"),
            "session again": lambda: talk(folder / "sessions"),
            "session's end": lambda: forget(folder / "sessions"),
            "session anew": lambda: talk(folder / "sessions"),
            "removal": cache.remove,
            "notes": lambda: notes(folder / "note.json", 0.8),
            "notes in haste": lambda: notes(PLACE / "note.json", 0.001),
        }
        for step, action in steps.items():
            started = time.monotonic()
            code, out, err = action()
            if code:
                wrong.append(f"{step}, scanned: {err[-300:]}")
            print(step, round(time.monotonic() - started, 1), file=sys.stderr)
            if step in ("quantize", "repair", "overwrite") and tree(folder / "made") != wanted:
                wrong.append(f"{step}, scanned: other bytes")
            if step in ("session", "session anew") and out != text:
                wrong.append(f"{step}, scanned: {out!r} instead of {text!r}")
    left = (path.name for path in folder.rglob("*"))
    wrong += [f"left: {name}" for name in left if name.endswith((".tmp", ".partial", ".replaced"))]
    return {"files": int(looked[0])}


def notes(path, pause, seconds=3):
    """Two threads write a note, two read it."""
    ends, problems = time.monotonic() + seconds, []
    shared_files.write_note(path, {"number": 0})

    def write():
        shared_files.write_note(path, {"number": time.monotonic()})

    def read():
        if "number" not in shared_files.read_note(path):
            problems.append("it could not be read")

    def repeat(act):
        try:
            while time.monotonic() < ends:
                act()
                time.sleep(pause)
        except OSError as problem:
            problems.append(repr(problem))

    threads = [threading.Thread(target=repeat, args=(act,)) for act in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(problems), "", f"{len(problems)} times: {problems[:1]}"


def held(wrong):
    """Another process has files open: an engine its export, any program anything."""

    def refused(what, result, path):
        code, _, err = result
        line = err.strip().splitlines()[-1:]
        if code != 1 or not line or HELD not in line[0] or str(path) not in line[0]:
            wrong.append(f"{what}: {result}")

    folder = fresh("held")
    export, wanted = folder / "made", tree(PLAIN)
    quantize(export)
    with beside(ENGINE, export) as said:
        refused("a repair of what runs", (damage(export), quantize(export))[1], export)
    if not said[0]:
        wrong.append("an engine computes nothing after a repair was tried")
    if quantize(export)[0] or tree(export) != wanted:
        wrong.append("a repair behind an engine's end")
    if (found := talk(folder / "sessions"))[0]:
        wrong.append(f"a session: {found}")
    blocks = [path for path in (folder / "sessions" / "blocks").rglob("*-*-*") if path.is_file()]
    with beside(HOLDER, *blocks):
        refused("a session whose blocks are open", forget(folder / "sessions"), folder)
    cache = Cache(folder / "cache")
    with beside(HOLDER, cache.export / "slotmoe.json"):
        refused("an export that is open", cache.remove(), folder)
    slotmoe("rm", *(path.name for path in cache.folder.iterdir()))
    if any(cache.folder.iterdir()):
        wrong.append(f"left in the cache: {[*cache.folder.iterdir()]}")
    cache = Cache(folder / "cache")
    with Export.open(cache.export):  # a reader of ours keeps nobody from removing its files
        if found := [path for path in cache.export.glob("e*/*") if path.unlink()]:
            wrong.append(f"read and not removed: {found}")
    (folder / "empty").mkdir()
    if (found := quantize(folder / "empty"))[0]:
        wrong.append(f"into an empty folder: {found}")
    return {"blocks": len(blocks)}


def paths(wrong):
    """Paths that Linux has not, and names that Windows has not."""
    folder = fresh("paths").absolute()
    wanted, text = tree(PLAIN), talk(fresh("unseen"))[1]
    os.chdir(folder)
    given = {
        "signs": folder / "Bücher, 本 & (x) %PATH% 'q'",
        "deep": folder.joinpath(*["n" * 40] * 3),  # Wine resolves none over 260 characters
        "a prefix": Path(f"\\\\?\\{folder}") / "prefixed",
        "a drive's folder": Path(f"{folder.drive}relative"),
        "slashes": Path(f"{folder.as_posix()}/slashes"),
        "another case": Path(str(folder).upper()) / "CASE",
    }
    for what, place in given.items():
        place.mkdir(parents=True)
        done = [quantize(place / "made"), talk(place / "sessions"), forget(place / "sessions")]
        cache = Cache(place / "cache")
        done += [slotmoe("verify", cache.export.name), slotmoe("list"), cache.remove()]
        wrong += [f"{what}: {each}" for each in done if each[0]]
        if tree(place / "made") != wanted or done[1][1] != text:
            wrong.append(f"{what}: {done[1][1]!r} or other bytes")
        if any((place / "cache").iterdir()) or "plain" not in done[4][1]:
            wrong.append(f"{what}: the cache, {done[4:]}")
    for name in ("con", "NUL", "aux.json", "com1.x", "lpt9"):
        words = "--session", name, "--session-dir", folder / "sessions", "-n", 1
        if (found := slotmoe("run", SAMPLE, "x", *words))[0] != 2:
            wrong.append(f"session {name}: {found}")
    del os.environ["SLOTMOE_CACHE"]
    if cache_folder() != Path(os.environ["LOCALAPPDATA"], "slotmoe"):
        wrong.append(f"the cache is in {cache_folder()}")
    os.chdir(PLACE)
    return {"kinds": len(given)}


PARTS = {"scanned": scanned, "held": held, "paths": paths}

if __name__ == "__main__":
    PLACE.mkdir(parents=True, exist_ok=True)
    if not PLAIN.exists():
        write_checkpoint(SOURCE, 3)
        print(quantize(PLAIN), file=sys.stderr)
    found, problems = {}, []
    for part in sys.argv[3:] or PARTS:
        found[part] = PARTS[part](problems)
    print(json.dumps({**found, "wrong": problems}))
