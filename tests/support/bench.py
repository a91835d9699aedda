"""Benchmarks are run as their users run them: ``python -m slotmoe.tools.bench NAME``."""

import json
import subprocess
import sys


def benchmark(*arguments):
    """The JSON object of a benchmark's last line."""
    command = [sys.executable, "-m", "slotmoe.tools.bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
