"""``config.json`` of a model of one of ``slotmoe.model.families``, read once and frozen.

Every key that shapes the network is required, so that a misspelt one is an error instead of a
default.  Values that this network does not compute are refused by name.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct, structs

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json, ReadFile, parse_json, read_json, typed
from slotmoe.model import attention_config as attention
from slotmoe.model.attention_config import MAX_INT, Positive
from slotmoe.model.checkpoint.encodings import Encoding, parse_encoding
from slotmoe.model.families import FAMILIES, OTHERS, WRAPPERS, Family
from slotmoe.network.shapes import SWIGLU, Activation

MAX_CONFIG_BYTES = 1 << 20

_TokenId = Annotated[int, Meta(ge=0, le=MAX_INT - 1)]
_Ends = Annotated[list[_TokenId], Meta(min_length=0, max_length=64)] | _TokenId | None
_LayerTypes = Annotated[list[Literal["dense", "sparse"]], Meta(min_length=1, max_length=1000)]
_SUPPORTED: dict[str, tuple[object, ...]] = {  # values that every family has; absent is fine too
    "hidden_act": ("silu",),
    "ep_size": (1, None),
    **dict.fromkeys(("attention_bias", "mlp_bias"), (False, None)),
    **dict.fromkeys(("linear_attn_config", "candidate_source_layer_id"), (None,)),
    **{f"{kind}_layer_ids": ([], None) for kind in ("engram", "kv_source", "index_source")},
}
_FLAGS = {"norm_topk_prob": False, "tie_word_embeddings": False, "rope_interleave": True}
_DEFAULTS = {"moe_layer_freq": 1, "num_nextn_predict_layers": 0, **_FLAGS}
# What null stands for.
_NULLS = {"n_shared_experts": 0, "num_nextn_predict_layers": 0, **_FLAGS}
# What a model with more than text says outside its text_config.
_OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")


@dataclass(frozen=True)
class ConfigKeys:
    """What a ``Config`` reads from ``config.json`` as it is.  Names are DeepSeek's."""

    vocab_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    intermediate_size: Annotated[int, Meta(ge=1, le=1 << 22)]
    moe_intermediate_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Annotated[int, Meta(ge=1, le=4096)]
    n_routed_experts: Annotated[int, Meta(ge=1, le=4096)]
    n_shared_experts: Annotated[int, Meta(ge=0, le=256)]  # 0: none
    num_experts_per_tok: Annotated[int, Meta(ge=1, le=256)]
    n_group: Annotated[int, Meta(ge=1, le=4096)]
    topk_group: Annotated[int, Meta(ge=1, le=4096)]
    norm_topk_prob: bool
    routed_scaling_factor: Positive
    first_k_dense_replace: Annotated[int, Meta(ge=0, le=MAX_INT)]
    moe_layer_freq: Annotated[int, Meta(ge=1, le=MAX_INT)]
    q_lora_rank: Annotated[int, Meta(ge=1, le=1 << 20)] | None
    kv_lora_rank: Annotated[int, Meta(ge=1, le=1 << 20)]
    qk_nope_head_dim: Annotated[int, Meta(ge=0, le=1 << 16)]
    qk_rope_head_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    v_head_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    rms_norm_eps: Positive
    rope_interleave: bool  # rotated pairs stand side by side
    max_position_embeddings: Annotated[int, Meta(ge=1, le=MAX_INT)]
    tie_word_embeddings: bool
    num_nextn_predict_layers: Annotated[int, Meta(ge=0, le=1000)]


