"""Tiny checkpoints of every family, and transformers' network of the same weights: the oracle."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from slotmoe.model.families import FAMILIES
from tests.support.encoded import fused
from tests.support.tiny import CONFIG, ODD_SIZES, REMOVE, write_files

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0}
YARN |= {"original_max_position_embeddings": 16, "beta_slow": 1.0, "mscale": 1.0}
YARN |= {"mscale_all_dim": 0.707}
LONG = {**YARN, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
LONG |= {"max_position_embeddings": 256, "partial_rotary_factor": 1 / 3}
ODD = {**ODD_SIZES, "n_routed_experts": 12}
HALVES = {"rope_interleave": False}
SHARED = {
    **{key: value for key, value in CONFIG.items() if key not in ("rope_scaling", "rope_theta")},
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
WITHOUT_METHOD = {"scoring_func": REMOVE, "topk_method": REMOVE}
INDEXED = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
TWO_DENSE = {"first_k_dense_replace": 2, "num_hidden_layers": 4}
TYPES = {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
TYPES |= {"first_k_dense_replace": REMOVE}
V2, V3, GLM, MISTRAL = "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4"
V32, DSA = "deepseek_v32", "glm_moe_dsa"
CLASSES = {V2: "DeepseekV2", V3: "DeepseekV3", GLM: "Glm4MoeLite", MISTRAL: "Mistral4"}
CLASSES |= {V32: "DeepseekV32", DSA: "GlmMoeDsa"}
SOFTMAX = {**WITHOUT_METHOD, "first_k_dense_replace": 0, "rope_parameters": LONG}

THIRD = {**LONG, "partial_rotary_factor": 0.3}

# Between them, for each family what it has: groups on and off, q-LoRA on and off, YaRN and plain
# RoPE, pairs side by side and in halves, odd sizes, two dense layers in both spellings.
CASES = {
    "v3-groups-yarn": (V3, {"rope_parameters": YARN}),
    "v3-no-groups-no-qlora": (V3, {"n_group": 1, "topk_group": 1, "q_lora_rank": None}),
    "v3-odd-halves": (V3, {**ODD, **HALVES}),
    "v3-two-dense-not-normalized": (V3, {**TWO_DENSE, "norm_topk_prob": False}),
    "glm-groups": (GLM, {"rms_norm_eps": 1e-3, "partial_rotary_factor": 1.0}),
    "glm-v-unlike-nope": (GLM, {"v_head_dim": 20, "qk_nope_head_dim": 12, **HALVES}),
    "glm-two-dense": (GLM, {**TYPES, "n_group": 1, "topk_group": 1}),
    "mistral-groups": (MISTRAL, SOFTMAX),
    "mistral-no-groups": (MISTRAL, {**SOFTMAX, "n_group": 1, "topk_group": 1}),
    "mistral-odd-halves": (MISTRAL, {**SOFTMAX, **ODD, **HALVES, "rope_parameters": THIRD}),
    "v3.2": (V32, {**INDEXED, **TYPES}),
    "v3.2-odd-yarn": (V32, {**INDEXED, **ODD, "rope_parameters": YARN}),
    "glm-5": (DSA, {**INDEXED, "rms_norm_eps": 1e-5}),
}


QWEN3, GLM4, MINIMAX, OSS = "qwen3_moe", "glm4_moe", "minimax_m2", "gpt_oss"
QWEN2, DOTS, HUNYUAN, ERNIE = "qwen2_moe", "dots1", "hunyuan_v1_moe", "ernie4_5_moe"
CLASSES |= {QWEN3: "Qwen3Moe", GLM4: "Glm4Moe", MINIMAX: "MiniMaxM2", OSS: "GptOss"}
CLASSES |= {QWEN2: "Qwen2Moe", DOTS: "Dots1", HUNYUAN: "HunYuanMoEV1", ERNIE: "Ernie4_5_Moe"}
_GROUPED = {key: CONFIG[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
_GROUPED |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
_GROUPED |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24}
_GROUPED |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_GROUPED |= {"rope_theta": 10000.0, "max_position_embeddings": 1024, "torch_dtype": "float32"}
_QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_V3 = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_V3 |= {"n_shared_experts": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
_V3 |= {"norm_topk_prob": True, "first_k_dense_replace": 1, "attention_bias": True}
_SLIDES = ["sliding_attention", "full_attention"] * 2
_OSS_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
_OSS_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
OF_GROUPED = {
    QWEN3: {**_QWEN, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [2]},
    GLM4: {**_V3, "partial_rotary_factor": 0.5, "use_qk_norm": True},
    MINIMAX: {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 48}
    | {"rotary_dim": 12, "scoring_func": "sigmoid", "use_qk_norm": True},
    OSS: {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 48}
    | {"attention_bias": True, "sliding_window": 9, "layer_types": _SLIDES}
    | {"rope_scaling": _OSS_YARN},
    QWEN2: {**_QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 96}
    | {"decoder_sparse_step": 2, "mlp_only_layers": []},
    DOTS: {**_V3, "sliding_window": 7, "layer_types": _SLIDES[::-1]},
    HUNYUAN: {"num_experts": 8, "moe_topk": [3] * 4, "attention_bias": False}
    | {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    ERNIE: {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "use_bias": False}
    | {"moe_intermediate_size": 48, "moe_layer_start_index": 1, "moe_layer_end_index": 2}
    | {"moe_layer_interval": 1, "tie_word_embeddings": True},
}
"""Of families with grouped queries, what their ``config.json`` says beside the common."""
NEXT, QWEN35 = "qwen3_next", "qwen3_5_moe_text"
CLASSES |= {NEXT: "Qwen3Next", QWEN35: "Qwen3_5Moe"}
_DELTA = {**_QWEN, "shared_expert_intermediate_size": 96, "full_attention_interval": 2}
_DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
_DELTA |= {"linear_value_head_dim": 24, "linear_conv_kernel_dim": 4, "head_dim": 32}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
_MROPE |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
OF_GROUPED |= {
    NEXT: {**_DELTA, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | {"partial_rotary_factor": 0.25},
    QWEN35: {**_DELTA, "rope_parameters": _MROPE, "rope_theta": REMOVE}
    | {"intermediate_size": REMOVE, "attn_output_gate": True, "mamba_ssm_dtype": "float32"},
}
PLAIN_ROPE = {"rope_scaling": REMOVE}
IN_BLOCKS = {"hidden_size": 96, "intermediate_size": 160}  # with half a block of 64 columns
IN_BLOCKS |= {"quantization_config": {"quant_method": "mxfp4", "dequantize": True}}
PLAIN_ROPE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# Between them: biases on and off, norms by head, by row, behind the rotation and none, rotations of
# a part, in halves and of pairs, YaRN, windows in either order, wider than a text, and of one
# token, dense layers in each spelling, one group for all heads and one for each, tied embeddings.
GROUPED_CASES = {
    "qwen3": (QWEN3, {}),
    "qwen3-yarn-biases-one-group": (
        QWEN3,
        {"attention_bias": True, "num_key_value_heads": 1, "rope_scaling": YARN, "head_dim": REMOVE}
        | {"num_attention_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
    "glm4": (GLM4, {}),
    "glm4-no-norm": (GLM4, {"use_qk_norm": False, "n_group": 1, "num_key_value_heads": 6}),
    "minimax": (MINIMAX, {}),
    "minimax-odd": (MINIMAX, {"hidden_size": 72, "intermediate_size": 37, "rotary_dim": 6}),
    "dots": (DOTS, {}),
    "dots-window-of-one": (DOTS, {"sliding_window": 1, "attention_bias": False}),
    "dots-wide-window": (DOTS, {"sliding_window": 600, "layer_types": ["sliding_attention"] * 4}),
    "hunyuan": (HUNYUAN, {}),
    "hunyuan-biases": (HUNYUAN, {"attention_bias": True, "rope_scaling": None}),
    "ernie": (ERNIE, {}),
    "gpt-oss": (OSS, {}),
    "gpt-oss-plain-rope": (OSS, {**PLAIN_ROPE, "swiglu_limit": 1.5}),
    "gpt-oss-in-blocks": (OSS, {**PLAIN_ROPE, **IN_BLOCKS}),
    "qwen2": (QWEN2, {}),
}


OF_YARN = {"factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0}
OF_YARN |= {"mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
_YARN = {"type": "yarn", **OF_YARN}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}

# Between them: groups on and off, q-LoRA on and off, YaRN and plain RoPE in both spellings, odd
# sizes, v_head_dim unlike qk_nope_head_dim, two dense layers, one shared expert, tied embeddings,
# mscale unlike mscale_all_dim.
V2_CASES = {
    "groups-qlora-yarn": {"rope_scaling": _YARN, "routed_scaling_factor": 16.0},
    "greedy-no-qlora": {**GREEDY, "q_lora_rank": None, "rope_scaling": None},
    "odd-sizes": {**ODD_SIZES, "rope_scaling": {**_YARN, "mscale": 0.707}},
    "v-unlike-nope": {"v_head_dim": 20, "qk_nope_head_dim": 12, "n_routed_experts": 12},
    "two-dense-layers": {"first_k_dense_replace": 2, "num_hidden_layers": 4, "n_shared_experts": 1},
    "tied": {"tie_word_embeddings": True, "num_experts_per_tok": 4, "rms_norm_eps": 1e-3},
    "transformers-spelling": {
        "rope_scaling": None,
        "rope_parameters": {**OF_YARN, "rope_type": "yarn", "rope_theta": 5000.0},
    },
}
"""Of DeepSeek-V2."""


_LINEAR = ["linear_attention", "full_attention"]
DELTA_CASES = {
    "next": (NEXT, {}),
    "next-one-key-head": (NEXT, {"linear_num_key_heads": 1, "linear_num_value_heads": 3}),
    "next-heads-alike": (NEXT, {"linear_num_key_heads": 4, "layer_types": _LINEAR[::-1] * 2}),
    "next-yarn-dense": (
        NEXT,
        {"rope_scaling": YARN, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "qwen3.5": (QWEN35, {}),
    "qwen3.5-odd": (
        QWEN35,
        {"hidden_size": 72, "linear_value_head_dim": 20, "tie_word_embeddings": True},
    ),
    "qwen3.5-one-full": (QWEN35, {"full_attention_interval": 4}),
}
"""Between them: key heads and value heads in each proportion, either kind of layer first, dense
layers, odd sizes."""
KIMI = "kimi_linear"
CLASSES |= {KIMI: "KimiLinear"}
_KDA = {"num_heads": 3, "head_dim": 24, "short_conv_kernel_size": 4}
_KDA |= {"kda_layers": [1, 2, 4], "full_attn_layers": [3]}
OF_KIMI = {"linear_attn_config": _KDA, "mla_use_nope": True, "num_experts": 8, "head_dim": 72}
OF_KIMI |= {"num_experts_per_token": 3, "num_shared_experts": 1, "num_expert_group": 1}
OF_KIMI |= {"moe_renormalize": True, "moe_router_activation_func": "sigmoid", "topk_group": 1}
OF_KIMI |= {"model_max_length": 1024, "num_hidden_layers": 4, "q_lora_rank": None}
OF_KIMI |= {"use_grouped_topk": True, "pad_token_id": 0, "rms_norm_eps": 1e-5}
OF_KIMI |= dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "n_shared_experts"), REMOVE)
OF_KIMI |= dict.fromkeys(("n_group", "norm_topk_prob", "scoring_func", "topk_method"), REMOVE)
OF_KIMI |= dict.fromkeys(("max_position_embeddings", "rope_parameters"), REMOVE)
"""In the words of Kimi-Linear's own ``config.json``."""
_FLAT = {"linear_num_heads": 2, "linear_head_dim": 20, "linear_conv_kernel_dim": 4}
DELTA_CASES |= {
    "kimi": (KIMI, OF_KIMI),
    "kimi-odd-groups": (
        KIMI,
        OF_KIMI
        | ODD_SIZES
        | _FLAT
        | {"linear_attn_config": REMOVE, "layer_types": [*_LINEAR[::-1] * 2]}
        | {"num_expert_group": 2, "first_k_dense_replace": 2},
    ),
}
GROUPED_CASES |= DELTA_CASES


