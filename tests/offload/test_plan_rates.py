"""What ``plan`` predicts from the speed of cores and memory: each measured figure counts, and each
figure that it takes for granted is named."""

import json
from dataclasses import replace

import pytest

from slotmoe.offload.plan import speed
from slotmoe.offload.plan.attention import attention_products
from slotmoe.offload.plan.memory import make_plan, sizes_of
from slotmoe.offload.plan.speed import (
    CORE,
    Bandwidths,
    Setting,
    store_bandwidths,
    stored_bandwidths,
)
from slotmoe.offload.runtime import Runtime
from slotmoe.system import Placement
from slotmoe.tools.bench import speed as bench
from tests.offload.test_plan import GIB, geometry
from tests.support.kernels import needs_native
from tests.support.slab import NF4S

LITE = geometry("v2-lite")
SIZES = sizes_of(LITE, "int8", NF4S)
FAST = Bandwidths(ram=1e12, disk=1e12, core_bytes=1e12)


def predict(rates=FAST, threads=8, tokens=512, at_once=512):
    plan = make_plan(LITE, SIZES, tier="ram", budget=20 * GIB, context=16384, runtime_bytes=0)
    plan = replace(plan, prefill_chunk=at_once)
    return Setting(LITE, SIZES, plan, rates, threads, True).predict(tokens, 64)


def test_prefill_is_products_over_cores():
    """By hand: V2-Lite has 905 million int8 weights but for the head, and 26 layers' 6 experts."""
    int8 = SIZES.touched - 102400 * 2048
    assert int8 == pytest.approx(905e6, rel=0.01)
    coded, attention = 26 * 6 * 3 * 2048 * 1408, 27 * 16 * (2 * 512 + 64) * 256
    assert attention == attention_products(LITE, 256)
    core = int8 / FAST.int8_products + coded / FAST.coded_products
    core += attention / FAST.attention_products
    for threads in (1, 8, 64):
        wanted = threads * speed.PREFILL_SHARE / core
        assert predict(threads=threads).prefill_tokens_per_second == pytest.approx(wanted)


def test_prefill_reads_all_weights_for_each_step():
    """However many cores there are; all experts have tokens among 512."""
    slow = FAST.updated("given", ram=100e9)
    weights = SIZES.touched + 26 * 64 * SIZES.record_bytes
    wanted = 512 * 100e9 * speed.KERNEL_SHARE / weights
    found = predict(slow, threads=256).prefill_tokens_per_second
    assert found == pytest.approx(wanted) and found < 6000
    assert predict(slow, threads=1).prefill_tokens_per_second < found / 2
    for at_once in (512, 1024):
        steps = predict(slow, 256, 1024, at_once).prefill_tokens_per_second
        assert steps == pytest.approx(wanted)


def test_few_cores_read_less_than_memory_gives():
    rates = Bandwidths(ram=100e9, core_bytes=10e9, attention_products=1e15)
    seconds = [predict(rates, threads).decode_seconds["RAM"] for threads in (1, 4, 9, 10, 64)]
    assert seconds[:3] == pytest.approx([36 * seconds[2] / 4, 9 * seconds[2] / 4, seconds[2]])
    assert seconds[3] == seconds[4] == pytest.approx(seconds[2] * 90 / 100)


def test_what_is_assumed_of_an_instruction_set():
    measured = Bandwidths().updated("measured on a day", int8_products=7.0)
    found = measured.assumed_for("avx2")
    assert (found.int8_products, found.origin_of("int8_products")) == (7.0, "measured on a day")
    assert found.coded_products == measured.coded_products / 4
    assert found.core_bytes == 0.7 * measured.core_bytes
    assert found.origin_of("core_bytes") == "assumed for avx2"
    for name in ("avx512vbmi", "amx"):
        assert measured.assumed_for(name).coded_products == measured.coded_products
    order = [
        measured.assumed_for(name).core_bytes for name in ("avx512vnni", "neon_dot", "portable")
    ]
    assert order == sorted(order, reverse=True)


