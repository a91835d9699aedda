"""The native kernels under AddressSanitizer and UBSan, and the thread pool under ThreadSanitizer.

A small driver calls every entry of the C ABI on arrays that end exactly where the formats say, over
odd shapes, on each instruction set, with 1 to 3 threads. A read or write one byte too far, an
overflow, or a data race fails the run.
"""

from pathlib import Path

import pytest

from tests.support.driver import COMPILER, build, run

pytestmark = pytest.mark.usefixtures("nightly", "processes")


def build_and_run(folder: Path, sanitizers: str, *arguments: str) -> str:
    flags = ["-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    return run(build(folder, COMPILER, *flags), *arguments)


def test_addresses_and_undefined_behaviour(tmp_path):
    assert "portable ok" in build_and_run(tmp_path, "address,undefined,float-cast-overflow")


def test_data_races(tmp_path):
    assert "portable ok" in build_and_run(tmp_path, "thread", "threads")
