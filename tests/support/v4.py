"""Tiny checkpoints of DeepSeek-V4, and of V3.2 and GLM-5 beyond ``index_topk``, in both spellings,
and what transformers makes of them: the oracle."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slotmoe.network.shapes import MARKS
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.advice import geometry_path
from tests.support.families import (
    CASES,
    DSA,
    GROUPED_CASES,
    INDEXED,
    KIMI,
    NEXT,
    ODD,
    OF_KIMI,
    OSS,
    TYPES,
    V32,
    YARN,
)
from tests.support.families import config_of as family_config
from tests.support.tiny import REMOVE, write_files

V4 = "deepseek_v4"
WINDOW, CSA = "sliding_attention", "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
_TYPES = {0: WINDOW, 4: CSA, 128: HCA}
_LEFT_OUT = ("expert_dtype", "num_nextn_predict_layers", "quantization_config")
CONFIG = json.loads(geometry_path("v4-flash").read_text())
CONFIG = {key: value for key, value in CONFIG.items() if key not in _LEFT_OUT}
"""In the words of DeepSeek's own config.json.  Values are clamped, top-k is less than what there is
to choose from, and the window is passed at once."""
CONFIG |= {"vocab_size": 4096, "max_position_embeddings": 1024, "hidden_size": 64}
CONFIG |= {"moe_intermediate_size": 48, "num_hidden_layers": 4, "num_hash_layers": 1}
CONFIG |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "num_attention_heads": 4}
CONFIG |= {"head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 24, "o_groups": 2}
CONFIG |= {"o_lora_rank": 20, "sliding_window": 8, "compress_ratios": [0, 4, 128, 4]}
CONFIG |= {"index_n_heads": 3, "index_head_dim": 24, "index_topk": 4, "swiglu_limit": 0.7}
CONFIG |= {"compress_rope_theta": 40000.0}
CONFIG["rope_scaling"] |= {"factor": 16, "original_max_position_embeddings": 64}
_SIZES = {"hidden_size": 72, "moe_intermediate_size": 37, "num_attention_heads": 6, "head_dim": 22}
_SIZES |= {"qk_rope_head_dim": 6, "q_lora_rank": 23, "o_groups": 3, "o_lora_rank": 7}
_SIZES |= {"index_n_heads": 1, "index_head_dim": 10, "n_routed_experts": 12, "hc_mult": 3}
# Between them: each kind of layer alone and with others, first and last, hash and learned gates,
# YaRN and plain RoPE, streams of several numbers, odd sizes, a limit and none that is reached.
V4_CASES = {
    "v4": {},
    "v4-pro": {"compress_ratios": [128, 128, 4, 128], "num_hash_layers": 3, "index_topk": 9},
    "v4-odd": {**_SIZES, "compress_ratios": [4, 0, 128, 4], "sliding_window": 5},
    "v4-two-streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "rms_norm_eps": 1e-3},
}
_SPARSE = {**INDEXED, "index_topk": 5, "index_n_heads": 3, "index_head_dim": 12}
_SHARED = {"num_hidden_layers": 5, "indexer_types": ["full", "full", "shared", "shared", "full"]}
SPARSE_CASES = {
    "v3.2-sparse": (V32, {**_SPARSE, **TYPES}),
    "v3.2-sparse-yarn": (V32, {**_SPARSE, **ODD, "index_n_heads": 1, "rope_parameters": YARN}),
    "glm-5-shared": (DSA, {**_SPARSE, **_SHARED}),
}
"""V3.2 and GLM-5 where attention is to fewer positions than there are: family and overrides."""
OTHER_CASES = CASES | GROUPED_CASES | SPARSE_CASES
# What transformers 5 spells otherwise.
RESPELLED = {"compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling"}
RESPELLED |= {"rope_theta", "topk_method", "torch_dtype"}


def config_of(case: str, **overrides):
    """``config.json`` of a case of ``V4_CASES`` in DeepSeek's words, or of ``OTHER_CASES``."""
    if case in OTHER_CASES:
        family, changes = OTHER_CASES[case]
        return family_config(family, **{**changes, **overrides})
    config = CONFIG | V4_CASES[case] | overrides
    return {key: value for key, value in config.items() if value is not REMOVE}


def in_transformers_words(config):
    """The ``config.json`` of a V4 as transformers 5 writes it."""
    part = config["qk_rope_head_dim"] / config["head_dim"]
    layers, hashed = config["num_hidden_layers"], config["num_hash_layers"]
    yarn = dict(config.get("rope_scaling", {"type": "default"}))
    yarn["rope_type"] = yarn.pop("type")
    if yarn["rope_type"] == "yarn":
        yarn["attention_factor"] = 1.0
    plain = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    yarn["rope_theta"] = config["compress_rope_theta"]
    both = {"main": plain, "compress": yarn}
    both = {name: {**rope, "partial_rotary_factor": part} for name, rope in both.items()}
    types = [_TYPES[ratio] for ratio in config["compress_ratios"][:layers]]
    config = {key: value for key, value in config.items() if key not in RESPELLED}
    return config | {
        "dtype": "float32",
        "layer_types": types,
        "compress_rates": {CSA: 4, HCA: 128},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "partial_rotary_factor": part,
        "rope_parameters": both,
    }


