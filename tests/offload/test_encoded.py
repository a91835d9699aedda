"""Checkpoints with quantized weights, fused experts or images: read as their references say, and
their exports are those of the same weights in plain tensors, from a folder and from the hub."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, DownloadError, ExportError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import expert_name, spelled, split_expert
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS, NF4
from slotmoe.quant.codecs.encode import quantize_nf4
from slotmoe.quant.export.layout import MANIFEST, PROJECTIONS, layer_file
from slotmoe.quant.export.reader import Export
from tests.support.codes import parts_of
from tests.support.disk import Stop, stop_at, tree
from tests.support.encoded import (
    FP4,
    FP8,
    FP8_WHOLE,
    WHOLE_BLOCKS,
    as_v4_spells,
    bitsandbytes,
    decoded_fp8,
    decoded_int4,
    decoded_mxfp4,
    encode,
    fuse,
    packed,
    same_bits,
    write_files,
)
from tests.support.families import IN_BLOCKS, MINIMAX, OSS, PLAIN_ROPE, QWEN3, write_family
from tests.support.hostile import edit_json, flip
from tests.support.hub import NAME, Repo, fill_cache, make
from tests.support.oracle import relative
from tests.support.tiny import write_checkpoint

# Blocks are cut off at the end of rows and of columns; ranks are no multiple of a block.
SIZES = {"hidden_size": 160, "moe_intermediate_size": 64, "intermediate_size": 300}
SMALL = {**SIZES, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}


def written(folder, **changes):
    write_checkpoint(folder, **{**SMALL, **changes})
    return folder


def minimax(folder):
    """Named in its own words."""
    write_family(folder, MINIMAX, torch.bfloat16, hidden_size=160, intermediate_size=136)


MINIMAXS = {**FP8, "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
MINIMAXS |= {"fmt": "float8_e4m3fn"}
COUNT = 2 * 5 + 3 + 3 + 4 * 3  # attention, dense, shared, routed
FP8_SOURCES = [(written, FP8, 128, COUNT), (written, FP8_WHOLE, 1 << 20, COUNT)]
FP8_SOURCES += [(minimax, MINIMAXS, 128, 4 * (4 + 8 * 3))]


@pytest.mark.parametrize(("write", "settings", "block", "count"), FP8_SOURCES)
def test_fp8_weights_are_code_times_scale(tmp_path, write, settings, block, count):
    write(tmp_path)
    stored = encode(tmp_path, settings)
    with open_checkpoint(tmp_path) as checkpoint:
        theirs = {name: spelled(name, checkpoint.config) for name in checkpoint.infos}
        encoded = [name for name in theirs if theirs[name] + "_scale_inv" in stored]
        assert len(encoded) == count
        for name in encoded:
            codes = stored[theirs[name]], stored[theirs[name] + "_scale_inv"]
            wanted = decoded_fp8(*codes, block).to(torch.bfloat16)
            assert torch.equal(checkpoint.tensor(name), wanted), name
            start, stop = len(wanted) // 2, len(wanted) - 1
            assert torch.equal(checkpoint.rows(name, start, stop), wanted[start:stop])


@pytest.mark.parametrize(
    ("quant_type", "nested", "dtype"),
    [("nf4", False, torch.bfloat16), ("fp4", True, torch.float16)],
)
def test_bitsandbytes_weights_are_what_it_makes_of_them(heavy, tmp_path, quant_type, nested, dtype):
    """And NF4's codes are those that ours gets."""
    plain = load_file(written(tmp_path, **WHOLE_BLOCKS) / "model.safetensors")
    stored, wanted = bitsandbytes(tmp_path, quant_type, nested, dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(wanted) == COUNT
        for name, weight in wanted.items():
            assert torch.equal(checkpoint.tensor(name), weight), name
            assert torch.equal(checkpoint.rows(name, 17, 40), weight[17:40]), name
            if quant_type == "nf4":
                pairs = torch.stack([stored[name] >> 4, stored[name] & 15], -1).view(weight.shape)
                ours = (part.numpy() for part in quantize_nf4(plain[name]))
                assert (parts_of(NF4.describe(), *ours, *pairs.shape)[0] == pairs.numpy()).all()


@pytest.mark.parametrize(
    ("prefix", "write"),
    [
        ("model.", written),
        ("model.language_model.", written),
        ("model.", lambda folder: write_family(folder, QWEN3)),
    ],
)
def test_fused_experts_are_those_of_one_tensor_each(tmp_path, prefix, write):
    for folder in ("single", "fused"):
        write(tmp_path / folder)
    with open_checkpoint(tmp_path / "single") as single:
        wanted = {name: single.tensor(name) for name in single.infos}
    fuse(tmp_path / "fused", prefix)
    with open_checkpoint(tmp_path / "fused") as fused:
        assert fused.infos.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(fused.tensor(name), tensor), name


def test_fused_experts_in_fp8(tmp_path):
    """The up projection begins inside a block of the two that are one tensor."""
    written(tmp_path, moe_intermediate_size=72)
    fuse(tmp_path)
    tensors = load_file(tmp_path / "model-1.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    codes = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1))
    tensors |= {name: codes, name + "_scale_inv": scales}
    write_files(tmp_path, {"model-1.safetensors": tensors}, quantization_config=FP8)
    with open_checkpoint(tmp_path) as checkpoint:
        for expert in range(4):
            both = decoded_fp8(codes[expert], scales[expert]).to(torch.bfloat16)
            for projection, rows in (("gate_proj", slice(72)), ("up_proj", slice(72, None))):
                found = checkpoint.tensor(expert_name(1, expert, projection))
                assert torch.equal(found, both[rows])


GATE = expert_name(1, 0, "gate_proj")


def changed(tensors, name, change):
    """``change`` makes another tensor of it; None leaves it out."""
    before = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(before)


def cut(columns):
    return lambda tensor: tensor[:, :columns].clone()


SCALE, PACKED, ZERO = (GATE + s for s in ("_scale_inv", "_packed", "_zero_point"))
ONE = torch.tensor(1)
BAD = [
    (FP8, SCALE, cut(1), [SCALE, "[1, 1]", "[1, 2]", "128 x 128"]),
    (FP8, SCALE, None, [GATE, "F8_E4M3", "BF16", "scales"]),
    (FP4, SCALE, lambda scale: scale.float(), [SCALE, "F32", "F8_E8M0"]),
    (FP4, GATE, lambda codes: codes.view(torch.uint8), [GATE, "U8", "I8"]),
    (packed(), ZERO, lambda _: torch.zeros(64, 1), [ZERO, "symmetric"]),
    (packed(), PACKED, cut(3), [PACKED, "[64, 3]", "[64, 20]"]),
    (FP8, SCALE, lambda s: s.index_fill(1, ONE, torch.inf), ["the scales of", "gate_proj", "NaN"]),
    ({}, GATE, lambda codes: codes, ["F8_E4M3", "quantization_config"]),
]


BITS = {"quant_method": "bitsandbytes"}
STATE = GATE + ".quant_state.bitsandbytes__nf4"
BAD += [
    (BITS, STATE, None, [STATE, "missing"]),
    (BITS, GATE + ".absmax", lambda x: x[:100].clone(), ["100 scales for [64, 128]"]),
    (BITS, GATE, lambda codes: codes[1:].clone(), [GATE, "[4095, 1]"]),
]


@pytest.mark.parametrize(("settings", "name", "change", "words"), BAD)
def test_bad_encodings_are_refused_by_name(heavy, tmp_path, settings, name, change, words):
    if settings == BITS:
        tensors, _ = bitsandbytes(written(tmp_path, **WHOLE_BLOCKS))
    else:
        tensors = encode(written(tmp_path), settings or FP8)
    changed(tensors, name, change)
    config = {} if settings == BITS else {"quantization_config": settings}
    write_files(tmp_path, {"model-1.safetensors": tensors}, **config)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(tmp_path) as checkpoint:
        checkpoint.tensor(GATE)
    assert all(word in str(caught.value) for word in words), caught.value


# Exports

V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
V3 |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
V3 |= {"hidden_size": 160, "moe_intermediate_size": 64}
IDS = list(range(5, 15))
SOURCES = {
    "fp8": lambda folder: encode(folder, FP8),
    "int4": lambda folder: encode(folder, packed()),
    "fp4": lambda folder: encode(folder, FP4),
    "fused": fuse,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_checkpoint(folder, **V3)
    SOURCES[request.param](folder)
    return folder


def weights_of(export):
    """Every file but those that name the source."""
    return {n: data for n, data in tree(export).items() if n not in ("config.json", MANIFEST)}


@pytest.mark.usefixtures("heavy")
def test_export_is_that_of_the_decoded_weights(source, tmp_path, monkeypatch):
    """And notes what it was made of, whatever pieces that was read in."""
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    with open_checkpoint(source) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.infos}
    for path in [*plain.glob("*.safetensors"), plain / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, plain / "model.safetensors")
    edit_json(plain / "config.json", lambda it: it.pop("quantization_config", None))
    for folder in (source, plain):
        quantize(folder, tmp_path / f"{folder.name}-e", codecs=EXPERT_CODECS["nf4", "4"])
    assert weights_of(tmp_path / "tiny-e") == weights_of(tmp_path / "plain-e")
    monkeypatch.setattr("slotmoe.model.checkpoint.reader._PIECE", 3000)
    with open_checkpoint(source) as checkpoint:
        manifest = json.loads((tmp_path / "tiny-e" / MANIFEST).read_text())
        assert checkpoint.weights(print) == manifest["source"]["weights"]
    logits = []
    for folder in (source, plain):
        with Runtime.open(folder, context=64, quantize=False) as runtime:
            logits.append(runtime.logits(IDS))
    assert torch.equal(*logits)


def test_scales_may_be_in_another_file_than_their_codes(hub, tmp_path, monkeypatch):
    """From the hub weight files come one after the other, and the first is gone by then.  One bit
    of the second is refused, in the download and in huggingface_hub's cache."""
    folder, name, said = tmp_path / "tiny", "model-2.safetensors", []
    write_checkpoint(folder, **V3)
    encode(folder, FP8, scales_apart=True)
    quantize(folder, tmp_path / "local")
    hub.add(NAME, Repo(folder))
    make(tmp_path / "export")
    assert weights_of(tmp_path / "export") == weights_of(tmp_path / "local")
    data = bytearray((folder / name).read_bytes())
    data[-9] ^= 1
    cache = fill_cache(path.name for path in folder.iterdir())
    next(cache.glob(f"*/snapshots/*/{name}")).resolve().write_bytes(data)
    hub.faults.append(
        lambda kind, file, handler: file == name and kind == "cdn" and handler.answer(200, data)
    )
    with pytest.raises(DownloadError, match=f"{name}: the server's bytes have the checksum"):
        make(tmp_path / "other", notify=said.append)
    assert any(name in text and "is damaged, so it is not used" in text for text in said)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        make(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def int4(stored, name):
    return decoded_int4(stored[name + "_packed"], stored[name + "_scale"])


def fp4(stored, name):
    return decoded_mxfp4(stored[name], stored[name + "_scale_inv"])


def oss(stored, name):
    """Rows of gate and up take turns; codes are in blocks of 16 bytes, and scales bytes."""
    layer, expert, projection = split_expert(name)
    first, step = {"gate_proj": (0, 2), "up_proj": (1, 2), "down_proj": (0, 1)}[projection]
    base = f"model.layers.{layer}.mlp.experts."
    base += "down_proj" if projection == "down_proj" else "gate_up_proj"
    codes, scales = stored[base + "_blocks"][expert], stored[base + "_scales"][expert]
    return decoded_mxfp4(codes.flatten(1)[first::step], scales[first::step])


def write_encoded(folder, settings):
    write_checkpoint(folder, **V3)
    stored = encode(folder, settings)
    if settings is FP4:
        write_files(folder, {"model-1.safetensors": as_v4_spells(stored)})
    return stored


def write_oss(folder, settings):
    changes = PLAIN_ROPE | IN_BLOCKS | {"quantization_config": settings}
    write_family(folder, OSS, torch.bfloat16, **changes)
    return load_file(folder / "model.safetensors")


KEPT = {
    "int4": (write_encoded, packed(), int4, torch.equal),
    "mxfp4": (write_encoded, FP4, fp4, same_bits),
    "gpt-oss": (write_oss, {"quant_method": "mxfp4"}, oss, same_bits),
}


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("case", KEPT)
def test_weights_that_were_trained_in_4_bits_are_kept_to_the_bit(tmp_path, slotmoe, case):
    """Signs of zeros and denormal scales too; other codes are made of them where asked for."""
    (write, settings, decoded, same), folder = KEPT[case], tmp_path / "tiny"
    stored, codec = write(folder, settings), "int4" if case == "int4" else "mxfp4"
    quantize(folder, tmp_path / "export")
    with Export.open(tmp_path / "export") as export:
        for layer in export.layers:
            expert = export.expert(layer, 5)
            for projection in PROJECTIONS:
                wanted = decoded(stored, expert_name(layer, 5, projection))
                assert same(expert[projection], wanted)
        families = export.manifest["quantization"]["report"]["families"]
    routed = [f for f in families if ".experts." in f["family"] and "bias" not in f["family"]]
    assert [(f["stored"], f["relative_rms_error"]) for f in routed] == [(codec, 0.0)] * 3
    with Runtime.open(tmp_path / "export", context=64, slots=6) as runtime:
        logits = runtime.logits(IDS)
    with Runtime.open(folder, context=64, quantize=False) as runtime:
        assert relative(logits, runtime.logits(IDS)) < 0.1
    assert slotmoe("verify", tmp_path / "export")[0] == 0
    made = quantize(folder, tmp_path / "lut", codecs=EXPERT_CODECS["lut", "3"])
    assert made["quantization"]["experts"]["down"] == "lut3"


@pytest.mark.usefixtures("heavy")
def test_biases_of_experts_are_made_again_checked_and_asked_for(tmp_path):
    folder, export = tmp_path / "tiny", tmp_path / "export"
    stored, name = write_oss(folder, None), "model.layers.1.mlp.experts.gate_up_proj_bias"
    with pytest.raises(Stop):
        quantize(folder, export, workers=1, progress=stop_at(0.6))
    quantize(folder, export)
    quantize(folder, tmp_path / "other")
    wanted = tree(tmp_path / "other")
    assert tree(export) == wanted
    with Export.open(export) as opened:
        header = opened.manifest["files"][layer_file(1)]["header_bytes"]
        assert same_bits(opened.expert(1, 5)["up_proj.bias"], stored[name][5, 1::2].float())
        bias = opened.layout.parts["up_proj.bias"].offset
        flip(export / layer_file(1), header + 5 * opened.layout.record_bytes + bias + 7)
        with pytest.raises(ExportError, match="checksum of layer 1 expert 5 is wrong"):
            opened.expert(1, 5)
    quantize(folder, export)
    assert tree(export) == wanted
    del stored[name]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        quantize(folder, export)


SCALES = [(FP4, 255, "NaN"), (FP4, 240, "infinite"), (FP8, torch.inf, "NaN or infinite")]


@pytest.mark.parametrize(("settings", "scale", "problem"), SCALES, ids=["NaN", "infinite", "fp8"])
def test_scales_that_no_weights_have_leave_no_export(tmp_path, settings, scale, problem):
    write_checkpoint(tmp_path / "tiny", **V3)
    tensors = encode(tmp_path / "tiny", settings)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    scales = tensors[name + "_scale_inv"]
    (scales if settings is FP8 else scales.view(torch.uint8))[1, 0] = scale
    write_files(tmp_path / "tiny", {"model-1.safetensors": tensors})
    with pytest.raises(CheckpointError, match=f"{name}.*{problem}"):
        quantize(tmp_path / "tiny", tmp_path / "export")
    assert not (tmp_path / "export").exists()
