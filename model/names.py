"""Names, shapes and roles of a model's tensors as DeepSeek's checkpoints have them, without torch.

This is the one place that spells those names, and llama.cpp's for them.  A tensor's role is how the
network uses it, which limits how it can be stored (``slotmoe.quant.shapes``): ``norm``, ``gate``
(of the router, and its bias), ``embedding`` (gathered by row), ``absorbed`` (``kv_b_proj``, used by
column too), ``sensitive`` (``lm_head``, ``kv_a_proj``, dense MLPs: rounding to 4 bits costs much
there), else ``matrix``.
"""

import re
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from slotmoe.model.config import Config

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE, POST_NORM = "mlp.gate", "post_attention_layernorm"
_GATE_BIAS = "mlp.gate.e_score_correction_bias"


class Part(NamedTuple):
    """A resident tensor: its ``name``, inside the layer if it is in one; its ``sizes``, a letter of
    ``_sizes`` for each dimension; its role; ``gguf``, llama.cpp's name; and the ``component`` that
    plans and profiles count it to."""

    name: str
    sizes: str
    role: str
    gguf: str = ""
    component: str = "attention"


_TOP_PARTS = (
    Part(EMBEDDING, "TD", "embedding", "token_embd", "embeddings"),
    Part(FINAL_NORM, "D", "norm", "output_norm"),
    Part(HEAD, "TD", "sensitive", "output", "embeddings"),
)
LAYER_PARTS = {
    "input_layernorm": Part("input_layernorm", "D", "norm", "attn_norm"),
    "q_proj": Part("self_attn.q_proj", "QD", "matrix", "attn_q"),
    "q_a_proj": Part("self_attn.q_a_proj", "LD", "matrix", "attn_q_a"),
    "q_a_layernorm": Part("self_attn.q_a_layernorm", "L", "norm", "attn_q_a_norm"),
    "q_b_proj": Part("self_attn.q_b_proj", "PL", "matrix", "attn_q_b"),
    "kv_a_proj": Part("self_attn.kv_a_proj_with_mqa", "WD", "sensitive", "attn_kv_a_mqa"),
    "kv_a_layernorm": Part("self_attn.kv_a_layernorm", "R", "norm", "attn_kv_a_norm"),
    "kv_b_proj": Part("self_attn.kv_b_proj", "KR", "absorbed", "attn_kv_b"),
    "o_proj": Part("self_attn.o_proj", "DV", "matrix", "attn_output"),
    "post_attention_layernorm": Part(POST_NORM, "D", "norm", "ffn_norm"),
    "gate": Part(GATE, "ED", "gate", "ffn_gate_inp", "router"),
    "gate_bias": Part(_GATE_BIAS, "B", "gate", component="router"),
    "gate_proj": Part("mlp.gate_proj", "FD", "sensitive", "ffn_gate", "dense layers"),
    "up_proj": Part("mlp.up_proj", "FD", "sensitive", "ffn_up", "dense layers"),
    "down_proj": Part("mlp.down_proj", "DF", "sensitive", "ffn_down", "dense layers"),
}
"""Tensors that a layer may have, by the network's name, in the order of the forward pass."""
_SHARED = "mlp.shared_experts."
SHARED_PARTS = {
    "gate_proj": Part(f"{_SHARED}gate_proj", "SD", "matrix", "ffn_gate_shexp", "shared experts"),
    "up_proj": Part(f"{_SHARED}up_proj", "SD", "matrix", "ffn_up_shexp", "shared experts"),
    "down_proj": Part(f"{_SHARED}down_proj", "DS", "matrix", "ffn_down_shexp", "shared experts"),
}
"""Those of its shared experts."""
MTP_PARTS = {
    "enorm": Part("enorm", "D", "norm", component="drafting head"),
    "hnorm": Part("hnorm", "D", "norm", component="drafting head"),
    "eh_proj": Part("eh_proj", "DX", "matrix", component="drafting head"),
    "norm": Part("shared_head.norm", "D", "norm", component="drafting head"),
}
"""What the layer that predicts one token more has beside a decoder layer.  Its embedding and its
output head are the model's own; checkpoints hold them once more, as ``embed_tokens`` and
``shared_head.head``."""
_TABLES = LAYER_PARTS.values(), SHARED_PARTS.values(), MTP_PARTS.values()
PARTS = {part.name: part for part in chain(_TOP_PARTS, *_TABLES)}
"""All of them by name."""
_EXPERT = Part("", "", "matrix")

FUSED = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}
"""All routed experts of a layer in one tensor, as transformers 5 saves them: its name, and which of
how many equal parts of the rows of each expert's matrix a projection is."""


def text_name(name: str) -> str:
    """Name without what checkpoints with images put before the tensors of their text part:
    ``language_model.model.norm.weight`` or ``model.language_model.norm.weight``."""
    return re.sub(r"^(model\.)?language_model\.", r"\1", name)


def fused_experts(layer: int, tensor: str) -> str:
    """Checkpoint name of a layer's fused experts, see ``FUSED``."""
    return f"model.layers.{layer}.mlp.experts.{tensor}"


def layer_tensor(layer: int, part: str) -> str:
    """Checkpoint name of the tensor ``part`` of a layer."""
    return f"model.layers.{layer}.{part}" + ("" if part == _GATE_BIAS else ".weight")


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


def part_of(name: str) -> Part:
    """The row of the tables for a tensor; a routed expert's has none of its own."""
    layer, inner = split_name(name)
    return PARTS.get(name if layer is None else inner, _EXPERT)


def text_layer(name: str, config: Config) -> int | None:
    """The layer of a tensor, None also in the head that predicts one token more: a text goes
    through the others."""
    layer, _ = split_name(name)
    return None if layer == config.num_hidden_layers else layer


def role_of(name: str) -> str:
    """The role of a tensor, see above."""
    return part_of(name).role


def _sizes(c: Config, layer: int) -> dict[str, int]:
    """Sizes of a layer's tensors by letter; a tensor that it does not have has one of 0."""
    D, H, L, moe = c.hidden_size, c.num_attention_heads, c.q_lora_rank or 0, c.is_moe(layer)
    queries = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    sizes = {"T": c.vocab_size, "D": D, "X": 2 * D, "L": L}
    sizes |= {"Q": 0, "P": queries} if L else {"Q": queries, "P": 0}
    sizes |= {"W": c.latent_width, "R": c.kv_lora_rank, "V": H * c.v_head_dim}
    sizes["K"] = H * (c.qk_nope_head_dim + c.v_head_dim)
    sizes["E"] = c.n_routed_experts if moe else 0
    sizes["B"] = sizes["E"] if c.family.correction_bias else 0
    sizes["F"] = 0 if moe else c.intermediate_size
    sizes["S"] = c.n_shared_experts * c.moe_intermediate_size if moe else 0
    return sizes


def resident_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all but the routed experts, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(parts: Iterable[Part], layer: int | None = None) -> None:
        sizes = _sizes(config, layer or 0)
        for part in parts:
            shape = tuple(sizes[letter] for letter in part.sizes)
            if 0 not in shape:
                shapes[part.name if layer is None else layer_tensor(layer, part.name)] = shape

    embedding, *end = _TOP_PARTS
    add([embedding])
    for layer in range(config.layer_count):
        add(chain(LAYER_PARTS.values(), SHARED_PARTS.values()), layer)
    add(end[:1] if config.tie_word_embeddings else end)
    if config.mtp:
        add(MTP_PARTS.values(), config.num_hidden_layers)
    return shapes


def expert_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Shape of each projection of a routed expert, ``[out, in]``."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
