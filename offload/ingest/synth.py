"""An export with random weights (``slotmoe synth``): real speed and memory, meaningless text."""

import math
import os
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.jsonfile import Json
from slotmoe.model.config import read_config
from slotmoe.model.names import EMBEDDING, resident_shapes, role_of
from slotmoe.offload.ingest import output_dir
from slotmoe.offload.ingest.manifest import Contents, write_files
from slotmoe.offload.ingest.output_dir import Progress
from slotmoe.offload.model_cache import SAMPLE
from slotmoe.offload.plan.memory import default_codecs
from slotmoe.offload.plan.precision import precision_of
from slotmoe.quant.codecs.codec import BLOCK, SCALES, TILE, Codec, ExpertCodecs
from slotmoe.quant.codecs.weight import pack
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, Part, layer_file
from slotmoe.quant.export.writer import ExportFile, write_json
from slotmoe.quant.shapes import TABLE

POOL_BYTES = 64 << 20  # random bytes that all weights are cut from, at random places
PIECE_BYTES = 32 << 20  # written at once


def synthesize(
    config_path: Path,
    destination: Path,
    resident: str,
    codecs: ExpertCodecs | None,
    share_layers: int | None,
    overwrite: bool,
    progress: Progress,
    keep_mtp: bool = False,
) -> Json:
    """Write the export under a temporary name, as ``quantize`` does, and rename it; returns its
    manifest.  Raises ``ExportError``.

    ``share_layers`` distinct expert layers are written, and the others are hard links to them.
    """
    config = read_config(config_path)
    if keep_mtp:
        config = config.with_mtp(config_path, "--keep-mtp")
    dtypes = {
        name: torch.int32 if role_of(name) == TABLE else torch.bfloat16
        for name in resident_shapes(config)
    }
    codecs = codecs or default_codecs(config)
    contents = Contents(config, precision_of(config, resident), codecs, dtypes)
    distinct = config.moe_layers[: share_layers or len(config.moe_layers)]
    partial = output_dir.beside(destination, "partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with output_dir.locked(partial, wait_for_lock=False):
        output_dir.check_destination(destination, overwrite)
        if not overwrite:
            output_dir.refuse_begun(partial)
        output_dir.empty(partial)
        try:
            files = [RESIDENT, *map(layer_file, distinct)]
            entries = _write_weights(contents, partial, files, progress)
            linked = {}
            for index, layer in enumerate(config.moe_layers[len(distinct) :]):
                linked[str(layer)] = origin = distinct[index % len(distinct)]
                os.link(partial / layer_file(origin), partial / layer_file(layer))
                entries[layer_file(layer)] = entries[layer_file(origin)]
            copied = [SAMPLE / name for name in ("tokenizer.json", "tokenizer_config.json")]
            small = {path.name: path.read_bytes() for path in copied}  # any tokenizer will do
            entries |= write_files({**small, "config.json": config_path.read_bytes()}, partial)
            origin_of_weights = {"name": f"random weights of {config_path.name}", "files": {}}
            manifest = contents.manifest(origin_of_weights, entries, {}, linked)
            write_json(partial / MANIFEST, manifest)
        except BaseException:
            output_dir.empty(partial)
            raise
        output_dir.publish(partial, destination)
    return manifest


def _write_weights(contents: Contents, partial: Path, files: list[str], progress: Progress) -> Json:
    """Write ``files`` of the export; returns their manifest entries."""
    total, done, entries = sum(map(contents.nbytes, files)), 0, {}
    output_dir.check_space(partial, total)
    random = _Random(contents)
    for name in files:
        with closing(ExportFile(partial / name, contents.parts(name))) as file:
            for part, piece in random.tensors(name):
                file.write(part, piece)
                done += piece.nbytes
                progress(done, total)
            entries[name] = file.finish(contents.record_bytes(name))
    progress(total, total)  # headers and padding, too
    return entries


class _Random:
    """Random weights at memory's speed: slices of a pool of noise, so small that all stays finite.

    Every matrix has mean zero: the least bias, summed over thousands of columns, would give all
    tokens the same direction, and with it the same experts.
    """

    def __init__(self, contents: Contents):
        self._contents, self._generator = contents, np.random.default_rng(0)
        noise = self._generator.integers(-127, 128, POOL_BYTES, dtype="int8")
        self._pool = torch.from_numpy(noise.view("uint8"))

    def _bytes(self, count: int) -> Tensor:
        """``count`` random bytes, uint8."""
        pieces = []
        while count:
            start = 64 * int(self._generator.integers(0, POOL_BYTES // 128))
            pieces.append(self._pool[start : start + count])
            count -= len(pieces[-1])
        return torch.cat(pieces)

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of ``file``, in pieces of their rows."""
        tensors = {n: t for n, t in self._contents.tensors.items() if t.file == file}
        source_of = {part: name for name, tensor in tensors.items() for part in tensor.parts}
        parts = self._contents.parts(file)
        scales = {} if file == RESIDENT else self._expert_scales
        for name in parts if file == RESIDENT else source_of:
            part, source = parts[name], source_of[name]
            shape, kind = tensors[source].shape, tensors[source].kind
            if name == source:
                for piece in self._matrix(part, shape, kind, source):
                    yield name, piece
            elif not isinstance(kind, Codec):
                yield name, self._signed(part.shape, _deviation(source, shape) / 73.3)
            elif scales:
                yield name, scales[source.split(".")[-2]]
            else:
                yield name, self._scales(kind, source, shape)

    def _matrix(
        self, part: Part, shape: tuple[int, ...], kind: str | Codec, source: str
    ) -> Iterator[Tensor]:
        """Yield a vector of ones, or the values of a matrix or of its bias, or int8 values or codes
        of ``source``."""
        if len(shape) == 1 and not source.endswith("_proj.bias"):
            yield torch.ones(part.shape, dtype=part.dtype)
            return
        row_bytes = part.nbytes // part.shape[0]  # of a tile of codes
        step = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, part.shape[0], step):
            count = min(step, part.shape[0] - start)
            if part.dtype == torch.int32:  # different experts for each of so many tokens
                experts, chosen = self._contents.config.n_routed_experts, torch.arange(shape[1])
                first_T = self._bytes(4 * count).view(torch.int32) % experts
                yield (first_T[:, None] + chosen * (experts // shape[1])).int() % experts
                continue
            if kind == "none":
                noise = self._bytes(count * math.prod(shape[1:])).view(torch.int8).float()
                values = noise * (_deviation(source, shape) / 73.3)
                yield values.to(part.dtype).view(count, *shape[1:])
                continue
            codes = self._bytes(count * row_bytes).view(part.dtype).view(count, *part.shape[1:])
            rows = min(count * TILE, shape[0] - start * TILE)
            yield _pad(kind, codes, rows, shape[1]) if isinstance(kind, Codec) else codes

    @cached_property
    def _expert_scales(self) -> dict[str, Tensor]:
        """By projection, the same for all experts."""
        layout = self._contents.layout
        return {
            projection: self._scales(layout.codecs.of(projection), "", shape)
            for projection, shape in layout.shapes.items()
        }

    def _scales(self, codec: Codec, source: str, shape: tuple[int, ...]) -> Tensor:
        """Scales of random codes; random signs, since the levels are no mirror images."""
        (N, K), size = shape, _deviation(source, shape) / (0.6 * max(map(abs, codec.levels)))
        scales, real = codec.scales_shape(N, K), torch.arange(-(-N // TILE) * TILE) < N
        if SCALES[codec.scales].dtype == "F16":
            rows = scales[0], scales[1] * scales[2] // TILE, TILE
            return (self._signed(rows, size).half() * real.view(-1, 1, TILE)).view(scales)
        if SCALES[codec.scales].dtype == "F8_E8M0":
            sizes = real.float().view(-1, 1, TILE) * size
            return sizes.repeat(1, scales[1], 2).to(torch.float8_e8m0fnu)
        most = SCALES[codec.scales].most
        of_rows = (real.float() * (size / most)).view(torch.uint8).view(scales[0], -1, scales[2])
        blocks = self._signed((scales[0], 2 * (scales[1] - of_rows.shape[1]), TILE), most)
        of_blocks = (blocks * real.view(-1, 1, TILE)).to(torch.int8).view(torch.uint8)
        if codec.scales == "i4":
            of_blocks = of_blocks[:, ::2] & 15 | of_blocks[:, 1::2] << 4
        return torch.cat([of_rows, of_blocks.view(scales[0], -1, scales[2])], dim=1)

    def _signed(self, shape: tuple[int, ...], size: float) -> Tensor:
        """``size`` with random signs."""
        signs = self._bytes(math.prod(shape)).view(torch.int8).view(shape) >= 0
        return torch.where(signs, size, -size)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a matrix [N, K]: 1 / (2 sqrt(K)), and 1 for the embedding, so that it
    leads the residual stream and different tokens go to different experts."""
    return 1.0 if name == EMBEDDING else 0.5 * shape[-1] ** -0.5


def _pad(codec: Codec, codes: Tensor, rows: int, K: int) -> Tensor:
    """The code of zero, if 4 bits have one, in what is padding in the tiles of [rows, K]."""
    if codec.bits != 4 or 0 not in codec.levels or (rows % TILE == 0 and K % BLOCK == 0):
        return codes
    real = torch.full((rows, K), 15, dtype=torch.uint8)
    real = F.pad(real, (0, -K % BLOCK, 0, -rows % TILE))
    kept = pack(real.view(-1, TILE, real.shape[1]), 4)
    return codes & kept | ~kept & 17 * codec.levels.index(0)
