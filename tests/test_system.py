"""What differs between systems: reads past the page cache, short reads, refusals; and on which
cores of made-up machines threads run, and on which nodes memory lies."""

import errno
import fcntl
import os
import sys

import pytest
import torch

from slotmoe import system
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from slotmoe.system import Placement, choose_placement, cores, placement
from tests.support.kernels import needs_native
from tests.support.tiny import SAMPLE, SMALL, write_checkpoint

BLOCK = 4096


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * BLOCK))
    handle = os.open(path, os.O_RDONLY)
    yield handle
    os.close(handle)


def is_direct(handle):
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


def test_direct_reads_and_back(file):
    assert system.bypass_page_cache(file, BLOCK) == is_direct(file)
    system.use_page_cache(file)
    assert not is_direct(file)


def test_a_file_system_that_wants_whole_large_pages_is_refused(file, monkeypatch):
    def read(handle, buffers, offset):
        if offset % (16 * BLOCK):
            raise OSError(errno.EINVAL, "Invalid argument")
        return BLOCK

    monkeypatch.setattr(os, "preadv", read)
    assert not system.bypass_page_cache(file, BLOCK)
    assert not is_direct(file)


def test_short_reads_are_no_damage(sample_export, monkeypatch):
    """A header in two parts was called damage, and that of a checkpoint got another hash."""
    with open_checkpoint(SAMPLE) as checkpoint:
        wanted = list(checkpoint.headers())
    preadv = os.preadv

    def short(handle, buffers, offset):
        return preadv(handle, [buffers[0][: max(len(buffers[0]) // 2, 1)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    Export.open(sample_export).close()
    with open_checkpoint(SAMPLE) as checkpoint:
        assert list(checkpoint.headers()) == wanted


REFUSED = {
    "quantize SOURCE MADE": ("os.pwrite", "os.fsync", "os.preadv"),
    "run EXPORT Hello -n 2": ("os.preadv", "os.open"),
    "run EXPORT Hello -n 20 --session x --session-dir MADE": ("os.fsync", "fcntl.flock"),
}


@pytest.mark.usefixtures("heavy", "processes")
@pytest.mark.parametrize(("line", "call"), [(line, it) for line in REFUSED for it in REFUSED[line]])
def test_what_the_system_refuses_names_the_file(line, call, slotmoe, tmp_path, monkeypatch):
    """The system does not: a call has only a number.  The campaign ``system-calls`` refuses all."""
    write_checkpoint(tmp_path / "source", **SMALL)
    if "EXPORT" in line:
        quantize(tmp_path / "source", tmp_path / "export")
    module, _, name = call.partition(".")
    original = getattr(sys.modules[module], name)

    def refuse(file, *given, **options):
        path = file if name == "open" else os.readlink(f"/proc/self/fd/{file}")
        if str(path).startswith(str(tmp_path)) and "tokenizer" not in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(file, *given, **options)

    words = [tmp_path / word.lower() if word.isupper() else word for word in line.split()]
    monkeypatch.setattr(call, refuse)
    code, _, err = slotmoe(*words)
    *_, told = err.splitlines()
    assert code in (0, 1, 2) and "Traceback" not in err and "damaged" not in err
    assert str(tmp_path) in told and os.strerror(errno.EIO) in err and told.startswith("slotmoe: ")


GIB = 1 << 30


def spans(*ranges):
    return tuple(number for span in ranges for number in range(*span))


class Machine:
    """A tree like Linux's, of ``nodes`` with 64 GiB and ``each`` cores, and ``smt`` logical CPUs a
    core, the second ones of all cores behind the first; ``packages`` share the nodes out."""

    def __init__(self, root, monkeypatch, each, nodes=1, smt=1, packages=1):
        self.root, self.monkeypatch = root, monkeypatch
        count = each * nodes
        for cpu in range(count * smt):
            core, topology = cpu % count, f"sys/devices/system/cpu/cpu{cpu}/topology"
            siblings = ",".join(str(core + thread * count) for thread in range(smt))
            self.write(f"{topology}/thread_siblings_list", siblings)
            self.write(f"{topology}/physical_package_id", core // each * packages // nodes)
        self.write("sys/devices/system/cpu/online", f"0-{count * smt - 1}")
        self.write("sys/devices/system/node/online", f"0-{nodes - 1}")
        for node in range(nodes):
            folder = f"sys/devices/system/node/node{node}"
            first = [thread * count + node * each for thread in range(smt)]
            cpus = ",".join(f"{cpu}-{cpu + each - 1}" for cpu in first)
            self.write(f"{folder}/cpulist", cpus)
            sizes = {"MemTotal": 64 << 20, "MemFree": 32 << 20, "FilePages": 32 << 20, "Shmem": 0}
            lines = [f"Node {node} {name}:  {size} kB" for name, size in sizes.items()]
            self.write(f"{folder}/meminfo", "\n".join(lines))
        monkeypatch.setattr(placement, "_ROOT", root)
        self.allow(range(count * smt))

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

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
]


@pytest.mark.parametrize(("sizes", "wanted_gib", "chosen"), PLACED)
def test_threads_and_memory_of_a_machine(machine, sizes, wanted_gib, chosen):
    """One thread a core, and a model on one processor if that has room."""
    machine(**sizes)
    assert choose_placement(wanted_gib * GIB) == chosen
    given = choose_placement(wanted_gib * GIB, threads=5)
    assert (given.threads, given.cpus) == (5, ())


def test_fewer_cpus_less_time_and_slow_cores(machine):
    for quota, count in ("350000 100000", 4), ("20000 100000", 1), ("not a number", 12):
        one = machine(each=12)
        one.write("sys/fs/cgroup/cpu.max", quota)
        assert (cores(), choose_placement(GIB).threads) == (count, count)
    for cpu in range(12):
        one.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", 1024 if cpu < 4 else 400)
    assert choose_placement(GIB) == Placement(4, spans((4,)))
    one.allow({8, 9})  # whoever chose them has chosen
    assert choose_placement(GIB) == Placement(2)


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
