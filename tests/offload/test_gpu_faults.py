"""Faults of a GPU, through the twin: memory that is not there, copies that fail.  No GPU is
needed."""

import gc

import pytest
import torch

from slotmoe.errors import DeviceError, PlanError
from slotmoe.offload.plan import memory
from tests.support.engine import IDS, PROMPT, start, whole
from tests.support.twin import Twin, open_on

pytestmark = pytest.mark.usefixtures("always_guessing", "twin")


def right(runtime, wanted):
    """The next passes are right and no slot is lost."""
    start(runtime)(IDS[:1])
    whole(runtime)
    assert torch.equal(runtime.logits(IDS), wanted[0])
    whole(runtime)


# Memory of the GPU


def test_what_is_allocated_is_what_was_planned(on_twin):
    twin = Twin()
    with on_twin(twin, misses="fetch", slots=12) as runtime:
        unseen = ("logits", "prefill scratch", "page tables")  # not asked of the device
        planned = sum(size for name, size in runtime.plan.components.items() if name not in unseen)
        assert 0.97 * planned <= twin.gpu.peak <= planned
        assert runtime.stats()["memory"]["peak_vram"] == twin.gpu.peak
    del runtime
    gc.collect()
    assert twin.gpu.allocated == 0


def test_a_budget_that_is_not_free_is_refused_before_anything_is_read(sample_export, monkeypatch):
    """And the advice opens it: less than what is free, unless the least plan takes more."""
    monkeypatch.setattr(memory, "FREE_SHARE", 0.99)  # the sample's slots take few bytes
    twin = Twin(capacity=400 << 20)
    for free, advice in ((200, "give --vram 198MiB or less, or end the"), (20, "end the")):
        twin.gpu.taken = (400 - free) << 20
        told = f"takes .* of the twin, of which {free}.0 MiB are free: {advice} programs that use"
        with pytest.raises(PlanError, match=told) as refused:
            open_on(sample_export, twin, vram="300MiB")
        assert twin.gpu.peak == 0 and ("--resident mixed" in str(refused.value)) == (free == 20)
    twin.gpu.taken = 200 << 20
    open_on(sample_export, twin, vram="198MiB", misses="fetch").close()


@pytest.mark.parametrize("after", [3, 50])
def test_another_program_takes_the_memory_while_the_model_is_opened(
    on_twin, wanted, monkeypatch, after
):
    twin, calls, empty = Twin(capacity=400 << 20), [], Twin.empty

    def taken(self, *wanted):
        calls.append(wanted)
        if len(calls) == after:
            twin.gpu.taken = 399 << 20
        return empty(self, *wanted)

    monkeypatch.setattr(Twin, "empty", taken)
    told = "ran out of memory while the model was opened: the budget is 300.0 MiB.*lower --context"
    with pytest.raises(PlanError, match=f"the twin {told}"):
        on_twin(twin, vram="300MiB", misses="fetch")
    gc.collect()
    assert twin.gpu.allocated == 0
    assert twin.released == 1
    twin.gpu.taken = 0
    with on_twin(twin, vram="300MiB", misses="fetch") as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])


@pytest.mark.parametrize(("moment", "times"), [(1, 1), (12, 2)])
def test_out_of_memory_in_the_middle_of_an_answer(on_twin, wanted, moment, times):
    twin, left = Twin(), [torch.OutOfMemoryError("out of memory: tried to allocate 20 MiB")] * times

    def on_launch(number):
        if number >= moment and left:
            raise left.pop()

    with on_twin(twin, misses="fetch", slots=6) as runtime:
        twin.on_launch = on_launch
        if times == 2:  # what the allocator had kept was not enough
            told = "the twin has no memory left in the middle of a step .*lower --vram"
            with pytest.raises(DeviceError, match=told):
                list(runtime.generate(PROMPT, 8))
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        assert twin.released == 1 and not left
        right(runtime, wanted)


ILLEGAL = "CUDA error: an illegal memory access"
AGAIN = f"^the twin failed .{ILLEGAL}.; start the program again$"
BROKEN = [  # what, at which copy or launch, by what, and what is told
    ("fail", 20, "an invalid argument", r"copying an expert to the twin failed .an invalid argu"),
    ("on_launch", 2, f"{ILLEGAL}\nmore", AGAIN),
    ("on_launch", 2, "a mistake here", "^a mistake here$"),
]


@pytest.mark.parametrize(("what", "moment", "problem", "told"), BROKEN)
def test_what_fails_when_it_is_queued_ends_the_step_and_a_copy_nothing_else(
    on_twin, wanted, what, moment, problem, told
):
    twin, broken = Twin(), True

    def fail(number):
        if broken and number >= moment:
            raise RuntimeError(problem)

    setattr(twin, what, fail)
    with on_twin(twin, misses="fetch", slots=6) as runtime:
        with pytest.raises((DeviceError, RuntimeError), match=told):
            runtime.logits(IDS)
        broken = False
        if what == "fail":
            right(runtime, wanted)
            assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_that_fails_on_its_way_is_the_end_of_the_gpu_for_this_process(on_twin, seed):
    """CUDA tells the same of every call from then on.  The model can be closed and gives its RAM
    back."""
    twin = Twin(seed)
    twin.spoil = lambda number: number == 20
    told = r"the twin.* failed \(CUDA error: an illegal memory access\)"
    with on_twin(twin, misses="fetch", slots=6) as runtime:
        runtime.logits(IDS[:1])
        with pytest.raises(DeviceError, match=told):
            runtime.logits(IDS)
    assert not twin.gpu.pinned()
