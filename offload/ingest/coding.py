"""How one run codes weights: with which levels, and with Hessians where text was read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.quant import encode, lut
from slotmoe.quant.feedback import Hessian, NotPositiveError
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import BLOCK
from slotmoe.quant.weights import quantize_int8, quantize_nf4, squared_error

CODECS = ("lut", "nf4")
_SAMPLED = 1 << 19  # weights that levels are learned from
_MATRICES = 48  # from which these are taken
Squares = tuple[float, float]


def check_codec(codec: str) -> str:
    """``codec``, or ``ConfigError``."""
    if codec not in CODECS:
        known = ", ".join(CODECS)
        raise ConfigError(f"codec {codec!r:.40} is unknown, expected one of: {known}")
    return codec


@dataclass(frozen=True)
class Coded:
    """What the export holds of some rows of a weight, and the sums of squares of its error and of
    the weight, plainly and in a Hessian's measure; None for what is exact or had no Hessian."""

    outputs: tuple[Tensor, ...]
    squares: Squares | None = None
    weighted: Squares | None = None


@dataclass
class Coder:
    """Codes weights by ``codec`` with these levels.  ``hessians`` are those of the layer at hand,
    by tensor; ``uncalibrated`` gets the names of those that turned out to be none."""

    codec: str
    levels: Tensor
    hessians: Mapping[str, Hessian] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)

    def code(self, name: str, piece: Tensor, kind: str) -> Coded:
        """Rows of tensor ``name``, stored as ``kind``.  Raises ``nf4.NotFiniteError``."""
        weight: Int8Weight | Nf4Weight
        if kind == "none":
            return Coded((piece,))
        if kind == "int8":
            weight = Int8Weight(*quantize_int8(piece))
            return Coded((weight.q, weight.scale), squared_error(piece, weight))
        weighted = None
        if self.codec == "nf4":
            codes, absmax = quantize_nf4(piece)
        else:
            codes, absmax, weighted = self._lut(name, piece)
        weight = Nf4Weight(codes, absmax, self.levels, (len(piece), piece.shape[1]))
        return Coded((codes, absmax), squared_error(piece, weight), weighted)

    def _lut(self, name: str, piece: Tensor) -> tuple[Tensor, Tensor, Squares | None]:
        if (hessian := self.hessians.get(name)) is not None and bool(piece.isfinite().all()):
            try:
                return lut.quantize(piece, self.levels, hessian)
            except NotPositiveError:
                self.uncalibrated.append(name)
        return lut.quantize(piece, self.levels)


def learning_file(checkpoint: Checkpoint, coded: Iterable[str]) -> str:
    """The weight file that levels are learned from: the first in order of name that holds any of
    the tensors ``coded``.  While a model is downloaded no other may be there."""
    return min(checkpoint.infos[name].file for name in coded)


def learn_levels(checkpoint: Checkpoint, coded: Iterable[str]) -> list[float]:
    """Levels for this checkpoint, learned from those tensors of ``coded`` that are in the learning
    file."""
    coded, infos = list(coded), checkpoint.infos
    file = learning_file(checkpoint, coded)
    names = [name for name in coded if infos[name].file == file]
    samples = []
    for name in names[:: -(-len(names) // _MATRICES)]:
        N, K = infos[name].shape
        count = max(1, min(N, _SAMPLED // _MATRICES // K))
        piece = checkpoint.rows(name, (N - count) // 2, (N + count) // 2).float()
        if bool(piece.isfinite().all()):  # else its own quantization says what is wrong
            samples.append(piece)
    return encode.learn_levels(samples, torch.tensor(lut.LEVELS), BLOCK).tolist()
