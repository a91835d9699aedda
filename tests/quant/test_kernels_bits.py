"""Every native function with 1, 4 and 16 threads, however few cores there are: the same bits.  On
ARM, under an emulator, those of plain C++ with every instruction set too."""

import shutil

import pytest

from tests.support.driver import COMPILER, build, run

pytestmark = pytest.mark.usefixtures("nightly", "processes")

ARM = "aarch64-linux-gnu"
SETS = {  # by the emulator's processor
    "cortex-a72": ["portable", "neon"],
    "cortex-a76": ["portable", "neon", "neon_dot"],
    "max": ["portable", "neon", "neon_dot", "neon_i8mm"],
}


def test_threads_change_no_bit(tmp_path):
    assert "portable ok" in run(build(tmp_path, COMPILER, "-O2"), "own")


@pytest.fixture(scope="module")
def arm_driver(tmp_path_factory):
    if not shutil.which("qemu-aarch64"):
        pytest.skip("no qemu-aarch64 here")
    return build(tmp_path_factory.mktemp("arm"), f"{ARM}-g++", "-O2")


@pytest.mark.parametrize("processor", SETS)
def test_neon_gives_the_bits_of_plain_code(arm_driver, processor):
    under = ["qemu-aarch64", "-cpu", processor, "-L", f"/usr/{ARM}"]
    printed = run(arm_driver, "bits", under=under)
    assert printed.split() == [word for name in SETS[processor] for word in (name, "ok")]
