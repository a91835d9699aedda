"""What is chosen once a layer or a token, and what the host does for a token on a Vulkan device:
the least CPU time of many short runs, in microseconds, which other programs change little.
``python -m scripts.choices``"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time
from unittest.mock import patch

import numpy as np
import torch

from slotmoe.model.generate import numbers, sample
from slotmoe.model.sampling import Sampling
from slotmoe.offload.engine import loading
from slotmoe.offload.engine.passes import Passes, Row
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.kernels import vulkan
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support.tiny import write_checkpoint

RUNS = 2000
LITE = {"num_hidden_layers": 27, "n_routed_experts": 64, "num_experts_per_tok": 6}
LITE |= {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "max_position_embeddings": 1024}


def policy(layers: int = 59, experts: int = 160, missed: int = 5) -> float:
    """``learned`` in a layer of V2's that misses so many, which get a slot or do not."""
    cache, chance = make_cache("learned", 1200, layers, experts, load()), np.random.default_rng(0)
    spent, often_E = list[float](), 1 / np.arange(3, 3 + experts)
    for layer in cycle(range(layers)):
        cache.advance(layer == 0)
        chosen = chance.choice(experts, 6, False, often_E / often_E.sum()).tolist()
        ids, x_1D = [layer * experts + expert for expert in chosen], np.empty((1, 5120), "f")
        chance.standard_normal(dtype="f", out=x_1D)
        cache.held_N[:] = False
        cache.held_N[ids] = True
        missing = [id for id in ids if id not in cache]
        started = thread_time()
        cache.use_chunk(layer, [chosen], x_TD=x_1D)
        for id in missing:
            evicted = cache.victim(id)
            if evicted is not None and evicted != id:
                cache.remove(evicted)
            if evicted != id:
                cache.add(id)
        if len(missing) == missed and len(cache) == cache.slots:
            spent.append(thread_time() - started)
        if len(spent) == RUNS:
            break
    return 1e6 * min(spent)


def token(spread: float, vocabulary: int = 129_280) -> float:
    """A token by logits of that standard deviation."""
    generator, spent = torch.Generator().manual_seed(0), list[float]()
    logits_V, draws = spread * torch.randn(vocabulary, generator=generator), numbers(generator)
    for _ in range(RUNS):
        started = thread_time()
        sample(logits_V, Sampling(temperature=0.6, top_p=0.95), draws)
        spent.append(thread_time() - started)
    return 1e6 * min(spent)


def on_vulkan(export: Path, slots: int) -> tuple[float, float, float]:
    """A token's pass through V2-Lite's layers, with experts in so many ``slots`` or in RAM, but for
    what the device does: the least and the median, and experts that go on to slots.  A token
    changes up to one expert of a layer."""
    chance, spent, chosen = np.random.default_rng(0), list[float](), list[np.ndarray]()
    chosen_MK, often_E = np.tile(np.arange(6), (26, 1)), 1 / np.arange(3, 67)
    for _ in range(1000):
        for row_K in chosen_MK:
            new = chance.choice(64, p=often_E / often_E.sum())
            if new not in row_K:
                row_K[chance.integers(6)] = new
        chosen.append(chosen_MK.copy())
    plan, run, choices = loading.make_plan, Passes.run, iter(chosen)

    def step(decoder: vulkan.Decoder, step: object) -> None:
        decoder.views.indices[:, :1] = next(choices)[:, None]
        decoder.views.stopped[:] = -1

    def passed(passes: Passes, rows: Sequence[Row]) -> None:
        started = thread_time()
        run(passes, rows)
        spent.append(1e6 * (thread_time() - started))

    in_ram = lambda *given, **how: replace(plan(*given, **how), host_slots=26 * 64)  # noqa: E731
    patched = patch.object(vulkan.Decoder, "run", step), patch.object(Passes, "run", passed)
    with patch.object(loading, "make_plan", in_ram), patched[0], patched[1]:
        runtime = Runtime.open(export, "vulkan", context=1024, slots=slots)
        runtime.warm()
        runtime.generate([*range(20)], 900, temperature=0.0).read()
        copied = runtime.stats()["cache"]["evictions"]
        runtime.close()
    return min(spent[200:]), float(np.median(spent[200:])), copied / len(spent)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "source"), **LITE)
        quantize(Path(folder, "source"), Path(folder, "export"))
        for slots in (1664, 832):
            least, median, copied = on_vulkan(Path(folder, "export"), slots)
            print(
                f"a pass on Vulkan, {slots} slots: {least:.0f}, {median:.0f}; copied {copied:.1f}"
            )
    print(f"policy of a layer with 5 misses: {policy():.1f}")
    for spread in (2.5, 3.0, 4.0):
        print(f"a token, logits of standard deviation {spread}: {token(spread):.1f}")
