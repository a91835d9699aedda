"""What transformers makes of a folder, and codes by the documented layout."""

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.families import oracle_network, quietly


def transformers_logits(folder, ids):
    """Logits of transformers' network, float32 [T, vocab_size]."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    with quietly():
        return oracle_network(folder, weights)(torch.tensor([ids])).logits[0]


def relative(found, wanted):
    """RMS of the difference over RMS of the truth, unless that is 0."""
    found, wanted = (torch.as_tensor(values).cpu().double() for values in (found, wanted))
    return ((found - wanted).norm() / (wanted.norm() or 1)).item()


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
