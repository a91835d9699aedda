"""The runs of a GPU's first hour: docs/gpu.md and the script have the same steps in the same order,
within the ten minutes of a run, and what a CPU and the tests' twin can do of them runs here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_first_hour as hour

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
RUNS = hour.runs(Path("work"), Path("run.json"), hour.Scale(), False, None)


def test_the_page_has_the_steps_in_their_order_and_a_run_ends_in_time():
    rows = [line.split("|") for line in PAGE.splitlines() if re.match(r"\| [1-6] \|", line)]
    assert {number: [step.name for step in steps] for number, steps in RUNS.items()} == {
        int(row[1]): ["set-up", *re.findall(r"`([a-z0-9-]+)`", row[2])] for row in rows
    }
    for steps in RUNS.values():
        assert sum(step.limit for step in steps) <= hour.RUN_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("number", RUNS)
def test_each_run_passes_on_the_twin(number, tmp_path):
    out = tmp_path / "run.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_first_hour.py"), "--run", str(number)]
    command += ["--dry", "--work", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    steps = json.loads(out.read_text())["steps"]
    states = {step["step"]: step["state"] for step in steps}
    assert done.returncode == 0 and {*states.values()} <= {"ok", "skipped"}, (states, steps)
    assert [*states] == [step.name for step in RUNS[number]]
