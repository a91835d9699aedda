"""kernels_driver.cpp calls every native function without Python, on arrays that end exactly where
the formats say, over odd shapes, on each instruction set: under sanitizers, with 1, 4 and 16
threads, however few cores there are, and on ARM under an emulator.  The bits are the same.
And what the Triton kernels become on GPUs that are not here."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nightly", "processes")

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "quant" / "kernels" / "cpu"
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
ARM = "aarch64-linux-gnu"
SETS = {  # by the emulator's processor
    "cortex-a72": ["portable", "neon"],
    "cortex-a76": ["portable", "neon", "neon_dot"],
    "max": ["portable", "neon", "neon_dot", "neon_i8mm"],
}


def build(folder, compiler, *flags):
    """The driver with all kernels.  Skips where the compiler can't do that."""
    if compiler is None or not shutil.which(compiler):
        pytest.skip(f"no {compiler or 'C++ compiler'} here")
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-pthread", *flags, f"-I{KERNELS}"]
    probe, program = folder / "probe.cpp", folder / "driver"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([*command, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {' '.join(flags)}")
    sources = [Path(__file__).with_name("kernels_driver.cpp"), *sorted(KERNELS.glob("*.cpp"))]
    built = subprocess.run([*command, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run(*command):
    """What the driver prints, once it has ended well."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


# An address out of bounds, an overflow, a data race.
@pytest.mark.parametrize(
    ("sanitizers", "arguments"),
    [("address,undefined,float-cast-overflow", []), ("thread", ["threads"])],
)
def test_sanitizers_find_nothing(tmp_path, sanitizers, arguments):
    flags = ["-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    assert "portable ok" in run(build(tmp_path, COMPILER, *flags), *arguments)


# AVX-VNNI also in the encoding of AVX-512, for processors that have only that one.
@pytest.mark.parametrize("flags", [[], ["-DSLOTMOE_EVEX"]])
def test_threads_change_no_bit(tmp_path, flags):
    assert "portable ok" in run(build(tmp_path, COMPILER, "-O2", *flags), "own")


def test_neon_gives_the_bits_of_plain_code(tmp_path):
    if not shutil.which("qemu-aarch64"):
        pytest.skip("no qemu-aarch64 here")
    driver = build(tmp_path, f"{ARM}-g++", "-O2")
    for processor, names in SETS.items():
        printed = run("qemu-aarch64", "-cpu", processor, "-L", f"/usr/{ARM}", driver, "bits")
        assert re.findall(r"^(\w+) ok", printed, re.MULTILINE) == names


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


@pytest.mark.parametrize("geometry", SHAPES)
@pytest.mark.parametrize("card", [80, 86, 89, 90, 100, 120])
def test_every_kernel_compiles_for_gpus_that_are_not_here(card, geometry):
    """In real shapes, into the least shared memory of these GPUs (99 KiB), spilling nothing to
    speak of.  A token's experts are one kernel each for gate and up and for down, however many are
    missing, whatever the shared expert's kind."""
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
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
    found = sorted(kernel["kernel"].rpartition("_")[2] for kernel in one_token)
    assert found == (["down", "down", "up", "up", "up"] if SHAPES[geometry] == 43 else [])
    for kernel in one_token:
        check_experts(kernel)
