"""The engine on a GPU, through the twin: order of streams, budgets, split misses.  No GPU is
needed."""

import importlib.util
import re
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload.devices import cuda
from slotmoe.offload.devices.cuda import CudaFacts, choose_device
from slotmoe.offload.engine.passes import Row
from slotmoe.offload.experts import host
from slotmoe.offload.observe.measure import Lasting
from slotmoe.offload.plan.speed import MEASURED, Bandwidths
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.policy.misses import MODES, choose_mode, for_cpu
from slotmoe.offload.runtime import Runtime
from slotmoe.quant import backends
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.sizes import format_size
from slotmoe.tools.bench.speed import calibration, measure
from tests.support.engine import IDS, PROMPT, start, whole
from tests.support.params import nth
from tests.support.twin import EXPERTS, Twin, measured

pytestmark = pytest.mark.usefixtures("always_guessing")

SIZES = [{"slots": 6}, {"slots": 22}, {"slots": 56, "prefetch": False}, {"slots": 112}, {}]
SETTINGS = [*product(SIZES, (0, 40, EXPERTS))]
# More than the 42 experts that a token cycles through, so that every policy hits.
SETTINGS += [({"slots": 30, "cache_policy": policy}, 60) for policy in POLICIES]


@pytest.mark.parametrize(("options", "host_slots"), nth(4, SETTINGS), ids=str)
def test_fetch_gives_the_same_bits_for_every_budget_and_policy(
    on_twin, wanted, options, host_slots
):
    twin = Twin(host_slots + len(str(options)))
    with on_twin(twin, host_slots, misses="fetch", **options) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        stats = runtime.stats()
        assert stats["misses"]["computed"] == 0
        assert stats["misses"]["fetched"] > 0
        assert (stats["io"]["host"]["hits"] > 0) == (host_slots > 0 and "slots" in options)
        assert stats["io"]["host"]["seconds"] > 0
        if host_slots == EXPERTS:  # each expert left the disk once
            assert stats["io"]["disk"]["bytes"] <= EXPERTS * runtime.plan.record_bytes
        whole(runtime)
        assert runtime.stats()["io"]["host"]["bytes"] == twin.copies * runtime.plan.record_bytes


# Misses, split


@pytest.mark.parametrize(
    ("mode", "host_slots"), nth(5, product(["cpu", "hybrid"], [0, 40, EXPERTS]))
)
def test_what_the_cpu_computes_differs_by_rounding_alone(on_twin, wanted, mode, host_slots):
    """Plain torch on both sides: all that is left are float32 sums in another order."""
    with on_twin(Twin(1), host_slots, misses=mode, slots=40, kernels="torch") as runtime:
        torch.testing.assert_close(runtime.logits(IDS), wanted[0], rtol=1e-3, atol=1e-3)
        assert [token.id for token in runtime.generate(PROMPT, 8)] == wanted[1]
        misses = runtime.stats()["misses"]
        assert misses["mode"] == mode
        assert misses["computed"] > 100
        assert misses["seconds"] > 0
        assert misses["fetched"] > 100
        whole(runtime)
        lent = runtime.stats()["io"]["host"]["lent_bytes"]
        assert lent == misses["computed"] * runtime.plan.record_bytes


