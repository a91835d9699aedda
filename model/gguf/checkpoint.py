"""``GgufCheckpoint``: a GGUF file, or the parts of a split one, read as a checkpoint.

Its tensors have the names, shapes and order of rows that DeepSeek's own checkpoints have;
llama.cpp's converter leaves the pairs of rotary columns as they are.  What is quantized is decoded
into float16 by the ``gguf`` package, a few rows at a time.

Shape legend: H heads, N and V width of a head's keys without position and of its values, R
kv_lora_rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import Checkpoint, tensor_shapes
from slotmoe.model.checkpoint.shards import TensorInfo, inside
from slotmoe.model.config import Config, config_among
from slotmoe.model.files import ReadFile
from slotmoe.model.gguf.header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    GgufHeader,
    GgufTensor,
    is_gguf,
    read_header,
    shard_paths,
)
from slotmoe.model.gguf.metadata import small_files
from slotmoe.model.names import (
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    LAYER_PARTS,
    mlp_parts,
    split_expert,
    split_name,
)

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODED = torch.float16  # as fine as the scales of blocks, which are float16 themselves
_TOP = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_LAYER = {
    LAYER_PARTS["input_layernorm"]: "attn_norm",
    LAYER_PARTS["q_proj"]: "attn_q",
    LAYER_PARTS["q_a_proj"]: "attn_q_a",
    LAYER_PARTS["q_a_layernorm"]: "attn_q_a_norm",
    LAYER_PARTS["q_b_proj"]: "attn_q_b",
    LAYER_PARTS["kv_a_proj"]: "attn_kv_a_mqa",
    LAYER_PARTS["kv_a_layernorm"]: "attn_kv_a_norm",
    LAYER_PARTS["kv_b_proj"]: "attn_kv_b",
    LAYER_PARTS["o_proj"]: "attn_output",
    LAYER_PARTS["post_attention_layernorm"]: "ffn_norm",
    GATE: "ffn_gate_inp",
    **dict(zip(mlp_parts(moe=False), _MLP, strict=True)),
    **{name: f"{part}_shexp" for name, part in zip(mlp_parts(moe=True), _MLP, strict=True)},
}
"""The network's tensors inside a layer -> llama.cpp's; ``attn_kv_b`` may be two, by head."""
_KV_B, _HALVES = LAYER_PARTS["kv_b_proj"], ("attn_k_b.weight", "attn_v_b.weight")


class GgufCheckpoint(Checkpoint):
    """An open GGUF file and the other parts of it.  ``parts`` are the tensors of the file that make
    up one of ``infos``."""

    def __init__(
        self, headers: list[GgufHeader], config: Config, read: ReadFile,
        infos: dict[str, TensorInfo], parts: dict[str, tuple[GgufTensor, ...]],
    ):  # fmt: skip
        super().__init__(headers[0].path.parent, config, infos)
        self.name, self._headers, self._read, self._parts = (
            headers[0].path.name,
            headers,
            read,
            parts,
        )

    @classmethod
    def open(cls, path: Path, keep_mtp: bool = False) -> "GgufCheckpoint":
        """Open the file ``path``, the first where there are several, and check that every tensor
        of its metadata is there with the right shape.  Raises ``CheckpointError`` or
        ``ConfigError``, also where the ``gguf`` package is needed and missing."""
        if keep_mtp:
            problem = "the head that predicts one token more is not read from GGUF files"
            advice = "leave --keep-mtp out, or give the original checkpoint"
            raise ConfigError(f"{path}: {problem}; {advice}")
        headers = _read_headers(path)
        read = small_files(headers[0])
        config = config_among(read, path)
        stored = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        infos, parts = {}, {}
        if 3 * len(config.moe_layers) * config.n_routed_experts > MAX_TENSORS:
            raise CheckpointError(f"{path}: asks for more than {MAX_TENSORS} tensors; not real")
        for name, shape in tensor_shapes(config):
            try:
                parts[name] = _parts_of(name, shape, stored, config)
            except ValueError as problem:
                raise CheckpointError(f"{path}: {problem}") from None
            dtypes = [_dtype(part) for part in parts[name]]
            dtype = dtypes[0] if len(set(dtypes)) == 1 else torch.float32
            infos[name] = TensorInfo(parts[name][0].file, dtype, shape, parts[name][0].offset)
        used = {part.name for part in chain(*parts.values())}
        for name in stored.keys() - used:
            if not name.endswith(_HALVES):  # ik_llama.cpp writes them beside the whole
                raise CheckpointError(f"{path}: tensor {name:.120} is none that DeepSeek-V2 has")
        encodings = {part.encoding.name for part in chain(*parts.values())} - _PLAIN.keys()
        if encodings and find_spec("gguf") is None:
            needed = f"{', '.join(sorted(encodings))} tensors are decoded by the gguf package"
            raise ConfigError(f"{path}: {needed}: pip install 'slotmoe[gguf]'")
        return cls(headers, config, read, infos, parts)

    def small_file(self, name: str, limit: int) -> bytes | None:
        return self._read(name, limit)

    def headers(self) -> Iterator[tuple[str, int, bytes]]:
        for header in self._headers:
            yield header.path.name, header.size, header.data

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info, parts = self.infos[name], self._parts[name]
        if len(parts) == 1:
            data = self._decode(name, parts[0], start, stop)
            return data.view(stop - start, *info.shape[1:])
        c, (keys, values) = self.config, parts
        N, V, R = c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
        first, last = start // (N + V), -(-stop // (N + V))
        k_HRN = self._decode(name, keys, first * R, last * R).view(-1, R, N)
        v_HVR = self._decode(name, values, first * V, last * V).view(-1, V, R)
        both = torch.cat((k_HRN.mT.to(info.dtype), v_HVR.to(info.dtype)), 1).view(-1, R)
        return both[start - first * (N + V) :][: stop - start]

    def _decode(self, name: str, part: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the matrix ``part``, whose leading dimensions are one."""
        raw = np.empty((stop - start, part.row_bytes), np.uint8)
        view = raw.reshape(-1).data
        self._fill(view, part.file, part.offset + start * part.row_bytes, name)
        if (plain := _PLAIN.get(part.encoding.name)) is not None:
            return torch.from_numpy(raw).view(plain)
        from gguf import GGMLQuantizationType, quants

        with np.errstate(all="ignore"):  # what is not finite is refused by name later
            decoded = quants.dequantize(raw, GGMLQuantizationType[part.encoding.name])
            return torch.from_numpy(decoded).to(_DECODED)


