"""Random weights and layers for the native kernels' tests.

Shapes: T tokens; W [N, K]; H hidden; I intermediate; k experts.
"""

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from slotmoe.border import Geometry, Layer, Mla, Router
from slotmoe.quant.backends.base import new
from slotmoe.quant.codecs.codec import EXPERT_CODECS, INT4, LUT3, LUT4, MXFP4, NF4
from slotmoe.quant.codecs.weight import levels_of
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.layers import mla_layer, sizes_of
from slotmoe.quant.kernels.cpu.tokens import addresses
from slotmoe.quant.kernels.cpu.weights import ExpertRecord, Matrix
from slotmoe.quant.shapes import latent_bytes
from tests.support.codes import random_codes

native = qk.load()
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built")
ISAS = native.isas if native else ()
TWO_DIGITS = tuple(isa for isa in ISAS if isa.startswith("amx"))  # activations have everywhere

NF4S = EXPERT_CODECS["nf4", "4"]
CODECS = (NF4, LUT4, LUT3, INT4, MXFP4)
LEVELS = np.array(NF4.levels, dtype=np.float32)

# Hypothesis runs inside parametrized tests; the fixtures that it complains about only choose the
# instruction set.  The examples are the same in each run: a bound on rounding leans on no luck.
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


def relative(got, want):
    """RMS of the difference over RMS of the truth."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    size = np.linalg.norm(want)
    return np.linalg.norm(got - want) / size if size else np.linalg.norm(got)


def random_expert(rng, h, i, codecs=NF4S):
    """-> (gate, up, down) float64 and the record with a poisoned tail."""
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    size = 4 / math.sqrt(h)
    parts = [random_codes(rng, codecs.of(name), *shapes[name], size) for name in shapes]
    tensors = [weight.codes for weight, _ in parts] + [weight.scales for weight, _ in parts]
    data = torch.frombuffer(
        bytearray().join(t.view(torch.uint8).numpy().tobytes() for t in tensors), dtype=torch.uint8
    )
    buffer = torch.full((len(data) + 164,), 0xFF, dtype=torch.uint8)
    record = buffer[-buffer.data_ptr() % 64 :][: len(data) + 100]  # it begins at a multiple of 64
    record[: len(data)] = data
    return [exact for _, exact in parts], record


def torch_of(x):
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


levels_tensor = torch.from_numpy(LEVELS)


def slab_of(records):
    """Records as slots, each at a multiple of 64 bytes, in poisoned memory: uint8 [S, stride]."""
    slab = torch.full((len(records), -(-len(records[0]) // 64) * 64 + 64), 255, dtype=torch.uint8)
    for slot, record in zip(slab, records, strict=True):
        slot[: len(record)] = record
    return slab


def latent_cache(kernels, rows, r, extra=0):
    """Rows [S, R + P] as the kernels keep them, ``extra`` bytes apart, the last as long as any."""
    size = latent_bytes(r, rows.shape[1] - r)
    cache = torch.full((len(rows), size + extra), 0xFF, dtype=torch.uint8)[:, :size]
    kernels.store_latents(torch_of(rows), r, cache)
    return cache


def expert_record(h, i, codecs=NF4S, levels=None, limit=0.0):
    """How records are coded, as the native calls take it."""
    table = torch.stack([levels_of(codec) for codec in codecs]) if levels is None else levels
    return ExpertRecord(h, i, codecs, table, limit)


def through_expert(kernels, x, record, intermediate):
    """All of x through one expert, [T, H]."""
    y, chosen = torch.empty(len(x), 1, x.shape[1]), torch.zeros(len(x), 1, dtype=torch.int64)
    slots = torch.zeros(1, dtype=torch.int32)
    coded = expert_record(x.shape[1], intermediate)
    kernels.experts_by_slot(coded, x, chosen, slots, coded.slab(slab_of([record])), y)
    return y[:, 0]


def attention_layer(kernels, layer, h, table, caches, positions, query_scale=None):
    """One token of each of T sequences through a layer's attention, the oracle of ``decode``: h
    float32 [T, H] -> y = h + attention(rms_norm(h)), x = rms_norm(y) and, with a router, its
    logits.  A token's latent row is written to its sequence's cache at its position."""
    _, stride = qk.latent_rows(caches[0], layer.sizes["R"], 2 * layer.sizes["C"])
    places = (ctypes.c_int64 * len(positions))(*positions)
    values = layer, h, table, query_scale, addresses(caches), stride, places
    experts = layer.sizes.get("E", 0)
    y, x, logits = kernels.attention.results(*values, T=len(caches), E=experts)
    return y, x, logits if experts else None


def coded_matrix(rng, n, k, codec=NF4, size=1.0):
    return Matrix.of(random_codes(rng, codec, n, k, size)[0])


def int8_matrix(kernels, q, scale):
    return kernels.tile_int8(Int8Weight(q, scale), new)


def alone(kernels, x, records, intermediate):
    """x [H] through some experts, by a call for each: [k, H]."""
    return torch.cat([through_expert(kernels, x[None], r, intermediate) for r in records])


def any_matrix(kernels, rng, kind, n, k):
    """A random matrix of one kind."""
    if kind == "int8":
        q = torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
        return int8_matrix(kernels, q, torch_of(rng.uniform(0.5, 2, n) / 80 / math.sqrt(k)))
    if kind == "nf4":
        return coded_matrix(rng, n, k, size=1.5 / math.sqrt(k))
    weight = torch_of(rng.standard_normal((n, k)) / math.sqrt(k))
    return Matrix.of(weight.to(getattr(torch, kind)))


def layer_of(arguments, constants, halves=False):
    """A geometry and a layer; with a part of a second query's, ``query`` is the first of two."""
    sizes, input_norm, query, query_norm, query_b, *rest = arguments
    queries = (query, None) if query_norm is None and query_b is None else (None, query)
    latent, latent_norm, kv_b, out, next_norm, gate, gate_bias = rest
    mla = Mla(*queries, query_norm, query_b, latent, latent_norm, kv_b, out, None)
    layer = Layer(input_norm, mla, next_norm, gate, gate_bias, None, None, None, None)
    return Geometry(*sizes, *constants, halves, Router(1, 1, 1), 0), layer


