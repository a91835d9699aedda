"""Valid DeepSeek-V2 checkpoints of a few hundred kilobytes, with random but repeatable weights."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slotmoe import model
from slotmoe.model.config import Config, parse_config
from slotmoe.model.names import (
    expert_name,
    expert_shapes,
    resident_shapes,
    role_of,
    spelled,
    stored_as,
    stored_rows,
)
from tests.support.encoded import fuse_interleaved

SAMPLE = Path(model.__file__).parent / "sample"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32}
YARN |= {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
CONFIG: dict[str, Any] = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
CONFIG |= {"hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
CONFIG |= {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1}
CONFIG |= {"max_position_embeddings": 256, "rope_scaling": YARN, "rope_theta": 10000.0}
CONFIG |= {"hidden_size": 64, "rms_norm_eps": 1e-06, "attention_bias": False}
CONFIG |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1}
CONFIG |= {"intermediate_size": 96, "moe_intermediate_size": 48, "n_shared_experts": 2}
CONFIG |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
CONFIG |= {"topk_method": "group_limited_greedy", "scoring_func": "softmax"}
CONFIG |= {"norm_topk_prob": False, "routed_scaling_factor": 4.0}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24}
CONFIG |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
# Sizes that fill no tile and no block.
ODD_SIZES = {"hidden_size": 72, "intermediate_size": 41, "moe_intermediate_size": 37}
ODD_SIZES |= {"num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 23}
ODD_SIZES |= {"kv_lora_rank": 22, "qk_nope_head_dim": 14, "qk_rope_head_dim": 6}
# What makes it smaller still, for kernels that are interpreted: as few programs of 16 rows as a
# layer can have.
SMALL = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
SMALL |= {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
SMALL |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16}
SMALL |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Tensors of a V4 that its checkpoints have in float32.
IN_FLOAT32 = ("sinks", "position_bias", "hc.fn", "hc.base", "hc.scale", "hc_fn", "hc_base")
IN_FLOAT32 += ("hc_scale",)
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
            for name, shape in expert_shapes(parsed).items():
                shapes[expert_name(layer, expert, name)] = shape
    weights, softmax = {}, parsed.family.scoring == "softmax"
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("tid2eid"):  # different experts for each token
            order = torch.rand((shape[0], parsed.n_routed_experts), generator=generator).argsort()
            weights[name] = order[:, : shape[1]].contiguous()
            continue
        if name.endswith(IN_FLOAT32):
            spread = shape[1] ** -0.5 if name.endswith("fn") else 0.7
            weights[name] = values * spread + name.endswith("scale")
            continue
        if name.endswith(("bias", "A_log")):
            values *= 0.2
        elif name.endswith("mlp.gate.weight") and not softmax:
            values *= 1.5 * shape[1] ** -0.5
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif not name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
            values *= shape[1] ** -0.5
        weights[name] = values.to(dtype)
    return weights


def joined(weights: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """As files of models with a delta rule have them: some matrices' rows among each other's,
    convolutions turned, norms less one."""
    stored = dict[str, torch.Tensor]()
    for name, weight in weights.items():
        if "conv1d" in name:
            weight = weight.t()[:, None].contiguous()
        if several := stored_as(name, config):
            stored |= zip(several, weight.clone().chunk(len(several)), strict=True)
        elif (place := stored_rows(name, config)) is not None:
            whole, count, ranges = place
            empty = torch.zeros(count, *weight.shape[1:], dtype=weight.dtype)
            stored.setdefault(whole, empty)[[row for part in ranges for row in part]] = weight
        elif config.family.by_channel and name.endswith("A_log"):
            stored[name] = weight[None, None, :, None]
        else:
            less = config.family.norms_less_one and role_of(name) == "norm"
            stored[name] = weight - 1 if less else weight
    return stored


def write_checkpoint(
    folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **keys: Any
) -> dict[str, Any]:
    """Write a checkpoint into ``folder`` (made if absent) as one file or as ``shards`` with an
    index; returns its config."""
    heads = keys.get("num_attention_heads", CONFIG["num_attention_heads"])
    config = {**CONFIG, "num_key_value_heads": heads, **keys}
    return write_files(folder, config, dtype, seed, shards)


def write_files(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, seed: int = 0, shards: int = 1
) -> dict[str, Any]:
    """Config, tokenizer and random weights."""
    config = {key: value for key, value in config.items() if value is not REMOVE}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        shutil.copyfile(SAMPLE / name, folder / name)
    weights, parsed = random_weights(config, dtype, seed), parse_config(config)
    if parsed.family.interleaved:
        weights = fuse_interleaved(weights, in_blocks=parsed.encoding is not None)
    if parsed.delta is not None:
        weights = joined(weights, parsed)
    weights = {spelled(name, parsed): tensor for name, tensor in weights.items()}
    for name in filter(re.compile("moe_statics").search, weights):  # as Ernie's files have them
        weights[name] = weights[name][None]
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return config
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = {"total_size": sum(weight.nbytes for weight in weights.values())}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return config
