"""A model's attention and residual streams as ``config.json`` says, in any publisher's words."""

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Literal, TypedDict, get_args

from msgspec import Meta, Struct

from slotmoe.jsonfile import Json, typed
from slotmoe.model.families import Family
from slotmoe.network.shapes import Activation

MAX_INT = 1 << 31
Positive = Annotated[float, Meta(ge=1e-30, le=1e30)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e30)]
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Width = Annotated[int, Meta(ge=1, le=1 << 16)]
Heads = Annotated[int, Meta(ge=1, le=4096)]
_Share = Annotated[float, Meta(ge=0, le=1)]

_LayerType = Literal[
    "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
]
GroupedType = Literal["full_attention", "sliding_attention", "linear_attention"]
_RATIOS = dict(zip(get_args(_LayerType), (0, 4, 128), strict=True))
"""Positions that become one, by transformers' name of such a layer."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings (YaRN: arXiv 2309.00071).  ``factor`` 1.0 means plain RoPE."""

    rope_theta: Positive
    factor: Positive = 1.0
    original_max_position_embeddings: Annotated[int, Meta(ge=1, le=MAX_INT)] = 1
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: _NotNegative = 1.0
    mscale_all_dim: _NotNegative = 0.0
    attention_factor: Positive | None = None  # what cosine and sine are times, if it is said
    truncate: bool = True  # whether the ramp's ends are whole dimensions
    llama_4_scaling_beta: _NotNegative = 0.0  # 0: queries are not scaled

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @cached_property
    def table_scale(self) -> float:
        """Factor on the cosine and sine table."""
        factor = self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return factor if self.attention_factor is None else self.attention_factor

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale: ``mscale(factor, mscale_all_dim) ** 2``."""
        return self._mscale(self.mscale_all_dim) ** 2


class IndexerConfig(Struct, frozen=True, rename=lambda name: f"index_{name}"):
    """What picks the best ``topk`` positions (of the compressed ones where attention compresses):
    ``full`` says of each layer whether it has its own, else it takes the choice of the layer
    before.  ``halves``: what is rotated are two halves, not pairs side by side."""

    n_heads: Heads
    head_dim: _Size
    topk: _Size
    full: tuple[bool, ...]
    halves: bool


class CompressedConfig(Struct, frozen=True):
    """DeepSeek-V4's attention.  ``ratios`` says of each layer how many positions become one: 4, by
    overlapping windows and of which an indexer picks, 128, or 0 for none.  Each layer also attends
    to the last ``sliding_window`` positions.  ``rope`` is that of layers with a ratio."""

    head_dim: Width
    sliding_window: _Size
    o_groups: Heads
    o_lora_rank: _Size
    ratios: tuple[int, ...]
    rope: Rope


class GroupedConfig(Struct, frozen=True):
    """Grouped-query attention: ``biased`` and ``qk_norm`` are as in ``Family``, ``qk_norm`` never a
    key."""

    groups: Heads
    head_dim: Width
    biased: str
    qk_norm: str


class DeltaConfig(Struct, frozen=True, rename=lambda name: f"linear_{name}"):
    """A gated delta rule: heads of keys, which queries share, and of values, and their widths.
    Where each channel of a key decays by itself, two projections are of ``latent`` values."""

    num_key_heads: Heads
    num_value_heads: Heads
    key_head_dim: Width
    value_head_dim: Width
    latent: int = 0

    @property
    def decays(self) -> int:
        """Numbers that say how much of all heads decays."""
        return self.num_value_heads * (self.key_head_dim if self.latent else 1)

    @property
    def columns(self) -> int:
        """What a token gives to the rule: queries, keys, values, a number a value head, decays."""
        keys = 2 * self.num_key_heads * self.key_head_dim
        return keys + self.num_value_heads * (self.value_head_dim + 1) + self.decays

    @property
    def state_values(self) -> int:
        """Of all heads' matrices."""
        return self.num_value_heads * self.key_head_dim * self.value_head_dim


