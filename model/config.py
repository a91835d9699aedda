"""``config.json`` of a model of one of the families (``slotmoe.model.families``), read once and
frozen.

Every key that shapes the network is required, so that a misspelt one is an error instead of a
default.  Values that this network does not compute are refused by name.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import (
    FLAG,
    Json,
    Kind,
    ListOf,
    check,
    integer,
    number,
    one_of,
    or_null,
    parse_json,
    read_json,
)
from slotmoe.model.checkpoint.encodings import Encoding, parse_encoding
from slotmoe.model.families import FAMILIES, OTHERS, WRAPPERS, Family
from slotmoe.model.files import ReadFile

MAX_CONFIG_BYTES = 1 << 20
MAX_INT = 1 << 31

_POSITIVE, _NOT_NEGATIVE = number(1e-30, 1e30), number(0, 1e30)
_TOKEN_IDS = ListOf(integer(0, MAX_INT - 1), 0, 64)
_SUPPORTED: dict[str, tuple[object, ...]] = {  # values that every family has; absent is fine too
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "ep_size": (1, None),
}
_FLAGS = {"norm_topk_prob": False, "tie_word_embeddings": False, "rope_interleave": True}
_DEFAULTS = {"moe_layer_freq": 1, "index_topk": None, "num_nextn_predict_layers": 0, **_FLAGS}
# What null stands for.
_NULLS = {"n_shared_experts": 0, "num_nextn_predict_layers": 0, **_FLAGS}
# What a model with more than text says outside its text_config.
_OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings (YaRN: arXiv 2309.00071).  ``factor`` 1.0 means plain RoPE."""

    rope_theta: Annotated[float, _POSITIVE]
    factor: Annotated[float, _POSITIVE] = 1.0
    original_max_position_embeddings: Annotated[int, integer(1, MAX_INT)] = 1
    beta_fast: Annotated[float, _POSITIVE] = 32.0
    beta_slow: Annotated[float, _POSITIVE] = 1.0
    mscale: Annotated[float, _NOT_NEGATIVE] = 1.0
    mscale_all_dim: Annotated[float, _NOT_NEGATIVE] = 0.0
    llama_4_scaling_beta: Annotated[float, _NOT_NEGATIVE] = 0.0  # 0: queries are not scaled

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
class Config:
    """Geometry of one model.  Names are those of DeepSeek's ``config.json``; beside the type of a
    value that is read from there as it is stands what it has to be.

    ``text_only``: the checkpoint also has parts that are not text, which are left out.  ``mtp``:
    the head that predicts one token more is used, as layer ``num_hidden_layers``.
    """

    family: Family
    vocab_size: Annotated[int, integer(1, 1 << 24)]
    hidden_size: Annotated[int, integer(1, 1 << 20)]
    intermediate_size: Annotated[int, integer(1, 1 << 22)]
    moe_intermediate_size: Annotated[int, integer(1, 1 << 20)]
    num_hidden_layers: Annotated[int, integer(1, 1000)]
    num_attention_heads: Annotated[int, integer(1, 4096)]
    n_routed_experts: Annotated[int, integer(1, 4096)]
    n_shared_experts: Annotated[int, integer(0, 256)]  # 0: none
    num_experts_per_tok: Annotated[int, integer(1, 256)]
    n_group: Annotated[int, integer(1, 4096)]
    topk_group: Annotated[int, integer(1, 4096)]
    norm_topk_prob: Annotated[bool, FLAG]
    routed_scaling_factor: Annotated[float, _POSITIVE]
    first_k_dense_replace: Annotated[int, integer(0, MAX_INT)]
    moe_layer_freq: Annotated[int, integer(1, MAX_INT)]
    q_lora_rank: Annotated[int | None, or_null(integer(1, 1 << 20))]
    kv_lora_rank: Annotated[int, integer(1, 1 << 20)]
    qk_nope_head_dim: Annotated[int, integer(1, 1 << 16)]
    qk_rope_head_dim: Annotated[int, integer(1, 1 << 16)]
    v_head_dim: Annotated[int, integer(1, 1 << 16)]
    rms_norm_eps: Annotated[float, _POSITIVE]
    rope: Rope
    rope_interleave: Annotated[bool, FLAG]  # rotated pairs stand side by side
    index_topk: Annotated[int | None, or_null(integer(1, MAX_INT))]
    max_position_embeddings: Annotated[int, integer(1, MAX_INT)]
    tie_word_embeddings: Annotated[bool, FLAG]
    num_nextn_predict_layers: Annotated[int, integer(0, 1000)]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    encoding: Encoding | None = None  # of a checkpoint's quantized weights
    text_only: bool = False
    mtp: bool = False
    unknown_keys: tuple[str, ...] = ()
    swiglu_limit: float = 0.0  # of an MLP's gate and up; 0: none

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` routes to experts; others have a dense MLP of ``intermediate_size``."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.layer_count) if self.is_moe(layer))

    @property
    def layer_count(self) -> int:
        """Decoder layers, with that of the head that predicts one token more if it is used."""
        return self.num_hidden_layers + self.mtp

    def with_mtp(self, where: Path, wanted_by: str) -> "Config":
        """The same with the head that predicts one token more (``slotmoe.model.mtp``), which the
        option ``wanted_by`` asks for.  Raises ``ConfigError`` where the model has none."""
        count, layer = self.num_nextn_predict_layers, self.num_hidden_layers
        if count and self.is_moe(layer):
            return replace(self, mtp=True)
        problem = f"num_nextn_predict_layers is {count}, expected 1 or more"
        if count:
            head = f"layer {layer}, the head that predicts one token more, no experts"
            problem = f"moe_layer_freq {self.moe_layer_freq} gives {head}"
        raise ConfigError(f"{where}: {problem} for {wanted_by}; leave {wanted_by} out")

    @property
    def latent_width(self) -> int:
        """Values that the latent cache holds for one token of one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        factor = self.rope.softmax_factor if self.family.softmax_factor else 1.0
        return 1.0 / math.sqrt(width) * factor

    @property
    def max_context(self) -> tuple[int, str]:
        """Positions that a sequence may have, and what says so.  Up to ``index_topk`` an indexed
        attention is to all positions, and beyond it this network does not compute it."""
        limit = self.max_position_embeddings
        if self.index_topk is None or self.index_topk >= limit:
            return limit, "max_position_embeddings"
        reason = "index_topk; its sparse attention beyond that is not supported, lower --context"
        return self.index_topk, reason

    @property
    def notes(self) -> list[str]:
        """What a user has to know of how this model is run."""
        notes = ["only the text part of this model is used"] if self.text_only else []
        limit, _ = self.max_context
        if limit < self.max_position_embeddings:
            why = "up to index_topk its sparse attention is to all positions"
            notes.append(f"a context has at most {limit} positions: {why}, and exact")
        return notes


def _kinds(of: type) -> dict[str, Kind]:
    hints = get_type_hints(of, include_extras=True)
    annotated = {key: hint for key, hint in hints.items() if get_origin(hint) is Annotated}
    return {key: hint.__metadata__[0] for key, hint in annotated.items()}


_CONFIG, _ROPE = _kinds(Config), _kinds(Rope)
_REALS = {key for key, kind in {**_CONFIG, **_ROPE}.items() if kind in (_POSITIVE, _NOT_NEGATIVE)}
# With these, the keys that don't change what the network computes or are read below.
_KNOWN_KEYS = {*_CONFIG, *_SUPPORTED} | set(
    """attention_dropout auto_map aux_loss_alpha bos_token_id dtype eos_token_id head_dim
    initializer_range model_type num_key_value_heads output_router_logits pad_token_id
    pretraining_tp qk_head_dim quantization_config rope_parameters rope_scaling rope_theta seq_aux
    torch_dtype transformers_version use_cache _name_or_path architectures scoring_func topk_method
    mlp_layer_types layer_types partial_rotary_factor num_mtp_layers
    index_head_dim index_n_heads index_topk_freq index_topk_pattern index_skip_topk_offset
    index_share_for_mtp_iteration indexer_rope_interleave indexer_types moe_router_dtype
    sliding_window""".split()
)


def parse_config(values: Json, where: str = "config.json") -> Config:
    """A ``Config`` from the parsed JSON; ``ConfigError`` names the key that is unsupported."""
    try:
        return _parse(values)
    except ValueError as problem:
        raise ConfigError(f"{where}: {problem}") from None


def read_config(path: Path) -> Config:
    """The ``Config`` in the file ``path``."""
    return parse_config(read_json(path, MAX_CONFIG_BYTES), str(path))


def config_among(read: ReadFile, where: Path) -> Config:
    """The ``Config`` among the small files of the model at ``where``."""
    path = where / "config.json"
    if (data := read("config.json", MAX_CONFIG_BYTES)) is None:
        raise ConfigError(f"{path}: is missing; not a model in Hugging Face's format")
    return parse_config(parse_json(data, path), str(path))


def _parse(outer: Json) -> Config:
    given = _text_part(outer)
    family = _family(given)
    _refuse_unsupported(given, family)
    values = {**_DEFAULTS, **given}
    values |= {key: value for key, value in _NULLS.items() if values.get(key, value) is None}
    if values.get("topk_method", family.topk_methods[0]) == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    if values.get("mlp_layer_types") is not None:
        values["first_k_dense_replace"] = _dense_layers(values)
    check(values, _CONFIG)
    if family.indexed:
        check(given, {"index_topk": integer(1, MAX_INT)})
    bos, eos = (_token_ids(values, key) for key in ("bos_token_id", "eos_token_id"))
    config = Config(
        family=family,
        **_floats({key: values[key] for key in _CONFIG}),
        rope=_rope(values, family),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        encoding=parse_encoding(given),
        text_only=given is not outer,
        unknown_keys=tuple(sorted(str(key)[:80] for key in given.keys() - _KNOWN_KEYS)),
    )
    _check_consistency(config)
    return config


def _text_part(values: Json) -> Json:
    """The config of a model's text part, which is the whole of most."""
    if values.get("model_type") not in WRAPPERS:
        return values
    check(values, {"text_config": {}})
    inner: Json = values["text_config"]
    return {key: values[key] for key in _OUTER if key in values} | inner


def _family(values: Json) -> Family:
    name = values.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    why = f" ({OTHERS[name]})" if isinstance(name, str) and name in OTHERS else ""
    only = ", ".join(json.dumps(known) for known in FAMILIES)
    problem = f"model_type {json.dumps(name)[:80]} is not supported{why}"
    raise ValueError(f"{problem}, only {only}; use a model of these families")


def _refuse_unsupported(values: Json, family: Family) -> None:
    supported = {
        "architectures": ([family.architecture], [], None),
        "scoring_func": (family.scoring,),
        "topk_method": family.topk_methods,
        **_SUPPORTED,
        "num_key_value_heads": (values.get("num_attention_heads"), None),  # MLA has one key a head
        "rope_interleave": (*family.rope_interleave, None),
    }
    if not family.indexed:
        supported["index_topk"] = (None,)
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            only = " or ".join(json.dumps(value) for value in allowed)
            found = json.dumps(values.get(key))[:80]
            raise ValueError(f"{key} {found} is not supported, only {only}")


def _dense_layers(values: Json) -> int:
    """``first_k_dense_replace`` as ``mlp_layer_types`` spells it."""
    check(values, {"mlp_layer_types": ListOf(one_of("dense", "sparse"), 1, 1000)})
    types: list[str] = values["mlp_layer_types"]
    dense = types.count("dense")
    for key, wanted in {"num_hidden_layers": len(types), "first_k_dense_replace": dense}.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{key} is {values[key]!r:.80}, but mlp_layer_types says {wanted}")
    if "dense" in types[dense:]:
        raise ValueError("mlp_layer_types has a dense layer behind a sparse one, expected none")
    return dense


def _token_ids(values: Json, key: str) -> tuple[int, ...]:
    """A token id, a list of them, or none."""
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    check(ids, _TOKEN_IDS, key)
    return tuple(ids)


def _rope(values: Json, family: Family) -> Rope:
    """From ``rope_scaling`` + ``rope_theta`` or transformers 5's ``rope_parameters``."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    for key in keys:
        check(values[key], {}, key)
    settings = {"rope_theta": values.get("rope_theta", 10000.0)}
    settings |= values[keys[0]] if keys else {}
    kind = settings.pop("rope_type", settings.pop("type", None))
    settings.pop("max_position_embeddings", None)
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
    return Rope(**_floats(settings))


def _check_rotated_part(values: Json, factor: object) -> None:
    """``qk_rope_head_dim`` values are rotated, of which ``factor`` says that they are all of a
    head, or which part of one with what is not rotated."""
    part = values["qk_rope_head_dim"] / (values["qk_nope_head_dim"] + values["qk_rope_head_dim"])
    for found in (factor, values.get("partial_rotary_factor")):
        if found not in (None, 1.0, part):
            problem = f"is {found!r:.80}, expected 1 or {part:g}, which is qk_rope_head_dim"
            raise ValueError(f"partial_rotary_factor {problem}")


def _floats(values: Json) -> Json:
    """The same with real numbers that JSON spells as integers turned into floats."""
    return {key: float(value) if key in _REALS else value for key, value in values.items()}


def _check_consistency(c: Config) -> None:
    experts, top_k = c.n_routed_experts, c.num_experts_per_tok
    reachable = experts // c.n_group * c.topk_group
    if c.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {c.qk_rope_head_dim}, expected an even number")
    if experts % c.n_group:
        raise ValueError(f"n_routed_experts {experts} is not a multiple of n_group {c.n_group}")
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
