"""The NF4 quantizers side by side: native, torch and bitsandbytes on one expert-sized matrix, codes
compared.

    python -m slotmoe.tools.bench.quantize [--json]

Prints GB/s of bf16 input (median of the repetitions, taken in turn) and each one's ratio to
bitsandbytes; then what `slotmoe quantize` does with every weight: quantize it and sum up its error
for the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slotmoe.quant import nf4
from slotmoe.quant.kernels.cpu import bindings as kernels
from slotmoe.quant.shapes import BLOCK
from slotmoe.quant.weights import dequantize, quantize_nf4, squared_error

ROWS, COLUMNS = 1408, 2048  # one projection of a V2-Lite expert


def bitsandbytes_nf4(weight: Tensor) -> Tensor:
    """The weight quantized by bitsandbytes and dequantized with its scales rounded to fp16,
    float32."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=-1).view(-1, BLOCK)
    values: Tensor = torch.tensor(nf4.LEVELS)[codes.int()] * state.absmax.half().float()[:, None]
    return values.view(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(
        logging.WARNING
    )  # bitsandbytes announces an optional package that is not installed
    from bitsandbytes.functional import quantize_4bit

    weight = (
        torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    ).bfloat16()
    quantizers: dict[str, Callable[[Tensor], object]] = {
        "bitsandbytes": lambda w: quantize_4bit(w, blocksize=BLOCK, quant_type="nf4"),
        "torch": nf4.quantize,
    }
    native = kernels.load()
    if native is not None:
        quantizers[f"native {native.isa}"] = native.quantize_nf4
    levels = torch.tensor(nf4.LEVELS)
    quantizers["with its error"] = lambda w: squared_error(
        w, nf4.Nf4Weight(*quantize_nf4(w), levels, (ROWS, COLUMNS))
    )
    speeds: dict[str, list[float]] = {name: [] for name in quantizers}
    for _ in range(arguments.repetitions + 1):
        for name, quantizer in quantizers.items():
            quantizer(weight)  # until the threads of the one before have gone to sleep
            started = time.perf_counter()
            quantizer(weight)
            speeds[name].append(weight.nbytes / (time.perf_counter() - started) / 1e9)
    wanted = bitsandbytes_nf4(weight)
    report: dict[str, dict[str, float]] = {}
    for name in quantizers:
        speed = statistics.median(speeds[name][1:])
        report[name] = {
            "gigabytes_per_second": speed,
            "ratio": speed / statistics.median(speeds["bitsandbytes"][1:]),
        }
        if name not in ("bitsandbytes", "with its error"):
            made = (
                nf4.quantize(weight)
                if name == "torch" or native is None
                else native.quantize_nf4(weight)
            )
            found = dequantize(nf4.Nf4Weight(*made, levels, (ROWS, COLUMNS)))
            report[name]["different_weights"] = int((found != wanted).sum())
    if arguments.json:
        print(json.dumps(report))
        return
    for name, row in report.items():
        different = (
            f"{row['different_weights']} weights differ" if "different_weights" in row else ""
        )
        print(
            f"{name:20} {row['gigabytes_per_second']:6.2f} GB/s of bf16  {row['ratio']:6.1f}x  {different}"
        )


if __name__ == "__main__":
    main()
