"""Runs text through a checkpoint, layer by layer, and keeps what each matrix multiplies with: the
Hessians of ``slotmoe.quant.codecs.encode``.

One layer is in memory at a time, its experts one by one, beside the residual stream of all tokens.
After each layer the stream goes into a file, from which a killed run that knows its sum goes on.

The routed experts' inputs count by the square of their gate weight, as their errors do.  Gate and
up projections of a layer share one Hessian.  A down projection has its own, pulled towards the
layer's by 256 tokens' worth: few tokens say little.

Shapes: T tokens of all windows, D hidden_size, I moe_intermediate_size, E experts, K experts a
token, W a latent row, C pairs of a head's rope part.
"""

import codecs
import hashlib
import json
import math
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.errors import ConfigError, reading
from slotmoe.model.attention import new_state
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.layers import LayerByLayer, geometry_of, layer_of
from slotmoe.model.names import (
    EMBEDDING,
    expert_name,
    expert_shapes,
    resident_shapes,
    role_of,
    split_name,
)
from slotmoe.model.network import Positions
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.network.layer_types import Chunk, Pending
from slotmoe.network.shapes import Activation
from slotmoe.network.state import plain_row
from slotmoe.offload.ingest.output_dir import STREAM, Resumption
from slotmoe.quant.backends.base import Prepared, TorchBackend, activated
from slotmoe.quant.codecs.encode import Hessian, fast_products
from slotmoe.quant.export.layout import checksum
from slotmoe.quant.export.writer import replace_file

MIN_TOKENS, MAX_TOKENS = 5000, 3 << 13  # more move the Hessians little
WINDOW = 512  # tokens that are read as one sequence; attention to more costs more than it says
_GRAIN = 256  # an expert's tokens are filled up to a multiple of this
_WAY = 3  # of making codes: what was begun or made in another way is not gone on with
_PRIOR_TOKENS = 256  # what the layer's Hessian counts beside an expert's own
Windows = Sequence[Sequence[int]]


def read_text(path: Path, limit: int = -1) -> str:
    """A text file whole, or the characters that end in its first ``limit`` bytes.  Raises
    ``ConfigError`` if it can't be read, is empty or no UTF-8."""
    expected = "; a text file in UTF-8 is expected here"
    with reading(path, ConfigError, advice=expected), path.open("rb") as file:
        data = file.read(limit)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) != limit)
    except UnicodeDecodeError as problem:
        reason = f"byte {problem.start} is not UTF-8 (try iconv -f latin1 -t utf-8)"
        raise ConfigError(f"{path}: {reason}{expected}") from None
    if not text.strip():
        raise ConfigError(f"{path}: is empty; give text like what the model will read and write")
    return text


def read_windows(texts: Sequence[Path], tokenizer: Tokenizer, positions: int) -> list[list[int]]:
    """The files as sequences of 2 to ``WINDOW`` tokens, at most ``positions``, each with the
    tokenizer's beginning.  Raises ``ConfigError`` like ``read_text``, or for too few tokens."""
    files = [tokenizer.encode(read_text(path), add_bos=False) for path in texts]
    if (count := sum(map(len, files))) < MIN_TOKENS:
        needed = f"calibration needs {MIN_TOKENS} or more (15,000 do well)"
        raise ConfigError(f"{', '.join(map(str, texts))}: {count} tokens of text, {needed}")
    begin = tokenizer.begin
    step = min(WINDOW, positions) - len(begin)
    starts = ((ids, start) for ids in files for start in range(0, len(ids), step))
    windows = (begin + ids[start : start + step] for ids, start in starts)
    return [window for window in windows if len(window) > 1]