def bound_layer(geometry, layer):
    return mla_layer(geometry, layer, sizes_of(geometry, layer))


class RandomLayer:
    """A layer of random weights whose attention is computed by one call, or by the single calls."""

    def __init__(self, kernels, rng, kinds, hidden, heads, n, p, r, v, q_rank, experts):
        self.kernels, self.sizes, self.q_rank = kernels, (heads, n, p, r, v), q_rank

        def make(rows, columns):
            return any_matrix(kernels, rng, kinds[int(rng.integers(len(kinds)))], rows, columns)

        def norm(size):
            return torch_of(1 + 0.1 * rng.standard_normal(size))

        self.query = make(q_rank or heads * (n + p), hidden)
        self.query_b = make(heads * (n + p), q_rank) if q_rank else None
        self.latent, self.out = make(r + p, hidden), make(hidden, heads * v)
        self.gate = any_matrix(kernels, rng, "float32", experts, hidden) if experts else None
        self.gate_bias = torch_of(rng.standard_normal(experts)) if experts else None
        self.halves = bool(rng.integers(2))
        self.input_norm, self.next_norm, self.latent_norm = norm(hidden), norm(hidden), norm(r)
        self.query_norm = norm(q_rank) if q_rank else None
        q = torch.from_numpy(rng.integers(-127, 128, (heads * (n + v), r), dtype=np.int8))
        scale = torch_of(rng.uniform(0.5, 2, heads * (n + v)) / 80 / math.sqrt(r))
        self.kv_b = kernels.tile_absorbed(Int8Weight(q, scale), (n, v), new)
        self.scale = 1.5 / math.sqrt(n + p)

    def arguments(self):
        query = self.query, self.query_norm, self.query_b
        latent = self.latent, self.latent_norm, self.kv_b
        rest = self.out, self.next_norm, self.gate, self.gate_bias
        return [self.sizes, self.input_norm, *query, *latent, *rest]

    def layer(self):
        return layer_of(self.arguments(), (1e-5, 1e-6, self.scale), self.halves)

    def prepared(self):
        return bound_layer(*self.layer())

    def one_by_one(self, h, table, query_scale, cache, position):
        heads, n, p, r, v = self.sizes
        k = self.kernels
        x = k.rms_norm(h, self.input_norm, 1e-5)
        q = k.linear(self.query, x)
        if self.q_rank:
            q = k.linear(self.query_b, k.rms_norm(q, self.query_norm, 1e-6))
        q = q.view(1, heads, n + p) * query_scale
        latent = k.linear(self.latent, x)
        normed = k.rms_norm(latent[:, :r].contiguous(), self.latent_norm, 1e-6)
        key = k.rotate(latent[:, None, r:].contiguous(), table, self.halves)[0]
        k.store_latents(torch.cat([normed, key], -1), r, cache[position : position + 1])
        absorbed = k.absorb_query(self.kv_b, q[..., :n].contiguous())
        rotated = k.rotate(q[..., n:].contiguous(), table, self.halves)
        out = k.mla(torch.cat([absorbed, rotated], -1), cache, position + 1, r, self.scale)
        h = h + k.linear(self.out, k.absorb_value(self.kv_b, out).reshape(1, heads * v))
        x = k.rms_norm(h, self.next_norm, 1e-5)
        return h, x, k.linear(self.gate, x) if self.gate else None


def same(got, want):
    pairs = zip(got, want, strict=True)
    return all(a is None if b is None else torch.equal(a, b) for a, b in pairs)
