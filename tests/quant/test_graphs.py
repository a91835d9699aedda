"""The graphs of a backend under torch's rules of memory pools, which a fake of its allocator
holds."""

import pytest
import torch

from slotmoe.quant.backends.graphs import Captured, CudaGraphs
from tests.support.allocator import Allocator

FAILED = "a CUDA graph could not be captured"


def captured(graphs):
    """A function of one buffer that is captured when it is called."""
    made = Captured((torch.zeros(1),), graphs)
    return lambda: made(lambda x: x + 1, torch.ones(1))


@torch.inference_mode()
def test_graphs_of_one_backend_share_a_pool_and_another_backend_has_its_own(monkeypatch):
    """A model is opened, decodes, is closed; the next one captures into a pool that lives."""
    allocator = Allocator(monkeypatch)
    for opened in range(1, 4):
        graphs = CudaGraphs()
        steps = [captured(graphs), captured(graphs)]
        for step in steps:
            step()
        assert len(allocator.users) == opened and allocator.users[(0, opened)] == 2
        del steps, step, graphs
    assert len(allocator.dead) == 3


@torch.inference_mode()
@pytest.mark.parametrize("spoiled", [1, 2])
def test_a_spoiled_capture_is_said_once_and_the_work_goes_on_without_graphs(
    monkeypatch, caplog, spoiled
):
    allocator = Allocator(monkeypatch, spoil={spoiled})
    graphs = CudaGraphs()
    steps = [captured(graphs) for _ in range(3)]
    for _ in range(2):
        assert [step().item() for step in steps] == [2, 2, 2]
    assert [record.message.partition(" (")[0] for record in caplog.records] == [FAILED]
    assert "(CUDA error: operation failed due to a previous error)" in caplog.text
    assert allocator.captures == spoiled
    allocator.empty_cache()  # nothing goes on recording
    another = captured(CudaGraphs())  # another model is not concerned
    assert another().item() == 2 and allocator.captures == spoiled + 1


@torch.inference_mode()
def test_work_that_fails_while_it_is_captured_ends_the_capture(monkeypatch, caplog):
    """Out of memory inside the capture alone: the step runs without graphs."""
    allocator, runs = Allocator(monkeypatch), []

    def work(x):
        runs.append(x)
        if len(runs) == 2:  # the first is the run before the capture
            raise torch.OutOfMemoryError("no memory for the pool")
        return x + 1

    made = Captured((torch.zeros(1),), CudaGraphs())
    assert made(work, torch.ones(1)).item() == 2
    assert len(runs) == 3 and "no memory for the pool" in caplog.text
    allocator.empty_cache()


@torch.inference_mode()
def test_an_interrupt_while_a_graph_is_captured_spoils_nothing(monkeypatch, caplog):
    allocator, runs, graphs = Allocator(monkeypatch), [], CudaGraphs()

    def work(x):
        runs.append(x)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return x + 1

    made = Captured((torch.zeros(1),), graphs)
    with pytest.raises(KeyboardInterrupt):
        made(work, torch.ones(1))
    assert not Captured.capturing
    assert made(work, torch.ones(1)).item() == 2
    assert allocator.captures == 2 and not caplog.records
    allocator.empty_cache()
