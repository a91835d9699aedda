"""``config.json`` of a DeepSeek-V2-family model, read once and frozen.

Every key that shapes the network is required, so that a misspelt one is an error instead of a
default.  Values that this network does not compute are refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import read_json

MAX_CONFIG_BYTES = 1 << 20
MAX_INT = 1 << 31

_SUPPORTED: dict[str, tuple[Any, ...]] = {  # values that this network computes; absent is fine too
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "ep_size": (1, None),
    "rope_interleave": (True, None),
}
_ROPE_KEYS = frozenset(
    """rope_theta rope_type type factor original_max_position_embeddings beta_fast beta_slow mscale
    mscale_all_dim""".split()
)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings (YaRN: arXiv 2309.00071).  ``factor`` 1.0 means plain RoPE."""

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def table_scale(self) -> float:
        """Factor on the cosine and sine table."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax scale: ``mscale(factor, mscale_all_dim) ** 2``."""
        return self._mscale(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Config:
    """Geometry of one model.  Names are those of DeepSeek's ``config.json``; beside the type of an
    integer that is read from there stand the lowest and the highest value."""

    vocab_size: Annotated[int, 1, 1 << 24]
    hidden_size: Annotated[int, 1, 1 << 20]
    intermediate_size: Annotated[int, 1, 1 << 22]
    moe_intermediate_size: Annotated[int, 1, 1 << 20]
    num_hidden_layers: Annotated[int, 1, 1000]
    num_attention_heads: Annotated[int, 1, 4096]
    n_routed_experts: Annotated[int, 1, 4096]
    n_shared_experts: Annotated[int, 0, 256]  # 0: none
    num_experts_per_tok: Annotated[int, 1, 256]
    n_group: Annotated[int, 1, 4096]
    topk_group: Annotated[int, 1, 4096]
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: Annotated[int, 0, MAX_INT]
    moe_layer_freq: Annotated[int, 1, MAX_INT]
    q_lora_rank: Annotated[int | None, 1, 1 << 20]
    kv_lora_rank: Annotated[int, 1, 1 << 20]
    qk_nope_head_dim: Annotated[int, 1, 1 << 16]
    qk_rope_head_dim: Annotated[int, 1, 1 << 16]
    v_head_dim: Annotated[int, 1, 1 << 16]
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: Annotated[int, 1, MAX_INT]
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    unknown_keys: tuple[str, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` routes to experts; others have a dense MLP of ``intermediate_size``."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_hidden_layers) if self.is_moe(layer))

    @property
    def latent_width(self) -> int:
        """Values that the latent cache holds for one token of one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        return 1.0 / math.sqrt(width) * self.rope.softmax_factor


_INTEGERS = {
    key: hint.__metadata__
    for key, hint in get_type_hints(Config, include_extras=True).items()
    if get_origin(hint) is Annotated
}
# With these, the keys that don't change what the network computes or are read below.
_KNOWN_KEYS = {*_INTEGERS, *_SUPPORTED} | set(
    """architectures attention_dropout auto_map aux_loss_alpha bos_token_id dtype eos_token_id
    head_dim initializer_range model_type norm_topk_prob num_key_value_heads output_router_logits
    pad_token_id pretraining_tp qk_head_dim quantization_config rms_norm_eps rope_parameters
    rope_scaling rope_theta routed_scaling_factor seq_aux tie_word_embeddings torch_dtype
    transformers_version use_cache _name_or_path""".split()
)


class _Reader:
    """Typed access to one JSON object; every complaint names the file, the key and the value."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {problem}")

    def unexpected(self, key: str, expected: str) -> ConfigError:
        given = repr(self.values[key])[:80] if key in self.values else "nothing"
        return self.error(f"{key} is {given}, expected {expected}")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.values.get(key)
        if not _is_integer(value, low, high):
            raise self.unexpected(key, f"an integer from {low} to {high}")
        return int(value)  # type: ignore[arg-type]  # an int by now

    def number(self, key: str, positive: bool = True) -> float:
        value = self.values.get(key)
        real = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
        if not real or (positive and value == 0):
            expected = "a positive number" if positive else "a number of at least 0"
            raise self.unexpected(key, expected)
        return float(value)  # type: ignore[arg-type]  # a number by now

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.unexpected(key, "true or false")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > 64 or not all(_is_integer(item, 0, MAX_INT - 1) for item in ids):
            raise self.unexpected(key, "a token id or a list of them")
        return tuple(ids)

    def rope(self) -> Rope:
        """From ``rope_scaling`` + ``rope_theta`` or transformers 5's ``rope_parameters``."""
        sources = "rope_parameters", "rope_scaling"
        keys = [key for key in sources if self.values.get(key) is not None]
        for key in keys:
            if not isinstance(self.values[key], dict):
                raise self.unexpected(key, "an object or null")
        given = {"rope_theta": self.values.get("rope_theta", 10000.0)}
        given |= self.values[keys[0]] if keys else {}
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        reader = _Reader({**defaults, **given}, f"{self.where}: rope settings")
        theta = reader.number("rope_theta")
        kind = given.get("rope_type", given.get("type"))
        if kind in ("default", None):
            return Rope(theta)
        if kind != "yarn":
            raise self.error(f"rope type {kind!r:.80} is not supported, only 'yarn' and 'default'")
        if unknown := sorted(given.keys() - _ROPE_KEYS):
            raise self.error(f"rope setting {unknown[0]!r:.80} is not supported")
        original = reader.integer("original_max_position_embeddings", 1, MAX_INT)
        numbers = {key: reader.number(key) for key in ("factor", "beta_fast", "beta_slow")}
        numbers |= {key: reader.number(key, False) for key in ("mscale", "mscale_all_dim")}
        return Rope(theta, original_max_position_embeddings=original, **numbers)


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _refuse_unsupported(reader: _Reader) -> None:
    values, mine = reader.values, ["DeepseekV2ForCausalLM"]
    if (kind := values.get("model_type")) != "deepseek_v2":
        raise reader.error(f"model_type {kind!r:.80} is not supported, only 'deepseek_v2'")
    if (architectures := values.get("architectures") or mine) != mine:
        raise reader.error(f"architectures {architectures!r:.80} is not supported, only {mine[0]}")
    if values.get("quantization_config"):
        problem = "quantization_config is set; give the original bf16, fp16 or fp32 checkpoint"
        raise reader.error(problem)
    heads = values.get("num_attention_heads"), None
    for key, allowed in {**_SUPPORTED, "num_key_value_heads": heads}.items():
        if key in values and values[key] not in allowed:
            supported = " or ".join(json.dumps(value) for value in allowed)
            why = " (MLA has one key a head)" if key == "num_key_value_heads" else ""
            given = json.dumps(values[key])[:80]
            raise reader.error(f"{key} {given} is not supported, only {supported}{why}")


def parse_config(values: dict[str, Any], where: str = "config.json") -> Config:
    """A ``Config`` from the parsed JSON; ``ConfigError`` names the key that is unsupported."""
    unknown = tuple(sorted(str(key)[:80] for key in values.keys() - _KNOWN_KEYS))
    _refuse_unsupported(_Reader(values, where))
    values = {"moe_layer_freq": 1, "topk_method": "greedy", **values}
    if values["topk_method"] == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    if "n_shared_experts" in values and values["n_shared_experts"] is None:
        values["n_shared_experts"] = 0
    reader = _Reader(values, where)
    sizes: dict[str, Any] = {}
    for key, (low, high) in _INTEGERS.items():
        absent = key == "q_lora_rank" and values.get(key, 0) is None
        sizes[key] = None if absent else reader.integer(key, low, high)
    bos = reader.token_ids("bos_token_id")
    config = Config(
        **sizes,
        topk_method=values["topk_method"],
        norm_topk_prob=reader.flag("norm_topk_prob"),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope=reader.rope(),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=reader.token_ids("eos_token_id"),
        unknown_keys=unknown,
    )
    _check_consistency(config, reader)
    return config


def _check_consistency(c: Config, reader: _Reader) -> None:
    experts, top_k = c.n_routed_experts, c.num_experts_per_tok
    reachable = experts // c.n_group * c.topk_group
    if c.qk_rope_head_dim % 2:
        raise reader.error(f"qk_rope_head_dim is {c.qk_rope_head_dim}, expected an even number")
    if experts % c.n_group:
        raise reader.error(f"n_routed_experts {experts} is not a multiple of n_group {c.n_group}")
    if c.topk_group > c.n_group:
        raise reader.error(f"topk_group {c.topk_group} is more than n_group {c.n_group}")
    if top_k > reachable:
        problem = f"the gate can reach only {reachable} experts"
        raise reader.error(f"num_experts_per_tok is {top_k}, but {problem}")
    if not c.moe_layers:
        dense = c.first_k_dense_replace
        raise reader.error(f"first_k_dense_replace {dense} leaves no layer with experts")


def read_config(path: Path) -> Config:
    """The ``Config`` in the file ``path``."""
    return parse_config(read_json(path, MAX_CONFIG_BYTES), str(path))
