"""What the tests' interpreter finds in kernels that are wrong."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted"),
]


@triton.jit
def copy(x_ptr, y_ptr, K, TAIL: tl.constexpr):
    """The last lanes are masked unless there is a TAIL."""
    k = tl.arange(0, 8)
    x = tl.load(x_ptr + k, mask=k < K + TAIL)
    tl.store(y_ptr + k, x, mask=k < K)


@triton.jit
def chain(y_ptr):
    """Each program adds to what the one before it has stored."""
    i = tl.program_id(0)
    tl.store(y_ptr + i + 1, tl.load(y_ptr + i) + 1)


@triton.jit
def follow(at_ptr, y_ptr, offset):
    """Reads where the address that it finds points to."""
    x_ptr = (tl.load(at_ptr) + offset).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr, tl.load(x_ptr))


@triton.jit
def count(y_ptr, i):
    tl.atomic_add(y_ptr + i, 1)


def test_a_lane_outside_of_the_launchs_tensors_is_found():
    x_K, y_K = torch.arange(6.0), torch.zeros(8)
    copy[(1,)](x_K, y_K, 6, TAIL=0)
    assert torch.equal(y_K[:6], x_K)
    with pytest.raises(InterpreterError, match="copy: 1 lanes are outside"):
        copy[(1,)](x_K, y_K, 6, TAIL=1)
    with pytest.raises(InterpreterError, match="copy: 2 lanes are outside"):
        copy[(1,)](y_K, x_K[:5], 7, TAIL=0)  # a part of a tensor is all that it may touch
    counts = torch.zeros(2, dtype=torch.int32)
    count[(3,)](counts, 1)
    with pytest.raises(InterpreterError, match="count: 1 lanes are outside"):
        count[(1,)](counts, 2)
    assert counts.tolist() == [0, 3]


def test_an_address_that_a_kernel_reads_leads_to_that_tensor_alone():
    rows_SW, y = torch.arange(6.0).view(2, 3), torch.zeros(1)
    at = torch.tensor([rows_SW.data_ptr()])
    follow[(1,)](at, y, 20)
    assert y.item() == 5
    with pytest.raises(InterpreterError, match="follow: 1 lanes are outside"):
        follow[(1,)](at, y, 24)
    with pytest.raises(InterpreterError, match="follow: an address is no multiple of 4"):
        follow[(1,)](at, y, 6)


def test_programs_run_in_no_order():
    y = torch.zeros(33)
    chain[(32,)](y)
    assert not torch.equal(y, torch.arange(33.0))
