"""The host's time for a layer with missing experts, beside a driver that does nothing in no time:
``python -m tests.support.gap``.  What counts is the thread's own: Python of the decoder, experts,
slots, cache policy, host tier and device, and torch's calls for small tensors; not what CUDA takes
to launch.

As with half of V2-Lite in slots: a token chooses six of 64 experts at random, 32 of them have
slots, and the others are in RAM.  A captured graph is what it holds, run once.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from unittest.mock import patch

import torch
from triton.runtime.interpreter import GridExecutor

from slotmoe.model.network import Network
from slotmoe.offload.devices import cuda
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.backends.graphs import Graph
from slotmoe.quant.backends.triton import TritonBackend
from slotmoe.tools.bench import turns
from slotmoe.tools.bench.decode import gaps
from tests.support.tiny import write_checkpoint
from tests.support.twin import open_on

LAYERS, EXPERTS, CHOSEN, TOKENS, FIRST = 8, 64, 6, 200, 10
MODEL = {"num_hidden_layers": LAYERS + 1, "n_routed_experts": EXPERTS, "q_lora_rank": None}
MODEL |= {"num_experts_per_tok": CHOSEN, "topk_method": "greedy", "n_group": 1, "topk_group": 1}


class Point:
    """An event and a stream of a driver for which all has happened."""

    def __init__(self, *given, **options):
        pass

    def query(self):
        return True

    def record_event(self):
        return Point()

    def elapsed_time(self, end):
        return 1.0

    def nothing(self, *given):
        pass

    record = synchronize = wait_event = nothing


class Idle(cuda.CudaDevice):
    def __init__(self):
        self.device, self.name, self._mailbox = torch.device("cpu"), "no GPU", cuda.Mailbox()
        self._copies = Point()

    def backend(self, kernels, swiglu_limit=0.0):
        backend = TritonBackend(self.device, swiglu_limit)
        backend.few.graph = captured
        return backend

    def mapped(self, size):
        memory = torch.zeros(size, dtype=torch.uint8)
        return cuda.Mapped(memory, memory)

    def pin(self, memory):
        return True

    def unpin(self, memory):
        pass

    def memory(self):
        return cuda.DeviceMemory(1 << 34, 1 << 34, 0, 0, 0)

    def release(self):
        pass


def captured(function):
    """A graph that does nothing but choose experts, where it ends in a choice."""
    outputs = function()
    choice = getattr(outputs, "choice", None)
    if choice is None:
        return Graph(lambda: None, outputs)
    chosen = iter([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS + FIRST)])
    return Graph(lambda: choice.indices_TK.copy_(next(chosen)), outputs)


def seconds(export):
    """Of a layer of each token, and of them those from a choice to the first copy behind it."""
    spent, run, device = [], Network.run, Idle()

    def timed(*given):
        started = time.thread_time()
        result = run(*given)
        spent.append(time.thread_time() - started)
        return result

    half = {"slots": LAYERS * EXPERTS // 2, "prefetch": False, "misses": "fetch"}
    driver = SimpleNamespace(Event=Point, Stream=Point, current_stream=Point)
    driver.stream = driver.device = nullcontext
    ways = {"run": timed, "head": lambda self, h_TD: h_TD.clone()}
    with (
        patch.object(GridExecutor, "__call__", lambda *given, **options: None),
        patch.object(cuda.torch, "cuda", driver),
        patch.multiple(Network, **ways),
        open_on(export, device, LAYERS * EXPERTS, **half) as runtime,
    ):
        runtime.warm()
        first = gaps(runtime, turns.random_ids(TOKENS))
    return [token / LAYERS for token in spent[FIRST:]], first[FIRST * LAYERS :]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model", **MODEL)
        quantize(Path(folder) / "model", Path(folder) / "export")
        figures = seconds(Path(folder) / "export")
    for name, values in zip(("a layer", "to the first copy"), figures, strict=True):
        few, *_, many = quantiles([1e6 * value for value in values], n=20)
        print(f"{name}: {1e6 * median(values):.0f} microseconds ({few:.0f} to {many:.0f})")
