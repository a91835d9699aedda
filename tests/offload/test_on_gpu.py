"""What only a CUDA device can say: page-locked RAM under kernels, the same bits for every budget
with real streams, memory after closing, graphs of one model after another.  ``pytest -m gpu``."""

import gc

import pytest
import torch

from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, PROMPT, start, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


def opened(export, **options):
    return Runtime.open(export, device="cuda", vram="1GiB", context=256, threads=1, **options)


@pytest.fixture(scope="module")
def complete(sample_export):
    with opened(sample_export, misses="fetch") as runtime:
        runtime.warm()
        step = start(runtime)
        logits, ids = runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 8)]
        return logits, ids, [step([id]).cpu() for id in IDS[:6]]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("slots", [6, 22, 56, 112])
def test_the_same_bits_for_every_budget(sample_export, complete, slots, prefetch):
    with opened(sample_export, misses="fetch", slots=slots, prefetch=prefetch) as runtime:
        step = start(runtime)
        assert all(map(torch.equal, [step([id]).cpu() for id in IDS[:6]], complete[2]))
        assert torch.equal(runtime.logits(IDS), complete[0])
        assert [token.id for token in runtime.generate(PROMPT, 8)] == complete[1]
        assert runtime.stats()["io"]["host"]["pinned"]
        whole(runtime)


@pytest.mark.parametrize("mode", ["cpu", "hybrid"])
def test_what_the_cpu_computes_agrees_within_rounding(sample_export, complete, mode):
    with opened(sample_export, misses=mode, slots=40) as runtime:
        found = runtime.logits(IDS)
    assert ((found - complete[0]).norm() / complete[0].norm()).item() < 0.03


def test_models_are_opened_and_closed_and_leave_nothing(sample_export):
    """Graphs of the second model are captured after those of the first are gone."""
    gc.collect()
    left, texts = [], []
    gc.disable()
    try:
        for _ in range(3):
            with opened(sample_export) as runtime:
                runtime.warm()
                texts.append([token.id for token in runtime.generate(PROMPT, 8)])
            del runtime
            left.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    # The first leaves what is torch's: cuBLAS's workspace, 32 MiB on compute capability 9.0.
    assert max(left) - left[0] < 1 << 20
    assert texts[0] == texts[1] == texts[2]
