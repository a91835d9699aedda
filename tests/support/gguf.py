"""GGUF files of a checkpoint, by the gguf package's writer, as llama.cpp's converter makes them."""

import json

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import expert_name, spelled, split_expert

ARCHITECTURES = {
    **{"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "qwen3_moe": "qwen3moe"},
    **{"qwen2_moe": "qwen2moe", "glm4_moe": "glm4moe", "gpt_oss": "gpt-oss", "dots1": "dots1"},
    **{"minimax_m2": "minimax-m2", "hunyuan_v1_moe": "hunyuan-moe", "glm_moe_dsa": "glm-dsa"},
    **{"qwen3_next": "qwen3next", "qwen3_5_moe_text": "qwen35moe"},
}


def write_gguf(
    source, path, kind="BF16", *, kv_b="split", shards=1, pre="gpt-2", edit=None, substitute=None,
    experts=None,
):  # fmt: skip
    """Write the checkpoint folder ``source`` as ``path`` and return the first file's path.

    ``kind`` is ggml's type of all matrices but the gate and, where that is given, ``experts``.
    ``kv_b`` is ``split`` by head as since 2025, ``whole`` as before, or ``flat`` as ik_llama.cpp's.
    ``edit(writer)`` may add or change metadata, and ``substitute(name, tensor)`` give raw bytes and
    their type for a tensor.
    """
    with open_checkpoint(source) as checkpoint:
        config = json.loads((source / "config.json").read_text())
        architecture = ARCHITECTURES[config["model_type"]]
        tensors = dict(_tensors(checkpoint, architecture, kv_b))
        biggest = -(-len(tensors) // shards) if shards > 1 else 0
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=biggest)
        add_config(writer, checkpoint.config)
        add_tokenizer(writer, source, checkpoint.config, pre)
        if edit is not None:
            edit(writer)
        for name, tensor in tensors.items():
            exact = tensor.dim() == 1 or name.endswith((".bias", "ssm_conv1d.weight"))
            exact |= "ffn_gate_inp" in name
            stored = Type.F32 if exact else Type[(experts or kind) if "_exps" in name else kind]
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
            if substitute is not None:
                data, stored = substitute(name, tensor) or (data, stored)
            writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if shards > 1 else path


def _tensors(checkpoint, architecture, kv_b):
    """By the names that llama.cpp's converter gives those of the hub."""
    c = checkpoint.config
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for name in checkpoint.infos:
        if split_expert(name) is None:
            tensor, theirs = checkpoint.tensor(name), spelled(name, c)
            if c.delta is not None:
                theirs, tensor = _of_delta(checkpoint, theirs, tensor)
                if tensor is None:
                    continue
            theirs = theirs.replace("correction_bias", "correction.bias")
            theirs += ".weight" * theirs.endswith("sinks")
            base, _, kind = theirs.rpartition(".")
            if base.endswith("kv_b_proj") and kv_b != "whole":
                heads = tensor.view(c.num_attention_heads, -1, c.kv_lora_rank)
                k, v = heads.split([c.qk_nope_head_dim, c.v_head_dim], 1)
                for part, tensor in (("k", k.mT), ("v", v)):
                    theirs = known.get_name(base.replace("kv_b", f"{part}_b"))
                    yield f"{theirs}.weight", tensor.flatten(0, 1) if kv_b == "flat" else tensor
            else:
                whole = known.get_name(theirs)  # of what is no module's
                yield whole or f"{known.get_name(base)}.{kind}", tensor.squeeze(0)
    for layer in c.moe_layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [expert_name(layer, e, part) for e in range(c.n_routed_experts)]
            experts = f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps"
            yield f"{experts}.weight", torch.stack([*map(checkpoint.tensor, names)])
            biases = [name.replace(".weight", ".bias") for name in names]
            if biases[0] in checkpoint.infos:
                yield f"{experts}.bias", torch.stack([*map(checkpoint.tensor, biases)])


def _of_delta(checkpoint, name, tensor):
    """In place of a model's tensor with delta rules, whose norms are whole here, what converters
    have: rows that the hub's files join, -exp(A_log), and Qwen3.5's value heads, those of each key
    head apart.  None for what is among another's rows."""
    c, part = checkpoint.config, name.partition("linear_attn.")[2].removesuffix(".weight")
    of, joined = c.delta, {"q_proj.weight": ("q_gate", c.num_attention_heads)}
    if c.family.by_key_head:
        joined["in_proj_b.weight"] = "in_proj_a", of.num_key_heads
    for end, (other, heads) in joined.items():
        if name.endswith(end):
            beside = checkpoint.tensor(name.replace(end, f"{other}.weight"))
            both = [x.unflatten(0, (heads, -1)) for x in (tensor, beside)]
            name = name.replace("in_proj_b", "in_proj_ba")
            return name, torch.cat(both, dim=1).flatten(0, 1)
        if name.endswith(f"{other}.weight"):
            return name, None
    tensor = {"A_log": -tensor.exp(), "conv1d": tensor.t()}.get(part, tensor) if part else tensor
    if part and part != "norm" and not c.family.by_key_head:
        heads, dim = of.num_key_heads, int(part == "out_proj")
        unit = 1 if part in ("in_proj_a", "in_proj_b", "A_log", "dt_bias") else of.value_head_dim
        first = tensor.shape[dim] - of.num_value_heads * unit
        keys, values = tensor.tensor_split([first], dim)
        values = values.unflatten(dim, (heads, -1, unit)).transpose(dim, dim + 1)
        tensor = torch.cat([keys, values.flatten(dim, dim + 2)], dim)
    return name.replace("dt_bias", "dt_proj.bias"), tensor


def add_config(writer, c):
    """As llama.cpp's converters have it."""
    values = {"block_count": c.num_hidden_layers, "embedding_length": c.hidden_size}
    values |= {"context_length": c.max_position_embeddings, "vocab_size": c.vocab_size}
    values |= {"feed_forward_length": c.intermediate_size, "head_count": c.num_attention_heads}
    values |= {"rope_freq_base": c.rope.rope_theta, "layer_norm_rms_eps": c.rms_norm_eps}
    values |= {"expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok}
    values |= {"expert_feed_forward_length": c.moe_intermediate_size}
    values |= {"rope_dimension_count": c.qk_rope_head_dim}
    is_latent = c.family.attention != "grouped"
    if is_latent:
        values |= {"head_count_kv": 1, "key_length": c.kv_lora_rank + c.qk_rope_head_dim}
        values |= {"key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim}
        values |= {"value_length": c.kv_lora_rank, "value_length_mla": c.v_head_dim}
        values |= {"kv_lora_rank": c.kv_lora_rank}
        if c.q_lora_rank is not None:
            values["q_lora_rank"] = c.q_lora_rank
    else:
        values |= {"head_count_kv": c.grouped.groups}
        values |= dict.fromkeys(("key_length", "value_length"), c.grouped.head_dim)
        if (of := c.delta) is not None:
            values |= {"ssm_conv_kernel": 4, "ssm_state_size": of.key_head_dim}
            values |= {"ssm_group_count": of.num_key_heads}
            values |= {"ssm_time_step_rank": of.num_value_heads}
            values |= {"ssm_inner_size": of.num_value_heads * of.value_head_dim}
            values |= {"full_attention_interval": c.windows.index(0) + 1}
        elif windows := [*filter(None, c.windows)]:
            values["sliding_window"] = windows[0]
    if is_latent or c.family.scoring == "sigmoid":
        values["expert_gating_func"] = gguf.ExpertGatingFuncType[c.family.scoring.upper()]
    if is_latent or c.family.group_best == 2:  # of DeepSeek's kind
        values |= {"expert_shared_count": c.n_shared_experts, "expert_group_count": c.n_group}
        values |= {"expert_weights_scale": c.routed_scaling_factor}
        values |= {"expert_weights_norm": c.norm_topk_prob, "expert_group_used_count": c.topk_group}
        values |= {"leading_dense_block_count": c.first_k_dense_replace}
    elif c.n_shared_experts:
        width = c.n_shared_experts * c.moe_intermediate_size
        values |= {"expert_shared_feed_forward_length": width}
    if c.indexer is not None:
        values |= {"indexer_head_count": c.indexer.n_heads, "indexer_top_k": c.indexer.topk}
        values |= {"indexer_key_length": c.indexer.head_dim}
        writer.add_array(f"{writer.arch}.attention.indexer.types", [*c.indexer.full])
    if c.rope.factor != 1:
        values |= {"rope_scaling_type": gguf.RopeScalingType.YARN}
        values |= {"rope_scaling_factor": c.rope.factor}
        values |= {"rope_scaling_orig_ctx_len": c.rope.original_max_position_embeddings}
        if is_latent:
            values |= {"rope_scaling_yarn_log_mul": 0.1 * c.rope.mscale_all_dim}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)


def add_tokenizer(writer, source, c, pre):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    names = {index: name for name, index in tokenizer["model"]["vocab"].items()}
    special = {item["id"]: item["content"] for item in tokenizer["added_tokens"]}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    kinds |= dict.fromkeys(special, gguf.TokenType.CONTROL)
    names |= special
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(c.vocab_size)])
    unused = gguf.TokenType.UNUSED
    writer.add_token_types([kinds.get(i, unused) for i in range(c.vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_ids[0])
    writer.add_add_bos_token(settings["add_bos_token"])
    writer.add_chat_template(settings["chat_template"])
