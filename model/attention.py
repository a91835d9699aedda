"""A model's attention and residual streams as ``config.json`` says, in any publisher's words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, get_origin, get_type_hints

from slotmoe.jsonfile import Json, Kind, ListOf, check, integer, number, one_of
from slotmoe.model.families import Family

MAX_INT = 1 << 31
POSITIVE, NOT_NEGATIVE = number(1e-30, 1e30), number(0, 1e30)
_SIZE = integer(1, 1 << 20)

_RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""Positions that become one, by transformers' name of such a layer."""

# Values of V4 that its config.json leaves out or repeats.
OF_V4 = {"num_key_value_heads": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
OF_V4 |= {"first_k_dense_replace": 0, "moe_layer_freq": 1, "rope_interleave": True}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings (YaRN: arXiv 2309.00071).  ``factor`` 1.0 means plain RoPE."""

    rope_theta: Annotated[float, POSITIVE]
    factor: Annotated[float, POSITIVE] = 1.0
    original_max_position_embeddings: Annotated[int, integer(1, MAX_INT)] = 1
    beta_fast: Annotated[float, POSITIVE] = 32.0
    beta_slow: Annotated[float, POSITIVE] = 1.0
    mscale: Annotated[float, NOT_NEGATIVE] = 1.0
    mscale_all_dim: Annotated[float, NOT_NEGATIVE] = 0.0
    llama_4_scaling_beta: Annotated[float, NOT_NEGATIVE] = 0.0  # 0: queries are not scaled

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @cached_property
    def table_scale(self) -> float:
        """Factor on the cosine and sine table."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale: ``mscale(factor, mscale_all_dim) ** 2``."""
        return self._mscale(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Indexer:
    """What picks the best ``topk`` positions (of the compressed ones where attention compresses):
    ``full`` says of each layer whether it has its own, else it takes the choice of the layer
    before.  ``halves``: what is rotated are two halves, not pairs side by side."""

    n_heads: Annotated[int, integer(1, 4096)]
    head_dim: Annotated[int, _SIZE]
    topk: Annotated[int, _SIZE]
    full: tuple[bool, ...]
    halves: bool


@dataclass(frozen=True)
class Compressed:
    """DeepSeek-V4's attention.  ``ratios`` says of each layer how many positions become one: 4, by
    overlapping windows and of which an indexer picks, 128, or 0 for none.  Each layer also attends
    to the last ``sliding_window`` positions.  ``rope`` is that of layers with a ratio."""

    head_dim: Annotated[int, integer(1, 1 << 16)]
    sliding_window: Annotated[int, _SIZE]
    o_groups: Annotated[int, integer(1, 4096)]
    o_lora_rank: Annotated[int, _SIZE]
    ratios: tuple[int, ...]
    rope: Rope


@dataclass(frozen=True)
class HyperConnections:
    """``mult`` residual streams (arXiv 2512.24880), mixed by matrices that ``sinkhorn_iters`` steps
    make doubly stochastic; ``eps`` keeps them from zero."""

    mult: Annotated[int, integer(1, 64)]
    sinkhorn_iters: Annotated[int, integer(1, 1000)]
    eps: Annotated[float, POSITIVE]


def kinds_of(of: type) -> dict[str, Kind]:
    hints = get_type_hints(of, include_extras=True).items()
    return {key: hint.__metadata__[0] for key, hint in hints if get_origin(hint) is Annotated}


_ROPE, _COMPRESSED = kinds_of(Rope), kinds_of(Compressed)
_INDEXER = {f"index_{key}": kind for key, kind in kinds_of(Indexer).items()}
_HYPER = {f"hc_{key}": kind for key, kind in kinds_of(HyperConnections).items()}
_OF_V4: dict[str, object] = {
    **_COMPRESSED,
    **_HYPER,
    "compress_ratios": ListOf(one_of(*_RATIOS.values()), 1, 1100),
    "num_hash_layers": integer(0, 1000),
    "swiglu_limit": NOT_NEGATIVE,
    "rope_theta": POSITIVE,
    "compress_rope_theta": POSITIVE,
}
KNOWN_KEYS = _INDEXER.keys() | _OF_V4


def parts_of_mla(values: Json, family: Family) -> Json:
    """``rope`` and ``indexer`` of a model with latent attention."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    for key in keys:
        check(values[key], {}, key)
    settings = {"rope_theta": values.get("rope_theta", 10000.0)}
    rope = _rope({**settings, **(values[keys[0]] if keys else {})}, values, family)
    if not family.indexed:
        return {"rope": rope}
    if values["q_lora_rank"] is None:
        raise ValueError("q_lora_rank is null, but the indexer's queries are made of its latent")
    full = _full_indexers(values)
    return {"rope": rope, "indexer": _indexer(values, full, family.index_halves)}


def _indexer(values: Json, full: tuple[bool, ...], halves: bool) -> Indexer:
    check(values, _INDEXER)
    heads, width, topk = (values[key] for key in _INDEXER)
    if width < (rotated := values["qk_rope_head_dim"]):
        raise ValueError(f"index_head_dim is {width}, expected at least qk_rope_head_dim {rotated}")
    return Indexer(heads, width, topk, full, halves)


def parts_of_v4(values: Json, family: Family) -> Json:
    """What only DeepSeek-V4 has, of ``values`` in the hub's words.  YaRN multiplies neither cosine
    and sine nor scores by a factor."""
    check(values, _OF_V4)
    layers, ratios = values["num_hidden_layers"], tuple(values["compress_ratios"])
    if len(ratios) < layers or any(ratios[layers:]):
        problem = f"says {list(ratios)!r:.80}, expected {layers}, and 0 for what follows"
        raise ValueError(f"compress_ratios {problem}")
    if (heads := values["num_attention_heads"]) % (groups := values["o_groups"]):
        raise ValueError(f"num_attention_heads {heads} is not a multiple of o_groups {groups}")
    if values["num_hash_layers"] > layers:
        problem = f"is {values['num_hash_layers']}, but num_hidden_layers is {layers}"
        raise ValueError(f"num_hash_layers {problem}")
    if values["q_lora_rank"] is None:
        raise ValueError("q_lora_rank is null, expected a number")
    check(scaling := values["rope_scaling"] or {}, {}, "rope_scaling")
    settings = {**scaling, "rope_theta": values["compress_rope_theta"]}
    rope = replace(_rope(settings, values, family), mscale=0.0, mscale_all_dim=0.0)
    ratios = ratios[:layers]
    full = tuple(ratio == _RATIOS["compressed_sparse_attention"] for ratio in ratios)
    return {
        "rope": Rope(float(values["rope_theta"])),
        "indexer": _indexer(values, full, family.index_halves),
        "compressed": Compressed(**floats(values, _COMPRESSED), ratios=ratios, rope=rope),
        "hyper": HyperConnections(*floats(values, _HYPER).values()),
        "num_hash_layers": values["num_hash_layers"],
        "swiglu_limit": float(values["swiglu_limit"]),
    }


def _rope(settings: Json, values: Json, family: Family) -> Rope:
    """From ``rope_scaling`` + ``rope_theta`` or transformers 5's ``rope_parameters``."""
    kind = settings.pop("rope_type", settings.pop("type", None))
    settings.pop("max_position_embeddings", None)
    if family.compressed and settings.pop("attention_factor", 1.0) != 1.0:
        raise ValueError("rope setting 'attention_factor' is not supported, only 1.0")
    _check_rotated_part(values, settings.pop("partial_rotary_factor", None))
    if "llama_4_scaling_beta" in settings and not (family.query_scaling and kind == "yarn"):
        raise ValueError("rope setting 'llama_4_scaling_beta' is not supported in this model")
    if kind not in ("default", "yarn", None):
        supported = "only 'yarn' and 'default'"
        raise ValueError(f"rope type {kind!r:.80} is not supported, {supported}")
    required = {"rope_theta", "factor", "original_max_position_embeddings"}
    if kind != "yarn":
        required = {"rope_theta"}
        settings = {key: settings[key] for key in required}
    if unknown := sorted(settings.keys() - _ROPE):
        raise ValueError(f"rope setting {unknown[0]!r:.80} is not supported")
    check(settings, {key: _ROPE[key] for key in _ROPE if key in required | settings.keys()}, "rope")
    if kind == "yarn" and settings["rope_theta"] <= 1:
        problem = "expected more than 1, whose logarithm YaRN divides by"
        raise ValueError(f"rope.rope_theta is {settings['rope_theta']}, {problem}")
    return Rope(**floats(settings, _ROPE))


def _check_rotated_part(values: Json, factor: object) -> None:
    """``qk_rope_head_dim`` values are rotated, of which ``factor`` says that they are all of a
    head, or which part of one with what is not rotated."""
    part = values["qk_rope_head_dim"] / (values["qk_nope_head_dim"] + values["qk_rope_head_dim"])
    for found in (factor, values.get("partial_rotary_factor")):
        if found not in (None, 1.0, part):
            problem = f"is {found!r:.80}, expected 1 or {part:g}, which is qk_rope_head_dim"
            raise ValueError(f"partial_rotary_factor {problem}")


def floats(values: Json, kinds: Mapping[str, Kind]) -> Json:
    """What ``values`` has of these kinds; real numbers that JSON spells as integers as floats."""
    reals, given = (POSITIVE, NOT_NEGATIVE), {key: values[key] for key in kinds if key in values}
    return {key: float(value) if kinds[key] in reals else value for key, value in given.items()}


def in_hub_words(given: Json) -> Json:
    """The ``config.json`` of a DeepSeek-V4 in the words of DeepSeek's own files, if it is in those
    of transformers 5, with what latent attention would say.  ``ValueError`` names the key."""
    check(given, {"head_dim": integer(1, 1 << 16), "num_hidden_layers": integer(1, 1000)})
    values, layers, width = dict(given), given["num_hidden_layers"], given["head_dim"]
    if given.get("layer_types") is not None:
        check(given, {"layer_types": ListOf(one_of(*_RATIOS), layers, layers)})
        rates = {name: one_of(ratio) for name, ratio in _RATIOS.items() if ratio}
        check(given, {"compress_rates": rates})
        _set(values, "compress_ratios", [_RATIOS[name] for name in given["layer_types"]])
    if given.get("mlp_layer_types") is not None:
        check(given, {"mlp_layer_types": ListOf(one_of("hash_moe", "moe"), layers, layers)})
        count = given["mlp_layer_types"].count("hash_moe")
        if "hash_moe" in given["mlp_layer_types"][count:]:
            raise ValueError("mlp_layer_types has a hash_moe layer behind a moe one, expected none")
        _set(values, "num_hash_layers", count)
    if given.get("rope_parameters") is not None:
        theta = {"rope_theta": POSITIVE}
        kinds = {"main": {"rope_type": one_of("default"), **theta}, "compress": theta}
        check(given, {"rope_parameters": kinds})
        main, compress = (given["rope_parameters"][name] for name in kinds)
        values |= {"rope_scaling": compress, "rope_theta": main["rope_theta"]}
        values["compress_rope_theta"] = compress["rope_theta"]
    if given.get("qk_rope_head_dim") is None:
        check(given, {"partial_rotary_factor": number(0, 1)})
        values["qk_rope_head_dim"] = int(width * given["partial_rotary_factor"])
    check(values, {"qk_rope_head_dim": integer(1, width - 1)})
    values["qk_nope_head_dim"] = width - values["qk_rope_head_dim"]
    values |= dict.fromkeys(("kv_lora_rank", "v_head_dim"), width)
    values["intermediate_size"] = values.get("moe_intermediate_size")
    return {"rope_scaling": None, **values}


def _set(values: Json, key: str, value: object) -> None:
    if values.get(key) not in (None, value):
        raise ValueError(f"{key} is {values[key]!r:.80}, but other keys say {value!r:.80}")
    values[key] = value


def _full_indexers(values: Json) -> tuple[bool, ...]:
    """Which layers have an indexer of their own, by the first of ``indexer_types``,
    ``index_topk_pattern`` and ``index_topk_freq`` that is there; else all.  ``ValueError``."""
    layers: int = values["num_hidden_layers"]
    for key, words in (("indexer_types", ("full", "shared")), ("index_topk_pattern", ("F", "S"))):
        if (given := values.get(key)) is None:
            continue
        spelled = list(given) if isinstance(given, str) else given
        words = ("full", "shared") if "full" in spelled else words
        check({key: spelled}, {key: ListOf(one_of(*words), layers, layers)})
        full = tuple(word == words[0] for word in spelled)
        break
    else:
        step, offset = values.get("index_topk_freq", 1), values.get("index_skip_topk_offset", 2)
        key = "index_topk_freq"
        check({key: step}, {key: integer(1, 1000)})
        check({"index_skip_topk_offset": offset}, {"index_skip_topk_offset": integer(0, 1000)})
        full = tuple(max(layer - offset + 1, 0) % step == 0 for layer in range(layers))
    if not full[0]:
        raise ValueError(f"{key} leaves the first layer without an indexer, expected one")
    return full
