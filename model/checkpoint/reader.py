"""Reads a Hugging Face checkpoint, one tensor (or a range of its rows) at a time.

What its files hold is checked against what the config promises before any data is read
(``shards`` and ``places`` beside this).  Data is read with ``pread`` into fresh buffers; a memory
map would count the whole shard as resident.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from slotmoe.errors import CheckpointError, ConfigError, reading
from slotmoe.jsonfile import parse_json, read_file
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint.dequantize import Codes, bitsandbytes_codes, decode_fp8, int4_codes
from slotmoe.model.checkpoint.places import Encoded, Weights
from slotmoe.model.checkpoint.shards import TensorInfo, inside, read_header, tensors_in
from slotmoe.model.config import Config, config_among
from slotmoe.model.files import files_in
from slotmoe.model.names import MTP_PARTS, expert_name, expert_shapes, layer_tensor, resident_shapes
from slotmoe.model.tokenizer import MAX_SETTINGS_BYTES


class Checkpoint:
    """An open checkpoint folder, a context manager.  Reading is thread-safe."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        infos: Mapping[str, TensorInfo],
        weights: Weights | None = None,
    ):
        """``infos`` are the tensors that the network uses: all of ``weights`` where those say how
        they are stored."""
        self.folder, self.config, self.infos, self.weights = folder, config, infos, weights
        self.name = folder.resolve().name
        self._stored = infos if weights is None else weights.used
        self._files: dict[str, int] = {}
        self._converted: bytes | None = None  # the tokenizer, where it is not there as JSON
        try:
            for name in {info.file for info in self._stored.values()}:
                with reading(folder / name, CheckpointError):
                    self._files[name] = os.open(folder / name, os.O_RDONLY)
        except CheckpointError:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path, keep_mtp: bool = False) -> "Checkpoint":
        """Open ``folder`` and check that every tensor of its config is there with the right shape,
        with ``keep_mtp`` also those of the head that predicts one token more.

        Raises ``ConfigError`` or ``CheckpointError``; no tensor data has been read by then.
        """
        config = config_among(files_in(folder), folder)
        stored = tensors_in(folder)
        if keep_mtp:
            config = config.with_mtp(folder / "config.json", "--keep-mtp")
            first = layer_tensor(config.num_hidden_layers, MTP_PARTS["enorm"])
            if first not in stored:
                problem = f"{first} is missing, though num_nextn_predict_layers names its layer"
                raise CheckpointError(
                    f"{folder}: {problem}; leave --keep-mtp out, or get all weights"
                )
        weights = Weights(folder, stored, config.encoding, config.n_routed_experts)
        for name, shape in tensor_shapes(config):
            weights.find(name, shape)
        return cls(folder, config, weights.infos, weights)

    @contextmanager
    def read_from(self, file: str, path: Path) -> Iterator[None]:
        """Read ``file`` from ``path`` for a while; ``CheckpointError`` if the header changed."""
        header = {name: replace(info, file=file) for name, info in read_header(path)[0].items()}
        known = [(name, info) for name, info in self._stored.items() if info.file == file]
        if any(header.get(name) != info for name, info in known):
            problem = f"its header is not the one that {file} had before"
            raise CheckpointError(f"{path}: {problem}; download this file again")
        usual, self._files[file] = self._files[file], os.open(path, os.O_RDONLY)
        try:
            yield
        finally:
            os.close(self._files[file])
            self._files[file] = usual

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the network uses."""
        return sum(info.nbytes for info in self.infos.values())

    def small_file(self, name: str, limit: int) -> bytes | None:
        """``config.json`` or another small file, see ``slotmoe.model.files``.  ``tokenizer.json``
        may be made of a ``tiktoken.model``.  Raises ``CheckpointError`` or ``ConfigError``."""
        if (self.folder / name).is_file():
            return read_file(inside(self.folder, name), limit, CheckpointError)
        if name != "tokenizer.json" or not (self.folder / tiktoken.FILE_NAME).is_file():
            return None
        if self._converted is None:
            path = inside(self.folder, tiktoken.FILE_NAME)
            model = read_file(path, tiktoken.MAX_BYTES, CheckpointError)
            settings = self.small_file("tokenizer_config.json", MAX_SETTINGS_BYTES) or b"{}"
            parsed = parse_json(settings, self.folder / "tokenizer_config.json")
            try:
                self._converted = tiktoken.tokenizer_json(model, parsed)
            except ValueError as problem:
                raise ConfigError(f"{path}: {problem}") from None
        return self._converted

    def headers(self) -> Iterator[tuple[str, int, bytes]]:
        """Each weight file, its size, and what it holds before the data."""
        for name, handle in sorted(self._files.items()):
            start = bytearray(8)
            self._fill(memoryview(start), name, 0, "its header")
            header = bytearray(8 + int.from_bytes(start, "little"))  # checked when it was opened
            self._fill(memoryview(header), name, 0, "its header")
            yield name, os.fstat(handle).st_size, bytes(header)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of tensor ``name``, in its dtype of ``infos``.

        Raises ``CheckpointError`` if the file ends early or holds scales that are not finite.
        """
        encoded = None if self.weights is None else self.weights.encoded.get(name)
        if encoded is None:
            return self._stored_rows(self.infos[name], start, stop, name)
        if encoded.encoding.method != "fp8":
            return self.codes(name, start, stop).values().to(self.infos[name].dtype)
        start, stop = encoded.first + start, encoded.first + stop
        rows = encoded.encoding.rows or stop
        scales = self._stored_rows(encoded.scales, start // rows, -(-stop // rows), name)
        self._check_scales(name, encoded, scales)
        codes = self._stored_rows(encoded.codes, start, stop, name)
        return decode_fp8(codes, scales, encoded.encoding, start)

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows of a weight that is stored in 4 bits, as they are.  Raises like ``rows``."""
        assert self.weights is not None
        encoded = self.weights.encoded[name]
        start, stop = encoded.first + start, encoded.first + stop
        scales = self._stored_rows(encoded.scales, start, stop, name)
        words = self._stored_rows(encoded.codes, start, stop, name)
        if not encoded.encoding.flat:
            codes = int4_codes(words, scales, encoded.encoding)
        else:
            beside = {
                part: self._stored_rows(info, 0, info.shape[0], name)
                for part, info in encoded.beside.items()
            }
            first = start * scales.shape[1]
            try:
                codes = bitsandbytes_codes(words, scales, encoded.encoding, first, beside)
            except ValueError as problem:
                where = f"{self.folder / encoded.beside['quant_state'].file}: {name}"
                raise CheckpointError(f"{where}: {problem}") from None
        self._check_scales(name, encoded, codes.scales)
        return codes

    def _check_scales(self, name: str, encoded: Encoded, scales: torch.Tensor) -> None:
        if not torch.isfinite(scales).all():
            where = f"{self.folder / encoded.scales.file}: the scales of {name}"
            raise CheckpointError(f"{where} are NaN or infinite; the file is damaged")

    def _stored_rows(self, info: TensorInfo, start: int, stop: int, name: str) -> torch.Tensor:
        """Rows of a tensor as they are in the file."""
        data = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        view = data.view(-1).view(torch.uint8).numpy().data
        self._fill(view, info.file, info.offset + start * info.row_bytes, name)
        return data

    def _fill(self, view: memoryview, file: str, offset: int, name: str) -> None:
        """Fill ``view`` from ``offset`` of ``file`` on, where tensor ``name`` lies."""
        while view:
            with reading(self.folder / file, CheckpointError):
                count = os.preadv(self._files[file], [view], offset)
            if count == 0:
                problem = f"ends inside {name}; it was truncated while being read"
                raise CheckpointError(f"{self.folder / file}: {problem}")
            view, offset = view[count:], offset + count

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, in the source's dtype, checked to be finite."""
        data = self.rows(name, 0, self.infos[name].shape[0])
        self.check_finite(name, data)
        return data

    def check_finite(self, name: str, data: torch.Tensor) -> None:
        """Raise ``CheckpointError`` if ``data`` of tensor ``name`` holds NaN or infinity."""
        if not torch.isfinite(data).all():
            problem = f"{name} holds NaN or infinite weights; the file is damaged"
            raise CheckpointError(f"{self.folder / self.infos[name].file}: {problem}")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_problem: object) -> None:
        self.close()


def tensor_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that ``config`` asks for; one by one, since a hostile one asks
    for far too many."""
    yield from resident_shapes(config).items()
    for layer in config.moe_layers:
        for projection, shape in expert_shapes(config).items():
            for expert in range(config.n_routed_experts):
                yield expert_name(layer, expert, projection), shape
