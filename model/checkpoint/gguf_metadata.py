"""The metadata of a GGUF file as ``config.json`` and tokenizer files.  Without torch.

llama.cpp's keys stand here alone.  A value that the network needs and the file lacks is refused by
its key: what llama.cpp assumes in its place may be wrong (its gate knows no groups, for example).

GGUF names the pre-tokenizer, which splits text before merges are applied, and does not hold it.  So
the patterns of the families stand here, as the ``tokenizer.json`` of their publishers has them.
"""

import json
from collections.abc import Container
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from slotmoe import model
from slotmoe.errors import CheckpointError
from slotmoe.jsonfile import Json, ReadFile, files_in, read_json, typed
from slotmoe.model.checkpoint.gguf_header import GgufHeader, is_gguf, read_headers
from slotmoe.model.families import FAMILIES, Family
from slotmoe.model.tiktoken import WORDS as KIMI_WORDS

_ARCHITECTURES = {
    **{"deepseek2": "deepseek_v2", "qwen3moe": "qwen3_moe", "qwen2moe": "qwen2_moe"},
    **{"glm4moe": "glm4_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2", "dots1": "dots1"},
    **{"hunyuan-moe": "hunyuan_v1_moe", "glm-dsa": "glm_moe_dsa", "qwen3next": "qwen3_next"},
    **{"qwen35moe": "qwen3_5_moe_text"},
}
"""llama.cpp's name -> ``model_type``; ``deepseek2`` with scores by sigmoid is ``deepseek_v3``."""
_Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_Real = Annotated[float, Meta(ge=0, le=1e30)]
_One = Annotated[float, Meta(ge=1, le=1, description="1")]
_GEOMETRY = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count"}
_GEOMETRY |= {"num_attention_heads": "attention.head_count"}
_GEOMETRY |= {"moe_intermediate_size": "expert_feed_forward_length"}
_GEOMETRY |= {"n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_OF_LATENTS = {"first_k_dense_replace": "leading_dense_block_count"}
_OF_LATENTS |= {"intermediate_size": "feed_forward_length"}
_OF_LATENTS |= {"kv_lora_rank": "attention.kv_lora_rank", "n_shared_experts": "expert_shared_count"}
_OF_LATENTS |= {"qk_rope_head_dim": "rope.dimension_count"}
"""``config.json``'s key -> that of the metadata, behind the architecture's name."""
_OF_INDEXERS = {"index_n_heads": "head_count", "index_head_dim": "key_length"}
_OF_INDEXERS |= {"index_topk": "top_k"}
_OF_DELTA = {"linear_num_key_heads": "ssm.group_count", "linear_key_head_dim": "ssm.state_size"}
_OF_DELTA |= {"linear_num_value_heads": "ssm.time_step_rank"}
_OF_GATES = (
    ("first_k_dense_replace", "leading_dense_block_count", 0),
    ("n_shared_experts", "expert_shared_count", 0),
    ("routed_scaling_factor", "expert_weights_scale", 1.0),
    ("n_group", "expert_group_count", 1),
    ("topk_group", "expert_group_used_count", 1),
)
"""The same of grouped queries' models, and what a file without it means."""
_SHARED_WIDTH, _GATING = "expert_shared_feed_forward_length", "expert_gating_func"
_WINDOW = "attention.sliding_window"
_GATINGS = {"softmax": (1, 3), "sigmoid": (2,)}  # 3: of the chosen alone, which is the same
_GROUPS = ("n_group", "topk_group", "topk_method")
# What may be written, but can have no other value.
_FIXED: Json = {"attention.causal": Literal[True]}
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
_KNOWN |= {
    "rope.dimension_sections",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
}
_KNOWN |= {f"rope.scaling.{key}" for key, *_ in _YARN.values()}
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ENDINGS, _SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE, _SIGN = r"[^\r\n\p{L}\p{N}]?", r"[^\s\p{L}\p{N}]"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLITS = {
    "deepseek-llm": ("[\r\n]", f"\\s?[{_LETTERS}]+", f"\\s?[{_MARKS}]+", "\\s+$", _EAST_ASIAN),
    "deepseek-coder": ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", _EAST_ASIAN),
    "gpt-2": (),  # the pattern is the byte-level step's own
    "deepseek-v3": (
        "\\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        f"| ?[\\p{{P}}\\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "kimi-k2": (KIMI_WORDS,),
    **dict.fromkeys(("gpt-4o", "minimax-m2"), (
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDINGS}?"
        f"|\\p{{N}}{{1,3}}| ?{_SIGN}+[\\r\\n/]*|{_SPACES}",
    )),
    "qwen35": (
        f"{_ENDINGS}|{_BEFORE}[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
        f"| ?[^\\s\\p{{L}}\\p{{M}}\\p{{N}}]+[\\r\\n]*|{_SPACES}",
    ),
    **dict.fromkeys(("qwen2", "hunyuan"), (
        f"{_ENDINGS}|{_BEFORE}\\p{{L}}+|\\p{{N}}| ?{_SIGN}+[\\r\\n]*|{_SPACES}",
    )),
    "glm4": (
        f"{_ENDINGS}|{_BEFORE}\\p{{L}}+|\\p{{N}}{{1,3}}| ?{_SIGN}+[\\r\\n]*|{_SPACES}",
    ),
}  # fmt: skip
"""Patterns that split text one after the other, by the pre-tokenizer's name.  DeepSeek-V2 and its
Coder models have the first; both of DeepSeek's split single digits after them."""
_DIGITS, _NFC = ("deepseek-llm", "deepseek-coder"), ("qwen2", "qwen35")  # what some do besides
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_PREFIX = "tokenizer.ggml."
_OfEach = Meta(min_length=1, max_length=500_000)


class GgufTokenizer(Struct):
    model: Literal["gpt2"]  # byte-level BPE
    pre: str
    tokens: Annotated[list[str], _OfEach]
    token_type: Annotated[list[Annotated[int, Meta(ge=0, le=6)]], _OfEach]
    merges: Annotated[list[str], _OfEach]
    bos_token_id: int
    eos_token_id: int
    eot_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_template: str | None = None

    @property
    def ends(self) -> list[int]:
        """The tokens at which a text ends, and a turn, if that differs."""
        turn = self.eos_token_id if self.eot_token_id is None else self.eot_token_id
        return list(dict.fromkeys((self.eos_token_id, turn)))


def read_tokenizer(metadata: Json) -> GgufTokenizer:
    """The tokenizer, checked.  Raises ``ValueError``, naming the key."""
    behind = {name: value for name, value in metadata.items() if name.startswith(_PREFIX)}
    given = {name.removeprefix(_PREFIX): value for name, value in behind.items()}
    given["chat_template"] = metadata.get("tokenizer.chat_template")
    found = typed(given, GgufTokenizer, _PREFIX[:-1])
    if found.pre not in _SPLITS:
        known = ", ".join(map(repr, _SPLITS))
        raise ValueError(f"{_PREFIX}pre is {found.pre!r:.80}, expected one of {known}")
    count, types = len(found.tokens), len(found.token_type)
    if types != count:
        raise ValueError(f"{_PREFIX}token_type has {types} values for {count} tokens")
    for name in ("bos_token_id", "eos_token_id", "eot_token_id"):
        index: int | None = getattr(found, name)
        if index is not None and not 0 <= index < count:
            raise ValueError(f"{_PREFIX}{name} is {index}, expected 0 to {count - 1}")
    return found


def tokenizer_files(found: GgufTokenizer) -> dict[str, Json]:
    """``tokenizer.json`` and ``tokenizer_config.json``.  Raises ``ValueError``, naming the key."""
    names, types = found.tokens, found.token_type
    # Rows beyond the tokenizer, which some converters declare as tokens of the user's.
    tokens = {
        name: index
        for index, (name, kind) in enumerate(zip(names, types, strict=True))
        if kind != _UNUSED and name != f"[PAD{index}]"
    }
    added = [
        {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": types[index] == _CONTROL}
        for name, index in tokens.items()
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    split = _SPLITS[found.pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split
    ]
    steps += [{"type": "Digits", "individual_digits": True}] if found.pre in _DIGITS else []
    steps += [{**byte_level, "use_regex": not split}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if found.pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": _merges(found.merges, tokens)},
    }
    settings: Json = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": names[found.bos_token_id], "eos_token": names[found.eos_token_id]}
    for key in ("add_bos_token", "add_eos_token", "chat_template"):
        if (value := getattr(found, key)) is not None:
            settings[key] = value
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _merges(merges: list[str], tokens: dict[str, int]) -> list[str]:
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens.keys():
            raise ValueError(f"{_PREFIX}merges[{number}] is {merge!r:.80}, not two tokens of it")
    return merges


class _Metadata:
    """The values of one file by their key behind the architecture's name; remembers which were
    asked for."""

    def __init__(self, header: GgufHeader):
        self._values, self._before = header.metadata, header.metadata["general.architecture"]
        self._asked = {self.named(key) for key in _KNOWN}

    def named(self, key: str) -> str:
        return f"{self._before}.{key}"

    def get(self, key: str, of: Any, *default: object) -> Any:
        name = self.named(key)
        self._asked.add(name)
        if name in self._values:
            return typed(self._values[name], of, name)
        if not default:
            raise ValueError(f"{name} is missing")
        return default[0]

    def unknown(self) -> Json:
        """Scalars that nobody asked for."""
        left, ours = sorted(self._values.keys() - self._asked), f"{self._before}."
        return {name: str(self._values[name])[:80] for name in left if name.startswith(ours)}


def files_of(path: Path) -> ReadFile:
    """The small files of a checkpoint folder, or of a GGUF file.  Raises ``CheckpointError``."""
    return metadata_files(read_headers(path)) if is_gguf(path) else files_in(path)


def metadata_files(headers: list[GgufHeader]) -> ReadFile:
    """The model's small files, see ``slotmoe.jsonfile``, made of the first part's metadata and the
    tensors of all.  Raises ``CheckpointError``, which names the key."""
    try:
        if (found := headers[0].metadata.get("general.architecture")) not in [*_ARCHITECTURES]:
            known = ", ".join(map(repr, _ARCHITECTURES))
            raise ValueError(f"general.architecture is {found!r:.80}, expected one of {known}")
        tokenizer = read_tokenizer(headers[0].metadata)
        files = {**tokenizer_files(tokenizer), "config.json": _config(headers, tokenizer)}
    except ValueError as problem:
        raise CheckpointError(f"{headers[0].path}: {problem}") from None
    contents = {name: json.dumps(values, indent=2).encode() for name, values in files.items()}

    def read(name: str, limit: int) -> bytes | None:
        data = contents.get(name)
        if data is not None and len(data) > limit:
            raise CheckpointError(f"{headers[0].path}: {name} of it has more than {limit} bytes")
        return data

    return read


def _config(headers: list[GgufHeader], tokenizer: GgufTokenizer) -> Json:
    """``config.json`` in DeepSeek's words.  Raises ``ValueError``."""
    header, found = headers[0], _Metadata(headers[0])
    tensors = {name: tensor for part in headers for name, tensor in part.tensors.items()}
    for key, of in _FIXED.items():
        found.get(key, of, None)
    name, gating = header.metadata["general.architecture"], found.get(_GATING, _Count, 0)
    kind = "deepseek_v3" if (name, gating) == ("deepseek2", 2) else _ARCHITECTURES[name]
    family = FAMILIES[kind]
    if gating not in (0, *_GATINGS[family.scoring]):
        expected = f"expected {_GATINGS[family.scoring][0]} ({family.scoring})"
        raise ValueError(f"{found.named(_GATING)} is {gating}, {expected}")
    values: Json = {"architectures": [family.architecture], "model_type": kind}
    values |= {"hidden_act": "silu", "scoring_func": family.scoring}
    values |= {key: found.get(name, _Count) for key, name in _GEOMETRY.items()}
    values["num_nextn_predict_layers"] = heads = found.get("nextn_predict_layers", _Count, 0)
    values["num_hidden_layers"] -= heads
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.ends}
    values["max_position_embeddings"] = found.get("context_length", _Count)
    values["rms_norm_eps"] = found.get("attention.layer_norm_rms_epsilon", _Real)
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values["vocab_size"] = found.get("vocab_size", _Count, len(tokenizer.tokens))
    if any(tensor.encoding.name == "MXFP4" for tensor in tensors.values()):
        values["quantization_config"] = {"quant_method": "mxfp4"}
    if family.attention == "grouped":
        values |= _grouped(found, values, family, tensors.keys())
    else:
        values |= {key: found.get(name, _Count) for key, name in _OF_LATENTS.items()}
        values["q_lora_rank"] = found.get("attention.q_lora_rank", _Count, None) or None
        values["num_key_value_heads"] = values["num_attention_heads"]
        values |= _heads(found, values) | _gate(found, values)
    if family.indexed:
        behind = {key: f"attention.indexer.{name}" for key, name in _OF_INDEXERS.items()}
        values |= {key: found.get(name, _Count) for key, name in behind.items()}
        if own := found.get("attention.indexer.types", list[bool], None):
            values["indexer_types"] = [("shared", "full")[each] for each in own]
    return values | _rope(found, family) | found.unknown()


def _grouped(found: _Metadata, values: Json, family: Family, tensors: Container[str]) -> Json:
    """What is of grouped queries alone.  Whether there are biases and norms, the tensors say."""
    heads, layers = values["num_attention_heads"], range(values["num_hidden_layers"])
    width = found.get("attention.key_length", _Count, values["hidden_size"] // max(1, heads))
    found.get("attention.value_length", Annotated[int, Meta(ge=width, le=width)], width)
    more = {"num_key_value_heads": found.get("attention.head_count_kv", _Count), "head_dim": width}
    more["rotary_dim"] = found.get("rope.dimension_count", _Count, width)
    more["intermediate_size"] = found.get("feed_forward_length", _Count, 1) or 1
    more["shared_expert_intermediate_size"] = found.get(_SHARED_WIDTH, _Count, 0)
    fixed = dict(family.values)
    for key, name, default in _OF_GATES:
        more[key] = found.get(name, type(default), fixed.get(key, default))
    dense = [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in tensors]
    more["mlp_only_layers"] = dense[more["first_k_dense_replace"] :]
    normed = family.delta or not family.shared_gate
    more["norm_topk_prob"] = found.get("expert_weights_norm", bool, normed)
    if family.delta:
        found.get("ssm.conv_kernel", Literal[4])
        more |= {key: found.get(name, _Count) for key, name in _OF_DELTA.items()}
        width = found.get("ssm.inner_size", _Count) // max(1, more["linear_num_value_heads"])
        more["linear_value_head_dim"] = width
        more["full_attention_interval"] = found.get("full_attention_interval", _Count, 4)
    window = found.get(_WINDOW, *((_Count,) if family.sinks else (Literal[0], 0)))
    if window:  # in gpt-oss each second layer has it
        names = ("sliding_attention", "full_attention")
        more |= {"sliding_window": window, "layer_types": [names[layer % 2] for layer in layers]}
    stated = {family.bias_key: "blk.0.attn_q.bias", family.qk_norm: "blk.0.attn_q_norm.weight"}
    return more | {key: name in tensors for key, name in stated.items() if "_" in key}


def _heads(found: _Metadata, values: Json) -> Json:
    """Since 2025 a head's widths have keys of their own; the old ones are the latent cache's."""
    mla = any(found.get(f"{name}_mla", _Count, None) is not None for name in _HEADS)
    names = [f"{name}_mla" if mla else name for name in _HEADS]
    keys, width = (found.get(name, _Count) for name in names)
    if (nope := keys - values["qk_rope_head_dim"]) < 1:
        raise ValueError(f"{found.named(names[0])} is {keys}, less than the rope's dimensions")
    return {"qk_nope_head_dim": nope, "v_head_dim": width}


def _gate(found: _Metadata, values: Json) -> Json:
    scale, is_v2 = found.get("expert_weights_scale", _Real), values["scoring_func"] == "softmax"
    norm = found.get("expert_weights_norm", bool, False)
    if norm and scale != 1 and is_v2:
        problem = f"{found.named('expert_weights_norm')} is true beside a scale of {scale}"
        raise ValueError(f"{problem}, and DeepSeek-V2 has one of both")
    gate = {"routed_scaling_factor": scale, "norm_topk_prob": norm}
    known = found.get("expert_group_count", _Count, None)
    if known is not None:
        used = found.get("expert_group_used_count", _Count)
        method = ("group_limited_greedy" if known > 1 else "greedy") if is_v2 else "noaux_tc"
        return gate | {"n_group": known, "topk_group": used, "topk_method": method}
    # Files from before the end of 2025 do not say; those of DeepSeek's own models are known.
    for path in sorted((Path(model.__file__).parent / "geometries").glob("*.json")):
        geometry = read_json(path, 1 << 20, Json)
        keys = ("model_type", *_GEOMETRY, *_OF_LATENTS, "q_lora_rank")
        if all(geometry.get(key) == values[key] for key in keys):
            return gate | {key: geometry[key] for key in _GROUPS}
    problem = "is missing, and this is no model whose groups of experts are known"
    advice = "convert it again with a llama.cpp of 2026"
    raise ValueError(f"{found.named('expert_group_count')} {problem}; {advice}")


def _rope(found: _Metadata, family: Family) -> Json:
    rope = {"rope_theta": found.get("rope.freq_base", _Real, 10000.0), "rope_scaling": None}
    kind = found.get("rope.scaling.type", str, "none")
    if kind == "none" and found.get("rope.scaling.factor", _Real, 1) == 1:
        return rope
    found.get("rope.scaling.type", Literal["yarn"])
    yarn = {key: found.get(f"rope.scaling.{name}", *of) for key, (name, *of) in _YARN.items()}
    if family.attention == "grouped":
        yarn["truncate"] = not family.sinks  # as gpt-oss alone has it
    else:
        # The multiplier is a tenth of mscale_all_dim; mscale, which no GGUF has, is the same in
        # DeepSeek's models.
        multiplier = found.get("rope.scaling.yarn_log_multiplier", _Real)
        yarn |= dict.fromkeys(("mscale", "mscale_all_dim"), float(Decimal(str(multiplier)) * 10))
    return rope | {"rope_scaling": {"type": "yarn", **yarn}}
