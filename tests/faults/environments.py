"""Each command where the world is not as usual.  ``python -m tests.faults.environments`` runs it.

Whatever the world is like, a command ends within a minute, with an exit code of the contract, and
what it says of a failure is one line of ours.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 60
COMMANDS = {
    "list": "list",
    "rm": "rm nothing",
    "plan": "plan v2-lite --ram 8GiB",
    "doctor": "doctor --json",
    "verify": "verify {export}",
    "run": "run {export} Hello -n 2 --context 64",
    "chat": "chat {export} -n 2 --context 256",
    "quantize": "quantize {source} {work}/made",
}


@dataclass(frozen=True)
class World:
    """``variables`` of the environment (an empty one is absent), redirections of a shell, what a
    child does before the command starts and with which ``prefix``, and where the export lies."""

    variables: dict[str, str] = field(default_factory=dict)
    streams: str = ""
    before: Callable[[], object] = lambda: None
    prefix: tuple[str, ...] = ()
    folder: str = "export"


def limit(kind: str, amount: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (amount, amount))


def in_a_folder_that_is_gone() -> None:
    name = tempfile.mkdtemp()
    os.chdir(name)
    os.rmdir(name)


HOMELESS = {"HOME": "", "SLOTMOE_CACHE": "", "USER": "", "LOGNAME": ""}
UNKNOWN = ("unshare", "--user", "--map-user=54321", "--map-group=54321")  # no entry of passwd
WORLDS = {
    "as usual": World(),
    "no home": World(HOMELESS, prefix=UNKNOWN),
    "a home that is not there": World(
        {"HOME": "/nonexistent", "SLOTMOE_CACHE": ""}, prefix=UNKNOWN
    ),
    "a cache that is a file": World({"SLOTMOE_CACHE": "/dev/null"}),
    "a cache that can't be made": World({"SLOTMOE_CACHE": "/proc/nothing/cache"}),
    "no temporary folder": World({"TMPDIR": "/nonexistent"}),
    "no environment": World({name: "" for name in os.environ if name != "PATH"}),
    "stdin closed": World(streams="<&-"),
    "stdout closed": World(streams=">&-"),
    "stderr closed": World(streams="2>&-"),
    "all streams closed": World(streams="<&- >&- 2>&-"),
    "stdout full": World(streams=">/dev/full"),
    "stderr full": World(streams="2>/dev/full"),
    "ASCII": World({"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
    "a dumb terminal": World({"TERM": "dumb", "NO_COLOR": "1"}),
    "a narrow terminal": World({"COLUMNS": "12", "LINES": "3"}),
    "few descriptors": World(before=limit("NOFILE", 24)),
    "very few descriptors": World(before=limit("NOFILE", 8)),
    "no files of any size": World(before=limit("FSIZE", 0)),
    "no locked memory": World(before=limit("MEMLOCK", 0)),
    "little address space": World(before=limit("AS", 900 << 20)),
    "very little address space": World(before=limit("AS", 200 << 20)),
    "few threads": World(before=limit("NPROC", 1), prefix=UNKNOWN),
    "a folder that is gone": World(before=in_a_folder_that_is_gone),
    "a strange name": World(folder="-x 'a\n\"é$(id)\u202e"),
    "a name that is no text": World(folder="caf\udce9"),
}


class Place:
    """A checkpoint, its export, and where commands leave what they make."""

    def __init__(self, folder: Path):
        from slotmoe.offload.ingest.quantize import quantize
        from tests.support.tiny import SMALL, write_checkpoint

        self.folder, self.work = folder, folder / "work"
        write_checkpoint(folder / "source", **SMALL)
        path = folder / "source" / "tokenizer_config.json"
        template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        quantize(folder / "source", folder / "export")

    def run(self, world: World, command: str) -> tuple[int, str]:
        """Exit code, and what is wrong with how it ended."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        export = self.folder / world.folder
        if not export.exists():
            shutil.copytree(self.folder / "export", export)
        names = {"source": self.folder / "source", "export": export, "work": self.work}
        arguments = [part.format(**names) for part in COMMANDS[command].split()]
        shell = ["sh", "-c", f'exec "$@" {world.streams}', "sh", sys.executable, "-m", "slotmoe"]
        given = {**os.environ, "SLOTMOE_CACHE": str(self.work / "cache"), **world.variables}
        environment = {name: value for name, value in given.items() if value}
        try:
            done = subprocess.run(
                [*world.prefix, *shell, *map(os.fsencode, arguments)],
                input=b"Hi\n",
                capture_output=True,
                env=environment,
                preexec_fn=world.before,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return -1, "does not end"
        return done.returncode, _wrong(done.returncode, done.stderr.decode(errors="replace"))


def _wrong(code: int, error: str) -> str:
    lines = error.strip().splitlines()
    if code not in (0, 1, 2):
        return f"exit code {code}: {lines[-3:]}"
    if "Traceback" in error or "internal error" in error:
        return f"{lines[-3:]}"
    if code and lines and not lines[-1].startswith(("slotmoe: ", "Error: ")):
        return f"no line of ours: {lines[-3:]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worlds", nargs="*", help=f"of {', '.join(WORLDS)}; all by default")
    given, failed = parser.parse_args(), False
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        for world in given.worlds or WORLDS:
            found = {command: place.run(WORLDS[world], command) for command in COMMANDS}
            wrong = {command: problem for command, (_, problem) in found.items() if problem}
            codes = {command: code for command, (code, _) in found.items()}
            print(json.dumps({"world": world, **codes, "wrong": wrong}), flush=True)
            failed = failed or bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
