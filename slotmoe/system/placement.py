"""Cores, and NUMA nodes, where threads run and memory lies."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MAX_THREADS = 256  # as many as the native kernels start
_ROOT = Path("/")
_MBIND = {"x86_64": 237, "aarch64": 235}  # the system call's number
_PREFERRED, _INTERLEAVE = 1, 3  # its modes


@dataclass(frozen=True)
class Processor:
    """A logical CPU of each core that is to compute, the NUMA nodes that have memory, and the bytes
    free there.  Nodes of one processor are near, and each has a part of the memory's bandwidth."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...] = ()
    free: int = 0


@dataclass(frozen=True)
class Placement:
    """How many ``threads`` compute; on which ``cpus``, wherever they may for none; and over which
    NUMA ``nodes`` memory lies, where it is first written for none."""

    threads: int
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()


def cores() -> int:
    """Cores that this process can keep busy: the machine's physical ones, of two kinds the fast
    ones, unless it may run on fewer or a CPU cgroup gives it the time of fewer."""
    return _within_quota(sum(len(processor.cpus) for processor in processors()))


def choose_placement(size: int, threads: int | None = None) -> Placement:
    """Where threads run, and where ``size`` bytes lie that all of them read: on one processor if it
    has room, else on all.  Threads are bound to its cores together, so that the system can move
    them.  Nothing is bound if ``threads`` or the process's CPUs are given."""
    there, allowed = processors(), _allowed()
    is_free = threads is None and allowed >= _numbers(_ROOT / "sys/devices/system/cpu/online")
    fitting = [it for it in there if is_free and it.nodes and it.free >= size]
    chosen = [max(fitting, key=lambda it: (len(it.cpus), it.free))] if fitting else there
    cpus = tuple(cpu for it in chosen for cpu in it.cpus)
    nodes = tuple(node for it in chosen for node in it.nodes)
    is_several = sum(len(it.nodes) for it in there) > 1
    bound = cpus if is_free and len(cpus) < len(allowed) else ()
    return Placement(threads or _within_quota(len(cpus)), bound, nodes if is_several else ())


def processors() -> list[Processor]:
    """What this process may run on."""
    system, allowed = _ROOT / "sys/devices/system", _allowed()
    if not allowed:
        return [Processor(tuple(range(psutil.cpu_count(logical=False) or os.cpu_count() or 1)))]
    path = "cpu/cpu{}/topology/thread_siblings_list"
    firsts = {min({cpu} | _numbers(system / path.format(cpu)) & allowed) for cpu in _fast()}
    found: dict[int, Processor] = {}  # by package
    for node in sorted(_numbers(system / "node/online")):
        cpus, free = _numbers(system / f"node/node{node}/cpulist"), _free(node)
        if cpus & firsts:
            package = _numbers(system / f"cpu/cpu{min(cpus)}/topology/physical_package_id")
            known = found.get(key := min(package, default=node), Processor(()))
            nodes = (*known.nodes, node) if free else known.nodes
            found[key] = Processor((*known.cpus, *sorted(cpus & firsts)), nodes, known.free + free)
    return [*found.values()] or [Processor(tuple(sorted(firsts)))]


def _allowed() -> set[int]:
    """Logical CPUs that this process may run on; none where the system does not say."""
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set()


def _fast() -> set[int]:
    """Allowed CPUs without the slow cores beside fast ones: each phase waits for its last thread,
    and the fast ones alone keep the memory busy."""
    allowed, system = _allowed(), _ROOT / "sys/devices/system/cpu"
    paths = {cpu: system / f"cpu{cpu}/cpu_capacity" for cpu in allowed}
    capacity = {cpu: max(_numbers(path), default=0) for cpu, path in paths.items()}
    fast = {cpu for cpu in allowed if 2 * capacity[cpu] >= max(capacity.values())}
    return allowed & _numbers(_ROOT / "sys/devices/cpu_core/cpus") or fast  # Intel's list first


def _free(node: int) -> int:
    """Bytes of a NUMA node that are free, or hold files alone."""
    with suppress(OSError, KeyError):
        text = (_ROOT / f"sys/devices/system/node/node{node}/meminfo").read_text()
        sizes = {name: int(size) << 10 for name, size in re.findall(r"(\w+): +(\d+) kB", text)}
        return sizes["MemFree"] + sizes["FilePages"] - sizes["Shmem"]
    return 0


def _numbers(path: Path) -> set[int]:
    """What a file like ``0-3,8`` lists; nothing where there is no such file."""
    with suppress(OSError, ValueError):
        parts = [part.split("-") for part in path.read_text().split(",") if part.strip()]
        return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}
    return set()


def _within_quota(count: int) -> int:
    with suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = map(int, (_ROOT / "sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, round(quota / period)))
    return min(count, MAX_THREADS)


def bind(cpus: Sequence[int]) -> None:
    """Let this thread run on ``cpus`` alone; for none, and where the system refuses, anywhere."""
    with suppress(OSError):
        if sys.platform == "linux" and cpus:
            os.sched_setaffinity(0, cpus)


def lie_on(nodes: Sequence[int], address: int, size: int) -> bool:
    """Let pages that are not written yet come from one NUMA node while it has room, or in turn from
    several.  False where the system refuses: containers may not ask."""
    number, mask = _MBIND.get(platform.machine()), (ctypes.c_ulong * 16)()
    if sys.platform != "linux" or number is None:
        return False
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    mode = _PREFERRED if len(nodes) == 1 else _INTERLEAVE
    where = ctypes.c_void_p(address), ctypes.c_size_t(size), mode, mask, 64 * len(mask), 0
    return not ctypes.CDLL(None).syscall(number, *where)
