"""Values of config.json that the network does not compute: each is refused by name."""

import json

import pytest

from slotmoe.errors import ConfigError
from slotmoe.model.config import parse_config, read_config
from tests.support.encoded import packed
from tests.support.hostile import refused
from tests.support.tiny import REMOVE

BAD_GROUP_VALUES = {
    "num_bits": 8,
    "group_size": 128,
    "symmetric": False,
    "strategy": "channel",
    "type": "float",
    "actorder": "group",
}


BAD_CONFIG_VALUES = {
    "model_type": [
        "deepseek_v4",
        "glm4_moe",
        "kimi_linear",
        "longcat_flash",
        "llama",
        None,
        2,
        ["deepseek_v2"],
        REMOVE,
    ],
    "architectures": [
        ["LlamaForCausalLM"],
        "DeepseekV2ForCausalLM",
        ["DeepseekV2ForCausalLM", "X"],
    ],
    "scoring_func": ["sigmoid", None, 1],
    "topk_method": ["noaux_tc", "gready", None, []],
    "quantization_config": [
        "fp8",
        [1],
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "mxfp4"},
        {"quant_method": []},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        *(packed(**{key: value}) for key, value in BAD_GROUP_VALUES.items()),
    ],
    "hidden_act": ["gelu", None],
    "attention_bias": [True, "yes"],
    "mlp_bias": [True],
    "ep_size": [8, "1"],
    "rope_interleave": [False],
    "num_key_value_heads": [1, 2],
    "hidden_size": [True, 64.0, "64", None, 0, -64, 1 << 40, 10**300, [64], REMOVE],
    "vocab_size": [0, 1 << 30, REMOVE],
    "intermediate_size": [0, REMOVE],
    "moe_intermediate_size": [0, REMOVE],
    "num_hidden_layers": [0, 1 << 30, 1001, REMOVE],
    "num_attention_heads": [0, -4, REMOVE],
    "n_routed_experts": [0, 4097, 9, None, REMOVE],
    "n_shared_experts": [-1, "two", True, REMOVE],
    "num_experts_per_tok": [0, 5, 9, REMOVE],
    "n_group": [0, 3, REMOVE],
    "topk_group": [0, 5, REMOVE],
    "norm_topk_prob": [1, "true"],
    "routed_scaling_factor": [0, -1.0, "16", None, 1e40, REMOVE],
    "first_k_dense_replace": [-1, 3, True, REMOVE],
    "moe_layer_freq": [0, -1, 1.5],
    "q_lora_rank": [0, -1, "null", REMOVE],
    "kv_lora_rank": [0, REMOVE],
    "qk_nope_head_dim": [0, REMOVE],
    "qk_rope_head_dim": [7, 0, REMOVE],
    "v_head_dim": [0, REMOVE],
    "rms_norm_eps": [0, -1e-6, True, REMOVE],
    "rope_theta": [0, -1, "10000", True],
    "max_position_embeddings": [0, 1 << 40, REMOVE],
    "tie_word_embeddings": [1, "no"],
    "bos_token_id": [-1, True, "0", 1.0, {}],
    "eos_token_id": [[-1], [True], "1", list(range(100)), 1 << 40],
    "rope_scaling": ["yarn", [], 4, False],
    "rope_parameters": ["yarn", [], 0],
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BAD_ROPE_SETTINGS = [
    {**YARN, "type": "linear"},
    {**YARN, "type": "dynamic"},
    {**YARN, "type": "llama3"},
    {**YARN, "type": ["yarn"]},
    {**YARN, "rope_type": "longrope"},
    {**YARN, "factor": 0},
    {**YARN, "factor": "4"},
    {**YARN, "original_max_position_embeddings": 0},
    {**YARN, "original_max_position_embeddings": True},
    {**YARN, "mscale": -1},
    {**YARN, "beta_fast": None},
    {**YARN, "attention_factor": 2.0},
    {"type": "yarn"},
    {"factor": 4.0, "rope_theta": 0},
]


@pytest.mark.parametrize("key", BAD_CONFIG_VALUES)
def test_unsupported_config_value_is_named(key, good, tmp_path):
    config = json.loads((good / "checkpoint" / "config.json").read_text())
    if key == "num_attention_heads":
        del config["num_key_value_heads"]
    for value in BAD_CONFIG_VALUES[key]:
        changed = {
            name: item for name, item in {**config, key: value}.items() if item is not REMOVE
        }
        (tmp_path / "config.json").write_text(json.dumps(changed))
        refused(lambda: read_config(tmp_path / "config.json"), "config.json", key, kind=ConfigError)


@pytest.mark.parametrize("settings", BAD_ROPE_SETTINGS, ids=repr)
def test_unsupported_rope_settings_are_named(settings, good):
    config = json.loads((good / "checkpoint" / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        refused(
            lambda key=key: parse_config({**config, "rope_scaling": None, key: settings}),
            "config.json",
            "rope",
            kind=ConfigError,
        )
