"""The runs of a GPU's first hour: docs/gpu.md and the script have the same steps in the same order,
within the ten minutes of a run, and what a CPU and the tests' twin can do of them runs here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_first_hour as hour
from scripts.gpu.steps import six_tests

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
def test_six_tests_are_collected():
    assert len({*six_tests()}) == 6


def test_a_failure_ends_its_step_alone_and_what_is_found_decides_its_state(processes):
    late = hour.Step("late", 1, [[sys.executable, "-c", "while True: pass"], ["not run"]])
    (run,) = hour.run_step(late, False, 100, {})["runs"]
    assert (run["code"], run["error"]) == (124, "ended after its 1 s")
    gone = hour.Step("gone", 1, [["/nowhere/program"]])
    assert hour.run_step(gone, False, 100, {})["runs"][0]["code"] == 127
    for dry, left, why in ((True, 100, "needs a GPU"), (False, 4, "no time")):
        assert hour.run_step(gone, dry, left, {})["why"] == why
    found = [{"ok": True}, {"results": []}, {"ok": False}, {"ok": True, "skipped": "not here"}]
    programs = [[sys.executable, "-c", f"print({json.dumps(json.dumps(one))})"] for one in found]
    reports = [hour.run_step(hour.Step("x", 60, [one]), False, 100, {}) for one in programs]
    assert [report["state"] for report in reports] == ["ok", "ok", "failed", "skipped"]


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
