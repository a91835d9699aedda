"""What other people's code makes of the same files: transformers' network, and weights by
safetensors and bitsandbytes."""

import logging
import warnings

import numpy as np
import torch
from safetensors import safe_open


def transformers_network(folder):
    """The oracle: transformers' DeepseekV2 in float32 with eager experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DeepseekV2ForCausalLM

        return DeepseekV2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
        )


def transformers_logits(folder, ids):
    """Logits of the oracle, float32 [T, vocab_size]."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
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
    logging.disable(logging.WARNING)  # bitsandbytes misses an optional package
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
    finally:
        logging.disable(logging.NOTSET)
    raw = {}
    for path in [export / "resident.safetensors", *sorted((export / "experts").iterdir())]:
        with safe_open(path, "pt") as file:
            raw |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        elif name + ".scale" in raw:
            weights[name] = tensor.float() * raw[name + ".scale"][:, None]
        elif not name.endswith((".absmax", ".scale", ".pad")):
            weights[name] = tensor.float()
    return weights
