"""The engine on a GPU, through the twin: order of streams, budgets, split misses, faults.  No GPU
is needed."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from click.testing import CliRunner

from slotmoe.errors import ConfigError
from slotmoe.model.config import read_config
from slotmoe.model.generate import Answer, Sampling
from slotmoe.model.network import Network
from slotmoe.offload import loading
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import make_plan, parse_size, sizes_of
from slotmoe.offload.plan.speed import MEASURED, Bandwidths
from slotmoe.offload.policy import POLICIES
from slotmoe.offload.policy.hybrid import MODES, Costs, choose_mode, for_cpu
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Job, Scheduler
from slotmoe.offload.tiers import cuda, host
from slotmoe.offload.tiers.cuda import CudaFacts, choose_device
from slotmoe.offload.tiers.disk import WARM
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools.bench.speed import calibration, measure
from slotmoe.tools.cli import cli
from tests.support.engine import IDS, PROMPT, start, whole
from tests.support.pages import CALLS, ROOT
from tests.support.params import nth
from tests.support.slab import NF4S
from tests.support.twin import EXPERTS, Twin, measured, open_on, slow

pytestmark = pytest.mark.usefixtures("always_guessing")


SIZES = [{"slots": 6}, {"slots": 22}, {"slots": 56, "prefetch": False}, {"slots": 112}, {}]
SETTINGS = [(size, host_slots) for size in SIZES for host_slots in (0, 40, EXPERTS)]
# More than the 42 experts that a token cycles through, so that every policy hits.
SETTINGS += [({"slots": 30, "cache_policy": policy}, 60) for policy in POLICIES]


@pytest.mark.parametrize(("options", "host_slots"), nth(2, SETTINGS), ids=str)
def test_fetch_gives_the_same_bits_for_every_budget_and_policy(
    on_twin, wanted, options, host_slots
):
    twin = Twin(slow if host_slots in (40, 60) else None)
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


def test_a_step_with_every_expert_in_a_slot_never_waits_for_the_host(on_twin):
    twin = Twin()
    with on_twin(twin, misses="fetch") as runtime:
        runtime.warm()
        step = start(runtime)
        step(IDS[:20])
        before, hits = twin.syncs, runtime.stats()["cache"]["hits"]
        for one in IDS[20:25]:
            step([one])
        assert twin.syncs == before
        assert runtime.stats()["cache"]["hits"] == hits + 5 * 7 * 6


def test_popular_experts_fill_slots_behind_their_copies(on_twin):
    """A copy to warm the cache is nobody's to wait for: its slot counts when it is there."""
    with on_twin(Twin(lambda number: 0.2), misses="fetch", slots=60) as runtime:
        slots = runtime.model.experts.slots
        assert slots.prefetch(7, WARM)
        read = slots.coming[7]
        runtime.model.store.wait([read])
        slots.admit_warm()
        assert 7 not in slots.cache
        read.copy.synchronize()
        slots.admit_warm()
        assert 7 in slots.cache
        assert slots.slots_ME[0, 7] == slots.slot(7)


def test_one_wait_a_layer_where_experts_are_missing(on_twin):
    twin = Twin()
    with on_twin(twin, slots=22, misses="fetch", prefetch=False) as runtime:
        step = start(runtime)
        step(IDS[:20])
        before = twin.syncs
        step(IDS[20:21])
        assert twin.syncs == before + 7


@pytest.mark.usefixtures("interpreter")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the twin is in RAM, where kernels have to be interpreted"
)
def test_triton_kernels_give_the_same_bits_for_every_budget(small_export, monkeypatch):
    """Interpreted, on a tiny model; the head, most of an interpreter's time, is left out."""
    pytest.importorskip("triton")
    monkeypatch.setattr(Network, "head", lambda self, h_TD: h_TD.clone())
    found = []
    for options in ({}, {"slots": 2}):
        twin = Twin(slow, triton=True)
        with open_on(small_export, twin, misses="fetch", **options) as runtime:
            assert runtime.stats()["kernels"] == "triton, interpreted"
            step = start(runtime)
            found.append(torch.cat([step(ids) for ids in (IDS[:3], IDS[3:4])]))
            whole(runtime)
    assert torch.equal(*found)


# Misses, split


@pytest.mark.parametrize(
    ("mode", "host_slots"), nth(2, product(["cpu", "hybrid"], [0, 40, EXPERTS]))
)
def test_what_the_cpu_computes_differs_by_rounding_alone(
    on_twin, wanted, monkeypatch, mode, host_slots
):
    """Plain torch on both sides: all that is left are float32 sums in another order."""
    monkeypatch.setattr(
        loading, "stored_bandwidths", lambda path: measured(pcie_busy=1e9, experts=1e9)
    )
    with on_twin(Twin(slow), host_slots, misses=mode, slots=40, kernels="torch") as runtime:
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


