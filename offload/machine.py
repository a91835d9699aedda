"""What this machine and this process have, without torch."""

import ctypes
import importlib.machinery
import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil

from slotmoe import quant, system
from slotmoe.errors import ConfigError
from slotmoe.system import CACHES, CUDA

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP = (  # files with the limit and the use of the memory cgroup's second and first version
    (_CGROUPS / "memory.max", _CGROUPS / "memory.current"),
    (_CGROUPS / "memory/memory.limit_in_bytes", _CGROUPS / "memory/memory.usage_in_bytes"),
)


def cache_folder() -> Path:
    """Where exports go: ``SLOTMOE_CACHE`` or ``slotmoe`` among the user's.  ``ConfigError``."""
    try:
        return Path(os.environ.get("SLOTMOE_CACHE") or Path(CACHES, "slotmoe").expanduser())
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        problem = "this user has no home folder, where exports are kept"
        raise ConfigError(f"{problem}: set SLOTMOE_CACHE to a folder, or HOME") from None


def process_bytes() -> int:
    """Resident set of this process now, on Windows what it was promised, in bytes."""
    return int(getattr(psutil.Process().memory_info(), system.MEMORY))


def total_memory() -> int:
    """Bytes of RAM that this process can ever have: the machine's, or a memory cgroup's limit."""
    total: int = psutil.virtual_memory().total
    for limit, _ in _CGROUP:
        with suppress(OSError, ValueError):
            total = min(total, int(limit.read_bytes()))
    return total


def available_memory() -> int:
    """Bytes of RAM that this process can still take: what is free, here or in its cgroup."""
    available = system.available_memory()
    for limit, usage in _CGROUP:
        with suppress(OSError, ValueError):
            available = min(available, int(limit.read_bytes()) - int(usage.read_bytes()))
    return max(available, 0)


def instruction_set() -> str | None:
    """The native kernels' one; None where they were not built.  ``OSError`` or ``AttributeError``:
    they do not load; ``ConfigError``: this machine has not what ``SLOTMOE_INSTRUCTIONS`` names."""
    folder = Path(str(quant.__file__)).parent / "kernels" / "cpu"
    suffixes = reversed(importlib.machinery.EXTENSION_SUFFIXES)  # as the kernels are loaded
    paths = [path for suffix in suffixes if (path := folder / f"_native{suffix}").exists()]
    if not paths:
        return None
    native, wanted = ctypes.CDLL(str(paths[0])), os.environ.get("SLOTMOE_INSTRUCTIONS")
    if wanted and native.slotmoe_set_isa(wanted.encode()):
        raise ConfigError(f"this machine has no instruction set {wanted!r:.40}")
    native.slotmoe_isa.restype = ctypes.c_char_p
    name: bytes = native.slotmoe_isa()
    return name.decode()


def device_index(device: str) -> int:
    """Which GPU ``--device`` names, in CUDA's order, or 0.  Raises ``ConfigError``."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise ConfigError(f"device {device!r:.40} is unknown, expected auto, cpu, cuda or cuda:N")
    return int(match[1] or 0)


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine and its ``free`` bytes."""

    name: str
    free: int


def find_gpu(index: int) -> Gpu | None:
    """GPU ``index`` as CUDA, unlike nvidia-smi, counts, by ``CUDA_VISIBLE_DEVICES``; or None."""
    identity = _cuda_uuid(index)
    if identity is None:
        return None
    query = ["nvidia-smi", f"--id={identity}", "--query-gpu=name,memory.free"]
    query += ["--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        name, free = run.stdout.splitlines()[0].rsplit(", ", 1)
        return Gpu(name, int(free) << 20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _cuda_uuid(index: int) -> str | None:
    """What CUDA's driver calls its GPU ``index`` (``GPU-...``), None without such a GPU."""
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL(CUDA)
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
        failed = failed or driver.cuDeviceGetUuid(ctypes.byref(raw), device)
        return None if failed else f"GPU-{UUID(bytes=bytes(raw))}"
    except (OSError, AttributeError):
        return None
