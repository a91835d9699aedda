"""Cores, processors and NUMA nodes of made-up machines: where threads run and memory lies."""

import os
import sys
from pathlib import Path

import pytest
import torch

from slotmoe.offload.devices.device import Device
from slotmoe.offload.devices.pages import Arena, page_aligned
from slotmoe.offload.runtime import Runtime
from slotmoe.system import Placement, Processor, choose_placement, cores, placement, processors
from tests.support.kernels import needs_native

GIB = 1 << 30


class Machine:
    """A tree like Linux's, of ``nodes`` with ``each`` cores and ``smt`` logical CPUs a core, the
    second ones of all cores behind the first; ``packages`` share the nodes out."""

    def __init__(self, root, monkeypatch, each, nodes=1, smt=1, packages=1, free=64):
        self.root, self.monkeypatch = root, monkeypatch
        count = each * nodes
        for cpu in range(count * smt):
            core, topology = cpu % count, f"sys/devices/system/cpu/cpu{cpu}/topology"
            siblings = ",".join(str(core + thread * count) for thread in range(smt))
            self.write(f"{topology}/thread_siblings_list", siblings)
            self.write(f"{topology}/physical_package_id", core // each * packages // nodes)
        self.write("sys/devices/system/cpu/online", f"0-{count * smt - 1}")
        for node in range(nodes):
            cpus = [
                f"{t * count + node * each}-{t * count + node * each + each - 1}"
                for t in range(smt)
            ]
            self.write(f"sys/devices/system/node/node{node}/cpulist", ",".join(cpus))
            self.memory(node, free)
        self.write("sys/devices/system/node/online", f"0-{nodes - 1}")
        monkeypatch.setattr(placement, "_ROOT", root)
        self.allow(range(count * smt))

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def memory(self, node, free):
        """Half of what is free holds files."""
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
    return lambda *sizes, **named: Machine(tmp_path, monkeypatch, *sizes, **named)


def spans(*ranges):
    return tuple(number for span in ranges for number in range(*span))


def test_one_node(machine):
    machine(8)
    assert processors() == [Processor(spans((8,)), (0,), 64 * GIB)]
    assert choose_placement(GIB) == choose_placement(200 * GIB) == Placement(8)


def test_one_thread_a_core(machine):
    machine(16, smt=2)
    assert choose_placement(GIB) == Placement(16, spans((16,)))
    assert choose_placement(GIB, threads=32) == Placement(32)


def test_a_model_that_fits_a_node_stays_there(machine):
    two = machine(32, nodes=2, smt=2, packages=2)
    two.memory(0, 60)
    assert choose_placement(GIB).nodes == (1,)
    assert choose_placement(64 * GIB) == Placement(32, spans((32, 64)), (1,))
    assert choose_placement(65 * GIB) == Placement(64, spans((64,)), (0, 1))
    assert choose_placement(GIB, threads=8) == Placement(8, (), (0, 1))
    two.memory(1, 60)
    assert choose_placement(GIB) == Placement(32, spans((32,)), (0,))


def test_nodes_of_one_processor_belong_together(machine):
    machine(16, nodes=4, packages=1)
    assert choose_placement(200 * GIB) == Placement(64, (), (0, 1, 2, 3))
    machine(32, nodes=4, packages=2, smt=2)
    assert choose_placement(100 * GIB) == Placement(64, spans((64,)), (0, 1))
    assert choose_placement(200 * GIB) == Placement(128, spans((128,)), (0, 1, 2, 3))


def test_nodes_without_memory_or_without_cores(machine):
    odd = machine(8, nodes=4, packages=4)
    odd.memory(1, 0)
    odd.write("sys/devices/system/node/node3/cpulist", "")
    assert processors()[1] == Processor(spans((8, 16)))
    assert choose_placement(150 * GIB) == Placement(24, spans((24,)), (0, 2))
    odd.allow(range(24))  # CPUs that no node has are not there
    odd.write("sys/devices/system/cpu/online", "0-23")
    assert choose_placement(GIB) == Placement(8, spans((8,)), (0,))


def test_whoever_chose_the_cpus_has_chosen(machine):
    two = machine(8, nodes=2, smt=2, packages=2)
    two.allow({2, 3, 18, 19, 4})  # of cores 2, 3 and 4
    assert choose_placement(GIB) == Placement(3)
    two.allow({7, 8, 9})
    assert choose_placement(GIB) == Placement(3, (), (0, 1))
    two.allow(range(32))
    two.write("sys/devices/system/cpu/online", "0-7,16-23")  # the others are switched off
    two.allow({*range(8), *range(16, 24)})
    assert choose_placement(GIB) == Placement(8, spans((8,)))


def test_slow_cores_beside_fast_ones(machine):
    hybrid = machine(12, smt=1)
    for cpu in range(12):
        hybrid.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", 1024 if cpu < 4 else 400)
    assert choose_placement(GIB) == Placement(4, spans((4,)))
    hybrid.write("sys/devices/cpu_core/cpus", "0-7")
    assert choose_placement(GIB) == Placement(8, spans((8,)))
    hybrid.allow({8, 9})
    assert choose_placement(GIB) == Placement(2)


def test_no_topology_at_all(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "_ROOT", tmp_path / "nothing")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert choose_placement(GIB) == Placement(3)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(placement.psutil, "cpu_count", lambda logical: 10)
    assert (cores(), choose_placement(GIB)) == (10, Placement(10))
    monkeypatch.setattr(placement.psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 64), ("350000 100000", 4), ("20000 100000", 1), ("not a number", 64)],
)
def test_a_cgroup_gives_less_time(machine, quota, count):
    machine(64, smt=2).write("sys/fs/cgroup/cpu.max", quota)
    assert cores() == count
    assert choose_placement(GIB) == Placement(count, spans((64,)))


def test_no_more_threads_than_the_kernels_start(machine):
    machine(192, nodes=2, packages=2)
    assert cores() == 256
    assert choose_placement(GIB).threads == 192


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