def write_case(folder: Path, case: str, dtype=torch.float32, hub=False, seed=0, **overrides):
    """Write a checkpoint of random weights; returns its config.  Names of tensors and config are
    those of transformers' network, or with ``hub`` those of DeepSeek's own files."""
    config = write_files(folder, config_of(case, **overrides), dtype, seed)
    if hub:
        file = folder / "model.safetensors"
        head = f"layers.{config['num_hidden_layers']}."
        weights = {hub_name(name): tensor for name, tensor in load_file(file).items()}
        weights = {name.replace(head, "mtp.0."): tensor for name, tensor in weights.items()}
        save_file(weights, file, metadata={"format": "pt"})
    elif case in V4_CASES:
        config = in_transformers_words(config)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return config


# Patterns of transformers' names, and what DeepSeek's files have for them.
_HUB = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"\bhc_head\.hc_(\w+)$", r"hc_head_\1"),
    (r"\bshared_head\.norm\.", "norm."),
    (r"\b(attn|ffn)_hc\.(\w+)$", r"hc_\1_\2"),
    (r"\binput_layernorm\.", "attn_norm."),
    (r"\bpost_attention_layernorm\.", "ffn_norm."),
    (r"\bcompressor\.indexer\.scorer\.", "indexer."),
    (r"\bcompressor\.indexer\.q_b_proj\.", "indexer.wq_b."),
    (r"\bcompressor\.indexer\.", "indexer.compressor."),
    (r"\bcompressor\.kv_norm\.", "compressor.norm."),
    (r"\bposition_bias$", "ape"),
    (r"\bsinks$", "attn_sink"),
    (r"\bself_attn\.q_a_norm\.", "self_attn.q_norm."),
    (r"\bself_attn\.(q|o)_(a|b)_proj\.", r"self_attn.w\1_\2."),
    (r"\b(self_attn\..*)kv_proj\.", r"\1wkv."),
    (r"\b(self_attn\..*)gate_proj\.", r"\1wgate."),
    (r"\be_score_correction_bias$", "bias"),
    (r"\bgate_proj\.", "w1."),
    (r"\bdown_proj\.", "w2."),
    (r"\bup_proj\.", "w3."),
    (r"\bself_attn\.", "attn."),
    (r"\bmlp\.", "ffn."),
)


def hub_name(name: str) -> str:
    """DeepSeek's own name for a tensor of transformers' network."""
    for pattern, words in _HUB:
        name = re.sub(pattern, words, name)
    return name


# The least models of V4, V3.2 and one with windows of grouped queries for sequences: a longer
# context, a wider window.
CONFIGS = {
    "v4": CONFIG
    | {"max_position_embeddings": 32768, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    | {"q_lora_rank": 32, "qk_rope_head_dim": 8, "o_lora_rank": 16, "sliding_window": 24}
    | {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 16, "swiglu_limit": 2.0}
    | {"hc_mult": 2, "hc_sinkhorn_iters": 6}
    | {"rope_scaling": CONFIG["rope_scaling"] | {"factor": 4.0}},
    "v3.2": {**family_config(V32, **INDEXED), "max_position_embeddings": 32768},
    "windows": family_config(OSS, sliding_window=24, max_position_embeddings=32768),
    "delta": family_config(NEXT, max_position_embeddings=32768),
    "kimi": family_config(KIMI, **OF_KIMI | {"model_max_length": 32768}),
}
CONFIGS["v4"]["rope_scaling"]["original_max_position_embeddings"] = 256


def state_bytes(state):
    """Bytes of a state's memory, with the marks that there may be but for those of the pass under
    way."""
    far = MARKS.tokens * 4096  # a multiple, behind a full window
    end, places = max(map(state.snapshot_bytes, range(far, far + MARKS.tokens))), state._places
    marks = places.ends * end + places.most * state.snapshot_bytes(far)
    return sum(part.rows.nbytes for part in (*state._kept, *state._tails)) + marks


def export_of(folder, name):
    """An export of the model, which routes by token id to two different experts."""
    raw, source = CONFIGS[name], folder / "source"
    write_files(source, raw, torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    for key, tensor in weights.items():
        if "tid2eid" in key:
            ids_T = torch.arange(len(tensor))[:, None]
            chosen_TK = (ids_T * 3 + torch.arange(tensor.shape[1])) % raw["n_routed_experts"]
            weights[key] = chosen_TK.to(torch.int64)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, folder / "export", workers=1)
    return folder / "export"
