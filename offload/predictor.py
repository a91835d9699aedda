"""Guesses of experts before their gate has chosen, trained (in the export) or by its own gates.

Shapes: D hidden_size, L MoE layers (indexed by ``row``), E routed experts, R and Q hidden widths.

Both horizons of the trained predictor are one hidden layer wide, ``out(silu(in(x) + bias)) +
bias``, trained so that ``sigmoid(score)`` is the probability that the expert is used
(``slotmoe.offload.study.calibrate``):

    token   [2 D] -> [R] -> [L, E]: rms(embedding of the token), rms(last hidden state before it)
    layer   [D] -> [Q] -> [E] of MoE layer r + 1: rms(input of MoE layer r)
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.layers import as_tensor
from slotmoe.model.names import GATE, POST_NORM, layer_tensor
from slotmoe.offload.resident_weights import Place
from slotmoe.quant.backends.base import Prepared, TorchBackend
from slotmoe.quant.int8 import Int8Weight

WORTH = 0.3  # probability from which on an expert is worth reading ahead
_WORTH_LOGIT = math.log(WORTH / (1 - WORTH))


class NextGate:
    """Untrained guesses: the next MoE layer's norm and gate on the present residual stream.

    RMSNorm is scale-free, so the residual itself is not needed: dividing the present norm's weight
    out of its output and multiplying the next one's in gives what the next norm would give.
    """

    def __init__(self, config: Config, weights: Mapping[str, Prepared], ops: TorchBackend):
        layers = config.moe_layers
        norms = [as_tensor(weights[layer_tensor(layer, POST_NORM)]) for layer in layers]
        self._first_norm = norms[0]
        self._gates = [weights[layer_tensor(layer, GATE)] for layer in layers]
        self._ratios = [after / before.where(before != 0, 1.0) for before, after in pairwise(norms)]
        self._ops, self._top_k = ops, config.num_experts_per_tok

    def token_scores(self, embedding_D: Tensor, hidden_D: Tensor) -> Tensor:
        """Gate logits of the first MoE layer alone, float32 [1, E], as if the embedding were still
        all of the residual stream: no more can be said without training."""
        return self._ops.linear((rms(embedding_D) * self._first_norm)[None], self._gates[0])

    def likely(self, scores_RE: Tensor) -> list[list[int]]:
        """Each row's experts worth guessing, the best first: as many as a token uses."""
        experts: list[list[int]] = scores_RE.topk(self._top_k, dim=-1).indices.tolist()
        return experts

    def layer_scores(self, row: int, x: Tensor, token_scores: Tensor | None = None) -> Tensor:
        """Gate logits of MoE layer ``row + 1`` for the input of layer ``row``, [D] or [T, D]:
        float32 [E] or [T, E]."""
        x_TD = (x * self._ratios[row]).view(-1, x.shape[-1])
        return self._ops.linear(x_TD, self._gates[row + 1]).view(*x.shape[:-1], -1)


class Predictor:
    """The trained guesses of an export.  ``popularity`` has each expert id's uses a token."""

    def __init__(
        self, tensors: dict[str, Tensor], top_k: int, ops: TorchBackend, place: Place | None = None
    ):
        """``tensors`` as in the file (``slotmoe.quant.export.layout.predictor_parts``), ``top_k``
        the experts that a token uses in a layer. ``place`` puts a named weight on its device in the
        form that ``ops`` multiplies with; by default it stays where it is."""
        self._ops, self._top_k = ops, top_k
        put: Place = place or (lambda _, weight: ops.prepare("matrix", weight))

        def matrix(name: str, row: int | None = None) -> tuple[Prepared, Tensor]:
            parts = (tensors[f"{name}.{part}"] for part in ("weight", "weight.scale", "bias"))
            q, scale, bias = parts if row is None else (part[row] for part in parts)
            weight = put(f"predictor.{name}.weight", Int8Weight(q, scale))
            return weight, as_tensor(put(f"predictor.{name}.bias", bias))

        self._token = [matrix("token.in"), matrix("token.out")]
        rows = len(tensors["layer.mix"]) if "layer.mix" in tensors else 0
        self._layers = [[matrix("layer.in", row), matrix("layer.out", row)] for row in range(rows)]
        self._mix: list[list[float]] = tensors["layer.mix"].tolist() if rows else []
        self.popularity: list[float] = tensors["popularity"].tolist()
        self._rows = rows + 1

    def token_scores(self, embedding_D: Tensor, hidden_D: Tensor) -> Tensor:
        """Every MoE layer's experts, from a token's embedding row and the residual stream after the
        last layer (before the final norm) of the token before it, float32 [D] each, or [T, D]:
        float32 logits [L, E], or [T, L, E]."""
        x = torch.cat([rms(embedding_D), rms(hidden_D)], dim=-1)
        return self._forward(x, self._token).view(*x.shape[:-1], self._rows, -1)

    def likely(self, scores_RE: Tensor) -> list[list[int]]:
        """Each row's experts worth guessing, the best first: those of probability ``WORTH`` and
        more, at most twice as many as a token uses."""
        best = scores_RE.topk(min(2 * self._top_k, scores_RE.shape[-1]), dim=-1)
        counts = (best.values > _WORTH_LOGIT).sum(dim=-1).tolist()
        pairs = zip(best.indices.tolist(), counts, strict=True)
        return [experts[:count] for experts, count in pairs]

    def layer_scores(self, row: int, x: Tensor, token_scores: Tensor | None = None) -> Tensor:
        """Experts of MoE layer ``row + 1`` from the input of layer ``row``, [D] or [T, D]: float32
        logits [E] or [T, E].

        ``token_scores``, [E] or [T, E], are ``token_scores``' of layer ``row + 1``: with them the
        guess is better, much so in the first layers, whose input knows little of the context.
        """
        scores = self._forward(rms(x), self._layers[row])
        if token_scores is None:
            return scores
        layer, token, bias = self._mix[row]
        return layer * scores + token * token_scores + bias

    def _forward(self, x: Tensor, matrices: list[tuple[Prepared, Tensor]]) -> Tensor:
        (inner, inner_bias), (outer, outer_bias) = matrices
        hidden_TR = F.silu(self._ops.linear(x.view(-1, x.shape[-1]), inner) + inner_bias)
        scores: Tensor = self._ops.linear(hidden_TR, outer) + outer_bias
        return scores.view(*x.shape[:-1], -1)


def rms(x: Tensor) -> Tensor:
    """``x`` scaled to a mean square of 1 over its last dimension, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-12)
