"""Keys of ``config.json`` that two publishers spell differently, in the words of one of them."""

from slotmoe.jsonfile import Json, ListOf, check, integer, number, one_of

RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
"""Positions that become one, by transformers' name of such a layer."""
_LAYERS = {"num_hidden_layers": integer(1, 1000)}


def in_hub_words(given: Json) -> Json:
    """The ``config.json`` of a DeepSeek-V4 in the words of DeepSeek's own files, if it is in those
    of transformers 5, with what latent attention would say.  Raises ``ValueError``, which names
    the key."""
    check(given, {"head_dim": integer(1, 1 << 16), **_LAYERS})
    values, layers, width = dict(given), given["num_hidden_layers"], given["head_dim"]
    if given.get("layer_types") is not None:
        check(given, {"layer_types": ListOf(one_of(*RATIOS), layers, layers)})
        rates = {name: one_of(ratio) for name, ratio in RATIOS.items() if ratio}
        check(given, {"compress_rates": rates})
        _set(values, "compress_ratios", [RATIOS[name] for name in given["layer_types"]])
    if given.get("mlp_layer_types") is not None:
        check(given, {"mlp_layer_types": ListOf(one_of("hash_moe", "moe"), layers, layers)})
        count = given["mlp_layer_types"].count("hash_moe")
        if "hash_moe" in given["mlp_layer_types"][count:]:
            raise ValueError("mlp_layer_types has a hash_moe layer behind a moe one, expected none")
        _set(values, "num_hash_layers", count)
    if given.get("rope_parameters") is not None:
        check(given, {"rope_parameters": {"main": {}, "compress": {}}})
        main, compress = (given["rope_parameters"][name] for name in ("main", "compress"))
        check(main, {"rope_type": one_of("default")}, "rope_parameters.main")
        for name, rope in (("main", main), ("compress", compress)):
            check(rope, {"rope_theta": number(1e-30, 1e30)}, f"rope_parameters.{name}")
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


def full_indexers(values: Json) -> tuple[bool, ...]:
    """Which layers have an indexer of their own, by the first of ``indexer_types``,
    ``index_topk_pattern`` and ``index_topk_freq`` that is there; else all.  Raises ``ValueError``,
    which names the key."""
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
