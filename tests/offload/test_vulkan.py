"""A model on a Vulkan device, which on a machine without a GPU is Mesa's lavapipe: the very shaders
that a GPU runs, beside the torch reference, and the same bits whatever lies where."""

from dataclasses import replace

import pytest
import torch

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.offload.devices.vulkan import gpu_report
from slotmoe.offload.engine import loading
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.memory import make_plan
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.kernels.vulkan import REFUSED, Vulkan, VulkanError
from slotmoe.tools.bench.speed import measure
from tests.support.engine import IDS, decode, whole
from tests.support.families import GROUPED_CASES
from tests.support.tiny import ODD_SIZES, SAMPLE, write_checkpoint
from tests.support.v4 import write_case

WHY = gpu_report(0)["reason"]
pytestmark = [
    pytest.mark.skipif(bool(WHY), reason=f"no Vulkan 1.3 device: {WHY}"),
    pytest.mark.usefixtures("heavy"),
]
EXPERTS = 2 * 8  # of a checkpoint of ``tests.support.tiny``
PROMPTS = [IDS[:9], IDS[:5], IDS[20:32]]


def opened(export, device="vulkan", **options):
    return Runtime.open(export, device, **{"context": 64, **options})


def texts(runtime, prompts=PROMPTS, count=6):
    streams = runtime.generate_all(prompts, max_new_tokens=count, temperature=0.0)
    return [[token.id for token in stream] for stream in streams]


