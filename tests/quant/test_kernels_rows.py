"""One table of the native operations: a row's result has the same bits alone and among others, on
both sides of where tiles, chunks and passes begin, and with every number of threads."""

import math

import numpy as np
import pytest
import torch

from slotmoe.network.layer_types import GroupedRows, ListedRows, Router
from slotmoe.quant.backends.base import new
from slotmoe.quant.codecs.encode import squared_error
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels.cpu.weights import BoundMlp, Matrix, bind_router
from tests.support.codes import random_codes
from tests.support.kernels import (
    BACKEND,
    CLAMPED,
    CODECS,
    any_matrix,
    expert_slab,
    latent_cache,
    levels_tensor,
    needs_native,
    random_expert,
    same,
    slab_of,
    through_experts,
    torch_of,
)

pytestmark = needs_native


def matrix(kernels, rng, kind, n, k):
    if isinstance(kind, str):
        return any_matrix(kernels, rng, kind, n, k)
    return Matrix.of(random_codes(rng, kind, n, k, 1.5 / math.sqrt(k))[0])


def linear(kind, n, k):
    def make(kernels, rng, t):
        w, x = matrix(kernels, rng, kind, n, k), torch_of(rng.standard_normal((t, k)))
        return lambda rows: [kernels.linear(w, x[rows])]

    return make


def mlp(kind):
    def make(kernels, rng, t):
        shapes, x = ((72, 100), (72, 100), (100, 72)), torch_of(rng.standard_normal((t, 100)))
        gate = torch_of(rng.standard_normal((1, 100)))
        bound = BoundMlp(*(matrix(kernels, rng, kind, *shape) for shape in shapes), CLAMPED, gate)
        return lambda rows: [kernels.mlp(bound, x[rows])]

    return make


def experts(kernels, rng, t):
    records = slab_of([random_expert(rng, 72, 40, biases=True)[1] for _ in range(3)])
    slab = expert_slab(records, 72, 40, activation=CLAMPED, biases=True)
    x, chosen = torch_of(rng.standard_normal((t, 72))), torch.from_numpy(rng.integers(0, 4, (t, 3)))
    slots = torch.tensor([2, 0, -1, 1], dtype=torch.int32)

    def run(rows):
        y = torch.full((len(x[rows]), 3, 72), 7.0)
        return [through_experts(kernels, x[rows], chosen[rows], slots, slab, y)]

    return run


def sums_and_norms(kernels, rng, t):
    x, weights = torch_of(rng.standard_normal((t, 5, 96))), torch_of(rng.uniform(0.1, 1, (t, 5)))
    gain, bias = torch_of(rng.standard_normal((2, 96)))
    table = torch.polar(torch.ones(t, 48), torch_of(rng.uniform(-9, 9, (t, 48))))
    flat = x[:, 0].contiguous()

    def run(rows):
        router = bind_router(Router(4, 2, 3, 1.5, True, 2, "sigmoid"))
        return [
            kernels.weighted_sum(x[rows], weights[rows]),
            kernels.rms_norm(flat[rows], gain, 1e-6),
            kernels.layer_norm(flat[rows], gain, bias, 1e-3),
            kernels.rotate(x[rows], table[rows], False),
            kernels.rotate(x[rows], table[rows], True),
            *kernels.route.results(router, flat[rows]),
        ]

    return run


def absorbed(kernels, rng, t):
    w = torch.from_numpy(rng.integers(-127, 128, (5 * 60, 70)).astype(np.int8))
    kv_b = kernels.tile_absorbed(Int8Weight(w, torch.rand(300)), (40, 20), new)
    q, latent = (torch_of(rng.standard_normal((t, 5, width))) for width in (40, 70))
    return lambda rows: [
        kernels.absorb_query(kv_b, q[rows]),
        kernels.absorb_value(kv_b, latent[rows]),
    ]