def test_the_native_kernels_rounding(on_twin, wanted, monkeypatch):
    """They round activations to 8 bits: as far from plain torch as a model in RAM is, whose every
    expert they compute."""
    monkeypatch.setattr(
        loading, "stored_bandwidths", lambda path: measured(pcie_busy=1e9, experts=1e9)
    )
    with on_twin(Twin(), misses="cpu", slots=6) as runtime:
        found = runtime.logits(IDS)
    assert 0 < ((found - wanted[0]).norm() / wanted[0].norm()).item() < 0.02


def test_cpu_fetches_only_as_long_as_slots_are_free(on_twin):
    twin = Twin()
    with on_twin(twin, misses="cpu", slots=40, prefetch=False) as runtime:
        step = start(runtime)
        for one in IDS[:12]:
            step([one])
        assert len(runtime.model.experts.slots.cache) == 40
        before = twin.copies
        for one in IDS[12:20]:
            step([one])
        assert twin.copies == before


def test_split_balances_both_sides():
    even = Costs(fetch=1.0, compute=1.0)
    assert [for_cpu([1] * n, even) for n in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert for_cpu([1] * 6, Costs(fetch=1.0, compute=10.0)) == 0
    assert for_cpu([1] * 6, Costs(fetch=5.5, compute=1.0)) == 5  # 5 computed while one is fetched
    assert for_cpu([1] * 6, Costs(fetch=10.0, compute=0.1)) == 6
    assert for_cpu([1, 2, 300, 300], even) == 2  # many tokens cost the CPU more than their copy


def test_the_mode_follows_what_was_measured():
    assert choose_mode("auto", Bandwidths(), 1 << 20, 6) == "fetch"
    assert (
        choose_mode("auto", Bandwidths().updated("given", pcie_busy=1e9, experts=1e9), 1 << 20, 6)
        == "fetch"
    )
    assert choose_mode("auto", measured(pcie_busy=1e9, experts=1e9), 1 << 20, 6) == "hybrid"
    assert choose_mode("auto", measured(pcie_busy=50e9, experts=1e9), 1 << 20, 6) == "fetch"
    assert choose_mode("auto", measured(pcie_busy=1e9, experts=50e9), 1 << 20, 6) == "cpu"
    assert [choose_mode(one, Bandwidths(), 1, 6) for one in MODES[1:]] == ["fetch", "cpu", "hybrid"]
    with pytest.raises(
        ConfigError, match="misses 'gpu' is unknown, expected one of: auto, fetch, cpu, hybrid"
    ):
        choose_mode("gpu", Bandwidths(), 1, 6)


def test_several_sequences_and_traces(on_twin, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loading, "stored_bandwidths", lambda path: measured(pcie_busy=1e9, experts=1e9)
    )
    found = []
    for number, options in enumerate(
        (
            {"misses": "fetch"},
            {"misses": "fetch", "slots": 22},
            {"misses": "hybrid", "slots": 40, "kernels": "torch"},
        )
    ):
        with on_twin(Twin(slow), sequences=2, **options) as runtime:
            runtime.trace(tmp_path / f"{number}.trace")
            for sequence, cut in enumerate((20, 30)):
                runtime.sequences[sequence].append(IDS[:cut])
            pairs = [[id, id + 1] for id in IDS[30:34]]
            found.append([runtime.append_each(runtime.sequences, pair) for pair in pairs])
            whole(runtime)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*found[1:], strict=True))
    traces = [(tmp_path / f"{number}.trace").read_bytes() for number in range(3)]
    assert traces[0] == traces[1] == traces[2]


def test_answers_beside_each_other_come_to_ram_by_kernels(on_twin):
    """The scheduler's logits too, of a prompt and of each token."""
    twin = Twin()
    with on_twin(twin, misses="fetch") as runtime:
        runtime.warm()
        ids, ended = runtime.tokenizer.encode("Call me"), threading.Event()
        answer = Answer(ids, runtime.tokenizer, (), Sampling(), 3)
        before = twin.syncs
        batch = Scheduler(runtime, 1, 1)
        batch.submit([Job(ids, answer, lambda piece: piece.finish and ended.set())])
        assert ended.wait(30)
        batch.close()
        assert twin.syncs - before == 3


# Page-locked RAM


