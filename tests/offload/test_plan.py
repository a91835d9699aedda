"""The plan: its arithmetic beside formulas of its own, real exports and runs; and the command."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slotmoe.errors import PlanError
from slotmoe.model.attention import new_state
from slotmoe.model.config import parse_config, read_config
from slotmoe.model.names import expert_shapes, resident_shapes
from slotmoe.offload import machine
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan import advice
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import (
    attention_products,
    kv_bytes,
    kv_read_bytes,
    make_plan,
    mark_bytes,
    sizes_of,
    waiting_bytes,
)
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.export.reader import Export
from slotmoe.quant.shapes import MARK_TOKENS
from slotmoe.state import plain_row
from tests.support.engine import RUN
from tests.support.hub import NAME, Repo
from tests.support.meta import empty
from tests.support.params import nth
from tests.support.slab import NF4S
from tests.support.tiny import SAMPLE, write_checkpoint
from tests.support.v4 import CONFIGS, state_bytes

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def geometry(name):
    return read_config(geometry_path(name))


def plan_of(config, budget, *, resident="int8", runtime_bytes=0, context=512, **options):
    options = {"tier": "ram", "context": context, "runtime_bytes": runtime_bytes, **options}
    return make_plan(config, sizes_of(config, resident, NF4S), budget=budget, **options)


REAL = [
    ("v2-lite", (8.65, 4.6, 7.65, 0.717, 1.31, 31104)),
    ("v2", (23.6, 12.53, 118.3, 4.43, 13.0, 69120)),
]


@pytest.mark.parametrize(("name", "wanted"), REAL)
def test_arithmetic_of_the_real_models(name, wanted):
    """Section 2 of the design: parameters (M), one record (MB), all (GB), a token's (GB), other
    parameters (G), KV bytes."""
    config = geometry(name)
    sizes, layers = sizes_of(config, "bf16", NF4S), len(config.moe_layers)
    found = (
        sum(math.prod(shape) for shape in expert_shapes(config).values()) / 1e6,
        sizes.record_bytes / 1e6,
        layers * config.n_routed_experts * sizes.record_bytes / 1e9,
        layers * config.num_experts_per_tok * sizes.record_bytes / 1e9,
        sum(math.prod(shape) for shape in resident_shapes(config).values()) / 1e9,
        kv_bytes(config, 1, "torch"),
    )
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("resident", nth(2, ["bf16", "int8", "nf4", "mixed"]))
def test_sizes_are_those_of_the_weights_in_memory(tmp_path, resident):
    write_checkpoint(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "export", resident=resident)
    config = read_config(tmp_path / "export" / "config.json")
    sizes = sizes_of(config, resident, NF4S)
    with Runtime.open(tmp_path / "export", context=64) as runtime:
        planned = sum(runtime.plan.components[name] for name in sizes.resident)
        assert planned == sum(sizes.resident.values())
    with Export.open(tmp_path / "export") as export:
        assert sizes.record_bytes == export.layout.record_bytes
        held = 0
        for name in resident_shapes(config):
            weight = export.resident(name)
            small = name.endswith(("norm.weight", "mlp.gate.weight"))  # in float32
            held += (weight.float() if small else weight).nbytes
            held -= 64 * isinstance(weight, CodedWeight)  # the levels: one table for all
    assert sum(sizes.resident.values()) == held


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
    waiting = plan.prefill_chunk - 512
    assert parts["waiting tokens"] == waiting_bytes(config, 512 + waiting)
    assert parts["waiting tokens"] <= (parts["expert slots"] + parts["read buffers"]) // 18


def test_the_smallest_budget_is_found_to_the_byte():
    config = geometry("v2")
    plan = plan_of(config, 5 * GIB)
    enough = plan_of(config, plan.total)
    enough.check()
    assert enough.slots >= config.num_experts_per_tok
    assert plan_of(config, plan.total - 1).shortfall
    with pytest.raises(PlanError, match="5 expert slots are too few"):
        plan_of(config, 50 * GIB, slots=5)


def test_passes_of_prefill_grow_with_the_room():
    """A twentieth of it holds the tokens that wait; at most 4,096, or the context."""
    chunks = [plan_of(geometry("v2"), size * GIB, context=8192).prefill_chunk for size in (16, 30)]
    assert chunks == [512, 4096]
    assert plan_of(geometry("v2"), 30 * GIB, context=600).prefill_chunk == 1024


@pytest.mark.parametrize("ram", [32, 96, 512])
def test_memory_below_a_gpu(ram):
    """Locked RAM takes the GPU's memory too: 8 bytes for each page of 4 KiB."""
    gpu = {"tier": "vram", "resident": "mixed", "runtime_bytes": GIB, "kernels": "triton"}
    plan = plan_of(geometry("v2"), 22 * GIB, host_budget=ram * GIB, **gpu)
    assert plan.shortfall == {} and "runtime" not in plan.components
    locked = plan.host["expert slots"] + plan.host["read buffers"]
    assert plan.components["page tables"] == locked // 4096 * 8
    assert plan.budget - plan.record_bytes - (1 << 20) < plan.total <= plan.budget
    if ram == 512:
        assert plan.host_slots == 59 * 160  # all of them
    else:
        assert 0 <= ram * GIB - sum(plan.host.values()) < plan.record_bytes
    with pytest.raises(PlanError, match=r"of ram .*: raise --ram$"):
        plan_of(geometry("v2"), 22 * GIB, host_budget=GIB, **gpu).check()


