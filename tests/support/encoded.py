"""Checkpoints whose weights are quantized, made of plain ones; and plain references that read
their weights, one block and one byte at a time."""

import json
import re

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# DeepSeek-V4's: experts in fp4, and all scales powers of two.
FP4 = {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
FP8_WHOLE = {**FP8, "weight_block_size": None, "activation_scheme": "static"}
WHOLE_BLOCKS = {  # rows of 64 weights
    **{"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 192},
    **{"q_lora_rank": 64, "kv_lora_rank": 64},
}
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def packed(**changes):
    """``quantization_config`` of compressed-tensors' int4; ``changes`` are to how weights are."""
    weights = {**_WEIGHTS, "actorder": None, **changes}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    about = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**about, "config_groups": groups, "ignore": ["lm_head", "re:.*self_attn.*"]}


def _fp8(name, weight, block):
    """Codes and scales of ``weight``, blocks of ``block`` x ``block``."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    values = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return {name: values.contiguous().to(torch.float8_e4m3fn), name + "_scale_inv": scales}


def _mxfp4(name, weight):
    """Two e2m1 codes a byte, the first in the low half, of which some are -0; a scale for 32
    weights of a row, of which one is denormal."""
    groups = weight.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(2) / 6).log2().ceil().exp2().to(torch.float8_e8m0fnu)
    size = groups.abs() / scales.float()[:, :, None]
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = (torch.bucketize(size, middle) + 8 * (groups < 0)).flatten(1).to(torch.uint8)
    scales.view(torch.uint8)[-1, -1] = 0
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return {name: packed, name + "_scale_inv": scales}


def as_v4_spells(stored):
    """``X.scale`` for the scales of ``X.weight``."""
    return {re.sub(r"weight_scale_inv$", "scale", name): t for name, t in stored.items()}


def _int4(name, weight):
    """Codes, scales and shape of ``weight``, groups of 32 along a row."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // 32, 32)
    scales = (groups.abs().amax(2) / 7.5).to(torch.bfloat16)
    codes = (groups / scales.float()[:, :, None]).round().clamp(-8, 7).to(torch.int64) + 8
    words = (codes.view(rows, columns // 8, 8) << torch.arange(0, 32, 4)).sum(2)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    shape = torch.tensor([rows, columns])
    return {name + "_packed": words, name + "_scale": scales, name + "_shape": shape}


def encode(folder, settings, block=128, scales_apart=False):
    """Quantize the checkpoint in ``folder``, one file, as ``settings`` say: with int4 the experts
    alone, as Kimi K2 has them, else all but embeddings, norms and gates.  With ``scales_apart``
    they are in another file than their codes.  Returns the tensors."""
    is_int4 = settings["quant_method"] == "compressed-tensors"
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain = re.search(r"norm|embed|lm_head|m(lp|oe)\.(gate\.|e_score)", name)
        if plain or (is_int4 and ".experts." not in name):
            stored[name] = tensor
        elif is_int4:
            stored |= _int4(name, tensor.float())
        elif "expert_dtype" in settings and ".experts." in name:
            stored |= _mxfp4(name, tensor.float())
        else:
            size = block if settings["weight_block_size"] else max(tensor.shape)
            stored |= _fp8(name, tensor.float(), size)
            if "scale_fmt" in settings:
                powers = stored[name + "_scale_inv"].to(torch.float8_e8m0fnu)
                stored[name + "_scale_inv"] = powers
    (folder / "model.safetensors").unlink()
    if settings.get("activation_scheme") == "static":  # scales of activations, which nothing uses
        stored["model.layers.0.mlp.up_proj.activation_scale"] = torch.tensor(0.5)
    files = {"model-1.safetensors": dict(stored)}
    if scales_apart:
        scales = [name for name in stored if "scale" in name]
        files["model-2.safetensors"] = {n: files["model-1.safetensors"].pop(n) for n in scales}
    write_files(folder, files, quantization_config=settings)
    return stored


def _experts(tensors, kind="weight"):
    """Take experts out of ``tensors``: for each layer the beginning of their names, and gate, up
    and down of all."""
    first = f"0.gate_proj.{kind}"
    for name in [name for name in tensors if name.endswith(f".experts.{first}")]:
        base = name.removesuffix(first)
        count = sum(n.startswith(base) and n.endswith(first[1:]) for n in tensors)
        of_part = (
            [tensors.pop(f"{base}{e}.{part}_proj.{kind}") for e in range(count)]
            for part in ("gate", "up", "down")
        )
        yield base, *map(torch.stack, of_part)


def fused(tensors):
    """The same with a layer's experts in one tensor, as transformers holds them."""
    for base, gate, up, down in _experts(tensors):
        tensors |= {base + "gate_up_proj": torch.cat((gate, up), 1), base + "down_proj": down}
    return tensors


def fuse(folder, prefix="model."):
    """Rewrite the checkpoint in ``folder``, one file, as transformers 5 saves experts, under names
    that begin with ``prefix`` and beside tensors that read images."""
    tensors = fused(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    stored = {"model.vision_tower.patch.weight": torch.zeros(3, 3, dtype=torch.uint8)}
    for name, tensor in tensors.items():
        stored[re.sub(r"^model\.", prefix, name)] = tensor.contiguous()
    write_files(folder, {"model-1.safetensors": stored})


def fuse_interleaved(tensors, in_blocks=False):
    """Experts by themselves as gpt-oss has those of a layer: rows of gate and up take turns, and
    matrices are turned, or ``in_blocks`` of 16 bytes and a scale."""
    left, fused = dict(tensors), {}
    for kind in ("weight", "bias"):
        for base, gate, up, down in _experts(left, kind):
            both = torch.stack((gate, up), 2).flatten(1, 2)
            for name, whole in ((f"{base}gate_up_proj", both), (f"{base}down_proj", down)):
                if kind == "bias":
                    fused[name + "_bias"] = whole
                elif in_blocks:
                    codes, scales = _mxfp4("", whole.flatten(0, 1).float()).values()
                    blocks = codes.view(torch.uint8).view(*whole.shape[:2], -1, 16)
                    fused[name + "_blocks"] = blocks
                    fused[name + "_scales"] = scales.view(torch.uint8).view(blocks.shape[:3])
                else:
                    fused[name] = whole.transpose(1, 2).contiguous()
    return left | fused


def write_files(folder, files, **config_changes):
    """Weight files with an index, and a config with ``config_changes``."""
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))


def decoded_fp8(codes, scales, block=128):
    """float32 weights by the format's words: sign, four bits of exponent, three of mantissa, and
    the scale of the block.  numpy alone."""
    raw = codes.view(torch.uint8).numpy().astype(int)
    sign, exponent, mantissa = raw >> 7, raw >> 3 & 15, raw & 7
    small = mantissa / 8 * 2.0**-6
    values = np.where(exponent == 0, small, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where(sign == 1, -values, values).astype(np.float32)
    row, column = (np.arange(size) // block for size in values.shape)
    return torch.from_numpy(values * scales.numpy()[row[:, None], column])


def decoded_mxfp4(codes, scales):
    """float32 weights by the format's words: sign, two bits of exponent, one of mantissa, and a
    power of two; weight ``c`` of a row is in bits 4 (c % 2) on of byte ``c // 2``.  numpy alone."""
    column = np.arange(2 * codes.shape[1])
    code = codes.view(torch.uint8).numpy().astype(int)[:, column // 2] >> 4 * (column % 2) & 15
    exponent, mantissa = code >> 1 & 3, code & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    power = scales.view(torch.uint8).numpy().astype(int)[:, column // 32] - 127
    return torch.from_numpy(np.ldexp(np.where(code > 7, -size, size), power).astype(np.float32))


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def decoded_int4(words, scales):
    """float32 weights: weight ``c`` of a row is in bits 4 (c % 8) on of word ``c // 8``."""
    column = np.arange(8 * words.shape[1])
    codes = words.numpy()[:, column // 8] >> 4 * (column % 8) & 15
    return torch.from_numpy((codes - 8) * scales.float().numpy()[:, column // 32])


def bitsandbytes(folder, quant_type="nf4", nested=True, dtype=torch.bfloat16):
    """Quantize all matrices but embeddings, head and gates of the checkpoint in ``folder``, one
    file, as bitsandbytes saves them.  Returns what its ``dequantize_4bit`` makes of each."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored, wanted = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(r"norm|embed|lm_head|mlp\.gate\.", name):
            stored[name] = tensor.to(dtype)
            continue
        options = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": 64}
        stored[name], state = quantize_4bit(tensor.to(dtype), **options)
        stored |= {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
        wanted[name] = dequantize_4bit(stored[name], state)
    (folder / "model.safetensors").unlink()
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    about |= {"bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": quant_type}
    changes = {"quantization_config": about, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_files(folder, {"model-1.safetensors": stored}, **changes)
    return stored, wanted
