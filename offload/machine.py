"""What this machine and this process have, and files that several processes may write at once;
without torch."""

import ctypes
import errno
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import psutil

from slotmoe import quant, system
from slotmoe.errors import ConfigError, naming
from slotmoe.jsonfile import Json
from slotmoe.sizes import format_size
from slotmoe.system import CACHES, CUDA, move, open_file, take_lock

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP = (  # files with the limit and the use of the memory cgroup's second and first version
    (_CGROUPS / "memory.max", _CGROUPS / "memory.current"),
    (_CGROUPS / "memory/memory.limit_in_bytes", _CGROUPS / "memory/memory.usage_in_bytes"),
)

# Network folders whose locks reach a single machine, by type and options of the mount.
_UNSHARED = re.compile(
    r"fuse\.(sshfs|rclone|s3fs|gcsfuse|blobfuse2) |nfs4? .*\b(nolock|local_lock=(all|flock))\b|"
    r"(cifs|smb3) .*\bnobrl\b|lustre .*\blocalflock\b"
)
_NO_GPU = 34, 100  # of CUDA's driver: a stub of it, no device
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def cache_folder() -> Path:
    """Where exports go: ``SLOTMOE_CACHE`` or ``slotmoe`` among the user's.  ``ConfigError``."""
    try:
        return Path(os.environ.get("SLOTMOE_CACHE") or Path(CACHES, "slotmoe").expanduser())
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        problem = "this user has no home folder, where exports are kept"
        raise ConfigError(f"{problem}: set SLOTMOE_CACHE to a folder, or HOME") from None


def cache_disk() -> Path:
    """The cache folder, or what there is of its path: on the disk where exports go."""
    folder = cache_folder().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


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
    """Which GPU ``--device`` names, in the order of CUDA or Vulkan, or 0.  ``ConfigError``."""
    match = re.fullmatch(r"auto|cpu|(?:cuda|vulkan)(?::(\d{1,3}))?", device)
    if match is None:
        raise ConfigError(f"device {device!r:.40} is unknown: auto, cpu, cuda[:N] or vulkan[:N]")
    return int(match[1] or 0)


class Gpu(NamedTuple):
    """A GPU as its driver's tools name it; ``memory`` in bytes, 0 where they do not say."""

    name: str
    memory: int
    driver: str


def visible_gpu(index: int) -> Gpu | None:
    """GPU ``index`` as CUDA, unlike nvidia-smi, counts, by ``CUDA_VISIBLE_DEVICES``, whether or not
    anything here can use it; or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "shown") in ("", "-1"):
        return None
    identity = _cuda_uuid(index)
    fields = "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"
    query = ["nvidia-smi", f"--id={identity or index}", *fields]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        name, size, driver = run.stdout.splitlines()[0].rsplit(", ", 2)
        return Gpu(name, int(size) << 20 if size.isdecimal() else 0, driver)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None if identity is None else Gpu("an NVIDIA GPU", 0, "")


def ask_gpu(index: int, kind: str = "cuda") -> Json:
    """What ``gpu_report`` finds of GPU ``index``, in a process of its own: torch, Triton or a
    driver that ends that is a ``reason`` like others."""
    program = f"import sys, json; from slotmoe.offload.devices.{kind} import gpu_report"
    program += f"; print(json.dumps(gpu_report({index})))"
    command, said = [sys.executable, "-c", program], "it takes too long"
    with suppress(subprocess.TimeoutExpired):
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        with suppress(ValueError, IndexError):
            found: Json = json.loads(run.stdout.splitlines()[-1])
            return found
        lines = run.stderr.strip().splitlines()
        said = lines[-1] if lines else f"it ends with {run.returncode}"
    reason = f"torch can't be asked about it ({said:.200})"
    return {"reason": reason, "mend": "pip install --force-reinstall torch"}


def _cuda_uuid(index: int) -> str | None:
    """What CUDA's driver calls its GPU ``index`` (``GPU-...``), empty where it does not start, None
    without such a GPU."""
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL(CUDA)
        if (failed := driver.cuInit(0)) not in (0, *_NO_GPU):
            return ""
        failed = failed or driver.cuDeviceGet(ctypes.byref(device), index)
        failed = failed or driver.cuDeviceGetUuid(ctypes.byref(raw), device)
        return None if failed else f"GPU-{UUID(bytes=bytes(raw))}"
    except (OSError, AttributeError):
        return None


def check_locks(folder: Path) -> None:
    """Raise ``ConfigError`` if ``folder`` has no locks, or none that other machines see."""
    if _UNSHARED.match(kind := " ".join(file_system(folder))):
        problem = f"{folder}: other machines do not see the locks of its file system ({kind:.200})"
        raise ConfigError(f"{problem}; take a local folder, or NFS with its locks")
    try:
        os.close(take_lock(folder / "lock", 1.0))
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            reason = f"{folder}: its file system has no locks ({problem.strerror})"
            raise ConfigError(f"{reason}; take another folder") from None


def file_system(folder: Path) -> tuple[str, str]:
    """The type of the one that ``folder`` is on, as in ``ext4``, and the options of its mount."""
    there, parts = folder.resolve(), psutil.disk_partitions(all=True)
    mounts = [part for part in parts if there.is_relative_to(part.mountpoint)]
    mounts.sort(key=lambda part: len(part.mountpoint))  # of two at one place the later is on top
    return (mounts[-1].fstype, mounts[-1].opts) if mounts else ("unknown file system", "")


def check_removed(left: Sequence[OSError], freed: int) -> None:
    """Raise an ``OSError`` that names the first file ``left``, if any, and the bytes ``freed``."""
    if left:
        more = f", nor {len(left) - 1} others" if len(left) > 1 else ""
        said = f"can't be removed ({left[0].strerror}){more}; {format_size(freed)} are free again"
        raise OSError(left[0].errno, said, left[0].filename)


def write_note(path: Path, values: Json) -> None:
    """Replace ``path`` by the JSON of ``values``, whole but not durably.  Raises ``OSError``."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    with naming(path):
        fresh.write_bytes(json.dumps(values).encode())
    move(fresh, path)


def read_note(path: Path) -> Json:
    """What ``write_note`` wrote; nothing if it is not there or damaged."""
    try:
        with open(path, "rb", opener=open_file) as file:
            values = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
