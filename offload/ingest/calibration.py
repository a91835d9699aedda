"""Runs text through a checkpoint, layer by layer, and keeps what each matrix multiplies with: the
Hessians of ``slotmoe.quant.codecs.feedback``.

One layer is in memory at a time, its experts one by one, beside the residual stream of all tokens.
After each layer the stream is put into ``hidden.safetensors``, from which a killed run goes on.

The routed experts' inputs count by the square of their gate weight, as their errors do.  Gate and
up projections of a layer share one Hessian.  A down projection has its own, pulled towards the
layer's by 256 tokens' worth: few tokens say little.

Shapes: T tokens of all windows, D hidden_size, I moe_intermediate_size, E experts, K experts a
token, W a latent row, C pairs of a head's rope part.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slotmoe.border import Pending, Step, Timer
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.layers import LayerByLayer, geometry_of, layer_of
from slotmoe.model.names import EMBEDDING, expert_name, expert_shapes, resident_shapes, split_name
from slotmoe.model.network import inverse_frequencies, position_tables
from slotmoe.offload.ingest.output_dir import HIDDEN
from slotmoe.quant.backends.base import Prepared, TorchBackend, new
from slotmoe.quant.codecs.feedback import Hessian

MAX_TOKENS = 1 << 16  # more text moves the Hessians little
WINDOW = 512  # tokens that are read as one sequence; attention to more costs more than it says
_PRIOR_TOKENS = 256  # what the layer's Hessian counts beside an expert's own
Windows = Sequence[Sequence[int]]


def chosen(windows: Windows) -> list[list[int]]:
    """Of windows of token ids, as many as hold about ``MAX_TOKENS``, evenly spread."""
    step = max(1, -(-sum(map(len, windows)) // MAX_TOKENS))
    return [list(window) for window in windows[::step]]


def fingerprint(windows: Windows) -> str:
    """What names the text in the state of a run."""
    return hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest()


class _Tap(TorchBackend):
    """Sums up ``x^T x`` over the inputs of some matrices."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self._names, self.sums, self.counts = names, dict[str, Tensor](), dict[str, int]()

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        if (name := self._names.get(id(weight))) is not None:
            if name not in self.sums:
                self.sums[name], self.counts[name] = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1]), 0
            self.sums[name].addmm_(x_TK.t(), x_TK)
            self.counts[name] += len(x_TK)
        return super().linear(x_TK, weight)


@dataclass(frozen=True)
class Calibrated:
    """A layer's Hessians by tensor."""

    layer: int
    hessians: dict[str, Hessian]


