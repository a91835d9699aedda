"""Names, shapes and roles of a model's tensors as DeepSeek's checkpoints have them, without torch.

This is the one place that spells those names.  A tensor's role is how the network uses it, which
limits how it can be stored (``slotmoe.quant.shapes``): ``norm``, ``gate`` (of the router, and its
bias), ``embedding`` (gathered by row), ``absorbed`` (``kv_b_proj``, used by column too),
``sensitive`` (``lm_head``, ``kv_a_proj``, dense MLPs: rounding to 4 bits costs much there), else
``matrix``.
"""

import re

from slotmoe.model.config import Config

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE, POST_NORM = "mlp.gate", "post_attention_layernorm"
GATE_BIAS = "mlp.gate.e_score_correction_bias"
LAYER_PARTS = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "q_a_proj": "self_attn.q_a_proj",
    "q_a_layernorm": "self_attn.q_a_layernorm",
    "q_b_proj": "self_attn.q_b_proj",
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "kv_a_layernorm": "self_attn.kv_a_layernorm",
    "kv_b_proj": "self_attn.kv_b_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": POST_NORM,
}
"""Tensors that every layer may have: the network's name -> the checkpoint's, inside the layer."""

MTP_PARTS = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
"""What the layer that predicts one token more has beside a decoder layer.  Its embedding and its
output head are the model's own; checkpoints hold them once more, as ``embed_tokens`` and
``shared_head.head``."""

FUSED = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}
"""All routed experts of a layer in one tensor, as transformers 5 saves them: its name, and which of
how many equal parts of the rows of each expert's matrix a projection is."""
ENCODED = {
    "fp8": ("", "_scale_inv"),
    "int4": ("_packed", "_scale"),
    "nf4": ("", ".absmax"),
    "fp4": ("", ".absmax"),
}
"""What follows the name of a weight where its codes are, and where their scales are."""
QUANT_STATE = ".quant_state.bitsandbytes__"
"""What follows it where bitsandbytes notes how it is stored; then comes the method."""
ZERO_POINT = "_zero_point"


def text_name(name: str) -> str:
    """Name without what checkpoints with images put before the tensors of their text part:
    ``language_model.model.norm.weight`` or ``model.language_model.norm.weight``."""
    return re.sub(r"^(model\.)?language_model\.", r"\1", name)


def fused_experts(layer: int, tensor: str) -> str:
    """Checkpoint name of a layer's fused experts, see ``FUSED``."""
    return f"model.layers.{layer}.mlp.experts.{tensor}"


_ROLES = {
    EMBEDDING: "embedding",
    GATE: "gate",
    GATE_BIAS: "gate",
    LAYER_PARTS["kv_b_proj"]: "absorbed",
    **dict.fromkeys(
        (HEAD, LAYER_PARTS["kv_a_proj"], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        "sensitive",
    ),
}


def layer_tensor(layer: int, part: str) -> str:
    """Checkpoint name of the tensor ``part`` of a layer."""
    return f"model.layers.{layer}.{part}" + ("" if part == GATE_BIAS else ".weight")


def mlp_parts(moe: bool) -> tuple[str, str, str]:
    """Gate, up and down projection of a layer's MLP or shared experts: names inside the layer."""
    prefix = "mlp.shared_experts" if moe else "mlp"
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Checkpoint name of one routed expert's ``gate_proj``, ``up_proj`` or ``down_proj``."""
    return layer_tensor(layer, f"mlp.experts.{expert}.{projection}")


def split_expert(name: str) -> tuple[int, int, str] | None:
    """Layer, expert and projection of a routed expert's tensor; None for another one."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+_proj)\.weight", name)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


def split_name(name: str) -> tuple[int | None, str]:
    """Layer (None if in no layer) and the name inside it: 3 and ``self_attn.o_proj``."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    inner = name.removeprefix(match[0] if match else "model.").removesuffix(".weight")
    return int(match[1]) if match else None, inner


def text_layer(name: str, config: Config) -> int | None:
    """The layer of a tensor, None also in the head that predicts one token more: a text goes
    through the others."""
    layer, _ = split_name(name)
    return None if layer == config.num_hidden_layers else layer


def role_of(name: str) -> str:
    """The role of a resident tensor, see above."""
    _, part = split_name(name)
    if part.endswith("norm"):
        return "norm"
    return _ROLES.get(name, _ROLES.get(part, "matrix"))


def component_of(name: str) -> str:
    """The part of the model that a resident tensor belongs to, as plans and profiles name it."""
    _, part = split_name(name)
    if name in (EMBEDDING, HEAD):
        return "embeddings"
    if part in (GATE, GATE_BIAS):
        return "router"
    if part in mlp_parts(moe=True):
        return "shared experts"
    if part in MTP_PARTS.values():
        return "drafting head"
    return "dense layers" if part in mlp_parts(moe=False) else "attention"


def _layer_shapes(c: Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's resident tensors by name inside it, in the order of the forward pass."""
    D, H, part = c.hidden_size, c.num_attention_heads, LAYER_PARTS
    query = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]] = {part["input_layernorm"]: (D,)}
    if c.q_lora_rank is None:
        shapes[part["q_proj"]] = (query, D)
    else:
        shapes[part["q_a_proj"]] = (c.q_lora_rank, D)
        shapes[part["q_a_layernorm"]] = (c.q_lora_rank,)
        shapes[part["q_b_proj"]] = (query, c.q_lora_rank)
    shapes[part["kv_a_proj"]] = (c.latent_width, D)
    shapes[part["kv_a_layernorm"]] = (c.kv_lora_rank,)
    shapes[part["kv_b_proj"]] = (H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    shapes[part["o_proj"]] = (D, H * c.v_head_dim)
    shapes[POST_NORM] = (D,)
    moe, width = c.is_moe(layer), c.intermediate_size
    if moe:
        shapes[GATE] = (c.n_routed_experts, D)
        if c.family.correction_bias:
            shapes[GATE_BIAS] = (c.n_routed_experts,)
        width = c.n_shared_experts * c.moe_intermediate_size
    if width:
        shapes |= zip(mlp_parts(moe), [(width, D), (width, D), (D, width)], strict=True)
    return shapes


def resident_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all but the routed experts, in the order of the forward pass."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    for layer in range(config.layer_count):
        for part, shape in _layer_shapes(config, layer).items():
            shapes[layer_tensor(layer, part)] = shape
    shapes[FINAL_NORM] = (D := config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = table
    if config.mtp:
        for part in MTP_PARTS.values():
            shape = (D, 2 * D) if part == MTP_PARTS["eh_proj"] else (D,)
            shapes[layer_tensor(config.num_hidden_layers, part)] = shape
    return shapes


def expert_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Shape of each projection of a routed expert, ``[out, in]``."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
