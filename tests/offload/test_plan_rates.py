"""What ``plan`` predicts from the speed of cores and memory: each measured figure counts, and each
figure that it takes for granted is named."""

import json
from dataclasses import replace

import pytest

from slotmoe.errors import ConfigError
from slotmoe.offload.observe.measure import Lasting
from slotmoe.offload.plan import speed
from slotmoe.offload.plan.memory import attention_products, kv_bytes, make_plan, sizes_of
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


def predict(rates=FAST, threads=8, tokens=512, at_once=512, gibibytes=20, random_routing=True):
    budget = int(gibibytes * GIB)
    plan = make_plan(LITE, SIZES, tier="ram", budget=budget, context=16384, runtime_bytes=0)
    plan = replace(plan, prefill_chunk=at_once)
    return Setting(LITE, SIZES, plan, rates, threads, random_routing).predict(tokens, 64)


def test_decode_is_bytes_over_bandwidth():
    rates = Bandwidths(ram=30e9, disk=2e9)
    whole, part = predict(rates), predict(rates, gibibytes=4)
    assert (whole.hit_rate, whole.decode_seconds["disk"]) == (1.0, 0.0)
    touched = SIZES.touched + 26 * 6 * SIZES.record_bytes + kv_bytes(LITE, 544)
    assert 0.7 < whole.decode_tokens_per_second * touched / 30e9 < 0.95
    assert (whole.bottleneck, part.bottleneck) == ("RAM", "disk")
    missing = 26 * 6 * (1 - part.hit_rate) * SIZES.record_bytes
    assert 0.8 < part.decode_tokens_per_second * missing / 2e9 < 1.0
    speed = part.decode_tokens_per_second
    faster = predict(replace(rates, disk=4e9), gibibytes=4)
    assert faster.decode_tokens_per_second > 1.5 * speed
    text = predict(rates, gibibytes=4, random_routing=False)
    assert text.decode_tokens_per_second > speed
    assert whole.prefill_tokens_per_second > part.prefill_tokens_per_second


def test_bandwidths_are_kept_for_later_plans(tmp_path):
    path = tmp_path / "new" / "machine.json"
    assert stored_bandwidths(path).origin_of("disk") == "assumed"
    store_bandwidths(path, ram=31e9, disk=3e9, latency=2e-4)
    found = stored_bandwidths(path)
    assert (found.ram, found.disk, found.latency) == (31e9, 3e9, 2e-4)
    assert found.origin_of("disk").startswith("measured on 20")
    path.write_text('{"ram": "fast"}')
    message = r"machine\.json: ram is .fast., .* run slotmoe bench --calibrate again"
    with pytest.raises(ConfigError, match=message):
        stored_bandwidths(path)
    path.write_text('{"ram": 7e9, "disk": 1e9, "date": "2020-02-03"}')
    store_bandwidths(path, disk=2e9)
    assert (stored_bandwidths(path).ram, stored_bandwidths(path).disk) == (7e9, 2e9)


def test_prefill_is_products_over_cores():
    """By hand: V2-Lite has 905 million int8 weights but for the head, and 26 layers' 6 experts; the
    rates of experts and attention are measured in its shapes."""
    int8 = SIZES.touched - 102400 * 2048
    assert int8 == pytest.approx(905e6, rel=0.01)
    coded, attention = 26 * 6 * 3 * 2048 * 1408, 27 * 16 * (2 * 512 + 64) * 256
    assert attention == attention_products(LITE, 256)
    flat = FAST.updated("given", int8_small=FAST.int8_products)
    core = (int8 + speed.STREAM_PRODUCTS * 27 * 2048) / FAST.int8_products
    coded *= 1 + speed.DECODED_ROWS * 64 / (6 * 512)  # each expert is decoded once
    core += coded / FAST.coded_products + attention / FAST.attention_products
    between = speed.TOKEN_SECONDS + 27 * speed.LAYER_SECONDS
    for threads in (1, 8, 64):
        found = predict(flat, threads).prefill_seconds
        assert found["cores"] == pytest.approx(512 * core / threads, rel=0.01)
        assert (found["disk"], found["between kernels"]) == (0, between)
    assert predict(FAST).prefill_seconds["cores"] > predict(flat).prefill_seconds["cores"]


