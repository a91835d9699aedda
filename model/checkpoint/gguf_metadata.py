"""The metadata of a GGUF file as ``config.json`` and tokenizer files.  Without torch.

llama.cpp's keys stand here and in ``gguf.json`` alone.  A value that the network needs and the file
lacks is refused by its key: what llama.cpp assumes in its place may be wrong (its gate knows no
groups, for example).

GGUF names the pre-tokenizer, which splits text before merges are applied, and does not hold it:
see ``slotmoe.model.tiktoken``.
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
from slotmoe.model.checkpoint.gguf_header import TABLES, GgufHeader, is_gguf, read_headers
from slotmoe.model.families import FAMILIES, Family
from slotmoe.model.tiktoken import PATTERNS, splitting

_Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
_Real = Annotated[float, Meta(ge=0, le=1e30)]
_One = Annotated[float, Meta(ge=1, le=1, description="1")]
# ``TABLES`` have llama.cpp's name of an architecture -> ``model_type``, where ``deepseek2`` with
# scores by sigmoid is ``deepseek_v3``; keys that are ``known``, without another use; and
# ``config.json``'s key -> that of the metadata, behind the architecture's name or its indexer's;
# of the gates of grouped queries' models also what a file without it means.
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
_OF_YARN = {f"rope.scaling.{key}" for key, *_ in _YARN.values()}
_KNOWN = {*_FIXED, *_HEADS, *_OF_YARN, *TABLES["known"]}
# What some do besides: both of DeepSeek's split single digits behind the patterns.
_DIGITS, _NFC = ("deepseek-llm", "deepseek-coder"), ("qwen2", "qwen35")
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
    if found.pre not in PATTERNS:
        known = ", ".join(map(repr, PATTERNS))
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
    split = PATTERNS[found.pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [splitting(pattern) for pattern in split]
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
    architectures = [*TABLES["architectures"]]
    try:
        if (found := headers[0].metadata.get("general.architecture")) not in architectures:
            known = ", ".join(map(repr, architectures))
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
    kind = "deepseek_v3" if (name, gating) == ("deepseek2", 2) else TABLES["architectures"][name]
    family = FAMILIES[kind]
    if gating not in (0, *_GATINGS[family.scoring]):
        expected = f"expected {_GATINGS[family.scoring][0]} ({family.scoring})"
        raise ValueError(f"{found.named(_GATING)} is {gating}, {expected}")
    values: Json = {"architectures": [family.architecture], "model_type": kind}
    values |= {"hidden_act": "silu", "scoring_func": family.scoring}
    values |= {key: found.get(name, _Count) for key, name in TABLES["geometry"].items()}
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
        values |= {key: found.get(name, _Count) for key, name in TABLES["latents"].items()}
        values["q_lora_rank"] = found.get("attention.q_lora_rank", _Count, None) or None
        values["num_key_value_heads"] = values["num_attention_heads"]
        values |= _heads(found, values) | _gate(found, values)
    if family.indexed:
        behind = {key: f"attention.indexer.{name}" for key, name in TABLES["indexers"].items()}
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
    for key, (name, default) in TABLES["gates"].items():
        more[key] = found.get(name, type(default), fixed.get(key, default))
    dense = [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in tensors]
    more["mlp_only_layers"] = dense[more["first_k_dense_replace"] :]
    normed = family.delta or not family.shared_gate
    more["norm_topk_prob"] = found.get("expert_weights_norm", bool, normed)
    if family.delta:
        found.get("ssm.conv_kernel", Literal[4])
        more |= {key: found.get(name, _Count) for key, name in TABLES["delta"].items()}
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
        keys = ("model_type", *TABLES["geometry"], *TABLES["latents"], "q_lora_rank")
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
