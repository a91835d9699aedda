"""Other people's programs against ``slotmoe serve``, each in an environment of its own.

Environments come from the package indices and stay in the folder of --environments, where one is
given.  The model is the bundled sample with a longer context, whose answers end at a line's end as
if it had learnt to stop.  A report's "row" is a line of the table in docs/clients.md.  OpenAI's and
Anthropic's clients for Python are not here: the usual tests of the server use them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from campaigns.runner import Attack
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools import serve
from tests.support.tiny import SAMPLE

HERE = Path(__file__).parent
CONTEXT = 65536  # what coding agents send has 18,000 tokens of the sample's
SECONDS = 1800  # for all cases of a program
# The newest of this date that Python 3.11 and Node 20 take; what they require is no newer.
DATE = "2026-11-26"
UV = "uv==0.13.9"
# By part: the script, and its packages.  The first is the program that is tried.
PROGRAMS = {
    "litellm": ("use_litellm.py", ["litellm==1.110.2"]),
    "lm-eval": ("use_lm_eval.py", ["lm-eval[api]==0.4.13", "transformers==5.24.0"]),
    "openai-node": ("use_openai.mjs", ["openai@6.49.0", "zod@4.6.7"]),
    "claude-code": ("use_claude.mjs", ["@anthropic-ai/claude-code@2.1.332"]),
    "codex": ("use_agents.mjs", ["@openai/codex@0.171.0"]),
    "opencode": ("use_agents.mjs", ["opencode-ai@1.18.33"]),
}


def call(*command, **options):
    subprocess.run([*map(str, command)], check=True, **options)


def write_model(folder):
    """Answers end at any token with a line's end: a JSON string has none."""
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
            call(sys.executable, "-m", "venv", uv.parents[1])
            call(uv.parent / "python", "-m", "pip", "install", "-q", UV)
        call(uv, "venv", "-q", "--python", sys.executable, folder)
        options = ["-q", "--python", folder / "bin/python", "--exclude-newer", f"{DATE}T23:59:59Z"]
        call(uv, "pip", "install", *options, *packages)
    return folder / "bin"


def install_node(folder, packages):
    """The same; scripts find packages in folders above their own."""
    programs = folder / "node_modules" / ".bin"
    if not programs.exists():
        folder.mkdir(exist_ok=True)
        options = ["--no-audit", "--no-fund", "--loglevel=error", f"--before={DATE}T23:59:59Z"]
        call("npm", "install", *options, *packages, cwd=folder)
    for script in (*HERE.glob("*.mjs"), Path(serve.__file__).parent / "clients.json"):
        shutil.copy(script, folder)
    return programs


@contextmanager
def prepare(folder, given):
    """A server of the model; its URL, the model and the folder of environments."""
    environments = (given.environments or folder / "environments").resolve()
    environments.mkdir(parents=True, exist_ok=True)
    model = folder / "sample"
    write_model(model)
    options = ["--port", "0", "--ram", "4GiB", "--context", str(CONTEXT), "--no-log"]
    command = [sys.executable, "-m", "slotmoe", "serve", str(model), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        line = "begun"
        while line and "is ready" not in line:
            line = server.stderr.readline()
        assert line, "the server did not start"
        try:
            yield re.search(r"http://[\d.:]+", line)[0], model, environments
        finally:
            server.terminate()


def run(place, name, aim):
    url, model, environments = place
    script, packages = PROGRAMS[name]
    client = packages[0]
    label, version = re.split(r"==|(?<=.)@", re.sub(r"\[.*\]", "", client))
    is_python = script.endswith(".py")
    programs = (install_python if is_python else install_node)(environments / name, packages)
    command = ["node", str(environments / name / script)]
    if is_python:
        program = f"import cases, {script[:-3]}; cases.main()"
        command = [str(programs / "python"), "-c", program]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    done = subprocess.run(
        [*command, url, "sample", str(model), sys.executable, name],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(HERE)},
        timeout=SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    results = re.findall(r"^(ok|not ok) - (.*)$", done.stdout, re.MULTILINE)
    wrong = [name for word, name in results if word != "ok"]
    if done.returncode or wrong or not results:
        wrong.append(done.stdout[-4000:])
    cases = "; ".join(name if word == "ok" else f"**{name} failed**" for word, name in results)
    kind, end = "Python" if is_python else "Node", "**failed**" if wrong else "all pass"
    return {"row": f"| {label} ({kind}) | {version} | {cases} | {end} |", "wrong": wrong}


OPTIONS = {"environments": {"type": Path, "metavar": "FOLDER", "help": "keep them there"}}
ATTACK = Attack(run, PROGRAMS, prepare=prepare, options=OPTIONS)
