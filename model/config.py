"""``config.json`` of a DeepSeek-V2-family model, read once and frozen.

Every key that shapes the network is required, so that a misspelt one is an error instead of a
default.  Values that this network does not compute are refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import read_json

MAX_CONFIG_BYTES = 1 << 20
MAX_INT = 1 << 31

# Keys that don't change what the network computes, or are checked elsewhere in this file.
_KNOWN_KEYS = frozenset(
    """architectures attention_bias attention_dropout auto_map aux_loss_alpha bos_token_id dtype eos_token_id ep_size
    first_k_dense_replace head_dim hidden_act hidden_size initializer_range intermediate_size kv_lora_rank
    max_position_embeddings mlp_bias model_type moe_intermediate_size moe_layer_freq n_group n_routed_experts
    n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
    output_router_logits pad_token_id pretraining_tp q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim
    quantization_config rms_norm_eps rope_interleave rope_parameters rope_scaling rope_theta routed_scaling_factor
    scoring_func seq_aux tie_word_embeddings topk_group topk_method torch_dtype transformers_version use_cache
    v_head_dim vocab_size _name_or_path""".split()
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
        """Factor on the softmax scale: ``mscale(factor, mscale_all_dim) ** 2``, 1.5896 for
        DeepSeek-V2."""
        return self._mscale(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Config:
    """Geometry of one model.  Names are those of DeepSeek's ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int  # 0: none
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    unknown_keys: tuple[str, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """True if ``layer`` routes to experts; the others have one dense MLP of width
        ``intermediate_size``."""
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
        return (
            1.0
            / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
            * self.rope.softmax_factor
        )


class _Reader:
    """Typed access to one JSON object; every complaint names the file, the key and the value."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def fail(self, key: str, expected: str) -> ConfigError:
        found = repr(self.values[key])[:80] if key in self.values else "nothing"
        return ConfigError(f"{self.where}: {key} is {found}, expected {expected}")

    def integer(
        self, key: str, low: int = 1, high: int = MAX_INT, default: int | None = None
    ) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, positive: bool = True) -> float:
        value: object = self.values.get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value < 1e30
            or (positive and value == 0)
        ):
            raise self.fail(key, "a positive number" if positive else "a number of at least 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def require(self, key: str, allowed: tuple[Any, ...], why: str = "") -> None:
        """Refuse ``key`` unless absent or one of ``allowed``."""
        if key in self.values and self.values[key] not in allowed:
            supported = " or ".join(json.dumps(value) for value in allowed)
            raise ConfigError(
                f"{self.where}: {key} {json.dumps(self.values[key])[:80]} is not supported, only {supported}{why}"
            )


def _read_rope(values: dict[str, Any], where: str) -> Rope:
    """Settings from ``rope_scaling`` + ``rope_theta`` (DeepSeek) or ``rope_parameters``
    (transformers 5)."""
    given = [
        (key, values[key])
        for key in ("rope_parameters", "rope_scaling")
        if values.get(key) is not None
    ]
    for key, value in given:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} is {value!r:.80}, expected an object or null")
    scaling = given[0][1] if given else {}
    merged = {"rope_theta": values.get("rope_theta", 10000.0), **scaling}
    reader = _Reader(merged, f"{where}: rope settings")
    theta = reader.number("rope_theta")
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind in ("default", None):
        return Rope(theta)
    if kind != "yarn":
        raise ConfigError(
            f"{where}: rope type {kind!r:.80} is not supported, only 'yarn' and 'default'"
        )
    known = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
    known |= {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    if unknown := sorted(set(merged) - known):
        raise ConfigError(f"{where}: rope setting {unknown[0]!r:.80} is not supported")
    return Rope(
        theta,
        factor=reader.number("factor"),
        original_max_position_embeddings=reader.integer("original_max_position_embeddings"),
        beta_fast=reader.number("beta_fast", 32.0),
        beta_slow=reader.number("beta_slow", 1.0),
        mscale=reader.number("mscale", 1.0, positive=False),
        mscale_all_dim=reader.number("mscale_all_dim", 0.0, positive=False),
    )


def _token_ids(values: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    found = values.get(key)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if len(ids) > 64 or any(
        not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < MAX_INT for i in ids
    ):
        raise ConfigError(f"{where}: {key} is {found!r:.80}, expected a token id or a list of them")
    return tuple(ids)


def _refuse_unsupported(reader: _Reader) -> None:
    values, where = reader.values, reader.where
    if values.get("model_type") != "deepseek_v2":
        raise ConfigError(
            f"{where}: model_type {values.get('model_type')!r:.80} is not supported, only 'deepseek_v2'"
        )
    architectures = values.get("architectures") or ["DeepseekV2ForCausalLM"]
    if architectures != ["DeepseekV2ForCausalLM"]:
        raise ConfigError(
            f"{where}: architectures {architectures!r:.80} is not supported, only DeepseekV2ForCausalLM"
        )
    if values.get("quantization_config"):
        raise ConfigError(
            f"{where}: quantization_config is set; give the original bf16, fp16 or fp32 checkpoint"
        )
    reader.require("scoring_func", ("softmax",))
    reader.require("topk_method", ("greedy", "group_limited_greedy"))
    reader.require("hidden_act", ("silu",))
    reader.require("attention_bias", (False, None))
    reader.require("mlp_bias", (False, None))
    reader.require("ep_size", (1, None))
    reader.require("rope_interleave", (True, None))
    reader.require(
        "num_key_value_heads",
        (values.get("num_attention_heads"), None),
        " (MLA has one key a head)",
    )


def parse_config(values: dict[str, Any], where: str = "config.json") -> Config:
    """A frozen ``Config`` from the parsed JSON; raises ``ConfigError`` naming the key for anything
    unsupported."""
    reader = _Reader(values, where)
    _refuse_unsupported(reader)
    grouped = values.get("topk_method", "greedy") == "group_limited_greedy"
    bos = _token_ids(values, "bos_token_id", where)
    config = Config(
        vocab_size=reader.integer("vocab_size", high=1 << 24),
        hidden_size=reader.integer("hidden_size", high=1 << 20),
        intermediate_size=reader.integer("intermediate_size", high=1 << 22),
        moe_intermediate_size=reader.integer("moe_intermediate_size", high=1 << 20),
        num_hidden_layers=reader.integer("num_hidden_layers", high=1000),
        num_attention_heads=reader.integer("num_attention_heads", high=4096),
        n_routed_experts=reader.integer("n_routed_experts", high=4096),
        n_shared_experts=0
        if values.get("n_shared_experts", 0) is None
        else reader.integer("n_shared_experts", 0, 256),
        num_experts_per_tok=reader.integer("num_experts_per_tok", high=256),
        n_group=reader.integer("n_group", high=4096) if grouped else 1,
        topk_group=reader.integer("topk_group", high=4096) if grouped else 1,
        topk_method=values.get("topk_method", "greedy"),
        norm_topk_prob=reader.flag("norm_topk_prob", False),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        first_k_dense_replace=reader.integer("first_k_dense_replace", 0),
        moe_layer_freq=reader.integer("moe_layer_freq", default=1),
        q_lora_rank=None
        if values.get("q_lora_rank", 0) is None
        else reader.integer("q_lora_rank", high=1 << 20),
        kv_lora_rank=reader.integer("kv_lora_rank", high=1 << 20),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim", high=1 << 16),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim", high=1 << 16),
        v_head_dim=reader.integer("v_head_dim", high=1 << 16),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope=_read_rope(values, where),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_token_ids(values, "eos_token_id", where),
        unknown_keys=tuple(sorted(str(key)[:80] for key in set(values) - _KNOWN_KEYS)),
    )
    _check_consistency(config, where)
    return config


def _check_consistency(config: Config, where: str) -> None:
    if config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"{where}: qk_rope_head_dim is {config.qk_rope_head_dim}, expected an even number"
        )
    if config.n_routed_experts % config.n_group:
        raise ConfigError(
            f"{where}: n_routed_experts {config.n_routed_experts} is not a multiple of n_group {config.n_group}"
        )
    if config.topk_group > config.n_group:
        raise ConfigError(
            f"{where}: topk_group {config.topk_group} is more than n_group {config.n_group}"
        )
    reachable = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise ConfigError(
            f"{where}: num_experts_per_tok is {config.num_experts_per_tok}, but the gate can reach only {reachable} experts"
        )
    if not config.moe_layers:
        raise ConfigError(
            f"{where}: first_k_dense_replace {config.first_k_dense_replace} leaves no layer with experts"
        )


def read_config(path: Path) -> Config:
    """The ``Config`` in the file ``path``."""
    return parse_config(read_json(path, MAX_CONFIG_BYTES), str(path))
