"""The bundled sample: what transformers computed from it, and what quantization costs."""

import json
from pathlib import Path

import pytest
import torch

from slotmoe.offload.runtime import Runtime
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


def test_quantization_costs_little_on_a_heldout_text(reference, sample_export):
    """In bits of its first windows, and in KL divergence a token."""
    bits, divergence, tokens = [0.0, 0.0], 0.0, 0
    text = (DATA / "heldout" / "sotu.txt").read_text(encoding="utf-8")
    ids = reference.tokenizer.encode(text, add_bos=False)
    with Runtime.open(sample_export, context=1024) as exported:
        for start in (0, 512):  # each after a begin token
            window = [0, *ids[start : start + 512]]
            targets = torch.tensor(window[1:])[:, None]
            wanted, found = (
                runtime.logits(window)[:-1].log_softmax(-1) for runtime in (reference, exported)
            )
            for i, logs in enumerate((wanted, found)):
                bits[i] -= logs.gather(1, targets).sum().item()
            divergence += (wanted.exp() * (wanted - found)).double().sum().item()
            tokens += len(targets)
    assert bits[1] <= 1.005 * bits[0]
    assert divergence / tokens <= 0.005
