"""Names and shapes of a model's tensors as DeepSeek's checkpoints have them, without torch."""

from __future__ import annotations

from slotmoe.model.config import Config


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Checkpoint name of one routed expert's projection (``gate_proj``, ``up_proj`` or
    ``down_proj``)."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def resident_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of everything but the routed experts, in the order of the forward
    pass."""
    D, H = config.hidden_size, config.num_attention_heads
    query = H * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}

    def mlp(prefix: str, width: int) -> None:
        shapes[prefix + "gate_proj.weight"] = shapes[prefix + "up_proj.weight"] = (width, D)
        shapes[prefix + "down_proj.weight"] = (D, width)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (D,)
        if config.q_lora_rank is None:
            shapes[prefix + "self_attn.q_proj.weight"] = (query, D)
        else:
            shapes[prefix + "self_attn.q_a_proj.weight"] = (config.q_lora_rank, D)
            shapes[prefix + "self_attn.q_a_layernorm.weight"] = (config.q_lora_rank,)
            shapes[prefix + "self_attn.q_b_proj.weight"] = (query, config.q_lora_rank)
        shapes[prefix + "self_attn.kv_a_proj_with_mqa.weight"] = (config.latent_width, D)
        shapes[prefix + "self_attn.kv_a_layernorm.weight"] = (config.kv_lora_rank,)
        expanded = H * (config.qk_nope_head_dim + config.v_head_dim)
        shapes[prefix + "self_attn.kv_b_proj.weight"] = (expanded, config.kv_lora_rank)
        shapes[prefix + "self_attn.o_proj.weight"] = (D, H * config.v_head_dim)
        shapes[prefix + "post_attention_layernorm.weight"] = (D,)
        if not config.is_moe(layer):
            mlp(prefix + "mlp.", config.intermediate_size)
            continue
        shapes[prefix + "mlp.gate.weight"] = (config.n_routed_experts, D)
        if config.n_shared_experts:
            mlp(
                prefix + "mlp.shared_experts.",
                config.n_shared_experts * config.moe_intermediate_size,
            )
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


def expert_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Shape of each projection of a routed expert, ``[out, in]``."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
