"""Faults of a GPU, through the twin: memory that is not there, copies that fail, interrupts.  No
GPU is needed."""

import gc
import re
import threading
from itertools import product

import pytest
import torch

from slotmoe.errors import DeviceError, ExportError, PlanError
from slotmoe.offload import loading
from slotmoe.offload.tiers import host
from slotmoe.quant.export.reader import Export
from tests.support.engine import IDS, PROMPT, start, whole
from tests.support.params import nth
from tests.support.twin import Twin, measured, slow

pytestmark = pytest.mark.usefixtures("always_guessing", "twin")


# Memory of the GPU


def test_what_is_allocated_is_what_was_planned(on_twin):
    twin = Twin()
    with on_twin(twin, misses="fetch", slots=60) as runtime:
        unseen = ("logits", "prefill scratch")  # not asked of the device
        planned = sum(size for name, size in runtime.plan.components.items() if name not in unseen)
        assert 0.97 * planned <= twin.peak <= planned
        assert runtime.stats()["memory"]["peak_vram"] == twin.peak
    del runtime
    gc.collect()
    assert twin.allocated == 0


def test_a_budget_that_is_not_free_is_refused_before_anything_is_read(on_twin):
    twin = Twin(capacity=400 << 20)
    twin.taken = 380 << 20
    with pytest.raises(
        PlanError,
        match=r"takes .* of the twin, of which 20.0 MiB are free: give --vram 20MiB or less",
    ):
        on_twin(twin, vram="300MiB")
    assert twin.peak == 0


@pytest.mark.parametrize("after", [3, 120])
def test_another_program_takes_the_memory_while_the_model_is_opened(on_twin, wanted, after):
    twin = Twin(capacity=400 << 20)
    original, calls = twin.empty, 0

    def empty(shape, dtype):
        nonlocal calls
        calls += 1
        if calls == after:
            twin.taken = 399 << 20
        return original(shape, dtype)

    twin.empty = empty
    with pytest.raises(
        PlanError,
        match=r"the twin ran out of memory while the model was opened: "
        r"the budget is 300.0 MiB.*lower --vram",
    ):
        on_twin(twin, vram="300MiB", misses="fetch")
    gc.collect()
    assert twin.allocated == 0
    assert twin.released == 1
    twin.taken = 0
    with on_twin(twin, vram="300MiB", misses="fetch") as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])


@pytest.mark.parametrize("moment", [1, 50])
@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_in_the_middle_of_an_answer(on_twin, wanted, moment, times):
    twin = Twin()
    with on_twin(twin, misses="fetch", slots=22) as runtime:
        left = times

        def on_launch(number):
            nonlocal left
            if number >= moment and left:
                left -= 1
                raise torch.OutOfMemoryError("out of memory: tried to allocate 20 MiB")

        twin.on_launch = on_launch
        if times == 1:  # what the allocator had kept was enough
            assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
            assert twin.released == 1
        else:
            with pytest.raises(
                DeviceError,
                match=r"the twin has no memory left in the middle of a step .*lower --vram",
            ):
                list(runtime.generate(PROMPT, 8))
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        assert torch.equal(runtime.logits(IDS), wanted[0])
        whole(runtime)


# Faults


@pytest.mark.parametrize("moment", [1, 60])
@pytest.mark.parametrize("way", ["fail", "spoil"])
def test_a_copy_that_fails_ends_the_step_and_nothing_else(on_twin, wanted, moment, way):
    """When it is queued, or on its way."""
    twin, broken = Twin(), True

    def act(number):
        if broken and number >= moment and way == "fail":
            raise RuntimeError("an invalid argument")
        return broken and number >= moment

    setattr(twin, way, act)
    with on_twin(twin, misses="fetch", slots=22) as runtime:
        with pytest.raises(
            DeviceError,
            match=r"copying an expert to the twin failed "
            r"\(an (invalid argument|illegal memory access)\)",
        ):
            runtime.logits(IDS)
        broken = False
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        whole(runtime)


