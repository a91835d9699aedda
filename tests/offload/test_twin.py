"""The GPU's twin finds what it is for: defects that are planted into the product show, by a wrong
text or by what CUDA refuses.  Without them the same runs are right."""

from contextlib import nullcontext

import pytest
import torch

from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.experts.host import HostTier
from tests.support import simulated, streams
from tests.support.engine import IDS, decode
from tests.support.params import nth
from tests.support.twin import Twin, open_on

pytestmark = pytest.mark.usefixtures("always_guessing", "twin")

LATE, COPIES_EARLY = 2, 6  # seeds of adversaries that do nothing else
CudaDevice, Mailbox = simulated.cuda.CudaDevice, simulated.cuda.Mailbox
copy = CudaDevice.copy


def early(mailbox):
    """Page-locked RAM serves again before the kernel that reads it has run."""
    for _, memory, _ in mailbox._used:
        mailbox._free[len(memory.host)].append(memory)
    mailbox._used.clear()


def reused(tier):
    """Slots in RAM are free as soon as the copies from them are queued."""
    tier.store.collect()
    while tier._copying:
        tier._put_back(tier._copying.popleft()[1], arrived=True)


def overtaking(device, source, target, after):
    """A copy does not wait for those who read what is in the slot."""
    return copy(device, source, target, simulated.cuda._CudaEvent(streams.Event()))


DEFECTS = {
    "a missing wait": (CudaDevice, "wait", lambda device, event: None),
    "an early write by the host": (Mailbox, "_collect", early),
    "a slot in RAM that is used again": (HostTier, "_collect", reused),
    "a slot of the GPU that is used again": (CudaDevice, "copy", overtaking),
    "a wrong GPU": (CudaDevice, "current", lambda device: nullcontext()),
}


def passes(on_twin, seed):
    """Logits of some, or what ended them."""
    with on_twin(Twin(seed), 60, misses="fetch", slots=22) as runtime:
        try:
            return torch.cat([runtime.logits(IDS[:8]), decode(runtime, IDS[:2], IDS[2:6])])
        except Exception as problem:
            return problem


@pytest.fixture(scope="module")
def right(twin, sample_export):
    with open_on(sample_export, Twin(LATE), misses="fetch") as runtime:
        return torch.cat([runtime.logits(IDS[:8]), decode(runtime, IDS[:2], IDS[2:6])])


@pytest.mark.parametrize("seed", nth(4, range(12)))
def test_the_text_is_the_same_in_every_order_that_streams_allow(on_twin, right, seed):
    assert torch.equal(passes(on_twin, seed), right)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_shows(on_twin, right, monkeypatch, defect):
    monkeypatch.setattr(*DEFECTS[defect])
    found = (passes(on_twin, seed) for seed in (LATE, COPIES_EARLY))
    assert not all(isinstance(text, torch.Tensor) and text.equal(right) for text in found)


# Capture


@pytest.fixture
def gpu():
    twin = Twin(LATE)
    with twin.current(), torch.inference_mode():
        yield twin


def test_a_graph_reads_its_inputs_when_it_is_replayed(gpu):
    x, graphs = gpu.upload(torch.arange(3.0)), simulated.graphs.CudaGraphs()
    graph = graphs(lambda: (x * 2).exp_() + x)
    for number in range(3):
        given = torch.full((3,), float(number))
        gpu.write(given, x)
        graph.replay()
        assert torch.equal(gpu.download(graph.outputs).get(), (given * 2).exp() + given)


FORBIDDEN = {
    "the host waits": lambda gpu, x: x.sum().item(),
    "page-locked RAM is allocated": lambda gpu, x: gpu.mapped(4096),
    "an event is asked for": lambda gpu, x: gpu.download(x),
    "a capture does not hold what is queued elsewhere": lambda gpu, x: gpu.gpu.put(
        gpu.gpu.default, int
    ),
    "RAM is page-locked": lambda gpu, x: gpu.pin(page_aligned(4096)),
}


@pytest.mark.parametrize("refused", FORBIDDEN)
def test_what_no_graph_can_hold_is_refused(gpu, caplog, refused):
    x = gpu.upload(torch.ones(3))
    gpu.download(x).get()
    assert simulated.graphs.CudaGraphs()(lambda: FORBIDDEN[refused](gpu, x)) is None
    assert refused in caplog.text and "could not be captured" in caplog.text
