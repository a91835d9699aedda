"""The plan: its arithmetic beside formulas of its own, real exports and runs; and the command."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.attention import new_state
from slotmoe.model.config import parse_config, read_config
from slotmoe.network.shapes import MARKS
from slotmoe.network.state import plain_row
from slotmoe.offload import machine
from slotmoe.offload.plan import advice, memory, speed
from slotmoe.offload.plan.advice import HUB, geometry_path, gpu_named
from slotmoe.offload.plan.memory import sizes_of
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.system import cores
from tests.support.hub import NAME, Repo
from tests.support.meta import empty
from tests.support.slab import NF4S
from tests.support.tiny import SAMPLE, SMALL, write_checkpoint
from tests.support.v4 import CONFIGS, state_bytes

GIB = 1 << 30
GPU = {"tier": "vram", "resident": "mixed", "runtime_bytes": GIB, "kernels": "triton"}
GPU["host_budget"] = 512 * GIB


def geometry(name):
    return read_config(geometry_path(name))


def plan_of(config, budget, *, resident="int8", runtime_bytes=0, context=512, **options):
    options = {"tier": "ram", "context": context, "runtime_bytes": runtime_bytes, **options}
    return memory.make_plan(config, sizes_of(config, resident, NF4S), budget=budget, **options)


@pytest.mark.parametrize("slots", [None, 100, 2000])
@pytest.mark.parametrize("gibibytes", [4, 5, 6, 9, 12, 20, 64])
@pytest.mark.parametrize("name", ["v2-lite", "glm-4.7-flash", "v4-flash"])
def test_a_budget_is_spent_and_kept(name, gibibytes, slots):
    """On what stays resident, then on slots and read buffers, of these an eighth at most."""
    config = geometry(name)
    plan, K = plan_of(config, gibibytes * GIB, slots=slots), config.num_experts_per_tok
    parts, record = plan.components, plan.record_bytes
    experts = len(config.moe_layers) * config.n_routed_experts
    if plan.shortfall:
        least = min(slots or K, experts)
        assert (plan.slots, plan.staging) == (least, K)
        assert plan.total == plan.budget + plan.shortfall["ram"]
        with pytest.raises(PlanError, match=r"needs at least .* of ram .* short: raise --ram, low"):
            plan.check()
        return
    assert parts["expert slots"] == plan.slots * record
    assert parts["logits"] == 4 * config.vocab_size
    assert plan.total <= plan.budget
    assert K <= plan.staging <= 4 * K
    if plan.slots == min(slots or experts, experts):
        assert parts["read buffers"] <= plan.staging * record
    else:
        assert plan.budget - plan.total < record and plan.slots + plan.staging < experts
        assert slots or plan.staging <= max(K, (plan.slots + plan.staging) // 8)
    if plan.slots == experts:
        assert (parts["read buffers"], plan.prefill_chunk) == (0, 512)


def test_the_smallest_budget_is_found_to_the_byte():
    config = geometry("v2")
    plan = plan_of(config, 5 * GIB)
    enough = plan_of(config, plan.total)
    enough.check()
    assert enough.slots >= config.num_experts_per_tok
    assert plan_of(config, plan.total - 1).shortfall
    with pytest.raises(PlanError, match="5 expert slots are too few"):
        plan_of(config, 50 * GIB, slots=5)


@pytest.mark.parametrize("ram", [32, 96, 512])
def test_memory_below_a_gpu(ram):
    """Locked RAM takes the GPU's memory too: 8 bytes for each page of 4 KiB."""
    assert gpu_named("RTX 4090").budget == pytest.approx(20.8 * GIB, rel=0.01)  # as run takes
    plan = plan_of(geometry("v2"), 22 * GIB, **GPU | {"host_budget": ram * GIB})
    assert plan.shortfall == {} and "runtime" not in plan.components
    locked = plan.host["expert slots"] + plan.host["read buffers"]
    assert plan.components["page tables"] == locked // 4096 * 8
    assert plan.budget - plan.record_bytes - (1 << 20) < plan.total <= plan.budget
    if ram == 512:
        assert plan.host_slots == 59 * 160  # all of them
    else:
        assert 0 <= ram * GIB - sum(plan.host.values()) < plan.record_bytes
    with pytest.raises(PlanError, match=r"of ram .*: raise --ram$"):
        plan_of(geometry("v2"), 22 * GIB, **GPU | {"host_budget": GIB}).check()