def test_drafts_have_room():
    config, row = geometry("v2-lite"), 4 * 16 * 16 * 512  # sums of a row's attention
    for budget, options, count in (
        (64 * GIB, {}, 15),
        (5 * GIB, {}, 3),
        (64 * GIB, {"slots": 64}, 3),
        (64 * GIB, {"kernels": "torch"}, 0),
    ):
        plain, drafting = (plan_of(config, budget, drafts=d, **options) for d in (False, True))
        more = {name: size - plain.components[name] for name, size in drafting.components.items()}
        assert (plain.drafted, drafting.drafted) == (0, count)
        assert more["prefill scratch"] == count * row and drafting.total <= budget


PEAKS = nth(3, [(22, 30), (112, 300), (224, 900)])


@pytest.mark.parametrize(("slots", "prompt"), PEAKS)
def test_peak_memory_is_within_three_percent(slots, prompt, sample_export, processes):
    command = [sys.executable, "-c", RUN, str(slots), str(prompt), sample_export]
    measured, predicted, kernels = json.loads(subprocess.check_output(command))
    if kernels == "torch":
        pytest.skip("the prediction of temporaries is for the native kernels, which were not built")
    assert measured == pytest.approx(predicted, rel=0.03)


KERNELS = {
    "native": lambda R, P: NativeBackend.latent_row(None, R, P),
    "torch": lambda R, P: TorchBackend.latent_row(None, R, P),
    "reference": plain_row,
}
NAMES = ("v2", "v3.2", "glm-5", "v4-flash", "v4-pro")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", [*NAMES, *(f"tiny {name}" for name in CONFIGS)])
def test_bytes_of_a_sequence_are_those_of_its_state(name, kernels):
    tiny = name.removeprefix("tiny ")
    config = parse_config(CONFIGS[tiny]) if tiny != name else geometry(name)
    given = ("native",) if kernels == "native" else ("torch", 4 if kernels == "reference" else 2)
    for context in (1, 100, 4096, 1 << 20):
        make = lambda shape, dtype: empty(*shape, dtype=dtype)  # noqa: E731
        state = new_state(config, context, KERNELS[kernels], make)
        assert kv_bytes(config, context, *given) == state_bytes(state)
        state.begin(8 * MARK_TOKENS)
        if state.snapshot_bytes(MARK_TOKENS):
            many = range(MARK_TOKENS * 1000, MARK_TOKENS * 1008, MARK_TOKENS)
            marks = sum(map(state.snapshot_bytes, many))
            assert mark_bytes(config, 8 * MARK_TOKENS, *given) == marks


