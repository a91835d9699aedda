"""What a GPU's kernels, compiled at their first use, do to a command: a line, and nothing at
Ctrl-C."""

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from slotmoe.offload.engine.requests import Request
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import COMPILES, Compiles
from slotmoe.signals import ENDING
from slotmoe.tools import screen


def test_a_compilers_process_gets_no_ctrl_c(small_export):
    """Its mask is that of the thread that starts it, which all kernels are launched in; a signal to
    all of the terminal's processes is the main thread's alone."""

    def blocked():
        text = Path("/proc/thread-self/status").read_text()
        return int(re.search(r"SigBlk:\s+(\w+)", text)[1], 16)

    before = blocked()
    with Runtime.open(small_export) as runtime:
        mask = runtime.engine.call(blocked)
    assert all(mask >> number - 1 & 1 for number in ENDING)
    assert blocked() == before and not before >> signal.SIGINT - 1 & 1


def test_a_terminal_says_which_kernel_is_compiled(monkeypatch):
    stderr = SimpleNamespace(isatty=lambda: True, text="", flush=lambda: None)
    stderr.write = lambda text: setattr(stderr, "text", stderr.text + text)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("slotmoe.quant.backends.base.COMPILES", compiles := Compiles())
    steps = iter([compiles.begin, compiles.end, compiles.begin, None])

    def wait(seconds):
        if step := next(steps):
            step(key="", repr="", fn=None)
        return step is None

    screen.wait_reading(SimpleNamespace(request=Request([1] * 20, None), wait=wait), quiet=False)
    lines = stderr.text.split("\r\x1b[2K")
    assert lines == [
        "",
        "compiling the GPU's kernels, once: 1",
        "reading 0 of 20 tokens",
        "compiling the GPU's kernels, once: 2",
        "",
    ]


@pytest.mark.usefixtures("interpreter")
def test_triton_tells_of_its_compiles():
    pytest.importorskip("slotmoe.quant.backends.triton", reason="needs Triton, which is for Linux")
    runtime = pytest.importorskip("triton.knobs", reason="older than Triton 3.4").runtime
    assert runtime.jit_cache_hook == COMPILES.begin
    assert runtime.jit_post_compile_hook == COMPILES.end
