"""Guesses of experts before their gate speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.config import Config
from quant.matmul import TorchOps


class NextGate:
    """Untrained guesses: the next MoE layer's norm and gate on the present residual stream.

    RMSNorm is scale-free, so the residual itself is not needed: dividing the present norm's weight out of its output and
    multiplying the next one's in gives what the next norm would give.
    """

    def __init__(self, config: Config, weights: Mapping[str, Any], ops: TorchOps):
        layers = config.moe_layers
        norms = [weights[f"model.layers.{layer}.post_attention_layernorm.weight"] for layer in layers]
        self._gates = [weights[f"model.layers.{layer}.mlp.gate.weight"] for layer in layers]
        self._ratios = [after / before.where(before != 0, 1.0) for before, after in zip(norms, norms[1:], strict=False)]
        self._ops = ops

    def token_scores(self, embedding_D: Tensor, hidden_D: Tensor) -> Tensor | None:
        """None: the whole token can't be guessed without training."""
        return None

    def layer_scores(self, row: int, x: Tensor) -> Tensor:
        """Gate logits of MoE layer ``row + 1`` for the input of layer ``row``, [D] or [T, D]: float32 [E] or [T, E]."""
        x_TD = (x * self._ratios[row]).view(-1, x.shape[-1])
        return self._ops.linear(x_TD, self._gates[row + 1]).view(*x.shape[:-1], -1)