def test_split_balances_both_sides():
    assert [for_cpu([1] * n, 1.0) for n in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert for_cpu([1] * 6, 10.0) == 0
    assert for_cpu([1] * 6, 1 / 5.5) == 5  # 5 computed while one is fetched
    assert for_cpu([1] * 6, 0.01) == 6
    assert for_cpu([1, 2, 300, 300], 1.0) == 2  # many tokens cost the CPU more than their copy


def test_the_mode_follows_what_was_measured():
    for rates, mode in (
        (Bandwidths(), "hybrid"),
        (measured(), "hybrid"),
        (measured(pcie_busy=50e9), "fetch"),
        (measured(experts=50e9), "cpu"),
    ):
        assert choose_mode("auto", rates, 6) == mode
    assert [choose_mode(one, Bandwidths(), 6) for one in MODES[1:]] == ["fetch", "cpu", "hybrid"]
    with pytest.raises(
        ConfigError, match="misses 'gpu' is unknown, expected one of: auto, fetch, cpu, hybrid"
    ):
        choose_mode("gpu", Bandwidths(), 6)


def decoded_together(engine):
    """Logits of two sequences' tokens, pass by pass."""
    found = []
    for sequence, cut in zip(engine.batch.sequences, (20, 30), strict=True):
        engine.batch.passes.run([Row(sequence, IDS[:cut], is_prompt=True)])
    for id in IDS[30:34]:
        rows = [Row(sequence, [id + n]) for n, sequence in enumerate(engine.batch.sequences)]
        engine.batch.passes.run(rows)
        found += [row.logits_RV for row in rows]
    return torch.cat(found)


def test_several_sequences_and_traces(on_twin, tmp_path):
    found, traces = [], []
    fewer, split = {"slots": 22}, {"misses": "hybrid", "slots": 40, "kernels": "torch"}
    for options in ({}, fewer, split):
        with on_twin(Twin(1), sequences=2, **{"misses": "fetch", **options}) as runtime:
            runtime.trace(tmp_path / "trace")
            found.append(runtime.engine.call(partial(decoded_together, runtime.engine)))
            whole(runtime)
        traces.append((tmp_path / "trace").read_bytes())
    assert torch.equal(*found[:2])
    torch.testing.assert_close(*found[1:], rtol=1e-3, atol=1e-3)
    assert traces[0] == traces[1] == traces[2]


# Page-locked RAM


def test_ram_is_locked_when_it_is_filled(on_twin, monkeypatch):
    monkeypatch.setattr(host, "PIN_BYTES", 16 * 28672)
    twin = Twin()
    with on_twin(twin, 64, misses="fetch", slots=22) as runtime:
        assert not twin.gpu.pinned()
        slab, size = runtime.model.store.slab, runtime.plan.record_bytes
        start(runtime)(IDS[:1])
        for first_byte, length in twin.gpu.pinned().items():  # no page that nothing was written to
            first = (first_byte - slab.data_ptr()) // size
            assert slab[first : first + length // size].any(dim=1).all()
        runtime.warm()
        assert sum(twin.gpu.pinned().values()) == slab.nbytes
        before = twin.gpu.unpinned
        runtime.logits(IDS[:5])
        assert twin.gpu.unpinned == before
    assert not twin.gpu.pinned()


def test_ram_that_can_not_be_locked_is_said_once(on_twin, wanted, monkeypatch, caplog):
    """Smaller pieces are locked while larger ones are refused, and later ones as soon as they may
    be; the copies from what is locked wait for no host."""
    record = 28672
    monkeypatch.setattr(host, "PIN_BYTES", 16 * record)
    twin = Twin()
    twin.gpu.pins = 23 * record
    with on_twin(twin, misses="fetch", slots=22, prefetch=False) as runtime:
        start(runtime)(IDS[:1])  # 42 records
        found, slab = runtime.stats()["io"]["host"], runtime.model.store.slab
        assert not found["pinned"] and found["pinned_bytes"] == 22 * record
        twin.gpu.pins = 128 * record
        assert torch.equal(runtime.logits(IDS), wanted[0])
        runtime.warm()
        locked = runtime.stats()["io"]["host"]["pinned_bytes"]
        assert 100 * record < locked == sum(twin.gpu.pinned().values())
    told = f"only {format_size(22 * record)} of {format_size(slab.nbytes)} of RAM for the twin"
    assert [told in record.message for record in caplog.records] == [True]


# Which device


GOOD = CudaFacts("2.9", True, "", "NVIDIA L4", (8, 9), ("sm_80", "sm_90", "compute_90"))
OLD = "The NVIDIA driver on your system is too old (found version 11040)."
BAD = {
    "built without CUDA": CudaFacts("2.9+cpu", False),
    "built for ROCm 6.4": CudaFacts("2.9+rocm", False, rocm="6.4"),
    "driver on your system is too old": CudaFacts("2.9", True, OLD),
    "compute capability 6.1, 7.0 or newer": replace(GOOD, name="GTX 1080", capability=(6, 1)),
    "no kernels .it has sm_80, sm_90, compute_90": replace(GOOD, capability=(7, 5)),
}


def test_a_gpu_is_taken_if_it_can_be_used_and_if_not_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(cuda, "lacking", lambda capability: "")
    for reason, facts in BAD.items():
        monkeypatch.setattr(cuda, "cuda_facts", lambda index, facts=facts: facts)
        device, why = choose_device("auto")
        assert device.tier == "ram" and re.search(reason, why)
        for name in ("cuda", "cuda:1"):
            refused = f"^device {name}: .*{reason}.*or use --device cpu$"
            with pytest.raises(ConfigError, match=refused):
                choose_device(name)
    monkeypatch.setattr(cuda, "cuda_facts", lambda index: replace(GOOD, name=f"NVIDIA L{index}"))
    taken = {"auto": ("0", "NVIDIA L0 is here"), "cuda": ("0", "as asked")}
    for name, found in (taken | {"cuda:1": ("1", "as asked")}).items():
        assert choose_device(name, str) == found
    assert choose_device("cpu", str)[0].tier == "ram"
    newer = replace(GOOD, capability=(12, 0))  # runs what compute_90 is translated to
    assert cuda.why_not(newer) == "" != cuda.why_not(replace(newer, architectures=("sm_90",)))
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x"):
        with pytest.raises(ConfigError, match="is unknown, expected auto, cpu, cuda or cuda:N"):
            choose_device(name)


@pytest.mark.parametrize(
    ("capability", "present", "native", "slower"),
    [
        ((7, 5), {}, True, "the GPU's compute capability is below 8.0"),
        ((8, 9), {"_python_header": lambda: Path("/x/Python.h")}, True, "/x/Python.h is not there"),
        ((8, 9), {}, True, ""),
        ((7, 5), {}, False, ""),
    ],
)
def test_a_gpu_that_only_plain_torch_serves_is_taken_where_it_is_asked_for(
    monkeypatch, capability, present, native, slower
):
    """Or where the CPU has no kernels of its own either."""
    facts = replace(GOOD, capability=capability, architectures=("sm_75", "sm_89"))
    monkeypatch.setattr(cuda, "cuda_facts", lambda index: facts)
    monkeypatch.setenv("CC", "a compiler")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    for name, value in {"_python_header": lambda: Path(__file__), **present}.items():
        monkeypatch.setattr(backends, name, value)
    monkeypatch.setattr(bindings, "load", lambda: native or None)
    device, why = choose_device("auto", str)
    if slower:
        told = f"NVIDIA L4 would compute slower, through plain torch: .*{slower}$"
        assert device.tier == "ram" and re.match(told, why)
    else:
        assert (device, why) == ("0", "NVIDIA L4 is here")
    assert choose_device("cuda", str) == ("0", "as asked")


def test_what_torch_says_of_cuda(monkeypatch):
    """AMD's builds say that CUDA is built, and name no architecture that a CUDA device has."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for count, shown in ((0, "no GPU"), (2, "only cuda:0 to cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ConfigError, match=f"device cuda:2: .*the driver shows {shown} to this"):
            choose_device("cuda:2")
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    with pytest.raises(ConfigError, match=r"built for ROCm 6.4.1, which slotmoe does not use; a C"):
        choose_device("cuda")


@pytest.mark.parametrize("kernels", ["auto", "torch", "triton"])
def test_each_kind_of_kernels_computes_beside_a_gpu(on_twin, wanted, kernels):
    """Native ones round activations to 8 bits: as far from plain torch as a model in RAM is, whose
    every expert they compute."""
    fast = "torch" if bindings.load() is None else "native"
    with on_twin(Twin(), kernels=kernels, misses="cpu", slots=6) as runtime:
        found, kind = runtime.logits(IDS), runtime.model.cpu.kind
    assert kind == ("torch" if kernels == "torch" else fast)
    difference = ((found - wanted[0]).norm() / wanted[0].norm()).item()
    assert difference < 0.02 and (difference > 0) == (kind == "native")


def test_runtime_tells_its_device_and_refuses_misses_where_there_is_no_gpu(on_twin, sample_export):
    with on_twin(Twin()) as runtime:
        assert runtime.stats()["device"] == {"name": "the twin", "why": "a test"}
    with Runtime.open(sample_export, context=64, device="cpu") as runtime:
        assert runtime.stats()["device"] == {"name": "cpu", "why": "as asked"}
    with pytest.raises(ConfigError, match="misses cpu is given but the device is the CPU"):
        Runtime.open(sample_export, context=64, device="cpu", misses="cpu")


# Measured


def test_bench_tells_the_links_bytes_and_bound(on_twin):
    with on_twin(Twin(), misses="fetch", slots=22, prefetch=False) as runtime:
        runtime.warm()
        report = measure(runtime, 20, 10, 0, 2)
        link, kept = report["link"], calibration(Lasting(runtime.model), report)
    missing = link["missing_bytes_per_token"]
    assert missing == link["copied_bytes_per_token"] > 0 == link["computed_bytes_per_token"]
    assert link["decode_tokens_per_second"] == pytest.approx(link["pcie"] / missing)
    assert {*kept} == {*MEASURED} and all(value > 0 for value in kept.values())
