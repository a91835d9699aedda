"""The reference path against the plain float64 network, and on the bundled sample against what
transformers computed; the network's own invariants, and what quantization costs."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from slotmoe.model.config import config_among
from slotmoe.network.shapes import SWIGLU, Activation
from slotmoe.offload.engine import loading
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support import plain
from tests.support.families import V2_CASES
from tests.support.native import feed, reference_cache, reference_of
from tests.support.oracle import relative
from tests.support.params import nth
from tests.support.tiny import SAMPLE, write_checkpoint

FP32 = 3.5e-6  # twice the distance of this path, and of transformers, from float64
IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(7)).tolist()


NOT_OF_TRANSFORMERS = {  # it ignores the first two, needs a shared expert, and even strides
    "norm-topk-prob": {"norm_topk_prob": True, "routed_scaling_factor": 3.0},
    "moe-layer-freq": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "no-shared-expert": {"n_shared_experts": None},
    "odd-sizes": {**V2_CASES["odd-sizes"], "kv_lora_rank": 19, "qk_nope_head_dim": 13},
}


@pytest.mark.parametrize("name", NOT_OF_TRANSFORMERS)
def test_reference_path_equals_plain_network(name, tmp_path):
    write_checkpoint(tmp_path, **NOT_OF_TRANSFORMERS[name])
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative(runtime.logits(IDS[:12]), plain.logits(tmp_path, IDS[:12])) <= 1e-4


def test_absorbed_equals_expanded_attention_over_several_blocks(heavy, tmp_path, monkeypatch):
    """A chunk long enough that expansion is cheaper, over blocks so small that the softmax is
    merged many times."""
    write_checkpoint(tmp_path, max_position_embeddings=8192, **V2_CASES["groups-qlora-yarn"])
    network, ids = reference_of(tmp_path), (IDS * 6)[:200]
    cache = partial(reference_cache, network.config)
    wanted = feed(network, cache(256), ids, [200])  # in one block
    monkeypatch.setattr("slotmoe.quant.backends.attention._MAX_SCORES", 1)  # blocks of 64 positions
    with patch.object(network.backend, "expand", wraps=network.backend.expand) as expand:
        expanded = feed(network, cache(256), ids, [200])
        called = expand.call_count
        absorbed = feed(network, cache(256), ids, [1] * 200)
    assert called == expand.call_count > 4
    assert relative(absorbed, wanted) <= FP32
    assert relative(expanded, wanted) <= FP32


CLAMPED, FEW = Activation(0.1, 1.702, 1.0), [(7 * i) % 4096 for i in range(1, 13)]


def test_an_activation_holds_on_every_path_of_a_cpu(heavy, monkeypatch, tmp_path):
    """What a model makes of gate and up reaches all that computes an MLP or an expert."""

    def read(*arguments):
        return replace(config_among(*arguments), activation=activations[-1])

    activations, folder, bits = [CLAMPED], tmp_path / "tiny", []
    monkeypatch.setattr(loading, "config_among", read)
    write_checkpoint(folder, swiglu_limit=CLAMPED.limit, swiglu_alpha=CLAMPED.alpha)
    wanted = plain.logits(folder, FEW)
    with Runtime.open(folder, quantize=False, context=64) as runtime:
        assert relative(runtime.logits(FEW), wanted) <= 1e-4
    quantize(folder, tmp_path / "export", resident="int8")
    for options in ({}, {"slots": 6}, {"kernels": "torch"}):
        with Runtime.open(tmp_path / "export", context=64, **options) as runtime:
            bits.append(runtime.logits(FEW))
            assert relative(bits[-1], wanted) < 0.15
            text = runtime.encode("a b c")
            for token in runtime.generate("a b c", 3):  # decode, beside prefill
                assert token.id == int(runtime.logits(text)[-1].argmax())
                text.append(token.id)
    assert torch.equal(bits[0], bits[1])
    for other in (SWIGLU, CLAMPED._replace(alpha=1.0), CLAMPED._replace(offset=0.0)):
        activations.append(other)
        with Runtime.open(tmp_path / "export", context=64) as runtime:
            assert relative(runtime.logits(FEW), wanted) > 0.2


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
