"""What the tests' interpreter finds in kernels that are wrong: an address outside of the launch's
tensors or between elements, and a program that counts on another's being done."""

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
    tl.store(y_ptr + k, tl.load(x_ptr + k, mask=k < K + TAIL), mask=k < K)


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


def test_what_is_wrong_is_found():
    x_K, y_K = torch.arange(6.0), torch.zeros(8)
    copy[(1,)](x_K, y_K, 6, TAIL=0)
    assert torch.equal(y_K[:6], x_K)
    at = torch.tensor([x_K.data_ptr()])
    follow[(1,)](at, y_K, 20)
    assert y_K[0] == 5
    for words, wrong in (
        ("copy: 1 lanes are outside", lambda: copy[(1,)](x_K, y_K, 6, TAIL=1)),
        ("copy: 2 lanes are outside", lambda: copy[(1,)](y_K, x_K[:5], 7, TAIL=0)),
        ("follow: 1 lanes are outside", lambda: follow[(1,)](at, y_K, 24)),
        ("follow: an address is no multiple of 4", lambda: follow[(1,)](at, y_K, 6)),
    ):
        with pytest.raises(InterpreterError, match=words):
            wrong()
    y = torch.zeros(33)
    chain[(32,)](y)
    assert not torch.equal(y, torch.arange(33.0))
