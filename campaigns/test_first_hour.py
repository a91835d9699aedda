"""The list for a GPU's first hour: docs/gpu.md and the script have the same steps in the same
order, and the script runs here in its dry mode."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "scripts" / "gpu_first_hour.py", ROOT / "docs" / "gpu.md"


def test_all_steps_run_without_a_gpu_and_the_page_has_them_in_this_order(tmp_path):
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path / "hour.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    steps = json.loads((tmp_path / "hour.json").read_text())["steps"]
    states = {step["step"]: step["state"] for step in steps}
    assert done.returncode == 0 and {*states.values()} == {"ok", "skipped"}, (states, done.stderr)
    found = {step["step"]: step["runs"][0].get("found") for step in steps if "runs" in step}
    assert {"copy_engines", "python_headers", "gpu", "why_not"} <= {*found["facts"]}
    assert found["one-text"]["bits"] == [True, True] and len(found["one-text"]["texts"]) == 1
    assert re.findall(r"(?m)^\| \d+ \| `([a-z0-9-]+)` \|", PAGE.read_text()) == [*states]
