"""Other people's clients against ``slotmoe serve``, each in an environment of its own.

    python -m tests.clients [NAME...] [--environments FOLDER]

Prints each case, then a table for docs/clients.md; exits with 1 if a case failed.  Environments
come from the package indices and stay in FOLDER, where one is given.  The model is the bundled
sample with a longer context, whose answers end at a line's end as if it had learnt to stop.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.versions import DATE, NODE, PYTHON, UV
from tests.support.tiny import SAMPLE

HERE = Path(__file__).parent
CONTEXT = 32768  # what coding agents send has 10,000 tokens of the sample's
SECONDS = 1800  # for all cases of a client


def run(*command, **options):
    subprocess.run([*map(str, command)], check=True, **options)


def write_model(folder):
    """Answers end at any token with a line's end: a JSON string has none."""
    from slotmoe.model.tokenizer import Tokenizer

    shutil.copytree(SAMPLE, folder)
    tokenizer = Tokenizer(folder, 0)
    config = json.loads((folder / "config.json").read_text())
    lines = [id_ for id_ in range(2, tokenizer.size) if "\n" in tokenizer.decode([id_])]
    config |= {"eos_token_id": [config["eos_token_id"], *lines], "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))


def install_python(folder, packages):
    """An environment with ``packages``; the path of its programs."""
    if not folder.exists():
        uv = folder.parent / "uv" / "bin" / "uv"
        if not uv.exists():
            run(sys.executable, "-m", "venv", uv.parents[1])
            run(uv.parent / "python", "-m", "pip", "install", "-q", UV)
        run(uv, "venv", "-q", "--python", sys.executable, folder)
        about = [
            "-q",
            "--python",
            folder / "bin" / "python",
            "--exclude-newer",
            f"{DATE}T23:59:59Z",
        ]
        if packages:
            run(uv, "pip", "install", *about, *packages)
    return folder / "bin"


def install_node(folder, packages):
    """The same; scripts find packages in folders above their own."""
    programs = folder / "node_modules" / ".bin"
    if not programs.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-audit", "--no-fund", "--loglevel=error", f"--before={DATE}T23:59:59Z"]
        run("npm", "install", *options, *packages, cwd=folder)
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return programs


def tried(label, version, programs, command):
    """A row of the table, and whether all cases passed."""
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    try:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, env=environment, timeout=SECONDS, **options)
        said, ended = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as problem:
        said, ended = str(problem), False
    results = re.findall(r"^(ok|not ok) - (.*)$", said, re.MULTILINE)
    passed = ended and bool(results)
    print(f"{label} {version}: {'ok' if passed else 'FAILED'}", flush=True)
    print(*(f"    {word} - {name}" for word, name in results), sep="\n", flush=True)
    if not passed:
        print(said[-4000:])
    names = "; ".join(name if word == "ok" else f"**{name} failed**" for word, name in results)
    return f"| {label} | {version} | {names} | {'all pass' if passed else '**failed**'} |", passed


def clients(names, folder):
    """Of each client: its label, its version, how to install it, and its command."""
    for kind, table in (("Python", PYTHON), ("Node", NODE)):
        for name, packages in table.items():
            if names and name not in names:
                continue
            client = packages[0] if packages else f"a coding agent's requests=={DATE}"
            label, version = re.split(r"==|(?<=.)@", re.sub(r"\[.*\]", "", client))
            suffix = "py" if kind == "Python" else "mjs"
            home = folder / f"{kind.lower()}-{name}"
            yield f"{label} ({kind})", version, home, packages, f"use_{name}.{suffix}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--environments", metavar="FOLDER", type=Path, help="keep them there")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        environments = (given.environments or work / "environments").resolve()
        environments.mkdir(parents=True, exist_ok=True)
        model = work / "sample"
        write_model(model)
        os.environ["SLOTMOE_CACHE"] = str(work / "cache")
        options = ["--port", "0", "--ram", "4GiB", "--context", str(CONTEXT), "--no-log"]
        command = [sys.executable, "-m", "slotmoe", "serve", str(model), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            said = ""
            while "is ready" not in said:
                said = server.stderr.readline()
                if not said:
                    sys.exit("the server did not start")
            url = re.search(r"http://[\d.:]+", said)[0]
            try:
                for label, version, home, packages, script in clients(given.names, environments):
                    if script.endswith(".py"):
                        programs = install_python(home, packages)
                        command = [programs / "python", HERE / script]
                    else:
                        programs = install_node(home, packages)
                        command = ["node", home / script]
                    command += [url, "sample", model, sys.executable]
                    rows.append(tried(label, version, programs, [*map(str, command)]))
            finally:
                server.terminate()
    print("\n| client | version | cases | result |\n|---|---|---|---|")
    print(*(row for row, _ in rows), sep="\n")
    sys.exit(not all(passed for _, passed in rows))


main()
