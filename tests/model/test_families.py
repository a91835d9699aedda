"""Every family: the reference path beside transformers, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import parse_config
from slotmoe.model.families import FAMILIES, OTHERS
from slotmoe.model.names import resident_shapes, role_of, tensor_shapes
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support import engine, v4
from tests.support.encoded import packed
from tests.support.families import (
    CASES,
    DELTA_CASES,
    DSA,
    ERNIE,
    GLM,
    GLM4,
    GROUPED_CASES,
    HUNYUAN,
    INDEXED,
    KIMI,
    MINIMAX,
    MISTRAL,
    NEXT,
    OF_KIMI,
    OSS,
    QWEN2,
    QWEN3,
    QWEN35,
    REMOVE,
    SOFTMAX,
    V2,
    V2_CASES,
    V3,
    V32,
    YARN,
    config_of,
    write_family,
)
from tests.support.native import ByRule, feed, reference_cache, reference_of
from tests.support.oracle import relative, transformers_logits
from tests.support.params import nth
from tests.support.v4 import V4

IDS = engine.words(7, 40)
EVERY = {**{name: (V2, overrides) for name, overrides in V2_CASES.items()}, **CASES}


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("name", nth(3, EVERY))
def test_reference_path_equals_transformers(name, tmp_path):
    family, overrides = EVERY[name]
    write_family(tmp_path, family, torch.bfloat16 if family == V2 else torch.float32, **overrides)
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative(runtime.logits(IDS), transformers_logits(tmp_path, IDS)) <= 1e-5


# Cases of V4, V3.2 and GLM-5, and seeds of texts in which rounding decides no choice of a top-k.
# More heads, so that no token has all of their products negative, and a tie for it.
SEEDS = {"v4": 0, "v4-odd": 0, "v3.2-sparse-yarn": 3, "glm-5-shared": 3}
OVER_CHUNKS = 300, [[64, 1, 127, 63, 1, 44], [256, 1, 43]]  # of 64, and over a mark
LONG = 389, [[1] * 20 + [220, 3, *[1] * 20, 110, *[1] * 16], [127, 1, 16, 17, 100, 128]]
SHORT = 70, [[6, 1, 1, 1, *[1] * 20, 40, 1], [9, 33, 7, 21]]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("case", [*SEEDS, *GROUPED_CASES, "v3-groups-yarn"])
def test_passes_of_any_size_equal_transformers(case, tmp_path):
    """Over more tokens than a window, a compressed row of each kind and ``index_topk``; in passes
    that end before, at and behind windows' ends, and in chunks of such."""
    more = {"max_position_embeddings": 1024, "index_n_heads": 16} if case in SEEDS else {}
    v4.write_case(tmp_path, case, **more)
    count, passes = LONG if case in SEEDS else OVER_CHUNKS if case in DELTA_CASES else SHORT
    ids = engine.words(SEEDS.get(case, 1), count)
    wanted, network = transformers_logits(tmp_path, ids), reference_of(tmp_path)
    assert case in SEEDS or not network.config.unknown_keys
    for sizes, chunk in zip([[count], [count], *passes], [count, 16] * 2, strict=True):
        state, network._chunk_tokens = reference_cache(network.config, count + 10), chunk
        assert relative(feed(network, state, ids, sizes), wanted) <= 1e-5


EDGES = 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 191, 192, 193
EVERY_LENGTH = [(case, ByRule, EDGES) for case in ("next", "kimi")]
EVERY_LENGTH += [
    pytest.param(case, kind, range(1, 194), marks=pytest.mark.slow, id=f"{case}-{kind.__name__}")
    for case in DELTA_CASES
    for kind in (ByRule, TorchBackend)
]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize(("case", "kind", "lengths"), EVERY_LENGTH)
def test_texts_of_every_length_equal_transformers(case, kind, lengths, tmp_path):
    """To 3 chunks of 64, the kernel's and transformers', which sees the longest alone: what a token
    becomes does not depend on those behind it."""
    if kind is ByRule and load() is None:
        pytest.skip("the native kernels are not built")
    v4.write_case(tmp_path, case)
    ids = engine.words(1, 193)
    wanted, network = transformers_logits(tmp_path, ids), reference_of(tmp_path, kind)
    for length in lengths:
        state = reference_cache(network.config, length)
        assert relative(feed(network, state, ids, [length]), wanted[:length]) <= 1e-5