KERNELS = {
    "native": lambda R, P: NativeBackend.latent_row(None, R, P),
    "torch": lambda R, P: TorchBackend.latent_row(None, R, P),
    "reference": plain_row,
}
NAMES = ("v2", "v3.2", "glm-5", "v4-flash", "v4-pro", "qwen3-30b-a3b", "gpt-oss-20b")
NAMES += ("qwen3-next-80b-a3b", "qwen3.6-35b-a3b", "kimi-linear-48b-a3b")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", [*NAMES, *(f"tiny {name}" for name in CONFIGS)])
def test_bytes_of_a_sequence_are_those_of_its_state(name, kernels):
    tiny = name.removeprefix("tiny ")
    config = parse_config(CONFIGS[tiny]) if tiny != name else geometry(name)
    for context in (1, 100, 4096, 1 << 20):
        make = lambda shape, dtype: empty(*shape, dtype=dtype)  # noqa: E731
        state = new_state(config, context, KERNELS[kernels], make)
        assert memory.kv_bytes(config, context, kernels) == state_bytes(state)
        state.begin(8 * MARKS.tokens)
        if state.snapshot_bytes(MARKS.tokens):
            many = range(MARKS.tokens * 1000, MARKS.tokens * 1008, MARKS.tokens)
            marks = sum(map(state.snapshot_bytes, many))
            marks //= 1 if config.delta is None else memory.MARKED_TOKENS // MARKS.tokens
            assert memory.mark_bytes(config, 8 * MARKS.tokens, kernels) == marks
            if kernels == "torch":  # beyond a chunk, streams and rotations
                tables = 1 if config.compressed is None else 2
                row = 4 * (config.stream_width + tables * config.qk_rope_head_dim)
                waiting = memory.waiting_bytes(config, 512 + 8 * MARKS.tokens)
                assert waiting == 8 * MARKS.tokens * row + marks


LEAST = {
    "v2": 26310415668,
    "glm-5": 36720609228,
    "v4-flash": 17057933950,
    "qwen3-next-80b-a3b": 7687198888,
    "kimi-linear-48b-a3b": 6420394480,
    "gpt-oss-20b": 4827115187,
}


@pytest.mark.parametrize("name", LEAST)
def test_least_bytes(name):
    """Of scratch for a token and for a step, and of plans without a budget; changes are meant."""
    config, kernels = geometry(name), ("native", "triton", "torch", "vulkan")[: 3 + (name == "v2")]
    found = [memory.scratch_bytes(config, tokens, by) for by in kernels for tokens in (1, 512)]
    plans = [plan_of(config, 0, drafts=True, **it).total for it in ({}, GPU | {"sequences": 2})]
    assert sum(found + plans) == LEAST[name]


@pytest.fixture
def plan(slotmoe, tmp_path, monkeypatch):
    """Run ``slotmoe plan``: exit code, stdout, stderr."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: slotmoe("plan", *arguments)


@pytest.fixture
def planned(plan):
    """What ``slotmoe plan --json`` prints."""
    return lambda *arguments: json.loads(plan(*arguments, "--json")[1])


LACKING = {  # how the ways out begin, the cheapest first
    "v2 --ram 64GiB --context 65536 --gpu rtx-3060": "--resident --device --vram",
    "v2 --ram 64GiB --slots 900 --gpu rtx-4090": "drop --resident --device",
    "v2 --device cpu --ram 14GiB --context 131072": "--context --resident --ram",
    "v2-lite --ram 1GiB --gpu rtx-3060": "--ram",
}


@pytest.mark.parametrize("line", LACKING)
def test_ways_out_of_a_model_that_does_not_fit_work(plan, planned, monkeypatch, line):
    """And ask for no more than is needed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 50))
    given = f"{line} --resident int8".split()
    report, text = planned(*given), " ".join(plan(*given)[1].split())
    libraries = GIB if "gpu" in line else 226 << 20
    assert not report["fits"] and report["components"]["runtime"]["ram"] > libraries
    assert report["shortfall"] == sum(report["shortfall_by_tier"].values())
    assert [way.split()[0] for way in report["ways_out"]] == LACKING[line].split()
    for way in report["ways_out"]:
        assert way in text
        option = way.partition(":")[0].replace(" and ", " ").removeprefix("drop --slots")
        on = [*given]
        del on[slice(3, 5) if not option else slice(-4, -2) if "cpu" in option else slice(0)]
        assert planned(*on, *option.split())["fits"], way
        less = re.sub(r"\d(?=GiB$)", lambda digit: str(int(digit[0]) - 1), option)
        less = re.sub(r"\d+$", lambda count: str(int(count[0]) + 1), less)
        assert less == option or not planned(*on, *less.split())["fits"], less