@dataclass(frozen=True)
class Config(ConfigKeys):
    """Geometry of one model.

    ``text_only``: the checkpoint also has parts that are not text, which are left out.  ``mtp``:
    the head that predicts one token more is used, as layer ``num_hidden_layers``.
    """

    family: Family
    rope: attention.Rope
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    indexer: attention.IndexerConfig | None = None
    compressed: attention.CompressedConfig | None = None
    grouped: attention.GroupedConfig | None = None
    delta: attention.DeltaConfig | None = None
    windows: tuple[int, ...] = ()  # by layer; see ``window``
    hyper: attention.HyperConnections | None = None
    dense_layers: tuple[int, ...] = ()  # beside the first ones and those between
    num_hash_layers: int = 0  # the first ones choose experts by token id
    activation: Activation = SWIGLU
    encoding: Encoding | None = None  # of a checkpoint's quantized weights
    text_only: bool = False
    mtp: bool = False
    unknown_keys: tuple[str, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` routes to experts; others have a dense MLP of ``intermediate_size``."""
        if layer < self.first_k_dense_replace or layer in self.dense_layers:
            return False
        return layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.layer_count) if self.is_moe(layer))

    @property
    def layer_count(self) -> int:
        """Decoder layers, with that of the head that predicts one token more if it is used."""
        return self.num_hidden_layers + self.mtp

    @property
    def stream_width(self) -> int:
        """Values of all residual streams of a token together."""
        return self.hidden_size * (1 if self.hyper is None else self.hyper.mult)

    def alone(self, layer: int) -> "Config":
        """A model of ``layer`` only, its first."""
        indexer, compressed = self.indexer, self.compressed
        if indexer is not None:
            indexer = structs.replace(indexer, full=(self.has_indexer(layer),))
        if compressed is not None:
            compressed = structs.replace(compressed, ratios=(self.ratio(layer),))
        one = replace(self, num_hidden_layers=1, mtp=False, dense_layers=())
        one = replace(one, indexer=indexer, compressed=compressed, windows=(self.window(layer),))
        dense, hashed = int(not self.is_moe(layer)), int(layer < self.num_hash_layers)
        return replace(one, first_k_dense_replace=dense, num_hash_layers=hashed)

    def with_mtp(self, where: Path, wanted_by: str) -> "Config":
        """The same with the head that predicts one token more, which the option ``wanted_by`` asks
        for.  Raises ``ConfigError`` where the model has none."""
        count, layer = self.num_nextn_predict_layers, self.num_hidden_layers
        if count and self.is_moe(layer):
            return replace(self, mtp=True)
        problem = f"num_nextn_predict_layers is {count}, expected 1 or more"
        if count:
            head = f"layer {layer}, the head that predicts one token more, no experts"
            problem = f"moe_layer_freq {self.moe_layer_freq} gives {head}"
        raise ConfigError(f"{where}: {problem} for {wanted_by}; leave {wanted_by} out")

    def ratio(self, layer: int) -> int:
        """How many positions ``layer`` compresses to one; 0: none, as in the ``mtp`` head."""
        ratios = () if self.compressed is None else self.compressed.ratios
        return ratios[layer] if layer < len(ratios) else 0

    def window(self, layer: int) -> int:
        """How many tokens each one sees in ``layer``; 0: all, -1: none, but it has a delta rule."""
        return self.windows[layer] if layer < len(self.windows) else 0

    def has_delta(self, layer: int) -> bool:
        """Whether ``layer`` has a delta rule."""
        return self.window(layer) < 0

    def has_indexer(self, layer: int) -> bool:
        """Whether ``layer`` has an indexer of its own, as the head that predicts one token more has
        where positions are not compressed."""
        full = () if self.indexer is None else self.indexer.full
        if layer < len(full):
            return full[layer]
        return self.indexer is not None and self.compressed is None

    @property
    def softmax_scale(self) -> float:
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        factor = self.rope.softmax_factor if self.family.softmax_factor else 1.0
        return 1.0 / math.sqrt(width) * factor

    @property
    def notes(self) -> list[str]:
        """What a user has to know of how this model is run."""
        return ["only the text part of this model is used"] if self.text_only else []


class _Channels(Struct, forbid_unknown_fields=True):
    """What a ``config.json`` says of a delta rule by channel: 1 is the first layer."""

    num_heads: attention.Heads
    head_dim: attention.Width
    kda_layers: list[int]
    full_attn_layers: list[int]
    short_conv_kernel_size: Literal[4] = 4


_Layers = TypedDict("_Layers", {"layer_types": list[attention.GroupedType]})
_Wrapper = TypedDict("_Wrapper", {"text_config": Json})
_TokenIds = TypedDict("_TokenIds", {"bos_token_id": _Ends, "eos_token_id": _Ends}, total=False)
# With these, the keys that don't change what the network computes or are read below.
_KNOWN_KEYS = {*ConfigKeys.__dataclass_fields__, *_SUPPORTED, *attention.KNOWN_KEYS} | set(
    """attention_dropout auto_map aux_loss_alpha bos_token_id dtype eos_token_id initializer_range
    model_type output_router_logits pad_token_id pretraining_tp qk_head_dim quantization_config
    seq_aux torch_dtype transformers_version use_cache _name_or_path architectures scoring_func
    topk_method num_mtp_layers mtp_num_hidden_layers mtp_use_dedicated_embeddings
    index_share_for_mtp_iteration indexer_rope_interleave moe_router_dtype expert_dtype
    router_aux_loss_coef router_jitter_noise use_mtp num_mtp_modules mtp_transformer_layers
    experts_per_token initial_context_length linear_num_heads linear_head_dim""".split()
)


def parse_config(values: Json, where: str = "config.json") -> Config:
    """A ``Config`` from the parsed JSON; ``ConfigError`` names the key that is unsupported."""
    try:
        return _parse(values)
    except ValueError as problem:
        raise ConfigError(f"{where}: {problem}") from None


def read_config(path: Path) -> Config:
    return parse_config(read_json(path, MAX_CONFIG_BYTES, Json), str(path))


def config_among(read: ReadFile, where: Path) -> Config:
    """The ``Config`` among the small files of the model at ``where``."""
    path = where / "config.json"
    if (data := read("config.json", MAX_CONFIG_BYTES)) is None:
        raise ConfigError(f"{path}: is missing; not a model in Hugging Face's format")
    return parse_config(parse_json(data, path, Json), str(path))


def _parse(outer: Json) -> Config:
    given = outer
    if outer.get("model_type") in WRAPPERS:  # of a model with more than text, its text part
        given = {key: outer[key] for key in _OUTER if key in outer}
        given |= typed(outer, _Wrapper)["text_config"]
    if (name := given.get("model_type")) not in [*FAMILIES]:
        why = f" ({OTHERS[name]})" if isinstance(name, str) and name in OTHERS else ""
        only = ", ".join(json.dumps(known) for known in FAMILIES)
        problem = f"model_type {json.dumps(name)[:80]} is not supported{why}"
        raise ValueError(f"{problem}, only {only}; use a model of these families")
    family = FAMILIES[name]
    try:
        return _config_of(given, family, given is not outer)
    except ValueError as problem:
        said = str(problem)
        for key, ours in family.words:
            said = re.sub(rf"\b{ours}\b", key, said) if key in given else said
        raise ValueError(said) from None


def _config_of(given: Json, family: Family, text_only: bool) -> Config:
    worded = _in_our_words(given, family)
    _refuse_unsupported(worded, family)
    in_words, parts_of = attention.KINDS[family.attention]
    values = {**_DEFAULTS, **in_words(worded, family)}
    values |= {key: value for key, value in _NULLS.items() if values.get(key, value) is None}
    values |= dict(family.values)
    if values.get("topk_method", family.topk_methods[0]) == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    if values.get("mlp_layer_types") is not None and family.attention != "compressed":
        values["first_k_dense_replace"] = _dense_layers(values)
    geometry = typed(values, ConfigKeys)
    ids = typed(values, _TokenIds)
    bos, eos = _as_tuple(ids.get("bos_token_id")), _as_tuple(ids.get("eos_token_id"))
    known = {family.bias_key, family.qk_norm, *(key for key, _ in family.words + family.values)}
    config = Config(
        **vars(geometry),
        family=family,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        **parts_of(values, family),
        **(_parts_of_channels(values) if family.by_channel else {}),
        encoding=parse_encoding(given),
        text_only=text_only,
        unknown_keys=tuple(sorted(str(key)[:80] for key in given.keys() - _KNOWN_KEYS - known)),
    )
    _check_consistency(config)
    return config


def _in_our_words(given: Json, family: Family) -> Json:
    """With DeepSeek's keys too, and one value for that of each layer where all are the same."""
    values = dict(given)
    for key, ours in family.words:
        value = given.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if key in given:
            values[ours] = value
    return values


def _refuse_unsupported(values: Json, family: Family) -> None:
    supported = {
        "architectures": ([family.architecture], [], None),
        "scoring_func": (family.scoring,),
        "topk_method": family.topk_methods,
        **_SUPPORTED,
        "rope_interleave": (*family.rope_interleave, None),
        **{key: (value, None) for key, value in family.values},
    }
    if not family.indexed:
        supported["index_topk"] = (None,)
    if family.indexed:
        supported["indexer_rope_interleave"] = (not family.index_halves, None)
    if family.attention == "latent":  # which has one key a head
        supported["num_key_value_heads"] = (values.get("num_attention_heads"), None)
        if family.delta:
            del supported["linear_attn_config"]
    if family.attention == "grouped":
        switches = family.bias_key * bool(family.biased), family.qk_norm
        supported |= dict.fromkeys(filter(None, switches), (True, False, None))
        supported |= dict.fromkeys(("kv_lora_rank", "q_lora_rank"), (None,))
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            only = " or ".join(map(json.dumps, allowed))
            raise ValueError(f"{key} {json.dumps(values[key])[:80]} is not supported, only {only}")


def _parts_of_channels(values: Json) -> Json:
    given, layers = values.get("linear_attn_config"), range(1, 1 + values["num_hidden_layers"])
    if given is None:  # but in the words of transformers 5
        given = {key: values.get(f"linear_{key}") for key in ("num_heads", "head_dim")}
        types = [*enumerate(typed(values, _Layers)["layer_types"], 1)]
        for key, kind in ("kda_layers", "linear_attention"), ("full_attn_layers", "full_attention"):
            given[key] = [at for at, name in types if name == kind]
    of = typed(given, _Channels, "linear_attn_config")
    if sorted(of.kda_layers + of.full_attn_layers) != [*layers]:
        said = f"{of.kda_layers!r:.80} and {of.full_attn_layers!r:.80}"
        raise ValueError(f"kda_layers and full_attn_layers are {said}, expected 1 to {layers[-1]}")
    heads, width = of.num_heads, of.head_dim
    delta = attention.DeltaConfig(heads, heads, width, width, latent=width)
    return {"delta": delta, "windows": tuple(-(at in of.kda_layers) for at in layers)}


def _dense_layers(values: Json) -> int:
    """``first_k_dense_replace`` as ``mlp_layer_types`` spells it."""
    types = typed(values["mlp_layer_types"], _LayerTypes, "mlp_layer_types")
    dense = types.count("dense")
    for key, wanted in {"num_hidden_layers": len(types), "first_k_dense_replace": dense}.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{key} is {values[key]!r:.80}, but mlp_layer_types says {wanted}")
    if "dense" in types[dense:]:
        raise ValueError("mlp_layer_types has a dense layer behind a sparse one, expected none")
    return dense


def _as_tuple(ids: list[int] | int | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _check_consistency(c: Config) -> None:
    experts, top_k = c.n_routed_experts, c.num_experts_per_tok
    reachable = experts // c.n_group * c.topk_group
    if c.grouped is None and c.qk_nope_head_dim < 1:
        raise ValueError(f"qk_nope_head_dim is {c.qk_nope_head_dim}, expected 1 or more")
    if c.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {c.qk_rope_head_dim}, expected an even number")
    attention.check_multiple(vars(c), "n_routed_experts", "n_group")
    if experts // c.n_group < c.family.group_best:
        expected = f"expected at least {c.family.group_best} experts a group"
        raise ValueError(f"n_group is {c.n_group} of {experts} experts, {expected}")
    if c.topk_group > c.n_group:
        raise ValueError(f"topk_group {c.topk_group} is more than n_group {c.n_group}")
    if top_k > reachable:
        problem = f"the gate can reach only {reachable} experts"
        raise ValueError(f"num_experts_per_tok is {top_k}, but {problem}")
    if not c.moe_layers:
        dense = c.first_k_dense_replace
        raise ValueError(f"first_k_dense_replace {dense} leaves no layer with experts")
