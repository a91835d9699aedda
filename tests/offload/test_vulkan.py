"""A model on a Vulkan device, which on a machine without a GPU is Mesa's lavapipe: the very shaders
that a GPU runs, beside the torch reference, and the same bits whatever lies where."""

from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.offload.devices import vulkan
from slotmoe.offload.engine import loading
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.memory import make_plan
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.kernels.vulkan import REFUSED, Vulkan, VulkanError
from tests.support.engine import IDS, decode, whole
from tests.support.tiny import ODD_SIZES, SAMPLE, write_checkpoint
from tests.support.v4 import write_case
from tests.support.vulkan import LOST, NO_ROOM, Loader

WHY = vulkan.gpu_report(0)["reason"]
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


def close(found, wanted):
    """Both keep latents in float16, and where one lies between two of these they may round apart,
    by 2^-11."""
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    return errors.median() < 1e-5 and errors.max() < 2**-11


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    write_checkpoint(folder / "source")
    quantize(folder / "source", folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def found(export):
    """With every expert in a slot."""
    with opened(export, slots=EXPERTS) as runtime:
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


CASES = {
    "v2": (EXPERT_CODECS["nf4", "4"], "int8"),
    "v2-lite": (EXPERT_CODECS["lut", "3.5"], "nf4"),
    "v3": (EXPERT_CODECS["lut", "3"], "mixed"),
    "moonlight": (EXPERT_CODECS["lut", "4"], "bf16"),
}


@pytest.mark.parametrize("case", CASES)
def test_random_checkpoints_are_as_the_reference_says(case, tmp_path):
    codecs, resident = CASES[case]
    own = {"q_lora_rank": None} if case in ("v2-lite", "moonlight") else {}
    if case.startswith("v2"):
        own |= {"n_group": 1, "topk_group": 1} if own else {}
        write_checkpoint(tmp_path / "source", **own)
    else:
        write_case(tmp_path / "source", "v3-groups-yarn", torch.bfloat16, **own)
    quantize(tmp_path / "source", tmp_path / "export", codecs=codecs, resident=resident)
    with opened(tmp_path / "export", "cpu", kernels="torch") as runtime:
        wanted = runtime.logits(IDS[:20]), texts(runtime, PROMPTS[:1])
    with opened(tmp_path / "export", slots=6) as runtime:
        assert close(runtime.logits(IDS[:20]), wanted[0])
        assert texts(runtime, PROMPTS[:1]) == wanted[1]


@pytest.mark.parametrize(
    ("slots", "in_ram"), [(4, EXPERTS), (10, EXPERTS), (4, 0), (6, 5), (EXPERTS, 0), (None, 16)]
)
def test_bits_are_the_same_wherever_experts_lie(export, monkeypatch, found, slots, in_ram):
    """In slots, in RAM, or on the disk; and a row's alone and among others.  Where a device has
    RAM alone no more goes to slots; and it takes what was planned."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=in_ram)

    monkeypatch.setattr(loading, "make_plan", plan)
    with opened(export, slots=slots) as runtime:
        assert torch.equal(runtime.logits(IDS[:40]), found[0])
        assert texts(runtime) == found[1]
        runtime.engine.empty()
        assert torch.equal(decode(runtime, IDS[:29], IDS[29:40]), found[0][28:])
        stats = runtime.stats()
        assert (stats["cache"]["misses"] > 0) == (slots != EXPERTS)
        copied = runtime.model.store.stats()["host"]["bytes"] // runtime.plan.record_bytes
        assert runtime.plan.slots == (slots or 3) and copied <= 3 if slots is None else copied > 0
        assert 0.97 < stats["memory"]["peak_vram"] / runtime.plan.total <= 1
        whole(runtime)


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
    write_case(tmp_path / "v3.2", "v3.2", torch.bfloat16)
    with pytest.raises(ConfigError, match="DeepseekV32ForCausalLM is not there"):
        opened(tmp_path / "v3.2")
    write_checkpoint(tmp_path / "odd", **ODD_SIZES)
    with pytest.raises(ConfigError, match="shapes are not computed"):
        opened(tmp_path / "odd")


@pytest.fixture
def failing(monkeypatch):
    """Devices by a loader, which is returned and outlives them."""
    kept = []

    def fail(*fault):
        kept.append(loader := Loader(*fault))
        monkeypatch.setattr(vulkan.kernels, "Vulkan", partial(Vulkan, loader=loader.address))
        return loader

    yield fail
    kept.clear()


ANY = [
    pytest.param(name, in_ram, count(1), marks=pytest.mark.slow)
    for name in ("QueueSubmit2", "WaitSemaphores")
    for in_ram in (EXPERTS, 4)
]


@pytest.mark.parametrize(("name", "in_ram", "calls"), [("QueueSubmit2", 4, (1, 6)), *ANY])
def test_a_device_that_is_lost(export, monkeypatch, failing, found, name, in_ram, calls):
    """At any submit of a text, whose experts are in slots, in RAM or on the disk: it is right, or
    the error says so."""
    made = lambda *given, **how: replace(make_plan(*given, **how), host_slots=in_ram)  # noqa: E731
    monkeypatch.setattr(loading, "make_plan", made)
    for at in calls:
        loader, told = failing(name, 0, LOST), ""
        with opened(export, slots=4) as runtime:
            loader.at = loader.calls + at
            try:
                assert texts(runtime, PROMPTS[:1]) == found[1][:1]
            except SlotmoeError as problem:
                told = str(problem)
            reached = loader.calls >= loader.at
        assert ("the device is lost" in told) == reached
        if not reached:
            break
    assert at > 5


def test_ram_that_is_not_imported_is_an_error_by_name(export, failing):
    failing("GetMemoryHostPointerPropertiesEXT", 1, NO_ROOM)
    with pytest.raises(SlotmoeError, match="give less --ram, or take"):
        opened(export)


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
