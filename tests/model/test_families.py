"""Every family: the reference path beside transformers, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.jsonfile import Json, read_json
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import parse_config
from slotmoe.model.families import FAMILIES, OTHERS
from slotmoe.model.names import resident_shapes, role_of, tensor_shapes
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from tests.support import v4
from tests.support.families import (
    CASES,
    DSA,
    GLM,
    INDEXED,
    LONG,
    MISTRAL,
    REMOVE,
    SOFTMAX,
    V3,
    V32,
    config_of,
    write_family,
)
from tests.support.oracle import relative_error, transformers_logits
from tests.support.params import nth

IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("name", nth(2, CASES))
def test_reference_path_equals_transformers(name, tmp_path):
    family, overrides = CASES[name]
    write_family(tmp_path, family, **overrides)
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative_error(runtime.logits(IDS), transformers_logits(tmp_path, IDS)) <= 1e-5


PART = {**LONG, "partial_rotary_factor": 0.25}


def types(letters):
    words = {"d": "dense", "s": "sparse"}
    return {"mlp_layer_types": [words[letter] for letter in letters]}


def rope(**parameters):
    return {**SOFTMAX, "rope_parameters": parameters}


BEHIND = {**types("sds"), "first_k_dense_replace": REMOVE}
BETA = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
WRONG = {  # family, what is wrong, words of the message
    "softmax": (V3, {"scoring_func": "softmax"}, 'scoring_func "softmax" only "sigmoid"'),
    "other-class": (GLM, {"architectures": ["DeepseekV3ForCausalLM"]}, "architectures only Glm4"),
    "grouped-keys": (GLM, {"num_key_value_heads": 2}, "num_key_value_heads 2 only 4"),
    "halves": (V32, {**INDEXED, "rope_interleave": False}, "rope_interleave false only true"),
    "no-index": (V32, {}, "index_n_heads is missing"),
    "index-of-another": (V3, {"index_topk": 64}, "index_topk 64 only null"),
    "small-groups": (V3, {"n_group": 8, "topk_group": 4}, "n_group is 8 at least 2 experts"),
    "dense-behind": (GLM, BEHIND, "mlp_layer_types dense layer behind"),
    "types-too-few": (GLM, types("ds"), "num_hidden_layers is 3 2"),
    "types-disagree": (GLM, types("dds"), "first_k_dense_replace is 1 mlp_layer_types says 2"),
    "part": (GLM, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 expected 1 or"),
    "scaled-queries": (V3, {"rope_parameters": LONG}, "llama_4_scaling_beta is not supported"),
    "scaled-without-yarn": (MISTRAL, rope(**BETA), "llama_4_scaling_beta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_the_family_has_not_is_named(name):
    family, overrides, words = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        parse_config(config_of(family, **overrides))
    message = str(caught.value)
    assert all(word in message for word in words.split()), message
    assert message.startswith("config.json: ") and "\n" not in message


def test_a_family_that_is_close_says_why_it_is_not_supported():
    for name, why in OTHERS.items():
        with pytest.raises(ConfigError) as caught:
            parse_config({**config_of(V3), "model_type": name})
        message = str(caught.value)
        assert f'model_type "{name}" is not supported ({why}), only' in message
        assert all(json.dumps(family) in message for family in FAMILIES)


def test_the_text_part_of_a_model_with_images_is_read():
    inner = {**config_of(V3), "model_type": "kimi_k2"}
    outer = {"model_type": "kimi_k25", "architectures": ["X"], "vision_config": {"model_type": "x"}}
    outer["eos_token_id"] = 7
    config = parse_config({**outer, "text_config": inner})
    assert config.text_only and config.hidden_size == 64 and config.eos_token_ids == (1,)
    assert config.notes == ["only the text part of this model is used"]
    del inner["eos_token_id"]
    assert parse_config({**outer, "text_config": inner}).eos_token_ids == (7,)
    for text, words in (({}, "is missing"), ({"text_config": []}, r"is \[\], which is not")):
        with pytest.raises(ConfigError, match=f"text_config {words}"):
            parse_config({**outer, **text})
    with pytest.raises(ConfigError, match='model_type "mistral" is not supported'):
        parse_config({"model_type": "mistral3", "text_config": {"model_type": "mistral"}})


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("what", ["missing", "too short", "not finite"])
def test_a_wrong_bias_is_refused_by_name(what, tmp_path):
    write_family(tmp_path / "source", V3, torch.bfloat16)
    file = tmp_path / "source" / "model.safetensors"
    weights = load_file(file)
    bias = weights.pop(BIAS).float()
    if what == "too short":
        weights[BIAS] = bias[:7]
    elif what == "not finite":
        weights[BIAS] = bias.index_fill(0, torch.tensor(3), torch.nan)
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=BIAS) as caught:
        quantize(tmp_path / "source", tmp_path / "export")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_layers_behind_the_last_are_not_exported(tmp_path):
    """The head that predicts a second token stands there."""
    write_family(tmp_path / "source", V3, torch.bfloat16, num_hidden_layers=4)
    config = config_of(V3, num_nextn_predict_layers=1)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    quantize(tmp_path / "source", tmp_path / "export")
    files = {path.name for path in (tmp_path / "export" / "experts").iterdir()}
    assert files == {"layer-00001.safetensors", "layer-00002.safetensors"}
    names = load_file(tmp_path / "export" / "resident.safetensors")
    assert not [name for name in names if name.startswith("model.layers.3.")]


@pytest.mark.parametrize("case", v4.V4_CASES)
def test_a_v4_is_the_same_in_both_spellings(case, tmp_path):
    """What is small stays as it is, in float32, and expert ids become int32."""
    for folder in ("transformers", "hub"):
        v4.write_v4(tmp_path / folder, case, hub=folder == "hub")
    with (
        open_checkpoint(tmp_path / "transformers") as ours,
        open_checkpoint(tmp_path / "hub") as theirs,
    ):
        assert ours.config == theirs.config and not ours.config.unknown_keys
        assert ours.infos.keys() == theirs.infos.keys() == dict(tensor_shapes(ours.config)).keys()
        wanted = {name: theirs.tensor(name) for name in theirs.infos}
        assert all(torch.equal(ours.tensor(name), wanted[name]) for name in wanted)
    quantize(tmp_path / "hub", tmp_path / "export")
    export = Export.open(tmp_path / "export")
    kept = [name for name in resident_shapes(ours.config) if role_of(name) in ("gate", "table")]
    assert len(kept) > 20
    for name in kept:
        table = name.endswith("tid2eid")
        stored = export.resident(name)
        assert stored.dtype == (torch.int32 if table else torch.float32)
        assert torch.equal(stored, wanted[name])


@pytest.mark.usefixtures("oracle")
def test_transformers_reads_the_same_of_both_spellings(tmp_path):
    """So that the names of ``tests/support/v4.py`` are DeepSeek's own."""
    v4.write_v4(tmp_path / "transformers", "v4-pro")
    v4.write_v4(tmp_path / "hub", "v4-pro", hub=True)
    assert torch.equal(
        v4.v4_logits(tmp_path / "hub", IDS), v4.v4_logits(tmp_path / "transformers", IDS)
    )


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_published_configs_name_more_layers_than_they_have(name):
    given = read_json(geometry_path(name), 1 << 20, Json)
    config = parse_config(given)
    assert config.compressed and config.indexer and config.hyper and not config.unknown_keys
    layers = config.num_hidden_layers
    assert config.compressed.ratios == tuple(given["compress_ratios"][:layers])
    assert config.indexer.full == tuple(ratio == 4 for ratio in config.compressed.ratios)
    assert len(given["compress_ratios"]) == layers + 1 and config.ratio(layers) == 0
    assert not config.has_indexer(layers) and config.latent_width == 512
    assert (config.num_hash_layers, config.swiglu_limit, config.hyper.mult) == (3, 10.0, 4)
    assert config.compressed.rope.table_scale == config.compressed.rope.softmax_factor == 1.0
    assert config.softmax_scale == pytest.approx(512**-0.5) and config.rope.rope_theta == 1e4
    head = config.with_mtp(Path("config.json"), "--keep-mtp")
    assert f"model.layers.{layers}.h_proj.weight" in resident_shapes(head)