class HyperConnections(Struct, frozen=True, rename=lambda name: f"hc_{name}"):
    """``mult`` residual streams (arXiv 2512.24880), mixed by matrices that ``sinkhorn_iters`` steps
    make doubly stochastic; ``eps`` keeps them from zero."""

    mult: Annotated[int, Meta(ge=1, le=64)]
    sinkhorn_iters: Annotated[int, Meta(ge=1, le=1000)]
    eps: Positive


class _KeysOfV4(Struct):
    """What else DeepSeek's own ``config.json`` says of V4 alone."""

    compress_ratios: Annotated[list[Literal[0, 4, 128]], Meta(min_length=1, max_length=1100)]
    num_hash_layers: Annotated[int, Meta(ge=0, le=1000)]
    swiglu_limit: _NotNegative
    rope_theta: Positive
    compress_rope_theta: Positive
    rope_scaling: Json | None


class _IndexerLayers(Struct):
    """Which layers have an indexer, in the words of one publisher or another."""

    indexer_types: list[Literal["full", "shared"]] | None = None
    index_topk_pattern: str | list[str] | None = None
    index_topk_freq: Annotated[int, Meta(ge=1, le=1000)] = 1
    index_skip_topk_offset: Annotated[int, Meta(ge=0, le=1000)] = 2


_Part = TypedDict("_Part", {"partial_rotary_factor": _Share | None}, total=False)
_MainRope = TypedDict("_MainRope", {"rope_type": Literal["default"], "rope_theta": Positive})
_Rates = TypedDict(
    "_Rates",
    {"compressed_sparse_attention": Literal[4], "heavily_compressed_attention": Literal[128]},
)
_Ropes = TypedDict("_Ropes", {"main": _MainRope, "compress": Json})


class _KeysOfHub(Struct):
    """What a ``config.json`` of V4 in the words of transformers 5 says in its own way."""

    head_dim: Width
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    qk_rope_head_dim: Width | None = None
    partial_rotary_factor: _Share | None = None
    layer_types: list[_LayerType] | None = None
    compress_rates: _Rates | None = None
    mlp_layer_types: list[Literal["hash_moe", "moe"]] | None = None
    rope_parameters: _Ropes | None = None


class _KeysOfGroups(Struct):
    """What a ``config.json`` of grouped-query attention says of it."""

    hidden_size: _Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Heads
    num_key_value_heads: Heads
    moe_intermediate_size: _Size
    head_dim: Width | None = None
    rotary_dim: Width | None = None
    partial_rotary_factor: _Share | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = 0
    layer_types: list[GroupedType] | None = None
    full_attention_interval: Annotated[int, Meta(ge=2, le=1000)] = 4  # others are linear
    decoder_sparse_step: Annotated[int, Meta(ge=1, le=1000)] = 1
    mlp_only_layers: list[int] | None = None
    swiglu_limit: _NotNegative | None = None
    swiglu_alpha: Positive | None = None
    moe_layer_start_index: Annotated[int, Meta(ge=0, le=1000)] = 0
    moe_layer_end_index: Annotated[int, Meta(ge=-1, le=1000)] = -1  # -1: the last layer's
    shared_expert_intermediate_size: Annotated[int, Meta(ge=0, le=1 << 22)] = 0


_READ: list[type[Struct]] = [IndexerConfig, HyperConnections, CompressedConfig, DeltaConfig]
_READ += _IndexerLayers, _KeysOfV4, _KeysOfHub, _KeysOfGroups
KNOWN_KEYS = {key for of in _READ for key in of.__struct_encode_fields__}


def parts_of_mla(values: Json, family: Family) -> Json:
    """``rope`` and ``indexer`` of a model with latent attention."""
    key = "rope_scaling" if values.get("rope_parameters") is None else "rope_parameters"
    given = {} if values.get(key) is None else typed(values[key], Json, key)
    rope = _rope({"rope_theta": values.get("rope_theta", 10000.0), **given}, values, family)
    if not family.indexed:
        return {"rope": rope}
    return {"rope": rope, "indexer": _indexer(values, _full_indexers(values), family.index_halves)}


