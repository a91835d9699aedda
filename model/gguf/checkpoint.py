"""A GGUF file, or the parts of a split one, as a ``Checkpoint``.

Its tensors have the names, shapes and order of rows that DeepSeek's own checkpoints have;
llama.cpp's converter leaves the pairs of rotary columns as they are.  What is quantized is decoded
into float16 by the ``gguf`` package, a few rows at a time.

Shape legend: H heads, N and V width of a head's keys without position and of its values, R
kv_lora_rank.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import Checkpoint, tensor_shapes
from slotmoe.model.checkpoint.shards import Read, TensorInfo, inside
from slotmoe.model.config import Config, config_among
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
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_NAMES = {
    EMBEDDING: "token_embd",
    FINAL_NORM: "output_norm",
    HEAD: "output",
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
"""The network's tensors, those of a layer by their name inside it -> llama.cpp's; ``attn_kv_b`` may
be two, by head."""
_KV_B, _HALVES = LAYER_PARTS["kv_b_proj"], ("attn_k_b.weight", "attn_v_b.weight")


@dataclass(frozen=True, slots=True)
class GgmlTensor(TensorInfo):
    """Rows that are encoded as ggml's type ``kind``, in ``codes``."""

    kind: str
    codes: TensorInfo

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        codes = read(self.codes, start, stop).numpy()
        with np.errstate(all="ignore"):  # what is not finite is refused by name later
            decoded = quants.dequantize(codes, GGMLQuantizationType[self.kind])
            return torch.from_numpy(decoded).to(self.dtype)


@dataclass(frozen=True, slots=True)
class HeadsTensor(TensorInfo):
    """``kv_b_proj`` of ``keys`` [H, R, N] and ``values`` [H, V, R]."""

    keys: TensorInfo
    values: TensorInfo

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        (_, R, N), (_, V, _) = self.keys.shape, self.values.shape
        first, last = start // (N + V), -(-stop // (N + V))
        k_HRN = self.keys.rows(read, first * R, last * R).view(-1, R, N)
        v_HVR = self.values.rows(read, first * V, last * V).view(-1, V, R)
        both = torch.cat((k_HRN.mT.to(self.dtype), v_HVR.to(self.dtype)), 1).view(-1, R)
        return both[start - first * (N + V) :][: stop - start]


def open_checkpoint(path: Path, keep_mtp: bool = False) -> Checkpoint:
    """The checkpoint folder ``path``, see ``Checkpoint.open``, or the GGUF file, the first where
    there are several: every tensor of its metadata is there with the right shape.  Raises
    ``CheckpointError`` or ``ConfigError``, also where the ``gguf`` package is needed and
    missing."""
    if not is_gguf(path):
        return Checkpoint.open(path, keep_mtp)
    if keep_mtp:
        problem = "the head that predicts one token more is not read from GGUF files"
        advice = "leave --keep-mtp out, or give the original checkpoint"
        raise ConfigError(f"{path}: {problem}; {advice}")
    headers = _read_headers(path)
    read = small_files(headers[0])
    config = config_among(read, path)
    if 3 * len(config.moe_layers) * config.n_routed_experts > MAX_TENSORS:
        raise CheckpointError(f"{path}: asks for more than {MAX_TENSORS} tensors; not real")
    places = _Places(headers, config)
    try:
        infos = {name: places.find(name, shape) for name, shape in tensor_shapes(config)}
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    for name in places.stored.keys() - places.used:
        if not name.endswith(_HALVES):  # ik_llama.cpp writes them beside the whole
            raise CheckpointError(f"{path}: tensor {name:.120} is none that DeepSeek-V2 has")
    encodings = {places.stored[name].encoding.name for name in places.used} - _PLAIN.keys()
    if encodings and find_spec("gguf") is None:
        needed = f"{', '.join(sorted(encodings))} tensors are decoded by the gguf package"
        raise ConfigError(f"{path}: {needed}: pip install 'slotmoe[gguf]'")
    starts = {header.path.name: header.length for header in headers}
    return Checkpoint(path, config, infos, (), starts, read)


