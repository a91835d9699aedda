"""Cores, processors and NUMA nodes of made-up machines: where threads run and memory lies."""

import os
import sys
from pathlib import Path

import pytest
import torch

from slotmoe.offload.devices.device import Device
from slotmoe.offload.devices.pages import Arena, page_aligned
from slotmoe.offload.runtime import Runtime
from slotmoe.system import Placement, choose_placement, cores, placement
from tests.support.kernels import needs_native

GIB = 1 << 30


def spans(*ranges):
    return tuple(number for span in ranges for number in range(*span))


class Machine:
    """A tree like Linux's, of ``nodes`` with ``each`` cores and ``smt`` logical CPUs a core, the
    second ones of all cores behind the first; ``packages`` share the nodes out."""

    def __init__(self, root, monkeypatch, each, nodes=1, smt=1, packages=1):
        self.root, self.monkeypatch = root, monkeypatch
        count = each * nodes
        for cpu in range(count * smt):
            core, topology = cpu % count, f"sys/devices/system/cpu/cpu{cpu}/topology"
            siblings = ",".join(str(core + thread * count) for thread in range(smt))
            self.write(f"{topology}/thread_siblings_list", siblings)
            self.write(f"{topology}/physical_package_id", core // each * packages // nodes)
        self.write("sys/devices/system/cpu/online", f"0-{count * smt - 1}")
        for node in range(nodes):
            first = [thread * count + node * each for thread in range(smt)]
            cpus = ",".join(f"{cpu}-{cpu + each - 1}" for cpu in first)
            self.write(f"sys/devices/system/node/node{node}/cpulist", cpus)
            self.memory(node, 64)
        self.write("sys/devices/system/node/online", f"0-{nodes - 1}")
        monkeypatch.setattr(placement, "_ROOT", root)
        self.allow(range(count * smt))

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def memory(self, node, free):
        """Half of what is free (GiB) holds files."""
        half, path = free * GIB // 2048, f"sys/devices/system/node/node{node}/meminfo"
        sizes = {"MemTotal": free << 20, "MemFree": half, "FilePages": half + 5, "Shmem": 5}
        lines = [f"Node {node} {name}:  {size} kB" for name, size in sizes.items()]
        self.write(path, "\n".join(lines))

    def allow(self, cpus):
        allowed = set(cpus)
        self.monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    return lambda **sizes: Machine(tmp_path, monkeypatch, **sizes)


TWO = {"each": 32, "nodes": 2, "smt": 2, "packages": 2}
FOUR = {"each": 32, "nodes": 4, "smt": 2, "packages": 2}
# A machine and GiB to place -> threads, their CPUs and the memory's nodes.
PLACED = [
    ({"each": 8}, 1, Placement(8)),
    ({"each": 16, "smt": 2}, 1, Placement(16, spans((16,)))),
    (TWO, 64, Placement(32, spans((32,)), (0,))),
    (TWO, 65, Placement(64, spans((64,)), (0, 1))),
    ({"each": 16, "nodes": 4}, 200, Placement(64, (), (0, 1, 2, 3))),
    (FOUR, 100, Placement(64, spans((64,)), (0, 1))),
    (FOUR, 200, Placement(128, spans((128,)), (0, 1, 2, 3))),
    ({"each": 192, "nodes": 2, "packages": 2}, 1, Placement(192, spans((192,)), (0,))),
]


@pytest.mark.parametrize(("sizes", "wanted_gib", "chosen"), PLACED)
def test_threads_and_memory_of_a_machine(machine, sizes, wanted_gib, chosen):
    """One thread a core, and a model on one processor if that has room."""
    machine(**sizes)
    assert choose_placement(wanted_gib * GIB) == chosen
    given = choose_placement(wanted_gib * GIB, threads=5)
    assert (given.threads, given.cpus) == (5, ())


def test_odd_machines(machine):
    """Nodes without memory, without cores; slow cores beside fast ones; fewer CPUs, less time."""
    odd = machine(each=8, nodes=4, packages=4)
    odd.memory(0, 60)
    odd.memory(1, 0)
    odd.write("sys/devices/system/node/node3/cpulist", "")
    assert choose_placement(GIB) == Placement(8, spans((16, 24)), (2,))
    assert choose_placement(150 * GIB) == Placement(24, spans((24,)), (0, 2))
    odd.allow({7, 8, 9})  # whoever chose them has chosen
    assert choose_placement(GIB) == Placement(3)
    for quota, count in ("350000 100000", 4), ("20000 100000", 1), ("not a number", 12):
        hybrid = machine(each=12)
        hybrid.write("sys/fs/cgroup/cpu.max", quota)
        assert (cores(), choose_placement(GIB).threads) == (count, count)
    for cpu in range(12):
        hybrid.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", 1024 if cpu < 4 else 400)
    assert choose_placement(GIB) == Placement(4, spans((4,)))
    hybrid.allow({8, 9})
    assert choose_placement(GIB) == Placement(2)


def test_memory_lies_on_the_nodes():
    """As the system itself says."""
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this system does not say where memory lies")

    def policy(tensor):
        lines = maps.read_text().splitlines()
        begins = [(int(line.split()[0], 16), line.split()[1]) for line in lines]
        return max(begin for begin in begins if begin[0] <= tensor.data_ptr())[1]

    memory = page_aligned(1 << 20, nodes=(0,))
    if not placement.lie_on((0,), memory.data_ptr(), 4096):
        pytest.skip("this system does not let memory be placed")
    assert policy(memory) == "prefer:0"
    assert policy(page_aligned(1 << 20)) == "default"
    arena = Arena(1 << 20, nodes=(0, 900))  # the second is not there
    assert policy(arena.empty((4096,), memory.dtype)) == "interleave:0"
    device = Device()
    device.placement = Placement(1, (), (0,))
    for empty in (device.empty, device.weights()):
        assert policy(empty((1 << 20,), memory.dtype)) == "prefer:0"
    assert not placement.lie_on((900,), memory.data_ptr(), 4096)
    assert page_aligned(1 << 20, nodes=(900,))[0] == 0  # it goes on


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound on Linux alone")
def test_threads_that_compute_are_bound(sample_export, monkeypatch):
    """The engine's and the kernels', and no other."""
    allowed, cpu = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    if len(allowed) == 1:
        pytest.skip("there is but one CPU")

    def bound():
        threads = map(int, os.listdir("/proc/self/task"))
        return sum(os.sched_getaffinity(thread) == {cpu} for thread in threads)

    def open_on(cpus):
        place = "slotmoe.offload.engine.loading.choose_placement"
        monkeypatch.setattr(place, lambda size, threads: Placement(3, cpus))
        return Runtime.open(sample_export, context=64)

    with open_on((cpu,)) as runtime:
        wanted = runtime.next_logits([1, 2, 3])
        assert (runtime.threads, bound(), os.sched_getaffinity(0)) == (3, 3, allowed)
    with open_on(()) as runtime:
        assert torch.equal(runtime.next_logits([1, 2, 3]), wanted)
        assert bound() == 0
