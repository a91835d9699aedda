"""What the Triton kernels become on GPUs that are not here."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
pytestmark = pytest.mark.usefixtures("processes")

ROOT = Path(__file__).parents[2]
CODED = 8 * 64 * 16 // 64  # weights of a turn of a loop over codes, for each of 64 threads


def check_experts(kernel):
    """Of one token: the loops of a shared expert in int8, then those of its routed ones.  Their
    levels are loaded one by one, whatever the kernel promises of their addresses: a load of two
    would take the level of the next code for that of the next row's."""
    gates = 2 if kernel["kernel"].endswith("up") else 1
    assert kernel["shared"] <= 1024 and len(kernel["loads"]) == 2 * gates, kernel
    for loads in kernel["loads"][gates:]:
        assert set(loads) == {"32", "128"} and loads["32"] >= CODED, kernel


SHAPES = {"v2-lite": 43, "v2": 43}  # with the kernels that they take
SHAPES |= {f"model/geometries/{name}.json": n for name, n in (("v3.2", 6), ("v4-flash", 11))}
SHAPES["model/geometries/v4-pro.json"] = 11


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("geometry", SHAPES)
@pytest.mark.parametrize("card", [80, 86, 89, 90, 100, 120])
def test_every_kernel_compiles_for_gpus_that_are_not_here(card, geometry):
    """In real shapes, into the least shared memory of these GPUs (99 KiB), spilling nothing to
    speak of.  A token's experts are one kernel each for gate and up and for down, however many are
    missing, whatever the shared expert's kind."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert metadata.version("triton") in page, "the page lists what was compiled with"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_gpu", f"sm_{card}", geometry]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= 99 << 10 and kernel["spilled"] <= 16, kernel
    assert len(kernels) == SHAPES[geometry]
    one_token = [kernel for kernel in kernels if ".rows.experts_" in kernel["kernel"]]
    assert len(one_token) == (6 if SHAPES[geometry] == 43 else 0)
    for kernel in one_token[:4]:
        check_experts(kernel)
