"""The campaign of system calls, at a few points; all of them with ``-m slow``, or by
``python -m tests.faults.campaign``."""

import json
import shutil

import pytest

from tests.faults.campaign import COMMANDS, run_preloaded

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def attacked(folder, *arguments):
    done = run_preloaded([*map(str, arguments)], folder)
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    return report["points"]


def test_a_few_faults(tmp_path):
    points = attacked(tmp_path, "quantize", "chat", "--points", 1)
    assert len(points) == 2 * 8 and set(points.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_system_call(command, tmp_path):
    points = attacked(tmp_path, command)
    print(json.dumps(points))
    assert sum(points.values()) >= {"quantize": 1000}.get(command, 50), "calls went uncounted"
