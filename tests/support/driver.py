"""The program that calls every native function without Python: kernels_driver.cpp."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_KERNELS = _ROOT / "quant" / "kernels" / "cpu"
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def build(folder: Path, compiler: str | None, *flags: str) -> Path:
    """The driver with all kernels.  Skips where the compiler can't do that."""
    if compiler is None or not shutil.which(compiler):
        pytest.skip(f"no {compiler or 'C++ compiler'} here")
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-pthread", *flags, f"-I{_KERNELS}"]
    probe, program = folder / "probe.cpp", folder / "driver"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([*command, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {' '.join(flags)}")
    sources = [_ROOT / "tests" / "quant" / "kernels_driver.cpp", *sorted(_KERNELS.glob("*.cpp"))]
    built = subprocess.run([*command, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, *arguments: str, under: Sequence[str] = ()) -> str:
    """What the driver prints, once it has ended well."""
    command = [*under, str(program), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
