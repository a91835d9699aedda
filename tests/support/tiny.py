"""Valid DeepSeek-V2 checkpoints of a few hundred kilobytes, with random but repeatable weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slotmoe import model
from slotmoe.model.config import parse_config
from slotmoe.model.names import expert_name, expert_shapes, resident_shapes

SAMPLE = Path(model.__file__).parent / "sample"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 48,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": 4.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 16,
    "vocab_size": 4096,
}
# Sizes that fill no tile and no block.
ODD_SIZES = {
    "hidden_size": 72,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 41,
    "moe_intermediate_size": 37,
    "kv_lora_rank": 22,
    "q_lora_rank": 23,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6,
}
# What makes it smaller still, for kernels that are interpreted: as few programs of 16 rows as a
# layer can have.
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 8,
}
REMOVE = object()
"""Pass ``key=REMOVE`` to leave a key out of the config."""


def random_weights(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Every tensor that ``config`` asks for.  Gates are spread out, so that routing does not hang
    on rounding; less where a score is a sigmoid, which saturates."""
    parsed, generator = parse_config(config), torch.Generator().manual_seed(seed)
    parsed = replace(parsed, mtp=parsed.num_nextn_predict_layers > 0)
    shapes: dict[str, tuple[int, ...]] = dict(resident_shapes(parsed))
    for layer in parsed.moe_layers:
        for expert in range(parsed.n_routed_experts):
            shapes |= {
                expert_name(layer, expert, name): shape
                for name, shape in expert_shapes(parsed).items()
            }
    weights, sigmoid = {}, parsed.family.scoring == "sigmoid"
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            values *= 0.2
        elif name.endswith("mlp.gate.weight") and sigmoid:
            values *= 1.5 * shape[1] ** -0.5
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif not name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
            values *= shape[1] ** -0.5
        weights[name] = values.to(dtype)
    return weights


def write_checkpoint(
    folder: Path,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config_overrides: Any,
) -> dict[str, Any]:
    """Write a checkpoint into ``folder`` (made if absent) as one file or as ``shards`` with an
    index; returns its config."""
    heads = config_overrides.get("num_attention_heads", CONFIG["num_attention_heads"])
    config = {**CONFIG, "num_key_value_heads": heads, **config_overrides}
    config = {key: value for key, value in config.items() if value is not REMOVE}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE / name, folder / name)
    write_weights(folder, config, dtype, seed, shards)
    return config


def write_weights(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, seed: int = 0, shards: int = 1
) -> None:
    """Random weights as one file or as ``shards`` with an index."""
    weights = random_weights(config, dtype, seed)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in weights.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
