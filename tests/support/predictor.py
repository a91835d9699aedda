"""Predictors for the tiny model, and what tests do to their files."""

import torch

from slotmoe.quant.export.layout import is_predictor, predictor_parts

D, L, E, K = 64, 2, 8, 3


def random_tensors(seed, experts=E, hidden=D):
    """A predictor of random numbers, as its file holds it."""
    generator = torch.Generator().manual_seed(seed)
    parts = predictor_parts(hidden, L, experts, 16, 16)
    return {
        name: (torch.randn(part.shape, generator=generator) * 9).to(part.dtype)
        for name, part in parts.items()
    }


def predictor_file(folder):
    return next(path for path in folder.iterdir() if is_predictor(path.name))


def state_of(tensors, old, new):
    """Which of two predictors ``tensors`` are: old, new, none or broken."""
    for name, wanted in (("old", old), ("new", new)):
        both = tensors is not None and wanted is not None and tensors.keys() == wanted.keys()
        if both and all(wanted[part].equal(tensors[part]) for part in wanted):
            return name
    return "none" if tensors is None else "broken"
