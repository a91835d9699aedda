"""What is chosen once a layer or a token: the least CPU time of many short runs, in microseconds,
which other programs change little.  ``python -m scripts.choices``"""

from itertools import cycle
from time import thread_time

import numpy as np
import torch

from slotmoe.model.generate import sample
from slotmoe.model.sampling import Sampling
from slotmoe.offload.policy.cache import make_cache
from slotmoe.quant.kernels.cpu.bindings import load

RUNS = 2000


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
    logits_V = spread * torch.randn(vocabulary, generator=generator)
    for _ in range(RUNS):
        started = thread_time()
        sample(logits_V, Sampling(temperature=0.6, top_p=0.95), generator)
        spent.append(thread_time() - started)
    return 1e6 * min(spent)


if __name__ == "__main__":
    print(f"policy of a layer with 5 misses: {policy():.1f}")
    for spread in (2.5, 3.0, 4.0):
        print(f"a token, logits of standard deviation {spread}: {token(spread):.1f}")