def open_checkpoint(path: Path, keep_mtp: bool = False) -> Checkpoint:
    """The GGUF file ``path``, or the checkpoint folder, see ``Checkpoint.open``."""
    return (GgufCheckpoint if is_gguf(path) else Checkpoint).open(path, keep_mtp)


def _dtype(part: GgufTensor) -> torch.dtype:
    return _PLAIN.get(part.encoding.name, _DECODED)


def _read_headers(path: Path) -> list[GgufHeader]:
    """The headers of all parts, which must be of one model.  Raises ``CheckpointError``."""
    headers: list[GgufHeader] = []
    paths, left = shard_paths(path), MAX_HEADER_BYTES
    for index, part in enumerate(paths):
        header = read_header(inside(path.parent, part.name) if index else path, left)
        left -= len(header.data)
        number, count = (header.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
        if (number, count or 1) != (index, len(paths)):  # 0 parts: they have been put together
            says = f"split.no is {number!r:.40} and split.count {count!r:.40}"
            named = f"{index} and {len(paths)}, as the name says (PREFIX-00001-of-00003.gguf)"
            raise CheckpointError(f"{part}: {says}, expected {named}")
        headers.append(header)
    counted = sum(len(header.tensors) for header in headers)
    names = set(chain(*(header.tensors for header in headers)))
    for header in headers:
        stated = header.metadata.get("split.tensors.count", counted)
        if not stated == counted == len(names):
            counts = f"split.tensors.count is {stated!r:.40}, the parts have {len(names)} tensors"
            raise CheckpointError(f"{header.path}: {counts}; they are not of one model")
    return headers


def _parts_of(
    name: str, shape: tuple[int, ...], stored: Mapping[str, GgufTensor], config: Config
) -> tuple[GgufTensor, ...]:
    """The tensors of the file that hold ``name``.  Raises ``ValueError``."""
    layer, inner = split_name(name)
    if layer is None:
        return (_tensor(f"{_TOP[name]}.weight", shape, stored),)
    prefix = f"blk.{layer}."
    if (expert := split_expert(name)) is not None:
        part = expert[2].removesuffix("_proj")
        every = _tensor(
            f"{prefix}ffn_{part}_exps.weight", (config.n_routed_experts, *shape), stored
        )
        offset = every.offset + expert[1] * (every.nbytes // config.n_routed_experts)
        return (replace(every, shape=shape, offset=offset),)
    if inner == _KV_B and f"{prefix}attn_kv_b.weight" not in stored:
        H, R = config.num_attention_heads, config.kv_lora_rank
        k_HRN, v_HVR = (H, R, config.qk_nope_head_dim), (H, config.v_head_dim, R)
        shapes = zip(_HALVES, (k_HRN, v_HVR), strict=True)
        return tuple(_tensor(prefix + half, shape, stored) for half, shape in shapes)
    return (_tensor(f"{prefix}{_LAYER[inner]}.weight", shape, stored),)


def _tensor(name: str, shape: tuple[int, ...], stored: Mapping[str, GgufTensor]) -> GgufTensor:
    if name not in stored:
        raise ValueError(f"tensor {name} is missing; its metadata asks for it")
    tensor = stored[name]
    # ik_llama.cpp writes keys and values of all heads as one matrix.
    flat = (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape
    if tensor.shape not in (shape, flat):
        shapes = f"{list(tensor.shape)}, its metadata asks for {list(shape)}"
        raise ValueError(f"tensor {name} has shape {shapes}")
    return tensor