class Calibration:
    """``windows`` of token ids through ``checkpoint``; ``wanted`` are the tensors whose Hessians
    are kept, ``needed`` the layers that are to be written, in ``folder``.  ``advance`` gets
    bytes of experts read.  ``remaining`` are the layers that the text goes through, and
    ``hidden_TD`` is the residual stream behind those that are done."""

    hidden_TD: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        wanted: set[str],
        needed: Sequence[int],
        folder: Path,
        advance: Callable[[int], None],
    ):
        self._checkpoint, self._config, self._wanted = checkpoint, checkpoint.config, wanted
        self._windows, self._path, self._advance = windows, folder / HIDDEN, advance
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        c, width = self._config, max(map(len, windows))
        row = c.latent_width, torch.float32
        one_layer = replace(c, num_hidden_layers=1)
        self._cache = LatentCache(one_layer, width, row, self._empty)
        frequencies_C = inverse_frequencies(c.rope, c.qk_rope_head_dim).to(self._device)
        positions_T = torch.arange(width, device=self._device).float()
        self._tables = position_tables(c.rope, frequencies_C, positions_T)
        self._first = self._resumed(min(needed, default=0))
        self.remaining = range(self._first, max(needed, default=-1) + 1)
        self._tokens: dict[int, list[int]] = {}

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return new(shape, dtype).to(self._device)

    @property
    def embedding_files(self) -> list[str]:
        """The weight file that the text begins with, unless an earlier run has begun."""
        begins = self.remaining and not self._first
        return [self._checkpoint.infos[EMBEDDING].file] if begins else []

    def layers(self, reach: Callable[[int], None]) -> Iterator[Calibrated]:
        """Each layer that an earlier run has not finished.  When the next one is asked for, this
        one's weights are expected to be written.  ``reach`` makes readable what a step reads: 0
        the beginning, 1 the first of the layers."""
        if not self.remaining:
            return
        reach(0)
        self.hidden_TD = self._stream()
        for step, layer in enumerate(self.remaining, 1):
            reach(step)
            if layer > self._first:
                self._save(layer, self.hidden_TD)
            self.hidden_TD, hessians = self._layer(layer, self.hidden_TD)
            yield Calibrated(layer, hessians)

    @property
    def nbytes(self) -> int:
        """Bytes of experts that will be read."""
        c, infos = self._config, self._checkpoint.infos
        layers = [layer for layer in self.remaining if c.is_moe(layer)]
        experts = range(c.n_routed_experts)
        names = (expert_name(x, e, p) for x in layers for e in experts for p in expert_shapes(c))
        return sum(infos[name].nbytes for name in names)

    def announcement(self) -> str:
        """What will be done and how long it takes, by a measurement of a product."""
        c, tokens = self._config, sum(map(len, self._windows))
        size = 1024
        a, b = torch.ones(2, size, size, device=self._device)
        rate = 0.0
        for _ in range(3):
            started = time.perf_counter()
            (a @ b)[0, 0].item()
            rate = max(rate, 2 * size**3 / (time.perf_counter() - started))
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        shared = c.num_experts_per_tok + c.n_shared_experts
        moe = sum(map(c.is_moe, self.remaining))
        read = 2.5 * tokens * moe * shared * expert  # with attention and the Hessians
        coded = (
            moe
            * c.n_routed_experts
            * expert
            * 9
            * (2 * c.hidden_size + c.moe_intermediate_size)
            / 3
        )
        minutes = [math.ceil(2 * work / rate / 60) for work in (read, coded)]
        return (
            f"{tokens} tokens of text go through {len(self.remaining)} layers, and experts are "
            f"coded by what they see: about {minutes[0]} min for the text and {minutes[1]} min for "
            "the codes"
        )

    def remarks(self, uncalibrated: Sequence[str]) -> list[str]:
        """What a person should know of how far the text reached."""
        counts = sorted(count for counts in self._tokens.values() for count in counts)
        sentences = []
        if counts:
            spread = (
                f"{counts[0]} to {counts[-1]} tokens each, {counts[len(counts) // 2]} in the middle"
            )
            sentences.append(f"of the calibration text experts got {spread}")
        if none := counts.count(0):
            sentences.append(f"{none} experts got none and are coded by their layer's Hessian")
        if uncalibrated:
            what = f"{len(uncalibrated)} tensors, {min(uncalibrated)} among them"
            sentences.append(f"{what}, have no finite Hessian and are coded without calibration")
        return sentences

    def _resumed(self, needed: int) -> int:
        """The first layer to compute, at most ``needed``."""
        tokens = sum(map(len, self._windows))
        try:
            with safe_open(self._path, framework="pt") as file:
                layer = int(file.metadata()["layer"])
                shape = file.get_slice("hidden").get_shape()
            return layer if layer <= needed and shape == [tokens, self._config.hidden_size] else 0
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return 0

    def _stream(self) -> Tensor:
        """The residual stream before that layer."""
        if self._first:
            with safe_open(self._path, framework="pt") as file:
                h_TD: Tensor = file.get_tensor("hidden")
            return h_TD.to(self._device)
        ids_T = torch.tensor([token for window in self._windows for token in window])
        unique, inverse_T = ids_T.unique(return_inverse=True)
        rows = [self._checkpoint.rows(EMBEDDING, i, i + 1) for i in unique.tolist()]
        return torch.cat(rows).float()[inverse_T].to(self._device)

    def _save(self, layer: int, h_TD: Tensor) -> None:
        temporary = self._path.with_name(HIDDEN + ".tmp")
        save_file({"hidden": h_TD.cpu()}, temporary, {"layer": str(layer)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).to(self._device, torch.float32)

    def _layer(self, layer: int, h_TD: Tensor) -> tuple[Tensor, dict[str, Hessian]]:
        """The stream after a layer, and its Hessians."""
        names = [name for name in resident_shapes(self._config) if split_name(name)[0] == layer]
        weights = {name: self._tensor(name) for name in names}
        # An MLP's up projection sees what its gate projection sees.
        tapped = {id(weights[name]): name for name in names if name in self._wanted}
        tap = _Tap({key: name for key, name in tapped.items() if "up_proj" not in name})
        geometry = geometry_of(self._config)
        runner = LayerByLayer(geometry, [layer_of(weights, layer)], tap)
        steps, pendings = [], []
        for h_WD in h_TD.split(list(map(len, self._windows))):
            rope_TC, scale_T = self._tables
            scale_W = None if scale_T is None else scale_T[: len(h_WD)]
            step = Step(h_WD, rope_TC[: len(h_WD)], scale_W, [self._cache], [len(h_WD)], Timer())
            pendings.append(runner.run_layers(step, None))
            steps.append(step)
        hessians = dict[str, Hessian]()
        if self._config.is_moe(layer):
            waiting = [pending for pending in pendings if pending is not None]
            routed_TD, hessians = self._experts(layer, waiting)
            for step, routed_WD in zip(
                steps, routed_TD.split(list(map(len, self._windows))), strict=True
            ):
                step.routed_TD = routed_WD
                runner.run_layers(step, None)
        for name, total in tap.sums.items():
            hessian = Hessian(total / tap.counts[name])
            hessians |= {name: hessian, name.replace("gate_proj", "up_proj"): hessian}
        return torch.cat([step.h_TD for step in steps]), hessians

    def _experts(
        self, layer: int, pendings: Sequence[Pending]
    ) -> tuple[Tensor, dict[str, Hessian]]:
        """What the routed experts add to the stream, and their Hessians."""
        x_TD = torch.cat([pending.x_TD for pending in pendings])
        weights_TK = torch.cat([pending.weights_TK for pending in pendings])
        indices_TK = torch.cat([pending.indices_TK for pending in pendings])
        weighted_TD = x_TD * weights_TK.square().sum(-1, keepdim=True).sqrt()
        into = Hessian(weighted_TD.t() @ weighted_TD / indices_TK.numel())
        del weighted_TD
        routed_TD = torch.zeros_like(x_TD)
        sums, counts = [], []
        for expert in range(self._config.n_routed_experts):
            token_U, rank_U = (indices_TK == expert).nonzero(as_tuple=True)
            weight_U1 = weights_TK[token_U, rank_U, None]
            gate_ID, up_ID, down_DI = (
                self._tensor(expert_name(layer, expert, name))
                for name in expert_shapes(self._config)
            )
            x_UD = x_TD[token_U]
            act_UI = F.silu(x_UD @ gate_ID.t()) * (x_UD @ up_ID.t()) * weight_U1
            routed_TD.index_add_(0, token_U, act_UI @ down_DI.t())
            sums.append(act_UI.t() @ act_UI)
            counts.append(len(token_U))
            self._advance(3 * gate_ID.numel() * self._itemsize(layer, expert))
        hessians: dict[str, Hessian] = {}
        for expert, back in enumerate(_shrunk(sums, counts)):
            gate, up, down = (
                expert_name(layer, expert, name) for name in expert_shapes(self._config)
            )
            hessians |= {gate: into, up: into, down: Hessian(back)}
        self._tokens[layer] = counts
        return routed_TD, hessians

    def _itemsize(self, layer: int, expert: int) -> int:
        return self._checkpoint.infos[expert_name(layer, expert, "gate_proj")].dtype.itemsize


def _shrunk(sums: Sequence[Tensor], counts: Sequence[int]) -> Iterator[Tensor]:
    """Each expert's mean, pulled towards the mean over all, which is scaled to the same trace."""
    prior = sum(sums[1:], sums[0]) / max(1, sum(counts))
    trace = prior.diagonal().sum()
    for total, count in zip(sums, counts, strict=True):
        mean, share = total / max(1, count), _PRIOR_TOKENS / (count + _PRIOR_TOKENS)
        scale = mean.diagonal().sum() / trace if count else 1.0
        yield mean * (1 - share) + prior * (share * scale)