def config_of(family: str, **overrides):
    """``config.json`` of a tiny model."""
    named = {"model_type": family, "architectures": [f"{CLASSES[family]}ForCausalLM"]}
    if family in OF_GROUPED:
        config = _GROUPED | named | OF_GROUPED[family]
    else:
        config = (CONFIG if family == V2 else SHARED) | named
        config["num_key_value_heads"] = overrides.get("num_attention_heads", 4)
    config |= overrides
    return {key: value for key, value in config.items() if value is not REMOVE}


def write_family(folder: Path, family: str, dtype=torch.float32, **overrides):
    """Write a checkpoint of random weights, one tensor an expert; returns its config."""
    return write_files(folder, config_of(family, **overrides), dtype)


@contextmanager
def quietly():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def oracle_network(folder: Path, weights):
    """transformers' network of the folder's config on ``weights``, in float32 and eager."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    family = FAMILIES[config.model_type]
    if family.attention == "grouped" or family.delta:  # by the names of the hub's files
        eager |= {"dtype": torch.float32, "output_loading_info": True}
        network, info = model_class.from_pretrained(folder, **eager)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        head = f"layers.{config.num_hidden_layers}."  # which predicts one token more
        assert not [name for name in info["unexpected_keys"] if head not in name]
        return network
    network = model_class._from_config(config, dtype=torch.float32, **eager)
    missing, unexpected = network.load_state_dict(fused(dict(weights)), strict=False)
    left = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not unexpected and {*missing} <= left, (unexpected, missing)
    if config.model_type == MISTRAL:
        # transformers 5.24 multiplies the scores by YaRN's factor too.  Mistral's own parameters
        # say ``apply_scale: false``, and the releases before 5.24 did not.
        for layer in network.model.layers:
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    return network