def test_ram_is_locked_when_it_is_filled(on_twin, monkeypatch):
    monkeypatch.setattr(host, "PIN_BYTES", 16 * 28672)
    twin = Twin()
    with on_twin(twin, 64, misses="fetch", slots=22) as runtime:
        assert not twin.pinned
        slab, size = runtime.model.store.table.slab, runtime.plan.record_bytes
        start(runtime)(IDS[:1])
        for first_byte, length in twin.pinned.items():
            first = (first_byte - slab.data_ptr()) // size
            assert (
                slab[first : first + length // size].any(dim=1).all()
            )  # no page that nothing was written to
        runtime.warm()
        assert sum(twin.pinned.values()) == slab.nbytes
        before = twin.unpinned_copies
        runtime.logits(IDS[:5])
        assert twin.unpinned_copies == before
    assert not twin.pinned


def test_ram_that_can_not_be_locked_is_said_once(on_twin, wanted, monkeypatch, caplog):
    monkeypatch.setattr(host, "PIN_BYTES", 4 * 28672)
    twin = Twin()
    twin.pins_allowed = 2
    with on_twin(twin, misses="fetch", slots=22) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert not runtime.stats()["io"]["host"]["pinned"]
    assert [record.message for record in caplog.records] == [
        "the system locks no more RAM for the twin; copies from it are slower"
    ]


# Which device


GOOD = CudaFacts("2.9", True, "", "NVIDIA L4", (8, 9), ("sm_80", "sm_90", "compute_90"))
BAD = {
    "built without CUDA": CudaFacts("2.9+cpu", False),
    "built for ROCm 6.4": CudaFacts("2.9+rocm", False, rocm="6.4"),
    "driver on your system is too old": CudaFacts(
        "2.9", True, "The NVIDIA driver on your system is too old (found version 11040)."
    ),
    "compute capability 6.1, 7.0 or newer": replace(GOOD, name="GTX 1080", capability=(6, 1)),
    "no kernels .it has sm_80, sm_90, compute_90": replace(GOOD, capability=(7, 5)),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_gpu_that_can_not_be_used_is_said(monkeypatch, reason):
    monkeypatch.setattr(cuda, "cuda_facts", lambda index: BAD[reason])
    card, why = choose_device("auto")
    assert card.tier == "ram"
    assert re.search(reason, why)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"^device {name}: .*{reason}.*or use --device cpu$"):
            choose_device(name)


def test_a_gpu_that_can_be_used_is_taken(monkeypatch):
    monkeypatch.setattr(cuda, "cuda_facts", lambda index: replace(GOOD, name=f"NVIDIA L{index}"))
    twins = Twin(), Twin()
    assert choose_device("auto", twins.__getitem__) == (twins[0], "NVIDIA L0 is here")
    assert choose_device("cuda", twins.__getitem__) == (twins[0], "as asked")
    assert choose_device("cuda:1", twins.__getitem__) == (twins[1], "as asked")
    chosen, why = choose_device("cpu", twins.__getitem__)
    assert (chosen.tier, why) == ("ram", "as asked")
    newer = replace(GOOD, capability=(12, 0))  # runs what compute_90 is translated to
    assert cuda.why_not(newer) == ""
    assert cuda.why_not(replace(newer, architectures=("sm_90",))) != ""
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x"):
        with pytest.raises(ConfigError, match="is unknown, expected auto, cpu, cuda or cuda:N"):
            choose_device(name)


@pytest.mark.parametrize(("count", "shown"), [(0, "no GPU"), (2, "only cuda:0 to cuda:1")])
def test_a_number_beyond_the_gpus_is_said(monkeypatch, count, shown):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"device cuda:2: .*the driver shows {shown} to this"):
        choose_device("cuda:2")


def test_amds_builds_of_torch_are_called_by_their_name(monkeypatch):
    """They say that CUDA is built, and name no architecture that a CUDA device has."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(ConfigError, match=r"built for ROCm 6.4.1, which slotmoe does not use; a C"):
        choose_device("cuda")


def test_facts_of_this_machine():
    facts = cuda.cuda_facts()
    assert facts.built == torch.backends.cuda.is_built()
    assert bool(cuda.why_not(facts)) == (choose_device("auto")[0].tier == "ram")


PAIRS = """
import sys
from slotmoe.errors import ConfigError
from tests.support.twin import Twin, open_on
from slotmoe.offload.runtime import Runtime
for kernels in ("auto", "torch", "triton"):
    with open_on(sys.argv[1], Twin(), kernels=kernels, misses="hybrid") as runtime:
        list(runtime.generate("My", max_new_tokens=1))
        print(kernels, "cuda", runtime.model.cpu.kind)
    try:
        with Runtime.open(sys.argv[1], "cpu", context=64, threads=1, kernels=kernels) as runtime:
            print(kernels, "cpu", runtime.model.cpu.kind)
    except ConfigError as problem:
        print(kernels, "cpu", problem)
