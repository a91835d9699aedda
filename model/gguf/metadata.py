"""The metadata of a GGUF file as ``config.json`` and tokenizer files.  Without torch.

llama.cpp's keys stand here alone.  A value that the network needs and the file lacks is refused by
its key: what llama.cpp assumes in its place may be wrong (its gate knows no groups, for example).
"""

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from slotmoe import model
from slotmoe.errors import CheckpointError
from slotmoe.jsonfile import Json, read_json, typed
from slotmoe.model.files import ReadFile
from slotmoe.model.gguf.header import GgufHeader
from slotmoe.model.gguf.tokenizer import Tokenizer, read_tokenizer, tokenizer_files

ARCHITECTURE = "deepseek2"
_Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_Real = Annotated[float, Meta(ge=0, le=1e30)]
_One = Annotated[float, Meta(ge=1, le=1, description="1")]
_GEOMETRY = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"}
_GEOMETRY |= {"moe_intermediate_size": "expert_feed_forward_length"}
_GEOMETRY |= {"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"}
_GEOMETRY |= {"n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_GEOMETRY |= {"first_k_dense_replace": "leading_dense_block_count"}
_GEOMETRY |= {"kv_lora_rank": "attention.kv_lora_rank", "qk_rope_head_dim": "rope.dimension_count"}
"""``config.json``'s key -> that of the metadata, behind the architecture's name."""
_GROUPS = ("n_group", "topk_group", "topk_method")
# What may be written, but can have no other value.
_FIXED: Json = {"attention.causal": Literal[True], "nextn_predict_layers": Literal[0]}
_FIXED["expert_gating_func"] = Annotated[int, Meta(ge=0, le=1, description="1 (softmax)")]
_FIXED |= {f"rope.scaling.{key}_factor": _One for key in ("attn", "yarn_attn", "yarn_ext")}
_YARN: dict[str, tuple[Any, ...]] = {
    "factor": ("factor", _Real),
    "original_max_position_embeddings": ("original_context_length", _Count),
    "beta_fast": ("yarn_beta_fast", _Real, 32.0),
    "beta_slow": ("yarn_beta_slow", _Real, 1.0),
}
"""Settings of YaRN -> key behind ``rope.scaling``, type, and what a file without it means."""
_HEADS = ("attention.key_length", "attention.value_length")
_KNOWN = {*_FIXED, *_HEADS, "attention.head_count_kv", "expert_group_used_count"}
_KNOWN |= {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier"}
_KNOWN |= {f"rope.scaling.{key}" for key, *_ in _YARN.values()}


class _Metadata:
    """The values of one file by their key behind ``deepseek2.``; remembers which were asked for."""

    def __init__(self, header: GgufHeader):
        self._values = header.metadata
        self._asked = {f"{ARCHITECTURE}.{key}" for key in _KNOWN}

    def get(self, key: str, of: Any, *default: object) -> Any:
        name = f"{ARCHITECTURE}.{key}"
        self._asked.add(name)
        if name in self._values:
            return typed(self._values[name], of, name)
        if not default:
            raise ValueError(f"{name} is missing")
        return default[0]

    def unknown(self) -> Json:
        """Scalars that nobody asked for."""
        left = sorted(self._values.keys() - self._asked)
        ours = [name for name in left if name.startswith(f"{ARCHITECTURE}.")]
        return {name: str(self._values[name])[:80] for name in ours}


def small_files(header: GgufHeader) -> ReadFile:
    """The model's small files, see ``slotmoe.model.files``, made of the first file's metadata.
    Raises ``CheckpointError``, which names the key."""
    try:
        if (found := header.metadata.get("general.architecture")) != ARCHITECTURE:
            raise ValueError(f"general.architecture is {found!r:.80}, expected {ARCHITECTURE!r}")
        tokenizer = read_tokenizer(header.metadata)
        files = {**tokenizer_files(tokenizer), "config.json": _config(header, tokenizer)}
    except ValueError as problem:
        raise CheckpointError(f"{header.path}: {problem}") from None
    contents = {name: json.dumps(values, indent=2).encode() for name, values in files.items()}

    def read(name: str, limit: int) -> bytes | None:
        data = contents.get(name)
        if data is not None and len(data) > limit:
            raise CheckpointError(f"{header.path}: {name} of it has more than {limit} bytes")
        return data

    return read


def _config(header: GgufHeader, tokenizer: Tokenizer) -> Json:
    """``config.json`` as DeepSeek writes it.  Raises ``ValueError``."""
    found = _Metadata(header)
    for key, of in _FIXED.items():
        found.get(key, of, None)
    values: Json = {"architectures": ["DeepseekV2ForCausalLM"]}
    values |= {"model_type": "deepseek_v2", "hidden_act": "silu", "scoring_func": "softmax"}
    values |= {key: found.get(name, _Count) for key, name in _GEOMETRY.items()}
    values["q_lora_rank"] = found.get("attention.q_lora_rank", _Count, None) or None
    values["n_shared_experts"] = found.get("expert_shared_count", _Count)
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.ends}
    values["num_key_value_heads"] = values["num_attention_heads"]
    values["max_position_embeddings"] = found.get("context_length", _Count)
    values["rms_norm_eps"] = found.get("attention.layer_norm_rms_epsilon", _Real)
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    values["vocab_size"] = found.get("vocab_size", _Count, len(tokenizer.tokens))
    return values | _heads(found, values) | _gate(found, values) | _rope(found) | found.unknown()


def _heads(found: _Metadata, values: Json) -> Json:
    """Since 2025 a head's widths have keys of their own; the old ones are the latent cache's."""
    mla = any(found.get(f"{name}_mla", _Count, None) is not None for name in _HEADS)
    names = [f"{name}_mla" if mla else name for name in _HEADS]
    keys, width = (found.get(name, _Count) for name in names)
    if (nope := keys - values["qk_rope_head_dim"]) < 1:
        raise ValueError(f"{ARCHITECTURE}.{names[0]} is {keys}, less than the rope's dimensions")
    return {"qk_nope_head_dim": nope, "v_head_dim": width}


def _gate(found: _Metadata, values: Json) -> Json:
    scale = found.get("expert_weights_scale", _Real)
    norm = found.get("expert_weights_norm", bool, False)
    if norm and scale != 1:
        problem = f"{ARCHITECTURE}.expert_weights_norm is true beside a scale of {scale}"
        raise ValueError(f"{problem}, and DeepSeek-V2 has one of both")
    gate = {"routed_scaling_factor": scale, "norm_topk_prob": norm}
    known = found.get("expert_group_count", _Count, None)
    if known is not None:
        used = found.get("expert_group_used_count", _Count)
        method = "group_limited_greedy" if known > 1 else "greedy"
        return gate | {"n_group": known, "topk_group": used, "topk_method": method}
    # Files from before the end of 2025 do not say; those of DeepSeek's own models are known.
    for path in sorted((Path(model.__file__).parent / "geometries").glob("*.json")):
        geometry = read_json(path, 1 << 20, Json)
        keys = ("model_type", *_GEOMETRY, "q_lora_rank")
        if all(geometry.get(key) == values[key] for key in keys):
            return gate | {key: geometry[key] for key in _GROUPS}
    problem = "is missing, and this is no model whose groups of experts are known"
    advice = "convert it again with a llama.cpp of 2026"
    raise ValueError(f"{ARCHITECTURE}.expert_group_count {problem}; {advice}")


def _rope(found: _Metadata) -> Json:
    rope = {"rope_theta": found.get("rope.freq_base", _Real, 10000.0), "rope_scaling": None}
    kind = found.get("rope.scaling.type", str, "none")
    if kind == "none" and found.get("rope.scaling.factor", _Real, 1) == 1:
        return rope
    found.get("rope.scaling.type", Literal["yarn"])
    # The multiplier is a tenth of mscale_all_dim; mscale, which no GGUF has, is the same in
    # DeepSeek's models.
    multiplier = found.get("rope.scaling.yarn_log_multiplier", _Real)
    mscale = float(Decimal(str(multiplier)) * 10)
    yarn = {key: found.get(f"rope.scaling.{name}", *of) for key, (name, *of) in _YARN.items()}
    scaling = {"type": "yarn", **yarn, "mscale": mscale, "mscale_all_dim": mscale}
    return rope | {"rope_scaling": scaling}