@pytest.mark.parametrize(
    ("told", "kind"),
    [("CUDA error: an illegal memory access\nmore", DeviceError), ("a mistake here", RuntimeError)],
)
def test_a_kernel_that_fails_is_told_as_the_gpus(on_twin, told, kind):
    twin = Twin()

    def on_launch(number):
        raise RuntimeError(told)

    twin.on_launch = on_launch
    wanted = (
        "the twin failed (CUDA error: an illegal memory access); start the program again"
        if kind is DeviceError
        else told
    )
    with (
        on_twin(twin, misses="fetch", slots=22) as runtime,
        pytest.raises(kind, match=f"^{re.escape(wanted)}$"),
    ):
        runtime.logits(IDS)


INTERRUPTED = ["fetch launch", "fetch copy", "fetch wait"]
INTERRUPTED += ["hybrid launch", "hybrid wait", "hybrid acquire", "cpu acquire"]


@pytest.mark.parametrize(("moment", "case"), nth(3, product([1, 15], INTERRUPTED)))
def test_interrupted_in_the_middle_of_a_step(on_twin, wanted, monkeypatch, moment, case):
    mode, where = case.split()
    monkeypatch.setattr(
        loading, "stored_bandwidths", lambda path: measured(pcie_busy=1e9, experts=1e9)
    )
    twin, calls, armed = Twin(slow), 0, False

    def stop(number=None):
        nonlocal calls, armed
        if (
            armed and threading.current_thread() is threading.main_thread()
        ):  # which alone gets signals
            calls += 1
            if calls == moment:
                armed = False
                raise KeyboardInterrupt

    twin.on_launch = stop if where == "launch" else lambda number: None
    twin.fail = stop if where == "copy" else lambda number: None
    if where in ("wait", "acquire"):
        owner = Twin if where == "wait" else host.HostTier
        original = getattr(owner, where)
        monkeypatch.setattr(owner, where, lambda *arguments: (stop(), original(*arguments))[1])
    with on_twin(twin, 40, misses=mode, slots=40, kernels="torch") as runtime:
        step = start(runtime)
        step(IDS[:30])
        calls, armed = 0, True
        with pytest.raises(KeyboardInterrupt):
            [step([one]) for one in IDS[30:]] + [runtime.logits(IDS)]
        start(runtime)(IDS[:1])
        whole(runtime)
        found = runtime.logits(IDS)
        assert (
            torch.equal(found, wanted[0])
            if mode == "fetch"
            else torch.allclose(found, wanted[0], rtol=1e-3, atol=1e-3)
        )
        whole(runtime)


@pytest.mark.parametrize("moment", [1, 25])
def test_interrupted_between_a_slot_and_its_entry(on_twin, wanted, monkeypatch, moment):
    """The table on the GPU is a copy of what the host knows: a step that changed one of them only
    is no step's truth."""
    original, calls = Twin.write, 0

    def write(self, source, target):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        original(self, source, target)

    monkeypatch.setattr(Twin, "write", write)
    with on_twin(Twin(), misses="fetch", slots=22) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.logits(IDS)
        start(runtime)(IDS[:1])
        whole(runtime)
        assert torch.equal(runtime.logits(IDS), wanted[0])


def test_a_disk_that_fails_under_what_the_cpu_computes(on_twin, wanted, monkeypatch):
    broken, original = False, Export.read_range

    def read_range(self, layer, expert, start, out, folder=0):
        if broken:
            raise ExportError("the disk is gone")
        original(self, layer, expert, start, out)

    monkeypatch.setattr(Export, "read_range", read_range)
    with on_twin(Twin(), 0, misses="cpu", slots=40, kernels="torch") as runtime:
        step = start(runtime)
        for one in IDS[:20]:
            step([one])
        broken = True
        with pytest.raises(ExportError, match="the disk is gone"):
            step(IDS[20:21])
        broken = False
        torch.testing.assert_close(runtime.logits(IDS), wanted[0], rtol=1e-3, atol=1e-3)
        whole(runtime)
