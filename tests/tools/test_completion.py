"""Completion in bash, as docs/command-line.md sets it up: commands, options, models and GPUs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
OFFERED = {
    "pro": ["profile"],
    "run sample x --max": ["--max-new-tokens"],
    "run li": ["library", "lite", "lite-export"],
    "rm l": ["library"],
    "run sam": ["sample"],
    "plan v2-": ["v2-lite"],
    "plan v2 --gpu rtx-40": ["rtx-4060", "rtx-4060-ti", "rtx-4070", "rtx-4080", "rtx-4090"],
    "run sample x --device cu": ["cuda"],
}
TAB = (
    "COMPREPLY=() COMP_WORDS=(slotmoe {words}) COMP_CWORD={last}; _slotmoe_completion slotmoe;"
    " printf '%s\\n' \"${{COMPREPLY[@]}}\"; echo END"
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_what_a_shell_offers(processes, tmp_path):
    program = tmp_path / "bin" / "slotmoe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m slotmoe "$@"\n')
    program.chmod(0o755)
    for name, file in (("lite-export", "slotmoe.json"), ("lite", "config.json"), ("lint", "x")):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / file).touch()
    (tmp_path / "cache" / "library-0123456789ab").mkdir(parents=True)
    (tmp_path / "cache" / "library-0123456789ab" / "slotmoe.json").touch()
    # The line that the page advises to put in the shell's own file, as a table spells it.
    (setup,) = re.findall(r"\| bash \| `([^`]*)` \|", PAGE.read_text())
    lines = [TAB.format(words=words, last=len(words.split())) for words in OFFERED]
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join([setup.replace("\\|", "|"), *lines])],
        capture_output=True,
        text=True,
        cwd=tmp_path / "work",
        env=os.environ | environment | {"SLOTMOE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    answers = done.stdout.split("END\n")[:-1]
    names = [re.findall(r"(?m)^([^\t:\n]+)", answer) for answer in answers]
    assert dict(zip(OFFERED, map(sorted, names), strict=True)) == OFFERED
