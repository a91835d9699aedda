"""Kinds of runtimes that are disturbed, what is computed on them, and what must hold afterwards."""

import torch

from slotmoe.offload.experts import disk
from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, decode, whole
from tests.support.twin import Twin, open_on, slow

PASSES = IDS[:12], [7, 8]
SHORT = IDS[:4], [7]  # plain torch, as the twin of a GPU has it, is slow


def compute(runtime):
    """Prefill and decode: all logits."""
    runtime.engine.empty()
    return decode(runtime, *(PASSES if runtime.model.device.tier == "ram" else SHORT))


def on_threads(export, monkeypatch):
    """Every record is read by the threads, in several pieces."""
    monkeypatch.setattr(disk, "HELP_BYTES", 0)
    monkeypatch.setattr(disk, "PIECE_BYTES", 8192)
    return Runtime.open(export, context=256, slots=22)


def on_gpu(export, mode):
    return open_on(export, Twin(slow), 40, misses=mode, slots=40, kernels="torch")


KINDS = {
    "helping": lambda export, monkeypatch: Runtime.open(export, context=256, slots=22),
    "threads": on_threads,
    "gpu": lambda export, monkeypatch: on_gpu(export, "fetch"),
    "hybrid": lambda export, monkeypatch: on_gpu(export, "hybrid"),
}


def check(runtime, want):
    """What was cancelled has ended, the next pass is right, and no slot is lost."""
    runtime.engine.call(lambda: whole(runtime))
    assert torch.equal(compute(runtime), want)
    runtime.engine.call(lambda: whole(runtime))
