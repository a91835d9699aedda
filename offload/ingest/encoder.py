"""How one run codes weights: with which levels, and with Hessians where text was read.

Levels are data: each export's are learned from its own weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slotmoe.model.checkpoint.places import Codes
from slotmoe.model.checkpoint.reader import Checkpoint, Seen
from slotmoe.model.names import split_expert, split_name
from slotmoe.offload.plan.memory import default_codecs
from slotmoe.quant.codecs import codec, encode
from slotmoe.quant.codecs.codec import DEFAULT_CODECS, NF4, SCALES, Codec, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, levels_of, possible_scales, store

_SAMPLED = 1 << 19  # weights that levels are learned from
_MATRICES = 48  # from which these are taken
_NONE = (0.0, 0.0)
Coded = tuple[tuple[Tensor, ...], tuple[float, ...]]
"""What the export holds of some rows of a weight, and the sums of squares of its error and of the
weight, plainly and in a Hessian's measure; 0 for what is exact or had no Hessian."""


@dataclass
class Coder:
    """Codes weights of a checkpoint.  ``levels`` are learned ones, by codec; ``hessians`` those of
    the layer at hand, by tensor; ``uncalibrated`` gets the tensors of those that are none."""

    checkpoint: Checkpoint
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    hessians: Mapping[str, encode.Hessian] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)

    def code(self, name: str, start: int, stop: int, kind: str | Codec, seen: Seen) -> Coded:
        """Rows of tensor ``name``, stored as ``kind``: as the checkpoint has them where the codec
        holds that; ``seen`` notes what is read.  Raises ``NotFiniteError``, and what reading
        raises."""
        if kind in (NF4, codec.INT4, codec.MXFP4) and self.checkpoint.in_4_bits(name):
            assert isinstance(kind, Codec)
            stored = self.checkpoint.codes(name, start, stop, seen)
            same_levels = torch.equal(stored.levels, levels_of(kind))
            if same_levels and stored.block == SCALES[kind.scales].block:
                return _kept(stored, kind)
        piece = self.checkpoint.rows(name, start, stop, seen)
        if not isinstance(kind, Codec):
            self.checkpoint.check_finite(name, piece)
            if kind == "none":
                return (piece,), (*_NONE, *_NONE)
            rounded = Int8Weight(*encode.quantize_int8(piece))
            return (rounded.q, rounded.scale), (*encode.squared_error(piece, rounded), *_NONE)
        if kind.name == NF4.name:
            codes, scales, weighted = *encode.quantize_nf4(piece), None
        else:
            if kind.learned:
                kind = replace(kind, levels=tuple(self.levels[kind.name]))
            measured = name in self.hessians and bool(torch.stack(piece.aminmax()).isfinite().all())
            hessian = self.hessians[name] if measured else None
            try:
                codes, scales, weighted = encode.quantize_lut(piece, kind, hessian)
            except encode.NotPositiveError:
                self.uncalibrated.append(name)
                codes, scales, weighted = encode.quantize_lut(piece, kind)
        weight = CodedWeight(codes, scales, levels_of(kind), (len(piece), piece.shape[1]))
        return (codes, scales), (*encode.squared_error(piece, weight), *(weighted or _NONE))


def _kept(codes: Codes, kind: Codec) -> Coded:
    """The same codes; scales are the codec's, float16 for those of trained weights in bfloat16."""
    kept = store(codes.codes, codes.scales, kind)
    if not possible_scales(kept[1]):
        raise encode.NotFiniteError
    wanted = codes.values()
    weight = CodedWeight(*kept, codes.levels, (len(wanted), wanted.shape[1]))
    return kept, (*encode.squared_error(wanted, weight), *_NONE)


def codecs_for(checkpoint: Checkpoint) -> ExpertCodecs:
    """How experts are coded unless said: as they are, if all are in 4 bits that a codec holds."""
    wanted, found = default_codecs(checkpoint.config), filter(split_expert, checkpoint.infos)
    experts = (name for name in found if not name.endswith(".bias"))
    return wanted if all(map(checkpoint.in_4_bits, experts)) else DEFAULT_CODECS


def level_samples(checkpoint: Checkpoint, coded: Mapping[str, Codec]) -> dict[Codec, list[str]]:
    """The tensors that levels are learned from, by codec; ``coded`` says how each is stored.  They
    are in the first weight file in order of name that holds any: while a model is downloaded no
    other may be there.  The head that predicts one token more is not among them: it changes no
    other byte."""
    infos, last = checkpoint.infos, checkpoint.config.num_hidden_layers
    named: dict[Codec, list[str]] = {}
    for name, kind in coded.items():
        if kind.learned and split_name(name)[0] != last:
            named.setdefault(kind, []).append(name)
    file = min((infos[name].file for names in named.values() for name in names), default="")
    found = {kind: [n for n in names if infos[n].file == file] for kind, names in named.items()}
    return {kind: names[:: max(1, -(-len(names) // _MATRICES))] for kind, names in found.items()}


def learn_levels(
    checkpoint: Checkpoint, samples: Mapping[Codec, Sequence[str]]
) -> dict[str, list[int]]:
    """Levels by codec, learned from rows of these tensors."""
    levels = {}
    for kind, names in samples.items():
        pieces = []
        for name in names:
            N, K = checkpoint.infos[name].shape
            count = max(1, min(N, _SAMPLED // _MATRICES // K))
            piece = checkpoint.rows(name, (N - count) // 2, (N + count) // 2).float()
            if torch.stack(piece.aminmax()).isfinite().all():
                pieces.append(piece)  # of others their own quantization says what is wrong
        start = torch.tensor(kind.levels, dtype=torch.float32)
        learned = encode.learn_levels(pieces, start, SCALES[kind.scales].block)
        levels[kind.name] = [int(level) for level in learned.tolist()]
    return levels
