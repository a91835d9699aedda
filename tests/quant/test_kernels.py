"""What all native kernels share: threads, refused arguments, and how the binary is loaded."""

import importlib.machinery
import os
import threading

import numpy as np
import pytest
import torch

from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import Matrix
from tests.support.kernels import (
    alone,
    expert_record,
    int8_matrix,
    latent_cache,
    levels_tensor,
    linear_nf4,
    native,
    needs_native,
    random_expert,
    random_nf4,
    through_expert,
    torch_of,
)

pytestmark = needs_native


def test_threads_change_nothing(kernels):
    rng = np.random.default_rng(9)
    experts = [random_expert(rng, 320, 176)[1] for _ in range(3)]
    x, rows = torch_of(rng.standard_normal((70, 320))), rng.standard_normal((10, 7))
    _, codes, absmax = random_nf4(rng, 333, 320)
    w = torch.from_numpy(rng.integers(-127, 128, (333, 320), dtype=np.int8))
    int8 = int8_matrix(kernels, w, torch.ones(333))
    q, cache = (
        torch_of(rng.standard_normal((16, 72))),
        latent_cache(kernels, rng.standard_normal((500, 72)), 64),
    )
    results = []
    for threads in (1, 2, 3, 4, 16):
        kernels.set_threads(threads)
        results.append(
            [
                linear_nf4(kernels, x, codes, absmax, levels_tensor, 333),
                kernels.linear(int8, x),
                alone(kernels, x[0], experts, 176),
                kernels.weighted_sum(x.view(10, 7, 320), torch_of(rows)),
                through_expert(kernels, x, experts[0], 176),
                kernels.mla(q[None], cache, 500, 64, 0.2),
                *kernels.quantize_nf4(x),
                *kernels.quantize_int8(x),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads(kernels):
    rng = np.random.default_rng(10)
    record = random_expert(rng, 256, 128)[1]
    x = torch_of(rng.standard_normal((8, 256)))
    want = [alone(kernels, row, [record], 128) for row in x]
    wrong = []

    def work(row):
        for _ in range(20):
            if not torch.equal(alone(kernels, x[row], [record], 128), want[row]):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # python 3.12 on forking with threads
def test_a_forked_child_does_not_hang(kernels):
    x = torch.randn(1, 64)
    w = int8_matrix(kernels, torch.ones(64, 64, dtype=torch.int8), torch.ones(64))
    want = kernels.linear(w, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernels.linear(w, x), want) else 1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert status == 0


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(12)
    _, codes, absmax = random_nf4(rng, 32, 128)
    x = torch.randn(2, 128)
    _, record = random_expert(rng, 64, 32)
    size = expert_record(64, 32).record_bytes
    ones = torch.ones(32, 128, dtype=torch.int8)
    tiles, int8 = torch.ones(2, 2, 1024).char(), int8_matrix(native, ones, torch.ones(32))
    x64, slots = torch.randn(2, 64), torch.zeros(1, dtype=torch.int32)
    chosen = torch.zeros(2, 1, dtype=torch.int64)
    coded = expert_record(64, 32)
    uses = slots, coded, torch.empty(2, 1, 64)
    cache, rows = torch.zeros(10, 88, dtype=torch.uint8), torch.ones(10, 72)
    nf4, short = (
        CodedWeight(codes, absmax, levels, (32, 128))
        for levels in (levels_tensor, levels_tensor[:15])
    )
    kv_b = Int8Weight(cache.to(torch.int8), torch.ones(10))
    cases = [
        lambda: linear_nf4(native, x.double(), codes, absmax, levels_tensor, 32),
        lambda: linear_nf4(native, x[:, :64], codes, absmax, levels_tensor, 32),
        lambda: linear_nf4(native, x.t(), codes, absmax, levels_tensor, 32),
        lambda: linear_nf4(native, x, codes, absmax, levels_tensor, 33),
        lambda: linear_nf4(native, x, codes, absmax, levels_tensor, 0),
        lambda: linear_nf4(native, x, codes[:1], absmax, levels_tensor, 32),
        lambda: linear_nf4(native, x, codes, absmax.float(), levels_tensor, 32),
        lambda: linear_nf4(native, x, codes, absmax, levels_tensor[:15], 32),
        lambda: linear_nf4(native, x, codes, absmax, levels_tensor * float("inf"), 32),
        lambda: linear_nf4(native, x.to("meta"), codes, absmax, levels_tensor, 32),
        lambda: native.linear(int8, x[:, :100].contiguous()),
        lambda: int8_matrix(native, ones, torch.ones(31)),
        lambda: Matrix.int8(tiles, torch.ones(48), (48, 128)),
        lambda: native.experts_by_slot(x64, chosen + 1, record[None], *uses),
        lambda: native.experts_by_slot(x64, chosen - 1, record[None], *uses),
        lambda: native.experts_by_slot(x64, chosen.int(), record[None], *uses),
        lambda: native.experts_by_slot(x64, chosen, record[None, : size - 1], *uses),
        lambda: native.experts_by_slot(x64, chosen, record[None, 1:], *uses),
        lambda: native.experts_by_slot(
            x64, chosen, record[None], slots, expert_record(64, 33), *uses[2:]
        ),
        lambda: native.experts_by_slot(torch.ones(2, 0), chosen, record[None], *uses),
        lambda: native.weighted_sum(torch.ones(1, 1, 64), torch.ones(1, 2)),
        lambda: native.experts_by_slot(
            torch.ones(64), chosen, record[None], slots, coded, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, chosen, record[None], slots, coded, torch.empty(2, 2, 64)
        ),
        lambda: native.experts_by_slot(
            x64, chosen, record[None], slots + 1, coded, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, chosen, record[None, :-64], slots, coded, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, chosen, record[None], slots.long(), coded, torch.empty(2, 1, 64)
        ),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 11, 64, 1.0),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 0, 64, 1.0),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 5, 73, 1.0),
        lambda: native.mla(torch.ones(2, 68)[None], cache, 5, 64, 1.0),
        lambda: native.mla(
            torch.ones(2, 72)[None], torch.zeros(88, 10, dtype=torch.uint8).t(), 5, 64, 1.0
        ),
        lambda: native.mla(torch.ones(2, 72)[None], cache.half(), 5, 64, 1.0),
        lambda: native.store_latents(rows, 64, cache[1:]),
        lambda: native.store_latents(rows, 64, cache[:, 1:]),
        lambda: native.store_latents(rows, 64, cache.half()),
        lambda: native.store_latents(rows, 73, cache),
        lambda: native.store_latents(rows, 0, cache),
        lambda: native.store_latents(torch.tensor(1.0), 1, cache),
        lambda: native.rotate(torch.tensor(1.0), torch.ones(1, 1, dtype=torch.complex64)),
        lambda: native.absorb_query(torch.ones(72), kv_b),
        lambda: native.absorb_value(torch.ones(1, 3, 88), kv_b, 1),
        lambda: native.absorb_value(torch.ones(1, 5, 88), Int8Weight(kv_b.q, torch.ones(9)), 1),
        lambda: native.absorb_value(torch.ones(1, 5, 88), kv_b, 3),
        lambda: native.store_latents(rows.double(), 64, cache),
        lambda: native.quantize_nf4(torch.ones(4, 64, dtype=torch.int32)),
        lambda: native.quantize_nf4(torch.ones(64)),
        lambda: native.quantize_int8(torch.ones(0, 64)),
        lambda: native.squared_error(torch.ones(33, 128), nf4),
        lambda: native.squared_error(torch.ones(32, 128), short),
        lambda: native.squared_error(torch.ones(32, 127), Int8Weight(ones, torch.ones(32))),
        lambda: native.squared_error(torch.ones(32, 128), Int8Weight(ones, torch.ones(31))),
        lambda: native.set_isa("quantum"),
        lambda: native.set_threads(0),
    ]
    for case in cases:
        with pytest.raises(
            ValueError, match=r"expected|must|rows|columns|record|refused|instruction"
        ):
            case()


def test_a_missing_or_broken_binary_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(qk, "__file__", str(tmp_path / "__init__.py"))
    assert qk.load.__wrapped__() is None
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    assert qk.load.__wrapped__() is None


def test_read_bandwidth_and_settings():
    assert NativeBackend(native).read_bandwidth(torch.ones(1 << 22, dtype=torch.uint8)) > 1e8
    assert native.isa in native.isas and native.isas[-1] == "portable"
    assert native.threads >= 1
