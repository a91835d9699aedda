"""kernels_driver.cpp calls every native function without Python, on arrays that end exactly where
the formats say, over odd shapes, on each instruction set: under sanitizers, with 1, 4 and 16
threads, however few cores there are, and on ARM under an emulator.  The bits are the same."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("nightly", "processes")

KERNELS = Path(__file__).parents[2] / "quant" / "kernels" / "cpu"
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
