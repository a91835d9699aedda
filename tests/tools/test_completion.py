"""Completion in the shells that docs/command-line.md names: commands, options, models and GPUs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
# What a person does: sets it up, types the words, and presses Tab.
TAB = {
    "bash": """
{setup}
COMP_WORDS=({words}) COMP_CWORD={last}
_slotmoe_completion slotmoe
printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    "zsh": """
autoload -Uz compinit && compinit -u -d "$PWD/zcompdump"
{setup}
compadd() {{
    for name; do [[ $name == completions* ]] && print -l -- "${{(@P)name}}"; done
}}
_describe() {{ compadd "$@" }}
words=({words}) CURRENT={position}
_slotmoe_completion
""",
    "fish": """
{setup}
complete --do-complete '{line}'
""",
}


@pytest.fixture
def place(tmp_path):
    """A folder with ``slotmoe`` on the path, models, and other things."""
    program = tmp_path / "bin" / "slotmoe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m slotmoe "$@"\n')
    program.chmod(0o755)
    for name, file in (("lite-export", "slotmoe.json"), ("lite", "config.json"), ("lint", "x")):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / file).touch()
    return tmp_path


def setup_of(shell):
    """The line that the page advises to put in the shell's own file."""
    (line,) = re.findall(rf"\| {shell} \| `([^`]*)` \|", PAGE.read_text())
    return line.replace("\\|", "|")  # as a table spells it


def completed(shell, place, *words):
    """What the shell offers for the last of the words."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    words = ["slotmoe", *words]
    quoted = " ".join(f"'{word}'" for word in words)
    count = len(words)
    script = TAB[shell].format(
        setup=setup_of(shell), words=quoted, last=count - 1, position=count, line=" ".join(words)
    )
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *options, "-c", script],
        capture_output=True,
        text=True,
        cwd=place / "work",
        env=os.environ | {"PATH": path, "HOME": str(place)},
    )
    offered = [line.split("\t")[0].partition(":")[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0 and not done.stderr, done.stderr
    return sorted(filter(None, offered))


@pytest.mark.parametrize("shell", TAB)
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pro"], ["profile"]),
        (["run", "sample", "x", "--max"], ["--max-new-tokens"]),
        (["run", "li"], ["lite", "lite-export"]),
        (["run", "sam"], ["sample"]),
        (["plan", "v2-"], ["v2-lite"]),
        (["plan", "v2", "--gpu", "rtx-40"], ["rtx-4060", "rtx-4060-ti", "rtx-4070", "rtx-4080",
                                             "rtx-4090"]),
        (["run", "sample", "x", "--device", "cu"], ["cuda"]),
    ],
)  # fmt: skip
def test_what_a_shell_offers(shell, words, offered, place):
    assert completed(shell, place, *words) == offered
