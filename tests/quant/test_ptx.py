"""What a GPU would run: the PTX of the kernels, on the CPU, by ``tests.support.ptx``.

Nightly every test of the Triton backend's operations and of its decode step runs so, for GPUs of
several generations.
"""

from pathlib import Path
from types import FunctionType

import pytest
import torch

from slotmoe.quant import backends

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from tests.offload import test_gpu_steps as steps
from tests.quant import test_triton, test_triton_lists
from tests.quant.test_triton import DEVICE

pytestmark = [
    pytest.mark.usefixtures("emulator"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is here"),
]
KEPT = Path(__file__).parents[2] / ".pytest_cache" / "ptx"


@pytest.fixture
def arch():
    return 89


@pytest.fixture
def emulator(arch, monkeypatch, interpreter, processes):
    from slotmoe.quant.backends.triton import TritonBackend
    from tests.support.ptx_launch import emulate

    KEPT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    monkeypatch.setattr(
        backends, "_triton_ops", lambda device, limit, required: TritonBackend(device, limit)
    )
    return emulate(monkeypatch, KEPT, arch)


@pytest.fixture
def ops(emulator):
    return backends.pick_backend(DEVICE, "triton")


@pytest.fixture
def triton_ops(ops):
    return ops


def test_a_row(ops):
    test_triton.test_linear_of_few_rows_is_exact_and_of_many_no_worse_than_bfloat16(
        ops, 1, (37, 130), "nf4"
    )


def again(module, *names):
    """Copies of a module's tests, or of those named."""
    for name, test in vars(module).items():
        if isinstance(test, FunctionType) and test.__module__ == module.__name__:
            if name in names or (not names and name.startswith("test_")):
                copy = FunctionType(test.__code__, test.__globals__, name, test.__defaults__)
                copy.pytestmark = [*getattr(test, "pytestmark", [])]
                yield name, staticmethod(copy)


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("arch", [80, 89, 90])
class TestAgain:
    locals().update(again(test_triton))


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("arch", [80, 89, 90])
class TestListsAgain:
    locals().update(again(test_triton_lists))


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("arch", [80, 89, 90])
class TestStepsAgain:
    locals().update(again(steps))

    @pytest.fixture(autouse=True)
    def caches(self, emulator, monkeypatch):
        made = steps.cache_of

        def cache_of(*arguments):
            cache = made(*arguments)
            emulator.named.append(cache.layers)
            return cache

        monkeypatch.setattr(steps, "cache_of", cache_of)
