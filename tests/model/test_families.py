"""Every family: the reference path beside transformers, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.config import parse_config
from slotmoe.model.families import FAMILIES, OTHERS
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support.families import (
    CASES,
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
