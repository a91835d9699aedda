"""Who multiplies: the one place that picks a backend."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slotmoe.errors import ConfigError
from slotmoe.network.shapes import SWIGLU, Activation
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.kernels.cpu import bindings

# Older GPUs multiply no bfloat16, and their shared memory is too small for the attention.
KERNELS_CAPABILITY = 8, 0


def pick_backend(
    device: torch.device, choice: str = "auto", activation: Activation = SWIGLU
) -> TorchBackend:
    """The ops for ``device``: Triton on CUDA, native on a CPU where kernels were built, else torch.

    ``choice`` is ``auto``, ``torch``, the plain reference, or ``triton``, which a CPU runs only
    under Triton's interpreter. ``activation`` as for ``TorchBackend``; its ``run_on``
    says how many threads compute.  Raises ``ConfigError``.
    """
    if choice == "triton" or (choice == "auto" and device.type == "cuda"):
        return _triton_ops(device, activation)
    native = bindings.load() if choice == "auto" and device.type == "cpu" else None
    if native is None:
        return TorchBackend(torch.float32 if device.type == "cpu" else torch.bfloat16, activation)
    torch.set_num_threads(1)
    return NativeBackend(native, activation)


def lacking(capability: tuple[int, int] | None) -> tuple[str, str]:
    """What Triton lacks for a GPU of ``capability``, or for its interpreter (None), and what mends
    that; else empty."""
    if (found := importlib.util.find_spec("triton")) is None:
        return "Triton is not installed", "pip install triton, on Windows triton-windows"
    if capability is None:
        return "", ""
    if capability < KERNELS_CAPABILITY:
        least, own = (".".join(map(str, pair)) for pair in (KERNELS_CAPABILITY, capability))
        reason = f"its compute capability is {own}, slotmoe's kernels need {least}"
        return reason, "the CPU computes"
    if Path(str(found.origin)).with_name("runtime").joinpath("tcc").is_dir():
        return "", ""  # triton-windows brings a compiler and headers
    compilers = os.environ.get("CC"), *map(shutil.which, ("gcc", "clang", "cc"))
    if (compiler := next(filter(None, compilers), None)) is None:
        reason = "Triton finds no C compiler (CC, gcc or clang), with which it starts kernels"
        return reason, "apt install gcc, or set CC"
    # A system's Python has headers in a package.  Debian's default scheme names a folder that has
    # none: Triton takes the other one too.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if not header.is_file():
        reason = f"Triton needs Python's headers to start kernels, and {header} is not there"
        return reason, f"apt install python3.{sys.version_info.minor}-dev"
    if problem := _compile_problem(compiler, header.parent):
        reason = f"the C compiler {compiler}, with which Triton starts kernels, fails ({problem})"
        return reason, "apt install --reinstall gcc libc6-dev, or set CC to one that works"
    return "", ""


@cache
def _compile_problem(compiler: str, headers: Path) -> str:
    """Why ``compiler`` makes no library with Python's ``headers``; empty if it does."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", f"{source}.so"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as problem:
            return str(problem.strerror)
        lines = [line for line in run.stderr.splitlines() if "error" in line] + ["it says nothing"]
        return f"{lines[0]:.200}" if run.returncode else ""


def _triton_ops(device: torch.device, activation: Activation) -> TorchBackend:
    """Triton comes with torch's CUDA builds for Linux, and for Windows apart.  Only this imports
    it."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason, mend = lacking(capability)
    if not reason:
        from slotmoe.quant.backends.triton import TritonBackend

        ops = TritonBackend(device, activation)
        if capability or ops.interpreted:
            return ops
        only = "on a CPU they run only under Triton's interpreter, for tests"
        reason, mend = only, "set TRITON_INTERPRET=1"
    raise ConfigError(f"kernels triton: {reason}; {mend}; or use kernels torch")
