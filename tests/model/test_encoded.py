"""Checkpoints with quantized weights, fused experts or images: read as their references say."""

import pytest
import torch
from safetensors.torch import load_file

from slotmoe.errors import CheckpointError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import expert_name, spelled
from slotmoe.quant.codecs.encode import quantize_nf4
from tests.support.encoded import (
    FP4,
    FP8,
    FP8_WHOLE,
    WHOLE_BLOCKS,
    bitsandbytes,
    decoded_fp8,
    encode,
    fuse,
    packed,
    write_files,
)
from tests.support.families import MINIMAX, QWEN3, write_family
from tests.support.oracle import untile
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
                codes, _ = quantize_nf4(plain[name])
                assert (untile(codes.numpy())[: len(pairs)] == pairs.numpy()).all()


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