def test_the_head_of_a_v4_is_layer_num_hidden_layers(tmp_path):
    changes = {"num_nextn_predict_layers": 1, "compress_ratios": [0, 4, 128, 4, 0]}
    v4.write_v4(tmp_path, "v4", hub=True, **changes)
    given = load_file(tmp_path / "model.safetensors")
    names = {"h_proj.weight": "h_proj.weight", "hc_head.hc_fn": "hc_head_fn"}
    names |= {"self_attn.sinks": "attn.attn_sink", "shared_head.norm.weight": "norm.weight"}
    names |= {"mlp.experts.7.down_proj.weight": "ffn.experts.7.w2.weight"}
    with open_checkpoint(tmp_path) as checkpoint:
        assert not any(name.startswith("model.layers.4.") for name in checkpoint.infos)
    with open_checkpoint(tmp_path, keep_mtp=True) as checkpoint:
        for name, theirs in names.items():
            found = checkpoint.tensor(f"model.layers.4.{name}")
            assert torch.equal(found, given[f"mtp.0.{theirs}"])
        assert sum(name.startswith("model.layers.4.") for name in checkpoint.infos) == 26 + 3 + 24
    quantize(tmp_path, tmp_path / "export", keep_mtp=True)
    assert Export.open(tmp_path / "export").mtp_layer == 4


