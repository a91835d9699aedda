"""Recorded routing under any cache policy and size, without the model; and what the best policy
could do.

Every token of a trace counts as a decode step: its gates choose K experts in each layer, and each
choice is a hit or a miss.  The cache starts empty.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import click
import numpy as np

from bench import turns
from slotmoe.errors import ConfigError, reading
from slotmoe.jsonfile import Json
from slotmoe.offload.observe import TraceStep
from slotmoe.offload.policy import POLICIES, available
from slotmoe.offload.policy import cache as played
from slotmoe.offload.policy.cache import FEATURES, Array, make_cache
from slotmoe.quant.kernels.cpu.bindings import load
from slotmoe.tools.options import EXISTING, option

OPTIMUM = "optimum"
SHARES = (5, 10, 15, 25, 35, 50, 75, 100)  # % of all experts
Choices = list[list[list[int]]]
"""The expert ids that each token's gates chose: [tokens][MoE layers][K]."""


def gate_choices(steps: Sequence[TraceStep], experts: int) -> tuple[Choices, Array]:
    """Expert ids of a trace's steps, and what the gates saw, [tokens, MoE layers, F]."""
    choices: Choices = []
    for indices, _ in steps:
        choices += (indices.astype(int) + experts * np.arange(indices.shape[1])[:, None]).tolist()
    return choices, np.concatenate([step.features for step in steps])


def replay(choices: Choices, features: Array, policy: str, slots: int, experts: int) -> int:
    """Hits of a policy of ``slotmoe.offload.policy``, or of ``OPTIMUM``."""
    if policy == OPTIMUM:
        return optimum(choices, slots)
    cache = make_cache(policy, slots, len(choices[0]), experts, load())
    firsts = [layer * experts for layer in range(cache.layers)]
    steps = (
        [[[id - first for id in chosen]] for first, chosen in zip(firsts, token, strict=True)]
        for token in choices
    )
    played.replay(cache, steps, [*features])
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


def read_trace(path: Path) -> tuple[Json, list[TraceStep]]:
    """Header and steps of a trace file of ``slotmoe run --trace``.  Raises ``ConfigError``."""
    with reading(path, ConfigError), path.open("rb") as file:
        try:
            header = json.loads(file.readline(1 << 16))
            shape = len(header["layers"]), header["num_experts_per_tok"]
            experts = header["n_routed_experts"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ConfigError(f"{path}: not a trace of slotmoe run --trace") from problem
        body = file.read()
    steps, offset = list[TraceStep](), 0
    while offset < len(body):
        tokens = int.from_bytes(body[offset : offset + 4], "little")
        count = tokens * shape[0]  # of gates' choices
        size, offset = 2 * count * (shape[1] + FEATURES), offset + 4
        if tokens == 0 or size > len(body) - offset:
            raise ConfigError(f"{path}: step {len(steps)} is cut off or damaged; record it again")
        indices = np.frombuffer(body, "<u2", count * shape[1], offset)
        offset += size
        features = np.frombuffer(body, "<f2", count * FEATURES, offset - 2 * count * FEATURES)
        features = features.reshape(tokens, shape[0], -1)
        steps.append(TraceStep(indices.reshape(tokens, *shape), features))
        if indices.max() >= experts:
            raise ConfigError(f"{path}: step {len(steps) - 1} chose an expert beyond {experts}")
    if not steps:
        raise ConfigError(f"{path}: holds no tokens; record longer")
    return header, steps


@click.command(name="replay")
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...", type=EXISTING)
@option(
    "--slots sizes", "N", "Cache size, repeatable. [default: 5% to 100%]", type=int, multiple=True
)
@option(
    "--policy policies",
    None,
    "Repeatable. [default: all that this machine has]",
    type=click.Choice(POLICIES),
    multiple=True,
)
def command(traces: tuple[Path, ...], sizes: Sequence[int], policies: Sequence[str]) -> None:
    """The hits of cache policies at several sizes, and their share of the optimum's hits, on the
    routing recorded in TRACE files of one model (slotmoe run --trace); means over the files.

    The optimum knows the future: no policy can do better without prefetching."""
    opened = [read_trace(path) for path in traces]
    geometry = opened[0][0]
    if any(header != geometry for header, _ in opened):
        raise ConfigError("the traces are of several models; replay them apart")
    experts, top_k = geometry["n_routed_experts"], geometry["num_experts_per_tok"]
    total = experts * (layers := len(geometry["layers"]))
    sizes = sorted(set(sizes) or {max(top_k, round(share * total / 100)) for share in SHARES})
    recorded = [gate_choices(steps, experts) for _, steps in opened]
    rows, best = list[turns.Row](), list[float]()
    policies = policies or available(load() is not None)
    for size, policy in product(sizes, (OPTIMUM, *policies)):
        hits = [
            replay(chosen, features, policy, size, experts) / (len(chosen) * layers * top_k)
            for chosen, features in recorded
        ]
        best = hits if policy == OPTIMUM else best
        shares = [rate / most if most else 1.0 for rate, most in zip(hits, best, strict=True)]
        row = {"policy": policy, "slots": size, "hit_rate": fmean(hits)}
        rows.append(row | {"of_optimum": fmean(shares)})
    turns.finish(rows, experts=total, tokens=sum(len(chosen) for chosen, _ in recorded))