def _indexer(values: Json, full: tuple[bool, ...], halves: bool) -> IndexerConfig:
    if values["q_lora_rank"] is None:
        raise ValueError("q_lora_rank is null, but the indexer's queries are made of its latent")
    indexer = typed({**values, "index_full": full, "index_halves": halves}, IndexerConfig)
    if (width := indexer.head_dim) < (rotated := values["qk_rope_head_dim"]):
        raise ValueError(f"index_head_dim is {width}, expected at least qk_rope_head_dim {rotated}")
    return indexer


def parts_of_v4(values: Json, family: Family) -> Json:
    """What only DeepSeek-V4 has, of ``values`` in the hub's words.  YaRN multiplies neither cosine
    and sine nor scores by a factor."""
    given, layers = typed(values, _KeysOfV4), values["num_hidden_layers"]
    ratios = tuple(given.compress_ratios)
    if len(ratios) < layers or any(ratios[layers:]):
        problem = f"says {list(ratios)!r:.80}, expected {layers}, and 0 for what follows"
        raise ValueError(f"compress_ratios {problem}")
    if (hashed := given.num_hash_layers) > layers:
        raise ValueError(f"num_hash_layers is {hashed}, but num_hidden_layers is {layers}")
    settings = {**(given.rope_scaling or {}), "rope_theta": given.compress_rope_theta}
    rope = replace(_rope(settings, values, family), mscale=0.0, mscale_all_dim=0.0)
    ratios = ratios[:layers]
    full = tuple(ratio == _RATIOS["compressed_sparse_attention"] for ratio in ratios)
    compressed = typed({**values, "ratios": ratios, "rope": rope}, CompressedConfig)
    check_multiple(values, "num_attention_heads", "o_groups")
    return {
        "rope": Rope(given.rope_theta),
        "indexer": _indexer(values, full, family.index_halves),
        "compressed": compressed,
        "hyper": typed(values, HyperConnections),
        "num_hash_layers": hashed,
        "activation": Activation(given.swiglu_limit),
    }


def _rope(settings: Json, values: Json, family: Family) -> Rope:
    """From ``rope_scaling`` + ``rope_theta`` or transformers 5's ``rope_parameters``."""
    kind = settings.pop("rope_type", settings.pop("type", None))
    if kind == "deepseek_yarn":  # in Sarvam's words
        kind = "yarn"
    settings.pop("max_position_embeddings", None)
    if family.delta:  # pairs turn by time, height and width, which are one for texts
        settings.pop("mrope_section", None)
        settings.pop("mrope_interleaved", None)
    if family.attention == "compressed" and settings.pop("attention_factor", 1.0) != 1.0:
        raise ValueError("rope setting 'attention_factor' is not supported, only 1.0")
    if family.attention == "latent" and "attention_factor" in settings:
        raise ValueError("rope setting 'attention_factor' is not supported")
    rotated = values["qk_rope_head_dim"]
    if kind == "dynamic" and family.ntk_alpha and settings.get("alpha"):
        stretch = typed(settings["alpha"], Positive, "rope.alpha") ** (rotated / (rotated - 2))
        kind, settings["rope_theta"] = None, settings["rope_theta"] * stretch
    part = rotated / (values["qk_nope_head_dim"] + rotated)  # of a head
    for of in (settings.pop("partial_rotary_factor", None), values.get("partial_rotary_factor")):
        if of not in (None, 1.0, part):
            problem = f"is {of!r:.80}, expected 1 or {part:g}, which is qk_rope_head_dim"
            raise ValueError(f"partial_rotary_factor {problem}")
    if "llama_4_scaling_beta" in settings and not (family.query_scaling and kind == "yarn"):
        raise ValueError("rope setting 'llama_4_scaling_beta' is not supported in this model")
    if kind not in ("default", "yarn", None):
        raise ValueError(f"rope type {kind!r:.80} is not supported, only 'yarn' and 'default'")
    if kind != "yarn":
        settings = {"rope_theta": settings["rope_theta"]}
    elif missing := sorted({"factor", "original_max_position_embeddings"} - settings.keys()):
        raise ValueError(f"rope.{missing[0]} is missing")
    if unknown := sorted(settings.keys() - {field.name for field in fields(Rope)}):
        raise ValueError(f"rope setting {unknown[0]!r:.80} is not supported")
    rope = typed(settings, Rope, "rope")
    if kind == "yarn" and rope.rope_theta <= 1:
        problem = "expected more than 1, whose logarithm YaRN divides by"
        raise ValueError(f"rope.rope_theta is {rope.rope_theta}, {problem}")
    return rope