def close(found, wanted, median=1e-5):
    """Both keep latents in float16, and where one lies between two of these they may round apart,
    by 2^-11; keys and values are more, and do so more often."""
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    return errors.median() < median and errors.max() < 2**-11


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    write_checkpoint(folder / "source")
    quantize(folder / "source", folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def found(export):
    """With every expert in a slot."""
    with opened(export) as runtime:
        return runtime.logits(IDS[:40]), texts(runtime)


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_the_sample_is_as_the_reference_says(sample_export, count):
    found = []
    for device, kernels in (("cpu", "torch"), ("vulkan", "auto")):
        with opened(sample_export, device, kernels=kernels, context=128) as runtime:
            runtime.warm()
            found.append((runtime.logits(IDS[:count]), texts(runtime, ["Call me"], count)))
    assert close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_bench_knows_no_ceiling(export):
    with opened(export) as runtime:
        report = measure(runtime, 9, 2, 0, 1)
    assert report["decode_tokens_per_second"] > 0
    assert report["ceiling"]["decode_fraction"] is None


CASES = {
    "v2": (EXPERT_CODECS["nf4", "4"], "int8"),
    "v2-lite": (EXPERT_CODECS["lut", "3.5"], "nf4"),
    "v3": (EXPERT_CODECS["lut", "3"], "mixed"),
    "moonlight": (EXPERT_CODECS["lut", "4"], "bf16"),
    "qwen3": (EXPERT_CODECS["nf4", "4"], "nf4"),
    "glm4": (EXPERT_CODECS["lut", "3.5"], "int8"),
    "minimax": (EXPERT_CODECS["lut", "2.5"], "mixed"),
    "ernie": (EXPERT_CODECS["nf4", "4"], "int8"),
}


@pytest.mark.parametrize("case", CASES)
def test_random_checkpoints_are_as_the_reference_says(case, tmp_path):
    codecs, resident = CASES[case]
    own = {"q_lora_rank": None} if case in ("v2-lite", "moonlight") else {}
    if case.startswith("v2"):
        own |= {"n_group": 1, "topk_group": 1} if own else {}
        write_checkpoint(tmp_path / "source", **own)
    else:
        name = case if case in GROUPED_CASES else "v3-groups-yarn"
        write_case(tmp_path / "source", name, torch.bfloat16, **own)
    quantize(tmp_path / "source", tmp_path / "export", codecs=codecs, resident=resident)
    with opened(tmp_path / "export", "cpu", kernels="torch") as runtime:
        wanted = runtime.logits(IDS[:20]), texts(runtime, PROMPTS[:1])
    with opened(tmp_path / "export", slots=6) as runtime:
        median, logits_TV = 1e-4 if case in GROUPED_CASES else 1e-5, runtime.logits(IDS[:20])
        assert close(logits_TV, wanted[0], median)
        assert texts(runtime, PROMPTS[:1]) == wanted[1]
        memory = runtime.stats()["memory"]
        assert 0.97 < memory["peak_vram"] / sum(memory["plan"].values()) <= 1
    with opened(tmp_path / "export") as runtime:
        assert torch.equal(runtime.logits(IDS[:20]), logits_TV)


@pytest.mark.parametrize(
    ("slots", "in_ram"), [(4, EXPERTS), (10, EXPERTS), (4, 0), (6, 5), (EXPERTS, 0)]
)
def test_bits_are_the_same_wherever_experts_lie(export, monkeypatch, found, slots, in_ram):
    """In slots, in RAM, or on the disk; and a row's alone and among others."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=in_ram)

    monkeypatch.setattr(loading, "make_plan", plan)
    with opened(export, slots=slots) as runtime:
        assert torch.equal(runtime.logits(IDS[:40]), found[0])
        assert texts(runtime) == found[1]
        runtime.engine.empty()
        assert torch.equal(decode(runtime, IDS[:29], IDS[29:40]), found[0][28:])
        stats = runtime.stats()
        assert (stats["cache"]["misses"] > 0) == (slots < EXPERTS)
        whole(runtime)


def test_experts_come_in_parts(export, monkeypatch, found):
    """Where a layer of a prompt lacks more than RAM lends at once."""

    def plan(*arguments, **given):
        made = make_plan(*arguments, **given)
        return replace(made, host_slots=0, host_staging=made.staging + 1)

    monkeypatch.setattr(loading, "make_plan", plan)
    with opened(export, slots=4) as runtime:
        assert torch.equal(runtime.logits(IDS[:40]), found[0])


def test_several_texts_drafts_and_sessions(export, tmp_path, found):
    said, of_blocks = [], [*IDS, *IDS[:12]]
    for restored in (False, True):
        with opened(export, sequences=3, draft="ngram", slots=9, context=96) as runtime:
            runtime.keep_in(tmp_path)
            assert texts(runtime) == found[1]
            said.append(texts(runtime, [of_blocks]))
            assert (runtime.stats()["sessions"]["restored_tokens"] > 64) == restored
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"misses": "cpu"}, "misses cpu is not there"),
        ({"kernels": "torch"}, "kernels torch is not there"),
        ({"device": "vulkan:9"}, "vulkan:9: there is no device 9"),
    ],
)
def test_what_is_not_there_yet_is_refused(export, options, named):
    with pytest.raises(ConfigError, match=named):
        opened(export, **options)


def test_models_that_are_not_there_yet_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="quantize False is not there"):
        opened(SAMPLE, quantize=False)
    for case, named in {"v3.2": "DeepseekV32", "dots": "Dots1", "gpt-oss": "GptOss"}.items():
        write_case(tmp_path / case, case, torch.bfloat16)
        with pytest.raises(ConfigError, match=f"{named}ForCausalLM is not there"):
            opened(tmp_path / case)
    write_checkpoint(tmp_path / "odd", **ODD_SIZES)
    with pytest.raises(ConfigError, match="shapes are not computed"):
        opened(tmp_path / "odd")


def test_memory_that_is_refused_is_an_error_by_name(export, monkeypatch):
    allocate, calls, refused = Vulkan.allocate, [], [-1]

    def count(self, *given):
        calls.append(given)
        if len(calls) - 1 == refused[0]:
            raise VulkanError(REFUSED, "no memory")
        return allocate(self, *given)

    monkeypatch.setattr(Vulkan, "allocate", count)
    opened(export, slots=9).close()
    total = len(calls)
    for refused[0] in (0, total // 2, total - 3, total - 1):
        calls.clear()
        with pytest.raises(SlotmoeError, match="memory"):
            opened(export, slots=9)
    refused[0] = -1
    opened(export).close()
