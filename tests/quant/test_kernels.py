"""What all native kernels share: threads, refused arguments, and how the binary is loaded."""

import importlib.machinery
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.quant.backends.base import new
from slotmoe.quant.codecs.codec import NF4
from slotmoe.quant.codecs.encode import squared_error
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import Matrix
from slotmoe.quant.shapes import record_bytes
from tests.support.codes import random_codes
from tests.support.kernels import (
    NF4S,
    alone,
    expert_slab,
    int8_matrix,
    native,
    needs_native,
    random_expert,
    slab_of,
    through_experts,
    torch_of,
)

pytestmark = needs_native


def test_calls_from_several_threads(kernels):
    rng = np.random.default_rng(10)
    record = random_expert(rng, 256, 128)[1]
    x = torch_of(rng.standard_normal((8, 256)))
    want = [alone(kernels, row, [record], 128) for row in x]

    def work(row):
        got = [alone(kernels, x[row], [record], 128) for _ in range(20)]
        return all(torch.equal(y, want[row]) for y in got)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forks with threads
def test_a_forked_child_does_not_hang(kernels):
    x = torch.ones(1, 64)
    w = int8_matrix(kernels, torch.ones(64, 64, dtype=torch.int8), torch.ones(64))
    want = kernels.linear(w, x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which kills it
        os._exit(0 if torch.equal(kernels.linear(w, x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(12)
    good = random_codes(rng, NF4, 32, 128)[0]
    _, record = random_expert(rng, 64, 32)
    ones = torch.ones(32, 128, dtype=torch.int8)
    slab = slab_of([record])
    cuts = record[: record_bytes(64, 32, NF4S) - 1], record[1:], record[:-64]
    int8 = int8_matrix(native, ones, torch.ones(32))
    x, x64, y = torch.randn(2, 128), torch.randn(2, 64), torch.empty(2, 1, 64)
    slots, chosen = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)
    cache, rows = torch.zeros(10, 88, dtype=torch.uint8), torch.ones(10, 72)
    kv_b = native.tile_absorbed(Int8Weight(ones, torch.ones(32)), (6, 10), new)

    def linear(x=x, codes=good.codes, n=32):
        weight = CodedWeight(codes, good.scales, good.levels, (n, x.shape[1]))
        return lambda: native.linear(Matrix.of(weight), x)

    def experts(x=x64, chosen=chosen, records=slab, slots=slots, i=32, y=y):
        return lambda: through_experts(native, x, chosen, slots, expert_slab(records, 64, i), y)

    def mla(width=72, cache=cache, context=5, r=64):
        return lambda: native.mla(torch.ones(1, 2, width), cache, context, r, 1.0)

    scalar, turns = torch.tensor(1.0), torch.ones(1, 1, dtype=torch.complex64)
    cases = [
        *(linear(x=bad) for bad in (x.double(), x[:, :64], x.t(), x.to("meta"))),
        *(linear(n=33), linear(codes=good.codes[:1])),
        lambda: native.linear(int8, x[:, :100].contiguous()),
        *(experts(chosen=bad) for bad in (chosen + 1, chosen - 1, chosen.int())),
        *(experts(records=cut[None]) for cut in cuts),
        *(experts(x=torch.ones(2, 0)), experts(slots=slots + 1), experts(slots=slots.long())),
        *(experts(i=40), experts(y=torch.empty(2, 2, 64))),
        lambda: native.weighted_sum(torch.ones(1, 1, 64), torch.ones(1, 2)),
        lambda: native.rotate(scalar, turns),
        lambda: native.absorb_query(kv_b, torch.ones(1, 2, 7)),
        lambda: native.absorb_query(kv_b, torch.ones(1, 3, 6)),
        lambda: native.absorb_value(kv_b, torch.ones(1, 2, 127)),
        lambda: native.quantize_nf4(torch.ones(4, 64, dtype=torch.int32)),
        lambda: native.quantize_int8(torch.ones(0, 64)),
        lambda: squared_error(torch.ones(32, 33), good),
        lambda: native.set_isa("quantum"),
        lambda: native.set_threads(0),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"expected|must|rows|columns|record|refused|instruc"):
            case()
    asserted = [
        *(mla(context=11), mla(context=0), mla(r=73), mla(width=68), mla(cache=cache.half())),
        lambda: native.store_latents(rows, 64, cache[1:]),
    ]
    for case in asserted:
        with pytest.raises(AssertionError):
            case()


def test_a_missing_or_broken_binary_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(qk, "__file__", str(tmp_path / "__init__.py"))
    assert qk.load.__wrapped__() is None
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    assert qk.load.__wrapped__() is None


def test_an_instruction_set_can_be_asked_for(kernels, monkeypatch):
    monkeypatch.setenv(qk.INSTRUCTIONS, "portable")
    loaded = qk.load.__wrapped__()
    assert loaded.isa == "portable"
    monkeypatch.setenv(qk.INSTRUCTIONS, "quantum")
    with pytest.raises(ConfigError, match=r"'quantum' is not one of this machine's: .*, portable"):
        qk.load.__wrapped__()