def in_hub_words(given: Json, _family: Family) -> Json:
    """The ``config.json`` of a DeepSeek-V4 in the words of DeepSeek's own files, if it is in those
    of transformers 5, with what latent attention would say.  ``ValueError`` names the key."""
    hub, values = typed(given, _KeysOfHub), dict(given)
    layers, width, rotated = hub.num_hidden_layers, hub.head_dim, hub.qk_rope_head_dim
    if (types := hub.layer_types) is not None:
        if hub.compress_rates is None:
            raise ValueError("compress_rates is missing")
        if len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} values, expected {layers}")
        _set(values, "compress_ratios", [_RATIOS[name] for name in types])
    if (moes := hub.mlp_layer_types) is not None:
        count = moes.count("hash_moe")
        if len(moes) != layers or "hash_moe" in moes[count:]:
            problem = f"has {len(moes)} values for {layers} layers"
            raise ValueError(f"mlp_layer_types {problem}, or a hash_moe layer behind a moe one")
        _set(values, "num_hash_layers", count)
    if (ropes := hub.rope_parameters) is not None:
        values |= {"rope_scaling": ropes["compress"], "rope_theta": ropes["main"]["rope_theta"]}
        values["compress_rope_theta"] = ropes["compress"].get("rope_theta")
    if rotated is None:
        if hub.partial_rotary_factor is None:
            raise ValueError("partial_rotary_factor is missing")
        rotated = int(width * hub.partial_rotary_factor)
    if not 0 < rotated < width:
        raise ValueError(f"qk_rope_head_dim is {rotated}, expected 1 to {width - 1}")
    values |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": width - rotated}
    values |= dict.fromkeys(("kv_lora_rank", "v_head_dim"), width)
    values["intermediate_size"] = values.get("moe_intermediate_size")
    return {"rope_scaling": None, **values}


def in_words_of_latents(given: Json, family: Family) -> Json:
    """The ``config.json`` of a model with grouped queries with what latent attention would say: a
    head's rotated values, those that are not, and as latent and value its width."""
    of, values = typed(given, _KeysOfGroups), dict(given)
    width = of.head_dim or of.hidden_size // of.num_attention_heads
    ropes = typed(given.get("rope_parameters") or {}, Json, "rope_parameters")
    if "rope_theta" not in {*given, *ropes}:
        raise ValueError("rope_theta is missing")
    rotated = of.rotary_dim or int(width * family.rotated)
    inner = typed(ropes, _Part, "rope_parameters").get("partial_rotary_factor")
    for part in (of.partial_rotary_factor, inner):
        rotated = rotated if part is None else int(width * part)
    if not 0 < rotated <= width:
        raise ValueError(f"{rotated} values of a head are rotated, expected 1 to {width}")
    if shared := of.shared_expert_intermediate_size:
        check_multiple(given, "shared_expert_intermediate_size", "moe_intermediate_size")
        values["n_shared_experts"] = shared // of.moe_intermediate_size
    if family.delta:  # of dense layers, which the newer ones have not
        values.setdefault("intermediate_size", of.moe_intermediate_size)
    values |= {"q_lora_rank": None, "rope_interleave": family.rope_interleave[0]}
    values |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": width - rotated}
    return values | dict.fromkeys(("kv_lora_rank", "v_head_dim"), width)


