"""How one run codes weights: with which levels, and with Hessians where text was read.

Levels are data: each export's are learned from its own weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slotmoe.model.checkpoint import Checkpoint
from slotmoe.quant import encode, lut
from slotmoe.quant.codec import NF4, SCALES, Codec
from slotmoe.quant.coded import CodedWeight, levels_of
from slotmoe.quant.feedback import Hessian, NotPositiveError
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.weights import quantize_int8, quantize_nf4, squared_error

_SAMPLED = 1 << 19  # weights that levels are learned from
_MATRICES = 48  # from which these are taken
Squares = tuple[float, float]


@dataclass(frozen=True)
class Coded:
    """What the export holds of some rows of a weight, and the sums of squares of its error and of
    the weight, plainly and in a Hessian's measure; None for what is exact or had no Hessian."""

    outputs: tuple[Tensor, ...]
    squares: Squares | None = None
    weighted: Squares | None = None


@dataclass
class Coder:
    """Codes weights.  ``levels`` are learned ones, by codec; ``hessians`` those of the layer at
    hand, by tensor; ``uncalibrated`` gets the names of those that turned out to be none."""

    levels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    hessians: Mapping[str, Hessian] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)

    def code(self, name: str, piece: Tensor, kind: str | Codec) -> Coded:
        """Rows of tensor ``name``, stored as ``kind``.  Raises ``nf4.NotFiniteError``."""
        if kind == "int8":
            rounded = Int8Weight(*quantize_int8(piece))
            return Coded((rounded.q, rounded.scale), squared_error(piece, rounded))
        if not isinstance(kind, Codec):
            return Coded((piece,))
        if kind.name == NF4.name:
            codes, scales, weighted = *quantize_nf4(piece), None
        else:
            kind = replace(kind, levels=tuple(self.levels[kind.name]))
            codes, scales, weighted = self._lut(name, piece, kind)
        weight = CodedWeight(codes, scales, levels_of(kind), (len(piece), piece.shape[1]))
        return Coded((codes, scales), squared_error(piece, weight), weighted)

    def _lut(self, name: str, piece: Tensor, codec: Codec) -> tuple[Tensor, Tensor, Squares | None]:
        if (hessian := self.hessians.get(name)) is not None and bool(piece.isfinite().all()):
            try:
                return lut.quantize(piece, codec, hessian)
            except NotPositiveError:
                self.uncalibrated.append(name)
        return lut.quantize(piece, codec)


def learns(kind: str | Codec) -> bool:
    """Whether a way to store weights has levels that are learned, and codes that are calibrated."""
    return isinstance(kind, Codec) and kind.name != NF4.name


def learn_levels(checkpoint: Checkpoint, kinds: Mapping[str, str | Codec]) -> dict[str, list[int]]:
    """Levels for this checkpoint by the name of a codec; ``kinds`` say how tensors are stored.

    They are learned from tensors in one weight file, the first in order of name that holds any:
    while a model is downloaded no other may be there.
    """
    learning = {name: kind for name, kind in kinds.items() if learns(kind)}
    infos, levels = checkpoint.infos, {}
    file = min((infos[name].file for name in learning), default="")
    for codec in dict.fromkeys(learning.values()):
        assert isinstance(codec, Codec)
        names = [name for name, kind in learning.items() if kind == codec]
        names = [name for name in names if infos[name].file == file]
        samples = []
        for name in names[:: max(1, -(-len(names) // _MATRICES))]:
            N, K = infos[name].shape
            count = max(1, min(N, _SAMPLED // _MATRICES // K))
            piece = checkpoint.rows(name, (N - count) // 2, (N + count) // 2).float()
            if bool(piece.isfinite().all()):  # else its own quantization says what is wrong
                samples.append(piece)
        start = torch.tensor(codec.levels, dtype=torch.float32)
        learned = encode.learn_levels(samples, start, SCALES[codec.scales].block)
        levels[codec.name] = [int(level) for level in learned.tolist()]
    return levels