def _read_headers(path: Path) -> list[GgufHeader]:
    """The headers of all parts, which must be of one model.  Raises ``CheckpointError``."""
    headers: list[GgufHeader] = []
    paths, left = shard_paths(path), MAX_HEADER_BYTES
    for index, part in enumerate(paths):
        header = read_header(inside(path.parent, part.name) if index else path, left)
        left -= header.length
        number, count = (header.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
        if (number, count or 1) != (index, len(paths)):  # 0 parts: they have been put together
            says = f"split.no is {number!r:.40} and split.count {count!r:.40}"
            named = f"{index} and {len(paths)}, as the name says (PREFIX-00001-of-00003.gguf)"
            raise CheckpointError(f"{part}: {says}, expected {named}")
        headers.append(header)
    counted = sum(len(header.tensors) for header in headers)
    names = {name for header in headers for name in header.tensors}
    for header in headers:
        stated = header.metadata.get("split.tensors.count", counted)
        if not stated == counted == len(names):
            counts = f"split.tensors.count is {stated!r:.40}, the parts have {len(names)} tensors"
            raise CheckpointError(f"{header.path}: {counts}; they are not of one model")
    return headers


class _Places:
    """Finds weights among the tensors of all parts, ``stored``; ``used`` are the names of those
    that the weights found are in."""

    def __init__(self, headers: list[GgufHeader], config: Config):
        self.stored: dict[str, GgufTensor] = {}
        for header in headers:
            self.stored |= header.tensors
        self.used: set[str] = set()
        self._config = config

    def find(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The weight ``name``.  Raises ``ValueError``."""
        c, (layer, inner) = self._config, split_name(name)
        prefix = "" if layer is None else f"blk.{layer}."
        if (expert := split_expert(name)) is not None:
            _, number, projection = expert
            part = f"{prefix}ffn_{projection.removesuffix('_proj')}_exps.weight"
            every = self._tensor(part, (c.n_routed_experts, *shape))
            return _info(name, every, shape, number * shape[0])
        if inner != _KV_B or f"{prefix}attn_kv_b.weight" in self.stored:
            part = _NAMES[name if layer is None else inner]
            return _info(name, self._tensor(f"{prefix}{part}.weight", shape), shape)
        H, R = c.num_attention_heads, c.kv_lora_rank
        shapes = (H, R, c.qk_nope_head_dim), (H, c.v_head_dim, R)  # k_HRN, v_HVR
        found = zip(_HALVES, shapes, strict=True)
        keys, values = (
            _info(name, self._tensor(prefix + half, shape), shape) for half, shape in found
        )
        dtype = keys.dtype if keys.dtype == values.dtype else torch.float32
        return HeadsTensor(name, keys.path, dtype, shape, keys.offset, keys, values)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        if name not in self.stored:
            raise ValueError(f"tensor {name} is missing; its metadata asks for it")
        self.used.add(name)
        tensor = self.stored[name]
        # ik_llama.cpp writes keys and values of all heads as one matrix.
        flat = (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape
        if tensor.shape not in (shape, flat):
            shapes = f"{list(tensor.shape)}, its metadata asks for {list(shape)}"
            raise ValueError(f"tensor {name} has shape {shapes}")
        return tensor


def _info(name: str, tensor: GgufTensor, shape: tuple[int, ...], first: int = 0) -> TensorInfo:
    """The weight ``name`` of ``shape`` whose rows are those of ``tensor`` from ``first`` on."""
    encoding, plain = tensor.encoding, _PLAIN.get(tensor.encoding.name)
    row = (*shape[:-1], shape[-1] // encoding.block * encoding.bytes)
    codes = TensorInfo(name, tensor.path, plain or torch.uint8, shape if plain else row, 0)
    codes = replace(codes, offset=tensor.offset + first * codes.row_bytes)
    if plain is not None:
        return codes
    # Scales of blocks are float16 themselves.
    return GgmlTensor(name, codes.path, torch.float16, shape, codes.offset, encoding.name, codes)
