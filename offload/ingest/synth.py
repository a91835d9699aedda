"""An export with random weights (``slotmoe synth``): real speed and memory, meaningless text."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slotmoe import model
from slotmoe.model.config import read_config
from slotmoe.model.names import EMBEDDING, resident_shapes
from slotmoe.offload.ingest.contents import Contents, copied_entries
from slotmoe.offload.ingest.output_dir import beside, check_destination, check_space, publish
from slotmoe.offload.ingest.quantize import Progress, resident_mode
from slotmoe.quant.export.layout import (
    MANIFEST,
    RESIDENT,
    Part,
    RecordLayout,
    expert_tensor,
    layer_file,
)
from slotmoe.quant.export.writer import ExportFile, publish_file, write_json

POOL_BYTES = 64 << 20  # random bytes that all weights are cut from, at random places


def synthesize(
    config_path: Path,
    destination: Path,
    resident: str,
    share_layers: int | None,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write the export under a temporary name and rename it; returns its manifest.

    ``share_layers`` distinct expert layers are written, and the others are hard links to them.
    """
    config = read_config(config_path)
    check_destination(destination, overwrite)
    dtypes = dict.fromkeys(resident_shapes(config), torch.bfloat16)
    contents = Contents(config, resident_mode(resident), dtypes)
    distinct = config.moe_layers[: share_layers or len(config.moe_layers)]
    partial = beside(destination, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = _write_weights(contents, partial, distinct, progress)
        linked = {}
        for index, layer in enumerate(config.moe_layers[len(distinct) :]):
            linked[str(layer)] = origin = distinct[index % len(distinct)]
            os.link(partial / layer_file(origin), partial / layer_file(layer))
            files[layer_file(layer)] = files[layer_file(origin)]
        sample = Path(model.__file__).parent / "sample"  # any tokenizer will do for noise
        sources = {name: sample / name for name in ("tokenizer.json", "tokenizer_config.json")}
        sources["config.json"] = config_path
        for name, source in sources.items():
            shutil.copyfile(source, partial / name)
        files |= copied_entries(partial, sources)
        origin_of_weights = {"name": f"random weights of {config_path.name}", "files": {}}
        manifest = contents.manifest(origin_of_weights, files, linked)
        write_json(partial / MANIFEST, manifest)
        publish(partial, destination)
        return manifest
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(
    contents: Contents, partial: Path, layers: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Write the resident file and those of ``layers``; returns their manifest entries."""
    parts, layout, experts = contents.resident, contents.layout, contents.config.n_routed_experts
    total = len(layers) * experts * layout.record_bytes
    total += sum(part.nbytes for part in parts.values())
    check_space(partial, total)
    random, done = _Random(np.random.default_rng(0)), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    files: dict[str, Any] = {}
    with closing(ExportFile(partial / RESIDENT, parts)) as file:
        for name, part in parts.items():
            for piece in random.resident(name, part, contents):
                file.write(name, piece)
                advance(piece.nbytes)
        files[RESIDENT] = file.finish()
    publish_file(partial / RESIDENT)
    make_record = random.record_maker(layout)
    for layer in layers:
        name = layer_file(layer)
        with closing(ExportFile(partial / name, contents.parts(name))) as file:
            for expert in range(experts):
                record = make_record()
                for part_name in layout.parts:
                    tensor = expert_tensor(layer, expert, part_name)
                    file.write(tensor, layout.part(record, part_name))
                advance(layout.record_bytes)
            files[name] = file.finish(layout.record_bytes)
        publish_file(partial / name)
    return files


class _Random:
    """Random weights at the speed of memory: slices of one pool of noise, scaled so that
    activations stay finite.

    Every matrix has mean zero: the least bias, summed over thousands of columns, would give all
    tokens the same direction, and with it the same experts.
    """

    def __init__(self, generator: np.random.Generator):
        self._generator = generator
        noise = generator.integers(-127, 128, POOL_BYTES, dtype="int8")
        self._pool = torch.from_numpy(noise.view("uint8"))

    def bytes(self, count: int) -> Tensor:
        """``count`` random bytes, uint8."""
        pieces = []
        while count:
            start = 64 * int(self._generator.integers(0, POOL_BYTES // 128))
            pieces.append(self._pool[start : start + count])
            count -= len(pieces[-1])
        return torch.cat(pieces)

    def resident(self, name: str, part: Part, contents: Contents) -> Iterator[Tensor]:
        """Yield the values of one tensor of the resident file in pieces of its rows."""
        source = name.removesuffix(".scale").removesuffix(".absmax")
        shape, kind = contents.shapes[source], contents.kind(source)
        if name != source:
            size = _deviation(source, shape) / (73.3 if kind == "int8" else 0.6)
            values = self._scales(part.shape, part.dtype, size)
            yield _pad_absmax(values, shape) if kind == "nf4" else values
            return
        if len(shape) == 1:
            yield torch.ones(part.shape, dtype=part.dtype)
            return
        row_bytes = part.nbytes // part.shape[0]
        step = max(1, (32 << 20) // row_bytes)
        for start in range(0, part.shape[0], step):
            count = min(step, part.shape[0] - start)
            if kind == "none":
                noise = self.bytes(count * shape[-1]).view(torch.int8).float()
                noise *= _deviation(source, shape) / 73.3
                yield noise.to(part.dtype).view(count, *shape[1:])
            else:
                data = self.bytes(count * row_bytes).view(part.dtype).view(count, *part.shape[1:])
                yield _pad_codes(data, start, shape) if kind == "nf4" else data

    def _scales(self, shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
        """``size`` with random signs, since NF4's levels are no mirror images of each other."""
        signs = self.bytes(math.prod(shape)).view(torch.int8).view(shape) >= 0
        return torch.where(signs, size, -size).to(dtype)

    def record_maker(self, layout: RecordLayout) -> Callable[[], Tensor]:
        """A function that returns the next random record; the same buffer every time."""
        record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        for name, shape in layout.shapes.items():
            absmax = layout.part(record, f"{name}.weight.absmax")
            scales = self._scales(absmax.shape, absmax.dtype, 0.5 / (0.6 * shape[-1] ** 0.5))
            absmax.copy_(_pad_absmax(scales, shape))

        def make() -> Tensor:
            for name, shape in layout.shapes.items():
                codes = layout.part(record, f"{name}.weight")
                codes.copy_(_pad_codes(self.bytes(codes.nbytes).view(codes.shape), 0, shape))
            return record

        return make


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix [N, K]: 1 / (2 sqrt(K)), and 1 for the embedding, so that it
    leads the residual stream and different tokens go to different experts."""
    return 1.0 if name == EMBEDDING else 0.5 * shape[-1] ** -0.5


def _pad_codes(codes: Tensor, first_tile: int, shape: tuple[int, ...]) -> Tensor:
    """The code of zero in every padded row and column of tiles of [N, K] (``quant.nf4``)."""
    N, K = shape
    tiles, blocks, _ = codes.shape
    if N % 16 == 0 and K % 64 == 0:
        return codes
    row = torch.arange(first_tile * 16, (first_tile + tiles) * 16).view(tiles, 1, 1, 16, 1)
    t, i = torch.arange(8).view(1, 1, 8, 1, 1), torch.arange(4)
    column = torch.arange(blocks).view(1, blocks, 1, 1, 1) * 64 + 8 * t + i
    view = codes.view(tiles, blocks, 8, 16, 4)
    high = torch.where((row < N) & (column < K), view >> 4, 7)
    low = torch.where((row < N) & (column + 4 < K), view & 15, 7)
    return (high << 4 | low).to(torch.uint8).view(codes.shape)


def _pad_absmax(absmax: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zero in the scales of padded rows."""
    tiles = absmax.shape[0]
    real = torch.arange(tiles * 16).view(tiles, 1, 16) < shape[0]
    return absmax * real