@pytest.fixture
def plan(slotmoe, tmp_path, monkeypatch):
    """Run ``slotmoe plan`` on a machine with four cores."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("slotmoe.tools.plan.cores", lambda: 4)
    monkeypatch.setattr("slotmoe.tools.plan.choose_placement", lambda size: Placement(4))
    return lambda *arguments: slotmoe("plan", *arguments)


def planned(plan, *arguments):
    return json.loads(plan(*arguments, "--json")[1])


def test_each_measured_rate_changes_the_prediction(plan, tmp_path):
    """Files from before they were measured are read as they are."""
    path, lite = tmp_path / "cache" / "machine.json", ("v2-lite", "--ram", "12GiB", "--threads", 2)
    rates = {"ram": 60e9, "disk": 3e9, "latency": 1e-4}
    store_bandwidths(path, **rates)
    before = planned(plan, *lite)
    assert all(rate["origin"].startswith("assumed for") for rate in before["core"].values())
    cores = dict.fromkeys(CORE, 20e9)
    store_bandwidths(path, **rates, **cores)
    base = planned(plan, *lite)
    assert all(rate["origin"].startswith("measured on 20") for rate in base["core"].values())
    for name in ("ram", *CORE):
        changed = {**rates, **cores, name: 19e9}
        store_bandwidths(path, **changed)
        found = planned(plan, *lite)
        kinds = {kind for kind in ("prefill", "decode") if found[key(kind)] < base[key(kind)]}
        wanted = {"ram": "decode", "core_bytes": "decode", "attention_products": "prefill decode"}
        assert kinds == {*wanted.get(name, "prefill").split()}, name


def key(kind):
    return f"{kind}_tokens_per_second"


def test_threads_that_this_machine_does_not_have_do_not_count(plan):
    lite = "v2-lite", "--device", "cpu", "--ram", "12GiB"
    four, more = planned(plan, *lite), planned(plan, *lite, "--threads", 200)
    assert (four["settings"]["threads"], more["settings"]["threads"]) == (4, 4)
    assert more[key("prefill")] == four[key("prefill")]
    another = planned(plan, *lite, "--threads", 200, "--ram-bandwidth", "400GB")
    assert another["settings"]["threads"] == 200
    assert 8 * four[key("prefill")] < another[key("prefill")] < 17_000
    code, _, err = plan(*lite, "--threads", 512)
    assert code == 2 and "threads is 512, expected 1 to 256" in err


def test_a_plan_that_fits_one_processor_has_its_cores(plan, monkeypatch):
    sizes = []

    def choose_placement(size):
        sizes.append(size)
        return Placement(3)

    monkeypatch.setattr("slotmoe.tools.plan.choose_placement", choose_placement)
    report = planned(plan, "v2-lite", "--ram", "12GiB")
    assert report["settings"]["threads"] == 3 and sizes == [report["total"]["ram"]]
    gpu = planned(plan, "v2-lite", "--ram", "12GiB", "--vram", "4GiB")
    assert sizes[1] == gpu["total"]["ram"]


def test_the_bandwidth_of_ram_bounds_experts_beside_a_gpu(plan):
    gpu = "v3", "--gpu", "rtx-4090", "--ram", "512GiB", "--threads", 64, "--misses", "cpu"
    slow, fast = (planned(plan, *gpu, "--ram-bandwidth", rate) for rate in ("40GB", "800GB"))
    assert fast[key("decode")] > 2 * slow[key("decode")]
    assert slow["bandwidths"]["experts"] == {"bytes_per_second": 19e9, "origin": "by RAM"}
    few = planned(plan, *gpu, "--ram-bandwidth", "800GB", "--threads", 2)
    assert few[key("decode")] < fast[key("decode")]


def test_every_constant_is_named(plan):
    for options in ((), ("--gpu", "rtx-4090")):
        report = planned(plan, "v2-lite", "--ram", "12GiB", *options)
        out = " ".join(plan("v2-lite", "--ram", "12GiB", *options)[1].split())
        assert all(name in out for name in report["constants"])
        assert "G int8 products" in out and "(assumed for " in out
    names = "KERNEL_SHARE PREFILL_SHARE TOKEN_SECONDS LAYER_SECONDS MISS_SECONDS GPU_SHARE"
    names += " GPU_LAUNCHES GPU_LAUNCH_SECONDS GPU_MISS_SECONDS"
    values = {*speed.CPU_CONSTANTS.values(), *speed.GPU_CONSTANTS.values()}
    assert values == {getattr(speed, name) for name in names.split()}


@pytest.mark.usefixtures("heavy")
@needs_native
def test_calibration_measures_what_is_stored(sample_export, tmp_path):
    with Runtime.open(sample_export, context=64, threads=2) as runtime:
        rates = bench.core_rates(runtime.model)
        assert runtime.threads == 2
    assert {*rates} == {*CORE} and all(1e6 < rate < 1e13 for rate in rates.values())
    store_bandwidths(tmp_path / "machine.json", **rates)
    assert stored_bandwidths(tmp_path / "machine.json").int8_products == rates["int8_products"]
