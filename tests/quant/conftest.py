"""The native kernels on every instruction set that this machine runs, and a Vulkan device."""

import pytest
import torch

from slotmoe.quant.kernels.vulkan import Vulkan
from tests.support.kernels import FAST, ISAS, native

SETS = [pytest.param(isa, marks=[] if isa in FAST else pytest.mark.full) for isa in ISAS]


@pytest.fixture(autouse=True)
def the_same_numbers():
    torch.manual_seed(0)


@pytest.fixture(params=SETS)
def kernels(request):
    before = native.isa, native.threads
    native.set_isa(request.param)
    native.set_threads(2)
    yield native
    native.set_isa(before[0])
    native.set_threads(before[1])


@pytest.fixture(scope="module")
def device():
    device = Vulkan()
    yield device
    device.close()
