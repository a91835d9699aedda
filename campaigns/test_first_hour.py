"""The list for a GPU's first hour: the page and the script have the same steps in the same order,
and the script runs here in its dry mode."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "scripts" / "gpu_first_hour.py", ROOT / "docs" / "gpu-first-hour.md"
# A few seconds each even on a busy machine; the others are slow ones.
QUICK = ("facts", "one-text")


def dry(tmp_path, *more):
    out = tmp_path / "hour.json"
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(out.read_text())
    assert report["dry"]
    states = {step["step"]: step["state"] for step in report["steps"]}
    assert done.returncode == 0, (states, done.stderr)
    return report["steps"], states


def test_quick_steps_run_without_a_gpu(tmp_path):
    steps, states = dry(tmp_path, "--only", ",".join((*QUICK, "kernels")))
    assert states == {"facts": "ok", "one-text": "ok", "kernels": "skipped"}
    found = {step["step"]: step["runs"][0]["found"] for step in steps if "runs" in step}
    assert {"copy_engines", "python_headers", "gpu", "why_not"} <= set(found["facts"])
    assert found["one-text"]["bits"] == [True, True] and len(found["one-text"]["texts"]) == 1


@pytest.mark.slow
def test_all_steps_run_without_a_gpu_and_the_page_has_them_in_this_order(tmp_path):
    steps, states = dry(tmp_path)
    assert set(states.values()) == {"ok", "skipped"}
    named = re.findall(r"(?m)^\| \d+ \| `([a-z0-9-]+)` \|", PAGE.read_text())
    assert named == [step["step"] for step in steps]


def test_the_page_names_the_scripts_steps_in_their_order():
    named = re.findall(r"(?m)^\| \d+ \| `([a-z0-9-]+)` \|", PAGE.read_text())
    assert named == re.findall(r'(?m)^ +Step\(\s*"([a-z0-9-]+)"', SCRIPT.read_text())


def test_a_command_that_fails_or_hangs_ends_its_step_alone(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_first_hour as hour
hang = [sys.executable, "-c", "import time; time.sleep(60)"]
wrong = [sys.executable, "-c", "print('so'); raise SystemExit(3)"]
good = [sys.executable, "-c", "print('{{\\"ok\\": true}}')"]
cases = ([hang, good], 0.5), ([wrong, good], 30), ([good, good], 30), ([["no"]], 9)
for commands, limit in cases:
    report = hour.run_step(hour.Step("one", limit, commands), False, 100)
    print(report["state"], [run["code"] for run in report["runs"]])
print(hour.run_step(hour.Step("late", 9, [good]), False, 1)["why"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "failed [124]", "failed [3]", "ok [0, 0]", "failed [127]", "no time",
    ], done.stderr  # fmt: skip
