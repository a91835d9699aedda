"""Random weights and layers for the native kernels' tests.

Shapes: T tokens; W [N, K]; H hidden; I intermediate; k experts.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from slotmoe.network.shapes import SWIGLU, Activation, latent_bytes
from slotmoe.quant.backends.base import new
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import EXPERT_CODECS, INT4, INT5, INT6, LUT2, LUT3, LUT4, MXFP4, NF4
from slotmoe.quant.codecs.weight import Int8Weight, levels_of
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import Matrix
from tests.support.codes import random_codes

native = qk.load()
BACKEND = native and NativeBackend(native)
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built")
ISAS = native.isas if native else ()
FAST = ("portable", native and native.isa)  # plain C++, and what this machine uses
TWO_DIGITS = tuple(isa for isa in ISAS if isa.startswith("amx"))  # activations have everywhere

NF4S = EXPERT_CODECS["nf4", "4"]
CLAMPED = Activation(1.2, 1.702, 1.0)  # gpt-oss', but for its limit of 7
CODECS = (NF4, LUT4, LUT3, INT4, MXFP4, LUT2, INT5, INT6)
LEVELS = np.array(NF4.levels, dtype=np.float32)

# Hypothesis runs inside parametrized tests; the fixtures that it complains about only choose the
# instruction set.  The examples are the same in each run, but follow the tree's constants.
quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**32 - 1)


def sizes(*largest):
    return st.tuples(*(st.integers(1, top) for top in largest))


def one_of(*values):
    return st.sampled_from(values)


def by_each_set(action):
    """What ``action()`` gives with each instruction set, the fastest first."""
    before, results = native.isa, []
    try:
        for isa in ISAS:
            native.set_isa(isa)
            results.append(action())
    finally:
        native.set_isa(before)
    return results


def silu(g):
    return g / (1 + np.exp(-np.clip(g, -700, None)))


def random_expert(rng, h, i, codecs=NF4S, biases=False):
    """-> (gate, up, down) float64, and their biases, and the record with a poisoned tail."""
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    size = 4 / math.sqrt(h)
    parts = [random_codes(rng, codecs.of(name), *shapes[name], size) for name in shapes]
    tensors = [weight.codes for weight, _ in parts] + [weight.scales for weight, _ in parts]
    added = [torch_of(rng.standard_normal(n)) for n in (i, i, h) if biases]
    tensors += added
    data = torch.frombuffer(
        bytearray().join(t.view(torch.uint8).numpy().tobytes() for t in tensors), dtype=torch.uint8
    )
    buffer = torch.full((len(data) + 164,), 0xFF, dtype=torch.uint8)
    record = buffer[-buffer.data_ptr() % 64 :][: len(data) + 100]  # it begins at a multiple of 64
    record[: len(data)] = data
    return [*(exact for _, exact in parts), *(bias.double().numpy() for bias in added)], record


def torch_of(x):
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


levels_tensor = torch.from_numpy(LEVELS)


def slab_of(records):
    """Records as slots, each at a multiple of 64 bytes, in poisoned memory: uint8 [S, stride]."""
    slab = torch.full((len(records), -(-len(records[0]) // 64) * 64 + 64), 255, dtype=torch.uint8)
    for slot, record in zip(slab, records, strict=True):
        slot[: len(record)] = record
    return slab


def latent_cache(rows, r, extra=0):
    """Rows [S, R + P] as the kernels keep them, ``extra`` bytes apart, the last as long as any."""
    size = latent_bytes(r, rows.shape[1] - r)
    cache = torch.full((len(rows), size + extra), 0xFF, dtype=torch.uint8)[:, :size]
    BACKEND.store_latents(torch_of(rows), r, cache)
    return cache


def expert_slab(slab, h, i, codecs=NF4S, levels=None, activation=SWIGLU, biases=False):
    """Records as the native calls take them."""
    table = torch.stack([levels_of(codec) for codec in codecs]) if levels is None else levels
    return qk.ExpertSlab(slab, h, i, codecs, table, activation, biases)


def through_experts(kernels, x, chosen, slots, coded, y):
    """All of x through those of its ``chosen`` experts that have slots, into ``y``."""
    kernels.experts_by_slot.results(coded, x, chosen, slots, coded.slab, y)
    return y


def coded_matrix(rng, n, k, codec=NF4, size=1.0):
    return Matrix.of(random_codes(rng, codec, n, k, size)[0])


def int8_matrix(kernels, q, scale):
    return kernels.tile_int8(Int8Weight(q, scale), new)


def any_matrix(kernels, rng, kind, n, k):
    """A random matrix of one kind."""
    if kind == "int8":
        q = torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
        return int8_matrix(kernels, q, torch_of(rng.uniform(0.5, 2, n) / 80 / math.sqrt(k)))
    if kind == "nf4":
        return coded_matrix(rng, n, k, size=1.5 / math.sqrt(k))
    weight = torch_of(rng.standard_normal((n, k)) / math.sqrt(k))
    return Matrix.of(weight.to(getattr(torch, kind)))


def same(got, want):
    pairs = zip(got, want, strict=True)
    return all(a is None if b is None else torch.equal(a, b) for a, b in pairs)