"""


@pytest.mark.usefixtures("processes")
def test_each_kind_of_kernels_opens_on_each_device(sample_export):
    """In a process whose Triton does not interpret: it has nothing for a CPU, not even beside a
    GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PAIRS, str(sample_export)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    fast = "torch" if bindings.load() is None else "native"
    assert lines[:5] == [
        f"auto cuda {fast}", f"auto cpu {fast}", "torch cuda torch", "torch cpu torch",
        f"triton cuda {fast}",
    ]  # fmt: skip
    assert lines[5].startswith("triton cpu kernels triton: ")


# A GPU of 24 GB as its owner knows it: what the driver shows, of which a desktop and the CUDA
# context take some.
TOTAL, TAKEN = 24564 << 20, 600 << 20
LOOP = re.search(r"for v in ([\d ]+);", (ROOT / "docs" / "gpu.md").read_text())
LARGEST = max(LOOP[1].split(), key=int)
ON_A_GPU = [call.values[0] for call in CALLS if {"--vram", "cuda"}.intersection(call.values[0])]


@pytest.mark.parametrize("arguments", ON_A_GPU, ids=" ".join)
def test_commands_of_the_pages_fit_a_gpu_of_24_gb(arguments):
    """Their budgets are free there, and the geometry that they name fits."""
    options = dict(pairwise(arguments))
    budget, free = parse_size(options["--vram"].replace("${v}", LARGEST)), TOTAL - TAKEN
    assert budget <= free
    geometry = "v2-lite" if "lite" in arguments[1] else "v2"
    sizes = sizes_of(
        read_config(geometry_path(geometry)), "int8" if "lite" in geometry else "nf4", NF4S
    )
    plan = make_plan(
        read_config(geometry_path(geometry)), sizes, tier="vram", budget=budget, context=4096,
        runtime_bytes=1 << 30, host_budget=64 << 30, kernels="triton",
    )  # fmt: skip
    assert not plan.shortfall
    assert plan.total <= free


def test_pages_have_commands_for_a_gpu():
    assert len(ON_A_GPU) >= 3


def test_misses_are_refused_where_there_is_no_gpu(sample_export):
    with pytest.raises(ConfigError, match="misses cpu is given but the device is the CPU"):
        Runtime.open(sample_export, context=64, device="cpu", misses="cpu")


def test_profile_of_a_gpu(sample_export, tmp_path, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (Twin(), "a test"))
    arguments = [
        "profile",
        str(sample_export),
        "Call me",
        "-n",
        "3",
        "--slots",
        "40",
        "--misses",
        "fetch",
        "-o",
        str(tmp_path / "p"),
        "--json",
    ]
    found = CliRunner().invoke(cli, [*arguments, "--threads", "1"], catch_exceptions=False)
    assert found.exit_code == 0
    report = json.loads(found.stdout)
    assert report["components"]["expert slots"]["vram"] == 40 * 28672
    assert report["time"]["decode"]["milliseconds_per_token"]["experts"] > 0
    assert {"ram", "gpu", "pcie", "experts"} <= set(report["bandwidths"])
    assert (tmp_path / "p" / "memory-vram.png").is_file()


def test_runtime_tells_its_device(on_twin, sample_export):
    with on_twin(Twin()) as runtime:
        assert runtime.stats()["device"] == {"name": "the twin", "why": "a test"}
    with Runtime.open(sample_export, context=64, device="cpu") as runtime:
        assert runtime.stats()["device"] == {"name": "cpu", "why": "as asked"}


# Measured


def test_bench_tells_the_links_bytes_and_bound(on_twin):
    with on_twin(Twin(), misses="fetch", slots=22, prefetch=False) as runtime:
        runtime.warm()
        report = measure(runtime, 20, 10, 0, 2)
        link, record = report["link"], runtime.plan.record_bytes
        assert link["missing_bytes_per_token"] == link["copied_bytes_per_token"] > 0
        misses = 20 * link["missing_bytes_per_token"] / record
        assert misses == pytest.approx(round(misses))
        assert link["computed_bytes_per_token"] == 0
        assert link["copy_seconds_per_token"] > 0
        assert link["decode_tokens_per_second"] == pytest.approx(
            link["pcie"] / link["missing_bytes_per_token"]
        )
        assert link["decode_fraction"] == pytest.approx(
            report["decode_tokens_per_second"] / link["decode_tokens_per_second"]
        )
        assert report["misses"]["mode"] == "fetch"
        kept = calibration(runtime, report)
        assert set(kept) == set(MEASURED)
        assert all(value > 0 for value in kept.values())
        whole(runtime)