RATIO, TYPE = "compress_ratios", "layer_types"
HASH_BEHIND = {"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}
HASH_BEHIND |= {"num_hash_layers": REMOVE}
WRONG_V4 = {  # what is wrong, words of the message
    "ratio": ({RATIO: [0, 4, 2, 4]}, "compress_ratios[2] is 2 0 or 4 or 128"),
    "ratio-of-v4.1": ({RATIO: [0, 2, 1, 1]}, "compress_ratios[1] is 2"),
    "too-few-ratios": ({RATIO: [0, 4, 128]}, "compress_ratios expected 4"),
    "compressing-head": ({RATIO: [0, 4, 128, 4, 4]}, "compress_ratios 0 for what follows"),
    "no-ratios": ({RATIO: REMOVE}, "compress_ratios is missing"),
    "hash-behind": (HASH_BEHIND, "mlp_layer_types hash_moe layer behind"),
    "hash-too-many": ({"num_hash_layers": 5}, "num_hash_layers is 5 num_hidden_layers is 4"),
    "hash-twice": ({"mlp_layer_types": ["moe"] * 4}, "num_hash_layers is 1 other keys say 0"),
    "layer-type": ({TYPE: ["full_attention"] * 4}, "layer_types[0] is 'full_attention'"),
    "rates-missing": ({TYPE: ["sliding_attention"] * 4}, "compress_rates. is missing"),
    "groups": ({"o_groups": 3}, "num_attention_heads 4 o_groups 3"),
    "rope-too-wide": ({"qk_rope_head_dim": 32}, "qk_rope_head_dim is 32 31"),
    "narrow-index": ({"index_head_dim": 8}, "index_head_dim is 8 qk_rope_head_dim 16"),
    "scoring": ({"scoring_func": "sigmoid"}, 'scoring_func "sigmoid" only "sqrtsoftplus"'),
    "expert-groups": ({"n_group": 4}, "n_group 4 only 1"),
    "not-normalized": ({"norm_topk_prob": False}, "norm_topk_prob false only true"),
    "keys": ({"num_key_value_heads": 4}, "num_key_value_heads 4 only 1"),
    "streams": ({"hc_mult": 0}, "hc_mult is 0"),
    "no-window": ({"sliding_window": REMOVE}, "sliding_window is missing"),
    "engram": ({"engram_layer_ids": [1]}, "engram_layer_ids [1] only"),
    "shared-keys": ({"kv_source_layer_ids": [1]}, "kv_source_layer_ids [1] only"),
    "kda": ({"linear_attn_config": {"kda_layers": [1]}}, "linear_attn_config only"),
    "another-v4": ({"model_type": "deepseek_v41"}, 'model_type "deepseek_v41" layers share keys'),
    "yarns-factor": ({"rope_scaling": {"type": "yarn", "attention_factor": 2}}, "attention_factor"),
}


@pytest.mark.parametrize("name", WRONG_V4)
def test_a_v4_of_another_kind_is_refused_by_the_name_of_the_key(name):
    overrides, words = WRONG_V4[name]
    with pytest.raises(ConfigError) as caught:
        parse_config(v4.config_of("v4", **overrides))
    message = str(caught.value)
    assert all(word in message for word in words.split()), message
    assert message.startswith("config.json: ") and "\n" not in message


def test_other_rates_of_transformers_are_refused_by_the_name_of_the_key():
    config = v4.in_transformers_words(v4.config_of("v4"))
    assert parse_config(config) == parse_config(v4.config_of("v4"))
    config["compress_rates"] = {v4.CSA: 4, v4.HCA: 16}
    with pytest.raises(ConfigError, match=rf"compress_rates.{v4.HCA} is 16, which is not 128"):
        parse_config(config)


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"index_topk_freq": 2},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        {"index_topk_pattern": "FSSFF"},
        {"indexer_types": ["full", "shared", "full", "full", "shared"], "index_topk_freq": 1},
    ],
)
def test_layers_have_the_indexers_that_transformers_gives_them(keys):
    import transformers

    given = config_of(DSA, **INDEXED, num_hidden_layers=5, **keys)
    types = transformers.GlmMoeDsaConfig(**given).indexer_types
    indexer = parse_config(given).indexer
    assert indexer.full == tuple(kind == "full" for kind in types) and not indexer.halves
    assert parse_config(config_of(V32, **INDEXED)).indexer.halves


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"indexer_types": ["shared", "full", "full"]}, "indexer_types leaves the first layer"),
        ({"indexer_types": ["full", "dense", "full"]}, r"indexer_types\[1\] is 'dense'"),
        ({"index_topk_pattern": "FS"}, r"index_topk_pattern is \['F', 'S'\], expected 3 of F or S"),
        ({"index_topk_freq": 0}, "index_topk_freq is 0"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave false .* only true"),
        ({"q_lora_rank": None}, "q_lora_rank is null"),
    ],
)
def test_indexers_of_another_kind_are_refused_by_the_name_of_the_key(keys, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(config_of(DSA, **{**INDEXED, **keys}))
