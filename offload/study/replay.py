"""Recorded routing under any policy and cache size, without the model and without torch; and what
the best policy could do.

Every token of a trace counts as a decode step: its gates choose K experts in each layer, and each
choice is a hit or a miss.  The cache starts empty.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from slotmoe.offload.observe.trace import Step
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.policy.forecast import Array

OPTIMUM = "optimum"
Choices = list[list[list[int]]]
"""The expert ids that each token's gates chose: [tokens][MoE layers][K]."""


def gate_choices(steps: Sequence[Step], experts: int) -> tuple[Choices, Array]:
    """Expert ids of a trace's steps, and what the gates saw, [tokens, MoE layers, F]."""
    choices: Choices = []
    for indices, _ in steps:
        choices += (indices.astype(int) + experts * np.arange(indices.shape[1])[:, None]).tolist()
    return choices, np.concatenate([step.features for step in steps])


def replay(choices: Choices, features: Array, policy: str, slots: int, experts: int) -> int:
    """Hits of a policy of ``slotmoe.offload.policy``, or of ``OPTIMUM``."""
    if policy == OPTIMUM:
        return optimum(choices, slots)
    cache = make_cache(policy, slots, len(choices[0]), experts)
    for token, seen in zip(choices, features, strict=True):
        cache.advance()
        for row, chosen in enumerate(token):
            missing = [expert_id for expert_id in chosen if expert_id not in cache]
            indices = [expert_id - row * experts for expert_id in chosen]
            cache.use_chunk(row, [indices], x_TD=seen[row, None])
            for expert_id in missing:
                cache.offer(expert_id, chosen)
    return cache.hits


def optimum(choices: Choices, slots: int) -> int:
    """Hits of the best policy with bypass, which evicts what is used last (Belady, 1966)."""
    uses = [expert for token in choices for chosen in token for expert in chosen]
    following, next_use = [0] * len(uses), dict[int, int]()
    for time in range(len(uses) - 1, -1, -1):
        following[time] = next_use.get(uses[time], len(uses))
        next_use[uses[time]] = time
    expected = dict[int, int]()  # cached expert id -> its next use
    # (-next use, id), the furthest first; entries of past uses stay at the end
    heap: list[tuple[int, int]] = []
    hits = 0
    for expert, again in zip(uses, following, strict=True):
        if expert in expected:
            hits += 1
        elif len(expected) == slots:
            if -heap[0][0] <= again:
                continue
            del expected[heapq.heappop(heap)[1]]
        expected[expert] = again
        heapq.heappush(heap, (-again, expert))
    return hits