def chosen(windows: Windows, vocab_size: int) -> list[list[int]]:
    """Windows of token ids, evenly spread, and as many of random tokens behind the same first one,
    together about ``MAX_TOKENS``.  Random tokens keep codes from losing on other kinds of text."""
    step = max(1, -(-2 * sum(map(len, windows)) // MAX_TOKENS))
    text, random = [list(window) for window in windows[::step]], Random(0)
    return text + [[ids[0], *random.choices(range(vocab_size), k=len(ids) - 1)] for ids in text]


def fingerprint(windows: Windows | None) -> str | None:
    """What names the text, and how codes are made with it, in the state of a run."""
    if windows is None:
        return None
    named = [_WAY, *map(list, windows)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class _Tap(TorchBackend):
    """Sums up ``x^T x`` over the inputs of some matrices."""

    def __init__(self, names: dict[int, str], activation: Activation):
        super().__init__(activation=activation)
        self._names, self.sums, self.counts = names, dict[str, Tensor](), dict[str, int]()

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        if (name := self._names.get(id(weight))) is not None:
            if name not in self.sums:
                self.sums[name], self.counts[name] = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1]), 0
            self.sums[name].addmm_(x_TK.t(), x_TK)
            self.counts[name] += len(x_TK)
        assert isinstance(weight, Tensor)
        return F.linear(x_TK.to(weight.dtype), weight).float()


class Calibration:
    """``windows`` of token ids through ``checkpoint``; ``wanted`` are the tensors whose Hessians
    are kept, ``needed`` the layers that are to be written, in ``folder``, whose ``state`` says how
    far an earlier run came.  ``advance`` gets bytes of experts read.  ``remaining`` are the layers
    that the text goes through, and ``hidden_TD`` the residual stream behind those that are done."""

    hidden_TD: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        wanted: set[str],
        needed: Sequence[int],
        folder: Path,
        state: Resumption,
        advance: Callable[[int], None],
    ):
        self._checkpoint, self._config, self._wanted = checkpoint, checkpoint.config, wanted
        self._path, self._state, self._advance = folder / STREAM, state, advance
        self._ids = [token for window in windows for token in window]
        self._lengths = list(map(len, windows))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._compute = fast_products(self._device)
        where, backend = torch.empty(0, device=self._device), TorchBackend()
        self._positions = Positions(self._config, where, backend)
        self._first = self._resumed(min(needed, default=0))
        self.remaining = range(self._first, max(needed, default=-1) + 1)
        self._counts: list[int] = []  # tokens of each expert

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    @property
    def begins_with(self) -> list[str]:
        """The tensor that ``begin`` reads, unless an earlier run has begun."""
        return [EMBEDDING] if self.remaining and not self._first else []

    @property
    def nbytes(self) -> int:
        """Bytes of experts that will be read."""
        c, infos = self._config, self._checkpoint.infos
        layers, experts = filter(c.is_moe, self.remaining), range(c.n_routed_experts)
        names = (name for layer in layers for e in experts for name in self._names(layer, e))
        return sum(infos[name].nbytes for name in names)

    def announcement(self) -> str:
        """What will be done and how long it takes, by a measurement of a product."""
        c, tokens, size = self._config, len(self._ids), 1024
        a, b = torch.ones(2, size, size, dtype=self._compute, device=self._device)
        seconds = timeit.repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=3)
        rate = 2 * size**3 / min(seconds)
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        moe = sum(map(c.is_moe, self.remaining))
        # With attention and the Hessians.
        read = 2.5 * tokens * moe * (c.num_experts_per_tok + c.n_shared_experts) * expert
        width = (2 * c.hidden_size + c.moe_intermediate_size) / 3
        coded = 7 * moe * c.n_routed_experts * expert * width
        text, codes = (f"{math.ceil(2 * work / rate / 60)} min" for work in (read, coded))
        what = f"{tokens} tokens of text go through {len(self.remaining)} layers"
        times = f"about {text} for the text and {codes} for the codes"
        return f"{what}, and experts are coded by what they see: {times}"

    def remarks(self, uncalibrated: Sequence[str]) -> list[str]:
        """What a person should know of how far the text reached."""
        counts, sentences = sorted(self._counts), []
        if counts:
            least, most, middle = counts[0], counts[-1], counts[len(counts) // 2]
            spread = f"{least} to {most} tokens each, {middle} in the middle"
            sentences.append(f"of the calibration text experts got {spread}")
        if none := counts.count(0):
            sentences.append(f"{none} experts got none and are coded by their layer's Hessian")
        if uncalibrated:
            what = f"{len(uncalibrated)} tensors, {min(uncalibrated)} among them"
            sentences.append(f"{what}, have no finite Hessian and are coded without calibration")
        return sentences

    def _resumed(self, needed: int) -> int:
        """The first layer to compute, at most ``needed``, with the stream that an earlier run has
        left before it; 0 if there is none, or if it is not as that run says."""
        layer, size = self._state.layer, len(self._ids) * self._config.stream_width
        if not 0 < layer <= needed or not self._path.is_file():
            return 0
        data = np.fromfile(self._path, np.float32, size)
        if data.size < size or checksum(data.data) != self._state.stream:
            return 0
        self.hidden_TD = torch.from_numpy(data).view(len(self._ids), -1).to(self._device)
        return layer

    def begin(self) -> dict[str, Hessian]:
        """Read the residual stream before the first layer; no Hessians are known yet."""
        if self.remaining and not self._first:
            unique, inverse_T = torch.tensor(self._ids).unique(return_inverse=True)
            rows = [self._checkpoint.rows(EMBEDDING, i, i + 1) for i in unique.tolist()]
            streams = self._config.stream_width // self._config.hidden_size
            hidden_TD = torch.cat(rows).float()[inverse_T].to(self._device)
            self.hidden_TD = hidden_TD.repeat(1, streams)
        return {}

    def layer(self, layer: int) -> dict[str, Hessian]:
        """The Hessians of the next of the ``remaining`` layers; the one before is written."""
        if layer > self._first:
            data = self.hidden_TD.cpu().numpy().data
            replace_file(self._path, data)
            self._state.layer, self._state.stream = layer, checksum(data)
            self._state.save(self._path.parent)
        before = torch.get_float32_matmul_precision()
        precision = "highest" if self._compute is torch.float32 else "medium"
        torch.set_float32_matmul_precision(precision)
        try:
            return self._through(layer)
        finally:
            torch.set_float32_matmul_precision(before)

    def _through(self, layer: int) -> dict[str, Hessian]:
        names = [name for name in resident_shapes(self._config) if split_name(name)[0] == layer]
        weights = {name: self._tensor(name) for name in names}
        # An MLP's up projection sees what its gate projection sees.
        tapped = (name for name in names if name in self._wanted and "up_proj" not in name)
        tap = _Tap({id(weights[name]): name for name in tapped}, self._config.activation)
        config = self._config.alone(layer)
        own = layer_of(weights, layer, self._config.window(layer))
        runner = LayerByLayer(geometry_of(config), [own], tap)
        state = new_state(config, max(self._lengths), plain_row, self._empty)
        chunks, pendings = list[Chunk](), list[Pending]()
        ids_T = torch.tensor(self._ids, device=self._device)
        windows = self.hidden_TD.split(self._lengths), ids_T.split(self._lengths)
        for h_WD, ids_W in zip(*windows, strict=True):
            chunk = self._positions.chunk(h_WD, [state], [0], [len(h_WD)], None, ids_W)
            state.begin(len(h_WD))
            if (pending := runner.run_layers(chunk)) is not None:
                pendings.append(pending)
            chunks.append(chunk)
        hessians = dict[str, Hessian]()
        if pendings:
            routed_TD, hessians = self._experts(layer, pendings)
            for chunk, routed_WD in zip(chunks, routed_TD.split(self._lengths), strict=True):
                chunk.routed_TD = routed_WD
                runner.run_layers(chunk)
        for name, total in tap.sums.items():
            hessian = Hessian(total / tap.counts[name])
            hessians |= {name: hessian, name.replace("gate_proj", "up_proj"): hessian}
        self.hidden_TD = torch.cat([chunk.h_TD for chunk in chunks])
        return hessians

    def _experts(self, layer: int, pendings: list[Pending]) -> tuple[Tensor, dict[str, Hessian]]:
        """What the routed experts add to the stream, and their Hessians."""
        _, *parts = zip(*pendings, strict=True)
        x_TD, weights_TK, indices_TK = map(torch.cat, parts)
        weighted_TD = x_TD * weights_TK.square().sum(-1, keepdim=True).sqrt()
        into = Hessian(weighted_TD.t() @ weighted_TD / indices_TK.numel())
        del weighted_TD
        routed_TD = torch.zeros_like(x_TD)
        x_TD, weights_TK = x_TD.to(self._compute), weights_TK.to(self._compute)
        hessians, downs = dict[str, Hessian](), list[str]()
        sums, counts = [], []
        for expert in range(self._config.n_routed_experts):
            token_U, rank_U = (indices_TK == expert).nonzero(as_tuple=True)
            # Filled up by tokens of weight 0, for products of each new size are prepared for long.
            count, rest = len(token_U), (0, -len(token_U) % _GRAIN)
            weight_U1 = F.pad(weights_TK[token_U, rank_U], rest)[:, None]
            token_U = F.pad(token_U, rest)
            names = self._names(layer, expert)
            gate_ID, up_ID, down_DI, *biases = map(self._tensor, names)
            x_UD = x_TD[token_U]
            gate_UI, up_UI = x_UD @ gate_ID.t(), x_UD @ up_ID.t()
            if biases:
                gate_UI, up_UI = gate_UI + biases[0], up_UI + biases[1]
            act_UI = activated(gate_UI, up_UI, self._config.activation) * weight_U1
            routed_TD.index_add_(0, token_U, (act_UI @ down_DI.t()).float())
            if biases:
                routed_TD.index_add_(0, token_U, (biases[2] * weight_U1).float())
            act_UI = act_UI.float()
            sums.append(act_UI.t() @ act_UI)
            counts.append(count)
            self._advance(sum(self._checkpoint.infos[name].nbytes for name in names))
            hessians |= dict.fromkeys(names[:2], into)
            downs.append(names[2])
        for name, mean in zip(downs, _shrunk(sums, counts), strict=True):
            hessians[name] = Hessian(mean)
        self._counts += counts
        return routed_TD, hessians

    def _names(self, layer: int, expert: int) -> list[str]:
        return [expert_name(layer, expert, name) for name in expert_shapes(self._config)]

    def _tensor(self, name: str) -> Tensor:
        is_matrix = role_of(name) in ("matrix", "sensitive", "absorbed")
        dtype = self._compute if is_matrix else torch.float32
        return self._checkpoint.tensor(name).to(self._device, dtype)


def _shrunk(sums: Sequence[Tensor], counts: Sequence[int]) -> Iterator[Tensor]:
    """Each expert's mean, pulled towards the mean over all, which is scaled to the same trace."""
    prior = sum(sums[1:], sums[0]) / max(1, sum(counts))
    trace = prior.diagonal().sum()
    for total, count in zip(sums, counts, strict=True):
        mean, share = total / max(1, count), _PRIOR_TOKENS / (count + _PRIOR_TOKENS)
        scale = mean.diagonal().sum() / trace if count else 1.0
        yield mean * (1 - share) + prior * (share * scale)