def test_what_attention_computes_and_reads():
    """V2's dense layers read all rows; V3.2's indexer one key of 128 values a token; V4's a fourth
    and a 128th of a row, what it chooses, and a window."""
    v2, v32, v4 = map(geometry, ("v2", "v3.2", "v4-flash"))
    assert attention_products(v2, 8192) == 60 * 128 * (2 * 512 + 64) * 8192
    more = attention_products(v32, 8192) - attention_products(v32, 2048)
    assert more == 61 * 64 * 128 * 6144
    more = kv_read_bytes(v32, 8192, "native") - kv_read_bytes(v32, 2048, "native")
    assert more == 6144 * 61 * 144
    csa, hca = 21, 20
    more = attention_products(v4, 1 << 20) - attention_products(v4, 1 << 19)
    assert more == csa * 64 * 128 * (1 << 17) + hca * 64 * 2 * 512 * (1 << 12)
    window, chosen = 43 * 127 * 528, csa * 512 * 528 + csa * (1 << 18) * 144
    opened = csa * 2 * 4 * 2 * 2 * (512 + 128) + hca * 2 * 512 * 4
    read = window + chosen + hca * (1 << 13) * 528 + opened
    assert kv_read_bytes(v4, 1 << 20, "native") == read


@pytest.fixture
def plan(slotmoe, tmp_path, monkeypatch):
    """Run ``slotmoe plan``: exit code, stdout, stderr."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: slotmoe("plan", *arguments)


@pytest.fixture
def planned(plan):
    """What ``slotmoe plan --json`` prints."""
    return lambda *arguments: json.loads(plan(*arguments, "--json")[1])


def test_the_full_model_fits_a_24_gb_gpu(planned):
    for ram in ("32GiB", "64GiB", "128GiB"):
        report = planned("v2", "--gpu", "rtx-4090", "--ram", ram)
        assert (report["fits"], report["resident"]["precision"]) == (True, "mixed")
        for tier, total in report["total"].items():
            assert total == sum(parts.get(tier, 0) for parts in report["components"].values())
            assert tier == "disk" or total <= report["budget"][tier]
        assert report["decode_tokens_per_second"] > 0.9


def test_a_model_that_does_not_fit_gets_three_ways_out_that_work(plan, planned):
    cpu = "v2 --ram 64GiB --resident int8 --context 65536".split()
    arguments = [*cpu, "--gpu", "rtx-3060"]
    report, text = planned(*arguments), plan(*arguments)[1]
    assert not report["fits"]
    assert report["shortfall"] == report["total"]["vram"] - report["budget"]["vram"]
    assert len(report["ways_out"]) == 3
    for way in report["ways_out"]:
        assert way in " ".join(text.split())
        if way.startswith("--device cpu"):
            assert planned(*cpu, "--device", "cpu")["fits"], way
        elif "model" not in way:
            assert planned(*arguments, *way.replace(" and ", " ").split())["fits"], way


def test_split_misses_are_predicted_by_both_bandwidths(plan, planned):
    arguments = "v2 --gpu rtx-4090 --ram 256GiB --pcie-bandwidth 20GB --misses".split()
    modes = "auto", "fetch", "cpu", "hybrid"
    spent = {mode: planned(*arguments, mode)["decode_seconds"] for mode in modes}
    assert spent["auto"] == spent["hybrid"]
    fetched, computed = spent["fetch"]["PCIe"], spent["cpu"]["CPU experts"]
    left = 0.95 * 40 / 2  # GB/s of RAM beside the copies: half at least
    assert computed == pytest.approx(fetched * 20 / left)
    assert spent["hybrid"]["PCIe and CPU experts"] == pytest.approx(fetched * 20 / (20 + left))
    code, _, err = plan("v2-lite", "--device", "cpu", "--misses", "cpu")
    assert code == 2 and "--misses cpu is given and no GPU is planned for" in err


def test_the_largest_context_is_the_largest(planned):
    options = "v2-lite", "--ram", "3GiB"
    largest = planned(*options)["largest_context"]
    assert planned(*options, "--context", largest)["fits"]
    assert not planned(*options, "--context", largest + 1)["fits"]


def test_an_export_is_planned_as_run_plans_it(planned, sample_export, processes):
    options = "--ram", "2GiB", "--context", 256, "--prompt-tokens", 100
    report = planned(sample_export, *options)
    with Runtime.open(sample_export, ram="2GiB", context=256) as runtime:
        for name, size in runtime.plan.components.items():
            if name != "runtime":
                assert report["components"].get(name, {}).get("ram", 0) == size
    assert report["resident"]["why"] == "as in the export"


def test_divergences_are_measured_here():
    """By the command that ``plan``'s table names, of every choice."""
    found = advice.measured()["rows"]
    assert not any("origin" in row for row in found)
    of = [(codec, bits, again) for codec, bits in EXPERT_CODECS for again in (False, True)]
    assert all(advice.expected(*row[:2], "mixed", row[2]) is not None for row in of)