def test_an_export_is_planned_as_run_plans_it(planned, sample_export, processes):
    options = "--ram", "2GiB", "--context", 256, "--prompt-tokens", 100
    report = planned(sample_export, *options)
    with Runtime.open(sample_export, ram="2GiB", context=256) as runtime:
        for name, size in runtime.plan.components.items():
            if name != "runtime":
                assert report["components"].get(name, {}).get("ram", 0) == size
    assert report["resident"]["why"] == "as in the export"
    with Runtime.open(SAMPLE, quantize=False, context=256) as runtime:
        (state,), components = runtime.model.states, runtime.plan.components
        assert components["KV cache"] == state_bytes(state)


def test_what_a_model_takes_of_the_disk(plan, planned, sample_export, tmp_path, monkeypatch):
    """Of the cache folder's, which is still to be made; another machine's is not known."""
    looked = []
    usage = lambda folder: looked.append(folder) or SimpleNamespace(free=38 * GIB)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr("slotmoe.offload.machine.total_memory", lambda: 40 * GIB)
    monkeypatch.setattr("slotmoe.offload.machine.available_memory", lambda: 32 * GIB)
    found = planned("v2", "--ram", "41GiB")["disk"]
    assert (found["fits"], found["free"], looked) == (True, None, [])
    assert found["download"] == pytest.approx(472e9, rel=0.01)
    for budget in ([], ["--ram", "32GiB"]):
        code, out, _ = plan("v2", *budget)
        assert code == 1 and {*looked} == {tmp_path}
        last = out.splitlines()[-1]
        assert re.match(r"v2 does not fit: its export takes 1.*GiB, 38.0 GiB are free in /", last)
    found = planned(sample_export)["disk"]
    assert (found["download"], found["export"], found["fits"]) == (0, 0, True)


MACHINES = [
    ("--device cpu --ram 64GiB --disk-bandwidth 2GB", "fits: about"),
    ("--gpu rtx-4090 --ram 100GiB --vram 23.2GiB --threads 8 --misses cpu", "fits: an estimated"),
    ("--device cpu --ram 1GiB", "does not fit"),
]


