"""Whatever call on a file fails, the one line that a command says names the file, although the
system does not: a call that has only a file's number raises an error without a name."""

import builtins
import errno
import fcntl
import io
import json
import mmap
import os
import sys
from pathlib import Path

import pytest

from slotmoe.offload.ingest.quantize import quantize
from tests.support.hub import NAME, Repo
from tests.support.tiny import SMALL, write_checkpoint

CALLS = {
    os: {"pwrite": errno.EFBIG, "fsync": errno.EIO, "ftruncate": errno.EDQUOT},
    fcntl: {"flock": errno.ENOLCK},
    mmap: {"mmap": errno.EIO},
}
READS = {os: {"pread": errno.EIO, "preadv": errno.EIO}}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
COMMANDS = {
    "quantize": ("quantize {source} {work}/made",),
    "hub": (f"quantize {NAME} {{work}}/fetched",),
    "run": (
        "run {export} Hello -n 20 --context 64 --session x --session-dir {work}/kept "
        "--trace {work}/trace",
        "run {export} Hello -n 20 --context 64 --session x --session-dir {work}/kept",
        "rm --sessions x --session-dir {work}/kept",
    ),
    "chat": ("chat {export} -n 2 --context 256",),
    "cache": ("quantize {source} --json", "list", "verify source", "rm source"),
}


class Files:
    """Counts calls by the line of ours that makes them, on files below ``place``.  ``fails`` is the
    one whose first call fails."""

    def __init__(self, place, patch):
        self.place, self.sites, self.fails = str(place), [], None
        for module, names in (*CALLS.items(), *READS.items()):
            for name, number in names.items():
                patch.setattr(module, name, self.watched(getattr(module, name), name, number))
        opened = io.open
        for module in (io, builtins):
            patch.setattr(
                module, "open", lambda *given, **rest: self.wrapped(opened(*given, **rest))
            )

    def call(self, name, number, handle):
        if not os.readlink(f"/proc/self/fd/{handle}").startswith(self.place):
            return
        frame = sys._getframe()
        while frame and "slotmoe" not in frame.f_globals.get("__name__", ""):
            frame = frame.f_back
        site = frame and (name, Path(frame.f_code.co_filename).name, frame.f_lineno)
        if site and site not in self.sites:
            self.sites.append(site)
            if site == self.fails:
                raise OSError(number, os.strerror(number))

    def watched(self, function, name, number):
        def call(handle, *given, **options):
            if handle != -1:  # memory of no file
                self.call(name, number, handle)
            return function(handle, *given, **options)

        return call

    def wrapped(self, file):
        return Written(self, file) if file.writable() else file


class Written:
    """A file that was opened to be written."""

    def __init__(self, files, file):
        self.files, self.file = files, file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.files.call("write", errno.EFBIG, self.file.fileno())
        return self.file.write(data)


@pytest.fixture(scope="module")
def place(heavy, processes, network, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_checkpoint(place / "source", **SMALL)
    path = place / "source" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    quantize(place / "source", place / "export")
    return place


SEEN = set()  # what several commands do fails once


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_names_the_file(name, place, slotmoe, monkeypatch, hub):
    hub.add(NAME, Repo(place / "source"))
    files, tries = Files(place, monkeypatch), 0

    def play(site=None):
        """Exit code and stderr of the first command that fails, or of the last."""
        nonlocal tries
        tries += 1
        files.sites, files.fails, work = [], site, place / f"{name}{tries}"
        work.mkdir()
        monkeypatch.setenv("SLOTMOE_CACHE", str(work / "cache"))
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(f"Hi\n/save {work}/x".encode()))
        )
        for line in COMMANDS[name]:
            names = {one: place / one for one in ("source", "export")}
            code, out, err = slotmoe(*line.format(work=work, **names).split())
            if code:
                break
        return code, err or out

    code, err = play()
    assert code == 0, err
    sites = [site for site in files.sites if site not in SEEN]

    SEEN.update(sites)
    for site in sites:
        code, err = play(site)
        *_, last = err.splitlines()
        assert code in (0, 1, 2) and "Traceback" not in err, (site, err)
        assert not code or (last.startswith("slotmoe: ") and str(place) in err), (site, err)
