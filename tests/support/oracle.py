"""What other people's code makes of the same files: transformers' network, and weights by
safetensors and bitsandbytes."""

import json

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.codes import values
from tests.support.families import oracle_network, quietly


def transformers_network(folder):
    """The oracle: transformers' network of the folder's weights, in float32 with eager experts."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return oracle_network(folder, weights)


def transformers_logits(folder, ids):
    """Logits of the oracle, float32 [T, vocab_size]."""
    with quietly():
        return transformers_network(folder)(torch.tensor([ids])).logits[0]


def relative_error(found, wanted):
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    return ((found - wanted).norm() / wanted.norm()).item()


def untile(codes):
    """uint8 [n_tiles, n_blocks, 512] of the documented layout to codes [rows, columns], byte by
    byte's formula."""
    tiles, blocks, _ = codes.shape
    out = np.empty((tiles * 16, blocks * 64), np.uint8)
    for t in range(8):
        for lane in range(16):
            for i in range(4):
                byte = codes[:, :, 64 * t + 4 * lane + i]
                out[lane::16, 8 * t + i :: 64] = byte >> 4
                out[lane::16, 8 * t + 4 + i :: 64] = byte & 15
    return out


def rebuild(export):
    """Every weight of the export as float32, with safetensors, numpy and bitsandbytes alone."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    raw = {}
    for path in [export / "resident.safetensors", *sorted((export / "experts").iterdir())]:
        with safe_open(path, "pt") as file:
            raw |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    beside = {name + ending for name in raw for ending in (".absmax", ".scale", ".scales")}
    codecs = json.loads((export / "slotmoe.json").read_text())["quantization"]["codecs"]
    weights = {}
    for name, tensor in raw.items():
        if name + ".absmax" in raw:
            codes = untile(tensor.numpy())
            scales = raw[name + ".absmax"].numpy().transpose(0, 2, 1)  # [rows, blocks]
            absmax = torch.from_numpy(scales.reshape(-1).astype(np.float32))
            packed = torch.from_numpy(codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
            about = {"blocksize": 64, "quant_type": "nf4", "dtype": torch.float32}
            about["code"] = get_4bit_type("nf4", device="cpu")
            state = QuantState(absmax, shape=torch.Size(codes.shape), **about)
            weights[name] = dequantize_4bit(packed, state)
        elif name + ".scales" in raw:  # 4 bits: 16 rows and 64 columns a tile
            codes, scales = tensor.numpy(), raw[name + ".scales"].numpy()
            rows, columns = 16 * codes.shape[0], 64 * codes.shape[1]
            weights[name] = torch.from_numpy(values(codecs["lut4"], codes, scales, rows, columns))
        elif name + ".scale" in raw:
            weights[name] = tensor.float() * raw[name + ".scale"][:, None]
        elif name not in beside and not name.endswith(".pad"):
            weights[name] = tensor.float()
    return weights
