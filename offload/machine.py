"""What this machine and this process have, without torch."""

import os
import resource
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil


def cache_folder() -> Path:
    """Where ``sample`` and plain checkpoints are quantized to: ``SLOTMOE_CACHE`` or
    ``~/.cache/slotmoe``."""
    return Path(os.environ.get("SLOTMOE_CACHE") or Path.home() / ".cache" / "slotmoe")


def process_bytes() -> int:
    """Resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:  # ru_maxrss would count the parent's memory at the time of fork too
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Bytes of RAM that this process can still take: what the machine has free, or less under a
    memory cgroup."""
    available: int = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free = int((root / limit).read_text()) - int((root / usage).read_text())
            available = min(available, free)
    return max(available, 0)


def free_gpu_memory() -> int | None:
    """Free bytes of the first NVIDIA GPU's memory; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        return int(run.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