def parts_of_groups(values: Json, family: Family) -> Json:
    """``rope``, ``grouped`` and ``delta`` of a model with grouped queries."""
    of, width = typed(values, _KeysOfGroups), values["v_head_dim"]
    check_multiple(values, "num_attention_heads", "num_key_value_heads")
    biased = family.biased if values.get(family.bias_key, not family.bias_key) else ""
    qk_norm = family.qk_norm
    if qk_norm not in ("", "head", "row"):
        qk_norm = "head" if values.get(qk_norm) else ""
    grouped = GroupedConfig(of.num_key_value_heads, width, biased, qk_norm)
    step, first, last = of.decoder_sparse_step, of.moe_layer_start_index, of.moe_layer_end_index
    layers = range(of.num_hidden_layers)
    sparse = {*layers[first : last + 1 or None]} - {*(of.mlp_only_layers or ())}
    dense = tuple(at for at in layers if at not in sparse or (at + 1) % step)
    usual = family.activation
    limit = usual.limit if of.swiglu_limit is None else of.swiglu_limit
    activation = Activation(limit, of.swiglu_alpha or usual.alpha, usual.offset)
    parts = {"grouped": grouped, "dense_layers": dense, "activation": activation}
    parts["windows"] = _windows(of, family)
    if family.delta:
        parts["delta"] = typed(values, DeltaConfig)
        check_multiple(values, "linear_num_value_heads", "linear_num_key_heads")
    return {**parts_of_mla(values, family), **parts}


KINDS = {
    "latent": (lambda given, _family: given, parts_of_mla),
    "compressed": (in_hub_words, parts_of_v4),
    "grouped": (in_words_of_latents, parts_of_groups),
}
"""By kind of attention, what puts a ``config.json`` in DeepSeek's words, and what reads parts."""


def _windows(of: _KeysOfGroups, family: Family) -> tuple[int, ...]:
    """The window of each layer, 0 for all tokens, -1 for a delta rule."""
    layers, types, window = of.num_hidden_layers, of.layer_types, of.sliding_window
    other: GroupedType = "linear_attention" if family.delta else "sliding_attention"
    if types is None and family.delta:
        types = [other] * layers
        step = of.full_attention_interval
        types[step - 1 :: step] = ["full_attention"] * (layers // step)
    elif types is None:
        slides = window is not None and of.use_sliding_window is not False
        if slides and (of.max_window_layers or 0) < layers:
            raise ValueError("layer_types is missing, which says where sliding_window counts")
        types = ["full_attention"] * layers
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} values, expected {layers}")
    for at, name in enumerate(types):
        if name not in ("full_attention", other):
            raise ValueError(f"layer_types[{at}] is {name!r}, expected full_attention or {other}")
    if family.delta:
        return tuple(-(name == other) for name in types)
    if other in types and (window is None or not 0 < window <= 1 << 20):
        raise ValueError(f"sliding_window is {window!r:.80}, expected 1 to {1 << 20}")
    return tuple((window or 0) * (name == other) for name in types)


def check_multiple(values: Json, key: str, of: str) -> None:
    """Raise ``ValueError`` unless one number is a multiple of another."""
    if values[key] % values[of]:
        raise ValueError(f"{key} {values[key]} is not a multiple of {of} {values[of]}")


def _set(values: Json, key: str, value: object) -> None:
    if values.get(key) not in (None, value):
        raise ValueError(f"{key} is {values[key]!r:.80}, but other keys say {value!r:.80}")
    values[key] = value


def _full_indexers(values: Json) -> tuple[bool, ...]:
    """Which layers have an indexer of their own, by the first of ``indexer_types``,
    ``index_topk_pattern`` and ``index_topk_freq`` that is there; else all.  ``ValueError``."""
    given, layers = typed(values, _IndexerLayers), values["num_hidden_layers"]
    step, offset = given.index_topk_freq, given.index_skip_topk_offset
    full = tuple(max(layer - offset + 1, 0) % step == 0 for layer in range(layers))
    lists = {"indexer_types": given.indexer_types, "index_topk_pattern": given.index_topk_pattern}
    key = next((key for key, words in lists.items() if words is not None), "index_topk_freq")
    if key in lists:
        words = [*(lists[key] or ())]
        if len(words) != layers or ({*words} - {"F", "S"} and {*words} - {"full", "shared"}):
            expected = f"expected {layers} of F or S, or of full or shared"
            raise ValueError(f"{key} is {words!r:.80}, {expected}")
        full = tuple(word in ("F", "full") for word in words)
    if not full[0]:
        raise ValueError(f"{key} leaves the first layer without an indexer, expected one")
    return full