def test_prefill_reads_all_weights_for_each_step():
    """However many cores there are; all experts have tokens among 512."""
    slow = FAST.updated("given", ram=100e9)
    weights = SIZES.touched + 26 * 64 * SIZES.record_bytes
    wanted = weights / 100e9 / slow.share
    found = predict(slow, threads=256)
    assert found.prefill_seconds["RAM"] == pytest.approx(wanted)
    assert found.prefill_tokens_per_second < min(6000, 512 / wanted)
    assert "RAM" not in predict(slow, threads=1).prefill_seconds
    for at_once in (512, 1024):
        steps = predict(slow, 256, 1024, at_once).prefill_seconds
        assert steps["RAM"] == pytest.approx(2 * wanted)


def test_few_cores_read_less_than_memory_gives():
    rates = Bandwidths(ram=100e9, core_bytes=10e9, attention_products=1e15)
    seconds = [predict(rates, threads).decode_seconds["RAM"] for threads in (1, 4, 9, 10, 64)]
    assert seconds[:3] == pytest.approx([36 * seconds[2] / 4, 9 * seconds[2] / 4, seconds[2]])
    assert seconds[3] == seconds[4] == pytest.approx(seconds[2] * 90 / 95)


def test_what_is_assumed_of_an_instruction_set():
    measured = Bandwidths().updated("measured on a day", int8_products=7.0)
    found = measured.assumed_for("avx2")
    assert (found.int8_products, found.origin_of("int8_products")) == (7.0, "measured on a day")
    assert found.coded_products == measured.coded_products / 4
    assert found.core_bytes == 0.7 * measured.core_bytes
    assert found.origin_of("core_bytes") == "assumed for avx2"
    for name in ("avx512vbmi", "amx"):
        assert measured.assumed_for(name).coded_products == measured.coded_products


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
    path, lite = tmp_path / "cache" / "machine.json", ("mistral-small-4", "--ram", "99GiB")
    rates = {"ram": 30e9, "share": 0.9, "disk": 3e9, "latency": 1e-4}
    store_bandwidths(path, **rates)
    before = planned(plan, *lite)
    assert all(rate["origin"].startswith("assumed for") for rate in before["core"].values())
    cores = dict.fromkeys(CORE, 7e9)
    store_bandwidths(path, **rates, **cores)
    base = planned(plan, *lite)
    assert all(rate["origin"].startswith("measured on 20") for rate in base["core"].values())
    for name in ("ram", "share", *CORE):
        changed = rates | cores
        store_bandwidths(path, **changed | {name: 0.9 * changed[name]})
        found = planned(plan, *lite)
        kinds = {kind for kind in ("prefill", "decode") if found[key(kind)] != base[key(kind)]}
        wanted = {"ram": "decode", "share": "decode", "core_bytes": "decode"}
        wanted |= {"attention_products": "prefill decode", "attention_small": "prefill decode"}
        assert kinds == {*wanted.get(name, "prefill").split()}, name


SOME = "v3 --ram 96GiB --device cpu --ram-bandwidth 90GB --threads 32".split()
EACH = [
    *("--slots 100", "--no-prefetch", "--draft mtp", "--threads 8", "--ram-bandwidth 50GB"),
    *("--disk-bandwidth 5GB", "--experts-dir x", "--context 65536", "--ram 64GiB", "--bits 3"),
    *("--gpu rtx-4090", "--resident mixed", "--prompt-tokens 9 -n 9", "--vram 16GiB --device auto"),
]


def test_each_option_changes_the_prediction_or_is_not_offered(plan):
    base = planned(plan, *SOME)
    for options in EACH:
        words = options.split()
        some = [word for word in SOME if "gpu" not in options or word not in ("--device", "cpu")]
        found = planned(plan, *some, *words)
        assert any(found[key(kind)] != base[key(kind)] for kind in ("prefill", "decode")), options
    for options in ("--cache-policy lru", "--experts-per-token 4"):
        code, _, err = plan(*SOME, *options.split())
        assert code == 2 and "No such option" in err
    code, _, err = plan(*SOME, "--draft", "ngram")
    assert code == 2 and "'ngram' is not one of 'off', 'mtp'" in err


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


@pytest.mark.usefixtures("heavy")
@needs_native
def test_calibration_measures_what_is_stored(sample_export, tmp_path):
    with Runtime.open(sample_export, context=64, threads=2) as runtime:
        rates = bench.core_rates(Lasting(runtime.model))
        assert runtime.threads == 2
    rates["share"] = rates.pop("all_bytes") / 1e12
    assert {*rates} == {*CORE, "share"} and all(1e6 < rates[name] < 1e13 for name in CORE)
    store_bandwidths(tmp_path / "machine.json", **rates)
    assert stored_bandwidths(tmp_path / "machine.json").int8_products == rates["int8_products"]