def test_what_is_shown(plan):
    """The verdict first, and no number has an exponent."""
    options = "--gpu rtx-4090 --ram 32GiB --disk-bandwidth 1234GB"
    code, out, _ = plan("v2-lite", *options.split())
    assert code == 0 and out.startswith("v2-lite fits: an estimated ")
    for words in ("expert slots", "bound by GPU memory (estimated", "disk 1,234 GB/s (given)"):
        assert words in " ".join(out.split())
    code, out, _ = plan("v2", "--ram", "5GiB")
    assert code == 1
    assert re.match(r"v2 does not fit: \d\.\d GiB of RAM short\.\n", out)
    assert not re.search(r"\de[+-]?\d", out)


def test_what_a_model_takes_of_the_disk(plan, sample_export, tmp_path, monkeypatch):
    def disk(*arguments):
        code, out, _ = plan(*arguments, "--json")
        return code, json.loads(out)["disk"]

    free = SimpleNamespace(free=38 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    code, found = disk("v2", "--ram", "32GiB")  # of another machine, perhaps
    assert (code, found["fits"], found["free"]) == (0, True, None)
    assert found["download"] == pytest.approx(472e9, rel=0.01)
    assert disk("v3", "--ram", "32GiB")[1]["download"] == pytest.approx(671e9, rel=0.01)  # fp8
    monkeypatch.setattr("slotmoe.offload.machine.available_memory", lambda: 32 * GIB)
    assert disk("v2")[0] == 1
    code, out, _ = plan("v2")
    assert re.match(r"v2 does not fit: its export takes 1.*GiB, 38.0 GiB are free in /", out)
    assert out.count("fit") == 1 and "tokens/s," not in out
    assert re.search(r"\nWay out: call this from a drive with 1.*GiB free\.\n$", out)
    free.free = 200 * GIB
    assert disk("v2")[0] == 0
    found = disk(sample_export)[1]
    assert (found["download"], found["export"], found["fits"]) == (0, 0, True)
    size = sum(path.stat().st_size for path in sample_export.rglob("*") if path.is_file())
    assert disk("sample")[1]["export"] == pytest.approx(size, rel=0.1)


LOWER = "lower --prompt-tokens, or raise --context (now 64, the model has 163840)"
BAD = [
    ("v2 --gpu rtx-409", "did you mean rtx-4090?"),
    ("v2 --gpu 4060", "did you mean rtx-4060-ti or rtx-4060?"),
    ("v2 --gpu gtx-1080", "'gtx-1080' is unknown; known are rtx-5090,"),
    ("v2 --gpu l40", "'l40' is unknown; known are"),
    ("v2 --ram lots", "'lots' is not a size"),
    ("v2 --disk-bandwidth -3GB", "is not a size"),
    ("v2-lite --context 999999999", "is outside 1 to 163840, the model's max_position_embeddings"),
    ("sample --prompt-tokens 5000", "does not fit the context of 1024"),
    ("v2 --context 64 --prompt-tokens 64", LOWER),
    ("nowhere", "nowhere"),
    ("v2 --device cpu --gpu rtx-4090", "drop one"),
    ("v2 --slots 3", "3 expert slots are too few"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_use_is_one_clear_line(plan, arguments, message):
    code, out, err = plan(*arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_damaged_manifests_are_named(plan, tmp_path):
    (tmp_path / "config.json").write_bytes((SAMPLE / "config.json").read_bytes())
    other = '{"quantization": {"resident": "int3"}, "source": {"name": ""}, "files": {}}'
    for text in ("{}", other, '{"quantization": 3}'):
        (tmp_path / "slotmoe.json").write_text(text)
        code, _, err = plan(tmp_path)
        assert (code, "slotmoe.json" in err) == (2, True)


class Driver:
    """CUDA's driver with GPUs of these numbers, in its own order."""

    def __init__(self, *numbers):
        self._numbers = numbers

    def cuInit(self, flags):
        return 0 if self._numbers else 100

    def cuDeviceGet(self, device, index):
        if index >= len(self._numbers):
            return 101
        device._obj.value = self._numbers[index]
        return 0

    def cuDeviceGetUuid(self, uuid, device):
        uuid._obj[:] = [device.value] * 16
        return 0


UUID = "GPU-01010101-0101-0101-0101-010101010101"


def test_a_gpu_in_this_machine_is_found(plan, planned, tmp_path, monkeypatch, processes):
    """The one that CUDA takes, which need not be the first of nvidia-smi's."""

    def gpus(*numbers):
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver(*numbers))

    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--id={UUID}) echo NVIDIA GeForce RTX 3090, 24000;;\n"
        "*) echo NVIDIA GeForce GT 1030, 1000;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus(1, 0)
    report = planned("v2-lite")
    assert report["budget"]["vram"] == int(24000 * (1 << 20) * 0.9)
    assert report["gpu"] == "NVIDIA GeForce RTX 3090"
    assert planned("v2-lite", "--device", "cuda:1")["gpu"] == "NVIDIA GeForce GT 1030"
    assert "vram" not in planned("v2-lite", "--device", "cpu")["budget"]
    gpus()  # none is visible
    assert "vram" not in planned("v2-lite")["budget"]
    gpus(1)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "vram" not in planned("v2-lite")["budget"]
    code, _, err = plan("v2-lite", "--device", "cuda")
    assert (code, "no such GPU is found" in err) == (2, True)


def test_a_hub_id_fetches_the_config_alone(plan, planned, hub):
    hub.add(NAME, Repo(SAMPLE))
    report = planned(NAME, "--ram", "2GiB")
    assert report["components"]["all experts"] == {"disk": 7 * 32 * 28672}
    assert {request["name"] for request in hub.requests} == {"config.json"}
    code, _, err = plan("no/model", "--ram", "2GiB")
    assert (code, "no/model: is no folder here and no model on" in err) == (2, True)
    code, _, err = plan(NAME, "--revision", "nowhere")
    assert (code, "has no revision 'nowhere'" in err) == (2, True)


def test_without_a_network_a_hub_id_is_one_line_and_no_torch_is_needed(tmp_path, processes):
    """Nor what huggingface_hub says of its attempts."""
    code = "import sys; from slotmoe.tools.cli import main, cli; "
    code += "cli.main(['plan', 'v2', '--ram', '64GiB'], standalone_mode=False); "
    code += f"assert 'torch' not in sys.modules; main(['plan', '{NAME}', '--ram', '2GiB'])"
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | away}
    done = subprocess.run([sys.executable, "-c", code], **options)
    problem = "the hub can't be reached and its config.json is not in huggingface_hub's cache"
    assert (done.returncode, done.stderr) == (1, f"slotmoe: {NAME}: {problem}\n")
