"""What the Triton kernels become on GPUs that are not here, under the Triton that is installed and
under each that a supported torch pins."""

import json
import os
import subprocess
import sys
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

from slotmoe.quant.codecs.codec import INT4, LUT3, LUT4, MXFP4, NF4

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
pytestmark = pytest.mark.usefixtures("processes")

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SLOTMOE_TEST_TRITONS", "~/.cache/slotmoe-tests")).expanduser()
CODED = 8 * 64 * 16 // 64  # weights of a turn of a loop over codes, for each of 64 threads
REGISTERS = {NF4.kind: 200, INT4.kind: 200, LUT3.kind: 216, LUT4.kind: 200, MXFP4.kind: 216}


def compiled(card, *arguments, triton=ROOT, spilled=16):
    """What ``compile_gpu`` tells, with another ``triton`` if its folder is given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (triton, ROOT)))
    command = [sys.executable, "-m", "tests.support.compile_gpu", f"sm_{card}", *arguments]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared"] <= 99 << 10 and kernel["spilled"] <= spilled, kernel
    return kernels


def check_experts(kernel):
    """Of one token: the loops of a shared expert in int8, then those of its routed ones.  Their
    levels are loaded one by one, whatever the kernel promises of their addresses: a load of two
    would take the level of the next code for that of the next row's."""
    gates = 2 if kernel["kernel"].endswith("up") else 1
    assert kernel["registers"] <= REGISTERS[kernel["kind"]] and kernel["shared"] <= 1024, kernel
    assert len(kernel["loads"]) == 2 * gates
    for loads in kernel["loads"][gates:]:
        assert set(loads) == {"32", "128"} and loads["32"] >= CODED, kernel


def test_one_tokens_experts_load_level_by_level():
    """No level or scale goes through shared memory.  Under the Triton that is installed."""
    kernels = compiled(90, "v2-lite", "nf4")
    assert len(kernels) == 2
    for kernel in kernels:
        check_experts(kernel)


@pytest.fixture(scope="module", params=["3.3.0", "3.4.0", "3.5.1", "3.6.0", "3.7.1"])
def pinned(request, nightly, processes):
    """The folder of a Triton that a supported torch pins.  An install puts it there."""
    folder = FOLDER / f"triton-{request.param}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        flock(lock, LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            command += ["--target", partial, f"triton=={request.param}"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                reason = result.stderr.strip().splitlines()[-1:]
                pytest.skip(f"no Triton {request.param}: {reason}")
            partial.rename(folder)
    return folder


@pytest.mark.parametrize("card", [86, 89, 90, 120])
def test_one_tokens_experts_load_level_by_level_by_each_triton(pinned, card):
    kernels = compiled(card, "v2-lite", "nf4", "lut", "int4", "mxfp4", triton=pinned, spilled=32)
    assert len(kernels) == 8
    for kernel in kernels:
        check_experts(kernel)


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
    kernels = compiled(card, geometry)
    assert len(kernels) == SHAPES[geometry]
    one_token = [kernel for kernel in kernels if ".rows.experts_" in kernel["kernel"]]
    assert len(one_token) == (6 if SHAPES[geometry] == 43 else 0)
    for kernel in one_token[:4]:
        check_experts(kernel)
