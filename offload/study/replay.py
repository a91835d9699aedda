"""Recorded routing under any policy and cache size, without the model and without torch; and what
the best policy could do.

Every token of a trace counts as a decode step: its gates choose K experts in each layer, and each
choice is a hit or a miss.  The cache starts empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from slotmoe.offload.policy.cache import make_cache

OPTIMUM = "optimum"
Choices = list[list[list[int]]]
"""The keys that each token's gates chose: [tokens][rows][K]."""


def gate_choices(steps: Sequence[np.ndarray], experts: int) -> Choices:
    """Keys, as ``slotmoe.offload.policy.cache`` counts them, of a trace's steps (expert indices [T,
    rows, K] each)."""
    keys: Choices = []
    for step in steps:
        keys += (step.astype(int) + experts * np.arange(step.shape[1])[:, None]).tolist()
    return keys


def replay(choices: Choices, policy: str, slots: int, experts: int) -> int:
    """Hits of a policy of ``slotmoe.offload.policy.cache``."""
    cache = make_cache(policy, slots, len(choices[0]), experts)
    for token in choices:
        cache.advance()
        for keys in token:
            for key in [key for key in keys if not cache.use(key)]:
                cache.offer(key, keys)
    return cache.hits


def optimum(choices: Choices, slots: int) -> int:
    """Hits of the best that any policy with bypass can do, knowing the future: who is used last
    leaves (Belady, 1966)."""
    uses = [key for token in choices for keys in token for key in keys]
    following, next_use = [0] * len(uses), dict[int, int]()
    for time in range(len(uses) - 1, -1, -1):
        following[time] = next_use.get(uses[time], len(uses))
        next_use[uses[time]] = time
    expected = dict[int, int]()  # cached key -> its next use
    heap: list[
        tuple[int, int]
    ] = []  # (-next use, key), the furthest first; entries of past uses stay at the end
    hits = 0
    for key, again in zip(uses, following, strict=True):
        if key in expected:
            hits += 1
        elif len(expected) == slots:
            if -heap[0][0] <= again:
                continue
            del expected[heapq.heappop(heap)[1]]
        expected[key] = again
        heapq.heappush(heap, (-again, key))
    return hits


def sweep(
    choices: Choices, policies: Iterable[str], sizes: Sequence[int], experts: int
) -> Iterator[tuple[str, int, int]]:
    """(policy, slots, hits) for every policy, ``optimum`` among them, and size."""
    for policy in policies:
        for slots in sizes:
            yield (
                policy,
                slots,
                optimum(choices, slots)
                if policy == OPTIMUM
                else replay(choices, policy, slots, experts),
            )