@pytest.mark.parametrize(("machine", "verdict"), MACHINES)
def test_a_plan_fits_a_terminal_and_ends_in_the_command_to_type(
    plan, planned, machine, verdict, monkeypatch
):
    """24 lines of 80 columns; with --verbose more, and the same end."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("v2", "v4-flash", "kimi-k2", "gpt-oss-120b"):
        out = plan(name, *machine.split())[1].splitlines()
        assert sum(1 + (len(line) - 1) // 80 for line in out if line) + out.count("") <= 24
        report = planned(name, *machine.split())
        if not report["fits"]:
            assert verdict in out[-1] and report["command"] is None
            continue
        hub = HUB[name]
        assert re.fullmatch(rf"slotmoe quantize {hub}  # downloads \d.* GiB", out[-1])
        assert f"{name} {verdict}" in out[-2]
        shown = re.search(r"tokens/s \((\S+) to (\S+)\)", out[-2])
        assert float(shown[1]) < report["decode_tokens_per_second"] < float(shown[2])
        (row,) = (row for row in report["choices"] if row["planned"])
        assert row["decode_tokens_per_second"] == report["decode_tokens_per_second"]
        assert row["export"] == report["disk"]["export"]
        if report["host_slots"]:  # experts in RAM are in memory too
            assert row["host_slots"] == report["host_slots"] > row["slots"]
            shown = f"{report['host_slots'] / report['experts']:.0%}"
            assert any(shown in line.split() for line in out), shown
            assert report["found_in_memory"] > report["hit_rate"]
        verbose = plan(name, *machine.split(), "--verbose")[1]
        assert verbose.splitlines()[-2:] == out[-2:] and "Taken for granted: " in verbose


def test_the_command_to_type_is_as_was_planned(planned, sample_export):
    plain = "v2 --ram 900GiB --device cpu".split()
    more = "--resident nf4 --bits 3 --codec lut --draft off --prompt-tokens 9".split()
    found = planned(*plain, *more)["command"]
    assert found == f"slotmoe quantize {HUB['v2']} --resident nf4 --codec lut --bits 3"
    found = planned("v3", *plain[1:], "--draft", "mtp")["command"]
    assert found == f"slotmoe quantize {HUB['v3']} --keep-mtp"
    found = planned(sample_export, "--ram", "2GiB", "--no-prefetch", "--prompt-tokens", 9)
    assert found["command"] == f'slotmoe run {sample_export} "Your prompt" --ram 2GiB --no-prefetch'


@pytest.mark.parametrize(("most", "precision"), [(0, "mixed"), (1 << 40, "int8")])
def test_plan_and_quantize_choose_alike(planned, slotmoe, tmp_path, monkeypatch, most, precision):
    monkeypatch.setattr("slotmoe.offload.plan.precision.MOST_INT8", most)
    write_checkpoint(tmp_path / "source", **SMALL)
    report = planned(tmp_path / "source", "--ram", "2GiB")
    assert report["resident"]["precision"] == precision
    assert report["command"] == f"slotmoe quantize {tmp_path}/source"
    code, out, _ = slotmoe("quantize", tmp_path / "source", tmp_path / "made", "--json")
    assert code == 0 and json.loads(out)["quantization"] == precision


LOWER = "lower --prompt-tokens, or raise --context (now 64, the model has 163840)"
BAD = [
    ("v2 --gpu rtx-409", "did you mean rtx-4090?"),
    ("v2 --gpu gtx-980", "'gtx-980' is unknown; known are rtx-5090,"),
    ("v2 --ram lots", "'lots' is not a size"),
    ("v2-lite --context 999999999", "is outside 1 to 163840, the model's max_position_embeddings"),
    ("sample --prompt-tokens 5000", "does not fit the context of 1024"),
    ("v2 --context 64 --prompt-tokens 64", LOWER),
    ("v2 --device cpu --gpu rtx-4090", "drop one"),
    (
        "gpt-oss-20b --gpu arc-b580",
        "GptOssForCausalLM is not there yet on Vulkan; use --device cpu",
    ),
    ("v2 --codec nf4 --bits 3", "--codec nf4 has no 3 bits"),
    ("v2 --slots 3", "3 expert slots are too few"),
    ("v2-lite --device cpu --pcie-bandwidth 9GB", "--pcie-bandwidth 9GB is given and no GPU"),
    ("v2-lite --device cpu --gpu-bandwidth 9GB", "--gpu-bandwidth 9GB is given and no GPU"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_use_is_one_clear_line(plan, arguments, message):
    code, out, err = plan(*arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_hub_id_fetches_the_config_alone(planned, hub):
    hub.add(NAME, Repo(SAMPLE))
    report = planned(NAME, "--ram", "2GiB")
    assert report["components"]["all experts"] == {"disk": 7 * 32 * 28672}
    assert {request["name"] for request in hub.requests} == {"config.json"}


PREDICTED = [  # geometry, MiB, more of the plan and of the setting; tokens/s of a prompt and after
    ("v2-lite", 20 << 10, {}, {}, 306.47, 20.325),
    ("v2-lite", 5 << 10, {"context": 8192}, {"random_routing": True}, 172.99, 5.0161),
    ("v4-flash", 64 << 10, {"sequences": 3}, {"prefetch": False}, 14.445, 1.2703),
    ("sample", 40, {"slots": 40, "drafts": True}, {}, 21181, 119.1),
    ("glm-5", 22 << 10, GPU | {"host_budget": 64 * GIB}, {}, 3.7316, 0.28852),
    ("v2", 22 << 10, GPU, {"misses": "hybrid"}, 131.90, 8.1443),
    ("v2", 16 << 10, GPU | {"context": 8192}, {"misses": "cpu"}, 192.56, 4.2764),
    ("v3.2", 22 << 10, GPU | {"context": 16384}, {"random_routing": True}, 37.459, 1.9038),
    ("v4-flash", 24 << 10, GPU | {"host_budget": 96 * GIB}, {"misses": "cpu"}, 41.712, 3.6713),
    ("qwen3.6-35b-a3b", 12 << 10, {}, {}, 181.95, 10.769),
    ("qwen3-next-80b-a3b", 16 << 10, GPU, {"misses": "hybrid"}, 702.75, 16.790),
    ("kimi-linear-48b-a3b", 12 << 10, GPU | {"context": 8192}, {}, 2668.7, 31.431),
    ("gpt-oss-20b", 8 << 10, GPU | {"context": 8192}, {}, 2920.0, 43.106),
]


@pytest.mark.parametrize(("name", "size", "options", "setting", "prefill", "decode"), PREDICTED)
def test_predictions(name, size, options, setting, prefill, decode):
    """A change of these is meant: users choose by them."""
    config, plan = geometry(name), plan_of(geometry(name), size << 20, **options)
    sizes = sizes_of(config, options.get("resident", "int8"), NF4S)
    given = config, sizes, plan, speed.Bandwidths(), 8
    on = speed.Setting(*given, **{"random_routing": False} | setting)
    found = on.predict(plan.context - 100, 100)
    speeds = found.prefill_tokens_per_second, found.decode_tokens_per_second
    assert speeds == pytest.approx((prefill, decode), rel=1e-4)
    assert advice.predicted_components(plan, 1 << 20, 0) == advice.by_name(plan)


def test_a_prediction_counts_what_no_shorter_text_spares():
    """Of delta rules the states, and copies of them where texts end and every 1,024 tokens."""
    config = geometry("qwen3.6-35b-a3b")
    plan = plan_of(config, 8 * GIB, context=2048)
    make = lambda shape, dtype: empty(*shape, dtype=dtype)  # noqa: E731
    state = new_state(config, 2048, KERNELS["native"], make, plan.marks)
    before = state.used_bytes
    state.begin(2048)
    assert state.used_bytes == before + state.saved_bytes(0, 2048)
    held = state.used_bytes + 4 * state.snapshot_bytes(2047)
    predicted = advice.predicted_components(plan, 2048, 0)["KV cache"]["ram"]
    assert predicted == pytest.approx(held, rel=1e-4)
    assert plan.marks.most == 4 and plan_of(config, 32 * GIB).marks.most == 8


RECKONED = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text().split("```text\n")[1]


@pytest.mark.parametrize("block", RECKONED.partition("```")[0].strip().split("\n\n"))
def test_a_gpus_figures_are_the_pages_arithmetic(planned, block):
    """Whose every line is right, and whose sums ``plan`` prints, within 15%."""
    command, *lines = block.splitlines()
    sums = {"prefill": 0.0, "decode": 0.0}
    for line in lines:
        name, product, result = re.match(r"(.{21}) ([\d.e()*/+-]+) +([\d.]+)$", line).groups()
        spent = eval(product)  # of digits and signs
        assert f"{spent:.1f}" == result, line
        sums["prefill" if name.startswith("prompt") else "decode"] += spent / 1e3
    report = planned(*command.split()[2:], "--threads", 8, "--misses", "fetch")
    for kind, tokens in (("prefill", 512), ("decode", 1)):
        found = tokens / report[f"{kind}_tokens_per_second"]
        assert sum(report[f"{kind}_seconds"].values()) == pytest.approx(found)
        assert found == pytest.approx(sums[kind], rel=0.15)
    assert report["bandwidths"]["gpu"]["origin"].startswith("of ")


@pytest.mark.parametrize("unified", [False, True])
def test_a_vulkan_device_that_is_here(planned, monkeypatch, unified):
    """One whose memory is RAM has no link, and experts stay where they are read to."""
    found = {"name": "a GPU", "reason": "", "free": 20 * GIB, "unified": unified}
    monkeypatch.setattr(machine, "ask_gpu", lambda index, kind: found)
    report = planned("v2-lite", "--device", "vulkan", "--ram", "24GiB", "--slots", 800)
    missing = report["decode_seconds"]["PCIe"]
    assert (missing == 0) == unified and report["host_slots"] == report["experts"]
    report = planned("v2-lite", "--device", "vulkan", "--ram", "24GiB")
    assert (report["slots"], report["host_slots"]) == ((6, 1664) if unified else (1664, 0))
    total = sum(report["total"][tier] for tier in ("ram", "vram"))
    half = planned(*"v2-lite --ram 24GiB --slots 832 --gpu rtx-4090 --device vulkan".split())
    assert half["decode_tokens_per_second"] > 100
    assert total < (24 if unified else 44) * GIB and report["prefill_tokens_per_second"] is None


@pytest.mark.parametrize("options", ["v2-lite --vram 8GiB", "v2 --ram-bandwidth 400GB", "v3.2"])
def test_auto_is_the_fastest_way(planned, options):
    """What ``run`` takes too; both sides at once where the CPU is twice as fast as the link."""
    on = *options.split(), "--gpu", "rtx-4090", "--threads", 64, "--ram", "600GiB"
    found = {way: planned(*on, "--misses", way) for way in ("auto", "fetch", "cpu", "hybrid")}
    speeds = {way: it["decode_tokens_per_second"] for way, it in found.items()}
    rates = found["auto"]["bandwidths"]
    twice = rates["experts"]["bytes_per_second"] > 2 * rates["pcie"]["bytes_per_second"]
    allowed = ["fetch", "cpu", *["hybrid"] * twice]
    assert speeds["auto"] == max(speeds[way] for way in allowed)
    assert speeds[found["auto"]["settings"]["misses"]] == speeds["auto"]
    assert twice == ("400GB" in options)


@pytest.mark.parametrize("misses", ["fetch", "cpu", "hybrid"])
def test_ram_gives_no_more_than_it_has(misses):
    """To a link of 50 GB/s and the CPU together."""
    config, plan = geometry("v2"), plan_of(geometry("v2"), 28 * GIB, **GPU)
    rates = speed.Bandwidths(ram=70e9, pcie=50e9, pcie_busy=50e9)
    sizes = sizes_of(config, "mixed", NF4S)
    on = speed.Setting(config, sizes, plan, rates, 64, False, misses)
    spent = sum(it for name, it in on.predict(8, 8).decode_seconds.items() if name[0] in "PC")
    absent = 59 * 6 * (1 - on.hits(plan.slots)) * plan.record_bytes
    assert absent / spent <= 0.95 * 70e9


def test_bandwidths_are_kept_for_later_plans(planned, tmp_path):
    path = tmp_path / "cache" / "machine.json"
    assert speed.stored_bandwidths(path).origin_of("disk") == "assumed"
    speed.store_bandwidths(path, ram=31e9, disk=3e9)
    speed.store_bandwidths(path, disk=2e9)
    found = speed.stored_bandwidths(path)
    assert (found.ram, found.disk) == (31e9, 2e9)
    for isa in speed.SETS:
        assumed = found.updated("measured", int8_small=1e9).assumed_for(f"{isa}x")
        assert assumed.int8_small == 1e9
        assert all(0 < getattr(assumed, name) <= 1.25 * getattr(found, name) for name in speed.CORE)
    assert found.assumed_for("amx").int8_products > found.int8_products
    speed.store_bandwidths(path, **dict.fromkeys((*speed.CORE, "ram"), 7e9), share=0.9)
    rates = planned("v2-lite", "--ram", "12GiB")["core"].values()
    told = {(rate["per_second"], rate["origin"][:14]) for rate in rates}
    assert told == {(7e9, "measured on 20")}
    path.write_text('{"ram": "fast"}')
    message = r"machine\.json: ram is .fast., .* run slotmoe bench --calibrate again"
    with pytest.raises(ConfigError, match=message):
        speed.stored_bandwidths(path)


SOME = "v3 --ram 96GiB --device cpu --ram-bandwidth 90GB --threads 32".split()
EACH = [
    *("--slots 100", "--no-prefetch", "--draft mtp", "--threads 8", "--ram-bandwidth 50GB"),
    *("--disk-bandwidth 5GB", "--experts-dir x", "--context 65536", "--ram 64GiB", "--bits 3"),
    *("--gpu rtx-4090", "--resident int8", "--prompt-tokens 9 -n 9", "--vram 16GiB --device auto"),
]


def test_each_option_changes_the_prediction_or_is_not_offered(plan, planned):
    base = planned(*SOME)
    few, many = (planned("v2-lite", "--device", "cpu", "--threads", n) for n in (cores(), 64))
    assert many["prefill_tokens_per_second"] > few["prefill_tokens_per_second"]
    for options in EACH:
        words = options.split()
        some = [word for word in SOME if "gpu" not in options or word not in ("--device", "cpu")]
        found = planned(*some, *words)
        kinds = (f"{kind}_tokens_per_second" for kind in ("prefill", "decode"))
        assert any(found[kind] != base[kind] for kind in kinds), options
    for options in ("--cache-policy lru", "--experts-per-token 4"):
        code, _, err = plan(*SOME, *options.split())
        assert code == 2 and "No such option" in err