def attention(kernels, rng, t):
    """Over the cache, over lists, by groups, and the choice of an indexer; whatever stands behind a
    list."""
    rows_SW = rng.standard_normal((280 + t, 72))
    cache, keys = latent_cache(rows_SW, 64), latent_cache(rows_SW[:, :64], 64)
    q, weights = torch_of(rng.standard_normal((t, 17, 72))), torch_of(rng.standard_normal((t, 17)))
    lists, counts = rng.integers(0, len(rows_SW), (t, 300)), rng.integers(0, len(rows_SW), t)
    lists[np.arange(300) >= rng.integers(0, 301, t)[:, None]] = -1
    lists, counts = torch.from_numpy(lists).int(), torch.from_numpy(counts).int()
    sinks, q_index = torch_of(rng.standard_normal(17)), q[..., :64].contiguous()
    pairs = latent_cache(rng.standard_normal((17 * (280 + t), 144)), 72, 8)
    pairs = pairs.unflatten(0, (17, -1))

    def run(rows):
        listed = ListedRows(cache[:170], cache[170:], lists[rows], sinks)
        one = GroupedRows(pairs[:1, : 280 + rows.stop], 0, 0, sinks)
        many = GroupedRows(pairs[:, 180 : 280 + rows.stop], 180, 100)
        return [
            BACKEND.mla(q[rows], cache[: 280 + rows.stop], 64, 0.1),
            BACKEND.attend(q[rows], listed, 64, 0.1),
            BACKEND.grouped(q[rows], one, 0.1),
            BACKEND.grouped(q[rows], many, 0.1),
            BACKEND.index(q_index[rows], weights[rows], keys, counts[rows], 100),
        ]

    return run


def streams(kernels, rng, t):
    """Hyper-connections and compressors of DeepSeek-V4."""
    h, y = torch_of(rng.standard_normal((t, 4, 300))), torch_of(rng.standard_normal((t, 300)))
    fn, base = torch_of(rng.standard_normal((24, 4, 300)) / 35), torch_of(rng.standard_normal(24))
    gates, head = (
        torch_of(rng.standard_normal((8, 300))),
        (fn[:4].contiguous(), base[:4].contiguous()),
    )

    def run(rows):
        mixed = kernels.hyper_in.results(h[rows], fn, base, torch.ones(3), 1e-6, 20, 1e-6)
        windows = h[rows].repeat(1, 2, 1)
        return [
            *mixed,
            kernels.hyper_out(y[rows], h[rows], *mixed[1:]),
            kernels.hyper_head(h[rows], *head, torch.ones(1), 1e-6, 1e-6),
            kernels.compress(windows, windows.flip(1), gates, gates[0], 1e-6),
        ]

    return run


def stored(kernels, rng, t):
    latents = rng.standard_normal((t, 40))
    return lambda rows: [latent_cache(latents[rows], 32)]


LINEARS = {f"linear {kind}": linear(kind, 90, 200) for kind in ("int8", *CODECS)}
LINEARS |= {f"linear {kind}": linear(kind, 33, 130) for kind in ("float32", "float16", "bfloat16")}
OTHERS = {"mlp int8": mlp("int8"), **{f"mlp {codec.name}": mlp(codec) for codec in CODECS}}
OTHERS |= {"sums and norms": sums_and_norms, "absorbed": absorbed, "attention": attention}
OTHERS |= {"streams": streams, "stored": stored}
OPS = {**{name: (make, 520) for name, make in LINEARS.items()}, "experts": (experts, 400)}
OPS |= {name: (make, 40) for name, make in OTHERS.items()}
EDGES = {0: (1, 2, 3, 9, 17, 33, 131), 126: (1, 2, 5), 390: (9,), 510: (1, 4)}
EDGES |= {5: (1, 4, 6, 7, 8, 16), 31: (1, 2, 9)}


@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_and_among_others(kernels, op):
    make, many = OPS[op]
    run = make(kernels, np.random.default_rng(len(op)), many)
    want = run(slice(0, many))
    for threads in (1, 3, 16):
        kernels.set_threads(threads)
        assert same(run(slice(0, many)), want), threads
        for start, sizes in EDGES.items():
            for rows in (slice(start, start + size) for size in sizes if start + size <= many):
                assert same(run(rows), [part[rows] for part in want]), rows


def test_threads_change_no_code(kernels):
    """Nor what is summed up of the error."""
    x = torch_of(np.random.default_rng(9).standard_normal((70, 320)))

    def results(threads):
        kernels.set_threads(threads)
        nf4, int8 = kernels.quantize_nf4(x), kernels.quantize_int8.results(x)
        coded = CodedWeight(*nf4, levels_tensor, (70, 320)), Int8Weight(*int8)
        return [*nf4, *int8, *(torch.tensor(squared_error(x, made)) for made in coded)]

    wanted = results(1)
    assert all(same(results(threads), wanted) for threads in (2, 3, 4, 16))
