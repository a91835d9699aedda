"""The tensors of a GGUF file, or of the parts of a split one, as those of a checkpoint.

They have the names, shapes and order of rows that the publishers' checkpoints have;
llama.cpp's converter leaves the pairs of rotary columns as they are.  What is quantized is decoded
into float16 by the ``gguf`` package, a few rows at a time.

Shape legend: H heads, N and V width of a head's keys without position and of its values, R
kv_lora_rank.
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model import names
from slotmoe.model.checkpoint import places
from slotmoe.model.checkpoint.gguf_header import MAX_TENSORS, GgufHeader, GgufTensor
from slotmoe.model.checkpoint.shards import Read, TensorInfo
from slotmoe.model.config import Config

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KV_B = names.LAYER_PARTS["kv_b_proj"].name
_EXPERTS = {f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}
_HALVES = {f"{_KV_B}.{part}": f"attn_{part}_b" for part in "kv"}
_BIASES = {f"{name}.bias": theirs for name, theirs in _EXPERTS.items()}
_NAMES = {part.name: part.gguf for part in names.PARTS.values()} | _EXPERTS | _BIASES | _HALVES
_DELTA, _BOTH = "linear_attn.", "linear_attn.in_proj_ba"
_NAMES |= {_BOTH: "ssm_ba"}
"""The network's tensors, those of a layer by their name inside it -> llama.cpp's, which may have
``kv_b_proj`` in two, by head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlTensor(TensorInfo):
    """Rows that are encoded as ggml's type ``kind``, in ``codes``."""

    kind: str
    codes: TensorInfo

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        codes = read(self.codes, self.first + start, self.first + stop).numpy()
        with np.errstate(all="ignore"):  # what is not finite is refused by name later
            decoded = quants.dequantize(codes, GGMLQuantizationType[self.kind])
            return torch.from_numpy(decoded).to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Tensor(GgmlTensor):
    """Rows of blocks of 32: a byte, the exponent of their scale, and 16 of e2m1 codes, the low
    halves of which are the first 16."""

    def four_bits(self, read: Read, start: int, stop: int) -> places.Codes:
        """Rows as they are.  Raises ``CheckpointError`` like ``rows``."""
        bytes_RX = read(self.codes, self.first + start, self.first + stop)
        blocks_RBX = bytes_RX.view(len(bytes_RX), -1, 17)
        scales_RB = blocks_RBX[..., 0].contiguous().view(torch.float8_e8m0fnu).float()
        if not torch.isfinite(scales_RB).all():
            problem = f"the scales of {self.name} are NaN; the file is damaged"
            raise CheckpointError(f"{self.path}: {problem}")
        codes_RBX = torch.cat((blocks_RBX[..., 1:] & 15, blocks_RBX[..., 1:] >> 4), 2)
        return places.Codes(places.MXFP4, places.OF_E2M1[codes_RBX.flatten(1).int()], scales_RB, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
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


def gguf_tensors(
    path: Path, config: Config, headers: list[GgufHeader]
) -> tuple[dict[str, TensorInfo], set[TensorInfo]]:
    """Where the files have the network's tensors, and the stored ones that these are in.  Raises
    ``CheckpointError`` or ``ConfigError``, also where the ``gguf`` package is missing."""
    if 3 * len(config.moe_layers) * config.n_routed_experts > MAX_TENSORS:
        raise CheckpointError(f"{path}: asks for more than {MAX_TENSORS} tensors; not real")
    files = {
        name.replace("post_attention_norm", "ffn_norm"): tensor  # which some architectures have
        for header in headers
        for name, tensor in header.tensors.items()
    }
    stored = {
        name: _info(files[_spelled(name)], count)
        for name, count in _matrices(config).items()
        if _spelled(name) in files
    }
    apart = config.family._replace(interleaved=False, norms_less_one=False)
    given = replace(config, family=apart), "its metadata", _spelled, "tensor ", _source_of
    found = places.Places(path, stored, *given)
    infos = dict[str, TensorInfo]()
    for name, shape in names.tensor_shapes(config):
        layer, inner = names.split_name(name)
        if layer is not None and inner == _KV_B and name not in stored:
            stored[name] = _of_heads(found, layer, config)
        infos[name] = found.find(name, shape)
    used, first = {info.name for info in found.used}, config.num_hidden_layers
    heads = tuple(f"blk.{first + head}." for head in range(config.num_nextn_predict_layers))
    for name in {tensor.name for tensor in files.values()} - used:
        beside = name.endswith(("attn_k_b.weight", "attn_v_b.weight"))  # the whole
        if not beside and not name.startswith(heads):
            raise CheckpointError(f"{path}: tensor {name:.120} is none that this model has")
    kinds = sorted({info.kind for info in found.used if isinstance(info, GgmlTensor)})
    if kinds and find_spec("gguf") is None:
        needed = f"{', '.join(kinds)} tensors are decoded by the gguf package"
        raise ConfigError(f"{path}: {needed}: pip install 'slotmoe[gguf]'")
    return infos, found.used


def _source_of(name: str, shape: places.Shape, config: Config) -> places.Source:
    """Of the weight ``name``, as llama.cpp's converter makes it.  In Qwen3.5 it puts the first
    value head of each key head before all second ones."""
    of, (_, inner) = config.delta, names.split_name(name)
    part = inner.removeprefix(_DELTA)
    joined = ("in_proj_b", "in_proj_a") if config.family.by_key_head else ()
    if of is None or part in (inner, "norm", *joined):
        return places.source_of(name, shape, config)
    heads_H = torch.arange(of.num_value_heads)
    if not config.family.by_key_head:
        heads_H = heads_H.view(-1, of.num_key_heads).t().flatten()
    unit = of.value_head_dim if part in ("in_proj_qkv", "in_proj_z", "conv1d", "out_proj") else 1
    first = 2 * of.num_key_heads * of.key_head_dim if part in ("in_proj_qkv", "conv1d") else 0
    starts = (first + unit * heads_H).tolist()
    order = [*range(first), *(row for start in starts for row in range(start, start + unit))]
    turned = shape[::-1] if part == "conv1d" else shape
    return name, turned, partial(_in_order, order=order, part=part)


def _in_order(rows: places.Rows, start: int, stop: int, order: list[int], part: str) -> Tensor:
    """Rows of ``part``, or its columns; taps are columns there, and -exp(A_log) is stored."""
    if part == "out_proj":
        return rows(start, stop)[:, order]
    if part == "conv1d":
        return rows(0, len(order))[order].t()[start:stop].contiguous()
    picked = places.picked(rows, start, stop, order)
    return (-picked).log() if part == "A_log" else picked


def _matrices(c: Config) -> dict[str, int]:
    """The tensors that a file may have, and how many matrices are in each."""
    counts = dict.fromkeys(names.resident_shapes(c), 1)
    for layer in range(c.num_hidden_layers):
        counts[names.layer_tensor(layer, _BOTH)] = 1
        counts |= {names.layer_tensor(layer, half): c.num_attention_heads for half in _HALVES}
    for layer in c.moe_layers:
        fused = (names.layer_tensor(layer, part) for part in _EXPERTS)
        counts |= dict.fromkeys(fused, c.n_routed_experts)
        if c.family.expert_biases:
            counts |= dict.fromkeys((names.layer_tensor(layer, part) for part in _BIASES), 1)
    return counts


def _spelled(name: str) -> str:
    """llama.cpp's name of a weight."""
    layer, inner = names.split_name(re.sub(r"(?<=\.experts\.)\d+\.", "", name))
    if inner == f"{_DELTA}A_log":
        return f"blk.{layer}.ssm_a"
    kind = "bias" if inner.endswith("bias") else "weight"
    return f"{_NAMES[name]}.{kind}" if layer is None else f"blk.{layer}.{_NAMES[inner]}.{kind}"


def _info(tensor: GgufTensor, count: int) -> TensorInfo:
    """A tensor of ``count`` matrices, which ik_llama.cpp writes as one."""
    shape, encoding = tensor.shape, tensor.encoding
    if len(shape) == 2 and count > 1 and shape[0] % count == 0:
        shape = (count, shape[0] // count, shape[1])
    place = tensor.name, tensor.path
    if (plain := _PLAIN.get(encoding.name)) is not None:
        return TensorInfo(*place, plain, shape, tensor.offset)
    row = (*shape[:-1], shape[-1] // encoding.block * encoding.bytes)
    codes = TensorInfo(*place, torch.uint8, row, tensor.offset)
    # Scales of blocks are float16 themselves.
    kept = Mxfp4Tensor if encoding.name == "MXFP4" else GgmlTensor
    return kept(*place, torch.float16, shape, tensor.offset, kind=encoding.name, codes=codes)


def _of_heads(found: places.Places, layer: int, c: Config) -> HeadsTensor:
    """``kv_b_proj`` of a layer that has its two halves.  Raises ``CheckpointError``."""
    H, N, V, R = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    shapes = zip(_HALVES, ((H, R, N), (H, V, R)), strict=True)
    keys, values = (found.find(names.layer_tensor(layer, half), shape) for half, shape in shapes)
    dtype = keys.dtype if keys.dtype == values.dtype else torch.float32
    place = keys.name, keys.path, dtype, (H * (N + V), R), keys.offset
    return HeadsTensor(*place, keys=keys, values=values)
