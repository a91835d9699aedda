"""What a GPU would run: the PTX of the kernels, on the CPU, by ``tests.support.ptx``.

Nightly every test of the Triton backend's operations, and of its decode step, runs so too, for
GPUs of several generations.  Those of compute capability 9.0 multiply the large tiles of many
tokens by instructions that the interpreter of PTX does not know.
"""

import re
import shutil
import time
from pathlib import Path
from types import FunctionType

import pytest
import torch

from slotmoe.quant import backends

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
pytest.importorskip("triton.backends.nvidia.compiler")

from tests.offload import test_gpu_steps as steps
from tests.quant import test_triton, test_triton_lists
from tests.quant.test_triton import DEVICE, attention, error, make_weight, randn

pytestmark = [
    pytest.mark.usefixtures("emulator"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is here: it runs the kernels itself"),
]
KEPT = Path(__file__).parents[2] / ".pytest_cache" / "ptx"
BARRIER, MASK, WAIT = r"bar\.sync\s+0;", r"@%p\d+ (?=ld\.global)", r"cp\.async\.wait_group\s+\d+;"


@pytest.fixture(scope="session")
def kept():
    """Where Triton keeps what it has compiled, for a day."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for folder in KEPT.iterdir():
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)
    return KEPT


@pytest.fixture
def arch():
    return 89


@pytest.fixture
def emulator(arch, kept, monkeypatch, interpreter, processes):
    """Where the Triton backend's launches go."""
    from slotmoe.quant.backends.triton import TritonBackend
    from tests.support.ptx_launch import emulate

    def made(device, limit, required):
        return TritonBackend(device, limit)

    monkeypatch.setattr(backends, "_triton_ops", made)
    torch.manual_seed(0)
    return emulate(monkeypatch, kept, arch)


@pytest.fixture
def ops(emulator):
    return backends.pick_backend(DEVICE, "triton")


@pytest.fixture
def triton_ops(ops):
    return ops


def row(ops):
    """One token through a coded weight: the error of its product."""
    weight, x_1K = make_weight("nf4", 37, 130), randn(1, 130)
    return error(ops.linear(x_1K, weight), x_1K.double() @ backends_dequantized(weight).T)


def attended(ops):
    q_1HW, rows_SW = randn(1, 5, 48) * 3, randn(290, 48).half()
    return error(ops.mla(q_1HW, rows_SW, 40, 0.2), attention(q_1HW, rows_SW, 40, 0.2))


def without(pattern, index):
    """PTX in which the ``index``-th place of a pattern is gone."""

    def edit(text):
        places = list(re.finditer(pattern, text))
        if index >= len(places):
            return text
        start, end = places[index].span()
        return text[:start] + text[end:]

    return edit
