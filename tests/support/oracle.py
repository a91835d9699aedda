"""What transformers makes of a folder, and how far two results are apart."""

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