def types(letters, **others):
    words = {"d": "dense", "s": "sparse"}
    return {"mlp_layer_types": [words[letter] for letter in letters], **others}


RATIO, TYPE, INDEXERS = "compress_ratios", "layer_types", "indexer_types"
BETA = {**SOFTMAX, "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}
FP8, BITS = {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}
OF_ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WRONG = [  # family, what is wrong, words of the message
    *((V2, {"hidden_size": value}, "hidden_size") for value in (True, 64.5, "64", 0, 1 << 40)),
    *((V2, {key: REMOVE}, f"{key} is missing") for key in ("vocab_size", "kv_lora_rank")),
    (V2, {"num_hidden_layers": 1001}, "num_hidden_layers"),
    (V2, {"n_routed_experts": 9}, "n_routed_experts"),
    (V2, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    (V2, {"topk_group": 5}, "topk_group"),
    (V2, {"routed_scaling_factor": 1e40}, "routed_scaling_factor"),
    (V2, {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
    (V2, {"topk_method": "noaux_tc"}, 'topk_method "noaux_tc" only'),
    (V2, {"hidden_act": "gelu"}, 'hidden_act "gelu"'),
    (V2, {"attention_bias": True}, "attention_bias"),
    (V2, {"eos_token_id": list(range(100))}, "eos_token_id"),
    *(
        (V2, {"quantization_config": value}, "quantization_config")
        for value in (
            *("fp8", {"quant_method": []}, {"quant_method": "gptq", "bits": 4}, BITS),
            *({**FP8, "weight_block_size": [64, 64]}, {**FP8, "fmt": "e5m2"}),
            *(packed(num_bits=8), packed(symmetric=False), packed(actorder="group")),
        )
    ),
    *(
        (V2, {"rope_scaling": value}, "rope")
        for value in (
            *("yarn", [], {**OF_ROPE, "type": "linear"}, {**OF_ROPE, "factor": 0}),
            {**OF_ROPE, "attention_factor": 2.0},
        )
    ),
    (V3, {"scoring_func": "softmax"}, 'scoring_func "softmax" only "sigmoid"'),
    (GLM, {"architectures": ["DeepseekV3ForCausalLM"]}, "architectures only Glm4"),
    (V32, {}, "index_n_heads is missing"),
    (V3, {"index_topk": 64}, "index_topk 64 only null"),
    (V3, {"n_group": 8, "topk_group": 4}, "n_group is 8 at least 2 experts"),
    (GLM, types("sds", first_k_dense_replace=REMOVE), "mlp_layer_types dense layer behind"),
    (GLM, types("ds"), "num_hidden_layers is 3 2"),
    (MISTRAL, BETA, "llama_4_scaling_beta"),
    (DSA, {INDEXERS: ["shared", "full", "full"]}, "indexer_types leaves the first layer"),
    (DSA, {"index_topk_pattern": "FS"}, "index_topk_pattern is ['F', 'S'], expected 3 of F or S"),
    (DSA, {"q_lora_rank": None}, "q_lora_rank is null"),
    (V4, {RATIO: [0, 4, 2, 4]}, "compress_ratios[2] is 2 0 or 4 or 128"),
    (V4, {RATIO: [0, 4, 128]}, "compress_ratios expected 4"),
    (V4, {"num_hash_layers": 5}, "num_hash_layers is 5 num_hidden_layers is 4"),
    (V4, {TYPE: ["full_attention"] * 4}, "layer_types[0] is 'full_attention'"),
    (V4, {"o_groups": 3}, "num_attention_heads 4 o_groups 3"),
    (V4, {"norm_topk_prob": False}, "norm_topk_prob false only true"),
    (V4, {"hc_mult": 0}, "hc_mult is 0"),
    (V4, {"engram_layer_ids": [1]}, "engram_layer_ids [1] only"),
    (QWEN3, {"num_experts": 2}, "num_experts_per_tok is 3"),
    (QWEN3, {"num_experts": "8"}, "num_experts is '8'"),
    (QWEN3, {"num_key_value_heads": 4}, "num_attention_heads 6 num_key_value_heads 4"),
    (QWEN3, {"kv_lora_rank": 32}, "kv_lora_rank 32 only null"),
    (QWEN3, {"rope_theta": REMOVE}, "rope_theta is missing"),
    (
        QWEN3,
        {"use_sliding_window": True, "sliding_window": 64},
        "use_sliding_window true only false",
    ),
    (QWEN3, {"mlp_only_layers": [0, 1, 2, 3]}, "leaves no layer with experts"),
    (QWEN3, {"attention_bias": 1.5}, "attention_bias 1.5 only true or false"),
    (OSS, {"hidden_act": "gelu"}, 'hidden_act "gelu" only "silu"'),
    *((OSS, {"sliding_window": size}, f"sliding_window is {size}") for size in (0, -1, None)),
    (OSS, {TYPE: ["linear_attention"] * 4}, "layer_types[0] is 'linear_attention'"),
    (OSS, {TYPE: ["full_attention"]}, "layer_types has 1 values, expected 4"),
    (OSS, {TYPE: REMOVE}, "layer_types is missing"),
    (GLM4, {"partial_rotary_factor": 0.0}, "0 values of a head are rotated, expected 1 to 24"),
    (GLM4, {"partial_rotary_factor": 0.05}, "partial_rotary_factor is 0.05"),
    (MINIMAX, {"rotary_dim": 25}, "25 values of a head are rotated"),
    (MINIMAX, {"attn_type_list": [1, 0, 1, 1]}, "attn_type_list [1, 0, 1, 1] only 1"),
    (MINIMAX, {"use_qk_norm": False}, "use_qk_norm false only true"),
    (HUNYUAN, {"moe_topk": [3, 2, 3, 3]}, "moe_topk is [3, 2, 3, 3]"),
    (HUNYUAN, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    (ERNIE, {"use_bias": True}, "use_bias true only false"),
    (NEXT, {"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim 3 only 4"),
    (NEXT, {"linear_num_value_heads": 3}, "linear_num_value_heads 3 linear_num_key_heads 2"),
    (NEXT, {"linear_key_head_dim": REMOVE}, "linear_key_head_dim is missing"),
    (NEXT, {TYPE: ["sliding_attention"] * 4}, "layer_types[0] is 'sliding_attention' linear"),
    (NEXT, {"attention_bias": True}, "attention_bias true only false"),
    (QWEN35, {"attn_output_gate": False}, "attn_output_gate false only true"),
    (QWEN35, {"output_gate_type": "sigmoid"}, 'output_gate_type "sigmoid" only "swish"'),
    (QWEN35, {"full_attention_interval": 1}, "full_attention_interval is 1"),
    *(
        (KIMI, {"linear_attn_config": OF_KIMI["linear_attn_config"] | wrong}, words)
        for wrong, words in (
            ({"gate_lower_bound": -5.0}, "linear_attn_config.gate_lower_bound is unknown"),
            ({"short_conv_kernel_size": 3}, "short_conv_kernel_size is 3"),
            ({"kda_layers": [1, 2]}, "are [1, 2] and [3], expected 1 to 4"),
            ({"kda_layers": [0, 1, 2]}, "are [0, 1, 2] and [3], expected 1 to 4"),
            ({"num_heads": 0}, "linear_attn_config.num_heads is 0"),
        )
    ),
    (KIMI, {"linear_attn_config": [1]}, "linear_attn_config is [1]"),
    (KIMI, {"linear_attn_config": REMOVE}, "layer_types is missing"),
    (KIMI, {"mla_use_nope": False}, "mla_use_nope false only true"),
    (KIMI, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1 only 0"),
    (KIMI, {"moe_router_activation_func": "softmax"}, 'moe_router_activation_func "softmax"'),
    (V3, {"linear_attn_config": OF_KIMI["linear_attn_config"]}, "linear_attn_config only null"),
    *(
        (V3, {"model_type": name}, f'model_type "{name}" ({why}), only')
        for name, why in OTHERS.items()
    ),
]


@pytest.mark.parametrize(("family", "overrides", "words"), WRONG)
def test_a_value_that_the_family_has_not_is_named(family, overrides, words):
    of_index = {DSA: INDEXED, KIMI: OF_KIMI}.get(family, {})
    given = v4.config_of("v4", **overrides) if family == V4 else None
    with pytest.raises(ConfigError) as caught:
        parse_config(given or config_of(family, **{**of_index, **overrides}))
    message = str(caught.value)
    assert all(word in message for word in words.split()), message
    assert message.startswith("config.json: ") and "\n" not in message
    if "model_type" in overrides:
        assert all(json.dumps(known) in message for known in FAMILIES)


def test_sarvam_is_v3_in_other_words():
    v3 = config_of(V3, rope_parameters=YARN)
    given = {**v3, "model_type": "sarvam_mla", "architectures": ["SarvamMLAForCausalLM"]}
    given |= {"num_experts": given.pop("n_routed_experts")}
    given |= {"num_shared_experts": given.pop("n_shared_experts")}
    given["rope_scaling"] = {**given.pop("rope_parameters"), "type": "deepseek_yarn"}
    del given["rope_scaling"]["rope_type"]
    wanted = parse_config(v3)
    assert replace(parse_config(given), family=wanted.family) == wanted
    with pytest.raises(ConfigError, match=r"num_experts is 0"):
        parse_config({**given, "num_experts": 0})


MISSING = [
    (QWEN3, "self_attn.q_norm.weight"),
    (GLM4, "self_attn.k_proj.bias"),
    (MINIMAX, "block_sparse_moe.experts.3.w2.weight"),
    (MINIMAX, "block_sparse_moe.e_score_correction_bias"),
    (OSS, "self_attn.sinks"),
    (OSS, "self_attn.o_proj.bias"),
    (OSS, "mlp.router.bias"),
    (QWEN2, "mlp.shared_expert_gate.weight"),
    (NEXT, "self_attn.q_proj.weight"),
    (QWEN35, "self_attn.q_norm.weight"),
    *((KIMI, f"self_attn.{part}") for part in ("v_proj.weight", "k_conv1d.weight", "A_log")),
    *((KIMI, f"self_attn.{part}.weight") for part in ("f_a_proj", "g_b_proj", "o_proj", "o_norm")),
    *((KIMI, f"block_sparse_moe.{part}.weight") for part in ("gate", "shared_experts.up_proj")),
    (KIMI, "block_sparse_moe.experts.3.w2.weight"),
]


@pytest.mark.parametrize(("family", "part"), MISSING)
def test_a_missing_part_is_named_as_the_family_does_and_nothing_written(tmp_path, family, part):
    write_family(tmp_path / "source", family, **OF_KIMI if family == KIMI else {})
    file, name = tmp_path / "source" / "model.safetensors", f"model.layers.1.{part}"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        quantize(tmp_path / "source", tmp_path / "export")
    assert not (tmp_path / "export").exists()


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


@pytest.mark.parametrize("case", ["v4", "v4-odd"])
def test_a_v4_is_the_same_in_both_spellings(heavy, case, tmp_path):
    """What is small stays as it is, in float32, and expert ids become int32."""
    for folder in ("transformers", "hub"):
        v4.write_case(tmp_path / folder, case, hub=folder == "hub")
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
        stored = export.resident(name)
        assert stored.dtype == (torch.int32 if name.endswith("tid2eid") else torch.float32)
        assert torch.equal(stored, wanted[name])


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize(
    "keys", [{"index_topk_freq": 3, "index_skip_topk_offset": 1}, {"index_topk_pattern": "FSSFF"}]
)
def test_layers_have_the_indexers_that_transformers_gives_them(keys):
    import transformers

    given = config_of(DSA, **INDEXED, num_hidden_layers=5, **keys)
    kinds = transformers.GlmMoeDsaConfig(**given).indexer_types
    indexer = parse_config(given).indexer
    assert indexer.full == tuple(kind == "full" for kind in kinds) and not indexer.halves
    assert parse_config(config_of(V32, **INDEXED)).indexer.halves
