"""The NF4 quantizers beside bitsandbytes, on one projection of a V2-Lite expert, and the weights in
which they differ from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import Tensor

from slotmoe.quant.codecs.codec import BLOCK, NF4
from slotmoe.quant.codecs.encode import nf4_by_torch, quantize_nf4, squared_error
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.quant.weights import dequantize
from slotmoe.tools.bench import turns

SHAPE = (1408, 2048)


@click.command()
@turns.repetitions(9)
def quantize(repetitions: int) -> None:
    """Print GB/s of bf16 input and each one's ratio to bitsandbytes.  What slotmoe quantize does
    with every weight is 'with its error': quantize it and sum up its error for the report."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces an optional package
    from bitsandbytes.functional import quantize_4bit

    levels, generator = torch.tensor(NF4.levels), torch.Generator().manual_seed(0)
    weight = (torch.randn(SHAPE, generator=generator) * 0.02).bfloat16()
    theirs = partial(quantize_4bit, blocksize=BLOCK, quant_type="nf4")
    ours: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"torch": nf4_by_torch}
    if (native := bindings.load()) is not None:
        ours[f"native {native.isa}"] = native.quantize_nf4

    def with_error(weight: Tensor) -> object:
        return squared_error(weight, CodedWeight(*quantize_nf4(weight), levels, SHAPE))

    def speed(quantizer: Callable[[Tensor], object]) -> float:
        quantizer(weight)  # until the threads of the way before have gone to sleep
        return weight.nbytes / turns.seconds(partial(quantizer, weight)) / 1e9

    quantizers: dict[str, Callable[[Tensor], object]]
    quantizers = {"bitsandbytes": theirs, **ours, "with its error": with_error}
    ways = {name: partial(speed, quantizer) for name, quantizer in quantizers.items()}
    rows = turns.compare(ways, repetitions, "bitsandbytes", "GB/s")
    packed, state = theirs(weight)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=-1).view(-1, BLOCK)
    wanted = (levels[codes.int()] * state.absmax.half().float()[:, None]).view(SHAPE)
    for row in rows:
        if (quantizer := ours.get(row["way"])) is not None:
            made = dequantize(CodedWeight(*quantizer(weight), levels, SHAPE))
            row["different_weights"] = int((made != wanted).sum())
    turns.finish(rows)
