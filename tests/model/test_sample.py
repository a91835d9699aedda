"""The bundled sample: what transformers computed from it, what quantization costs, and the export
rebuilt by others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.offload.runtime import Runtime
from tests.support.native import reference_cache, reference_network
from tests.support.oracle import rebuild, relative_error, transformers_logits
from tests.support.params import nth
from tests.support.tiny import SAMPLE

DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture(scope="module")
def reference(heavy):
    with Runtime.open(SAMPLE, quantize=False, context=1024) as runtime:
        yield runtime


@pytest.mark.parametrize("case", nth(2, EXPECTED["prompts"]), ids=lambda case: case["prompt"][:20])
def test_reference_path_gives_the_expected_text(reference, case):
    assert reference.tokenizer.encode(case["prompt"]) == case["ids"]
    tokens = list(reference.generate(case["prompt"], max_new_tokens=48))
    assert [token.id for token in tokens] == case["greedy_ids"]
    assert "".join(token.text for token in tokens) == case["greedy_text"]


@pytest.mark.usefixtures("oracle")
def test_reference_path_equals_transformers_on_the_sample(reference):
    ids = EXPECTED["prompts"][1]["logits_ids"]
    assert relative_error(reference.logits(ids), transformers_logits(SAMPLE, ids)) <= 1e-5


def test_bfloat16_products_stay_close_to_float32(reference, monkeypatch):
    """The dtype of products on CUDA, here on the CPU."""
    ids = EXPECTED["prompts"][0]["logits_ids"]
    wanted = reference.logits(ids)
    monkeypatch.setattr(reference.model.backend, "compute", torch.bfloat16)
    assert relative_error(reference.logits(ids), wanted) <= 2e-2


def compare(reference, exported, name, count=None):
    """Bits of the text, or of its first ``count`` windows, under both models, KL divergence in nats
    summed over tokens, and the token count."""
    text = (DATA / "heldout" / name).read_text(encoding="utf-8")
    bits, divergence, tokens = [0.0, 0.0], 0.0, 0
    ids = reference.tokenizer.encode(text, add_bos=False)
    for start in range(0, len(ids), 512)[:count]:  # each after a beginning-of-sentence token
        window = [0, *ids[start : start + 512]]
        wanted, found = (
            runtime.logits(window)[:-1].log_softmax(-1) for runtime in (reference, exported)
        )
        targets = torch.tensor(window[1:])[:, None]
        for i, logs in enumerate((wanted, found)):
            bits[i] -= logs.gather(1, targets).double().sum().item() / math.log(2)
        divergence += (wanted.exp() * (wanted - found)).sum(dim=-1).double().sum().item()
        tokens += len(targets)
    return bits[0], bits[1], divergence, tokens


def test_quantization_costs_little_at_the_beginning_of_a_heldout_text(reference, sample_export):
    with Runtime.open(sample_export, context=1024) as exported:
        before, after, divergence, tokens = compare(reference, exported, "sotu.txt", 3)
    assert after <= 1.005 * before
    assert divergence / tokens <= 0.005


@pytest.mark.usefixtures("nightly")
def test_quantization_costs_little_on_all_heldout_texts(reference, sample_export):
    totals = np.zeros(4)
    with Runtime.open(sample_export, context=1024) as exported:
        for name in sorted(path.name for path in (DATA / "heldout").iterdir()):
            part = compare(reference, exported, name)
            wanted = EXPECTED["heldout"][name]
            assert part[3] == wanted["tokens"]
            assert part[0] / wanted["bytes"] == pytest.approx(wanted["bits_per_byte"], abs=1e-5)
            totals += part
    before, after, divergence, tokens = totals
    wanted = EXPECTED["heldout"]["all"]
    assert before / wanted["bytes"] == pytest.approx(wanted["bits_per_byte"], abs=1e-5)
    assert after <= 1.005 * before
    assert divergence / tokens <= 0.005


def test_export_equals_the_network_with_rebuilt_weights(reference, sample_export):
    ids = EXPECTED["prompts"][0]["logits_ids"]
    network = reference_network(reference.config, rebuild(sample_export))
    cache = reference_cache(reference.config, 64)
    wanted = network.head(network.forward(torch.tensor(ids), [cache]))
    with Runtime.open(sample_export, context=64, kernels="torch") as exported:
        assert relative_error(exported.logits(ids), wanted) <= 1e-3
