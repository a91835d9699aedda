"""Which experts the next token will use in a layer, learned while the model runs, without torch.

The chances are linear in what the present token's gate saw: the layer's input, folded to
``FEATURES`` columns, and a constant.  Least mean squares (Widrow and Hoff, 1960) fits them to what
the gates choose, token by token, so no text has to be read before.

Shapes: T tokens, D hidden_size, F features, M MoE layers, E experts, K experts a token.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
FEATURES = 256
FOLLOWED = 256  # newest tokens of a pass that are learned from
_CONSTANT = 3.0  # it learns faster than a feature, whose mean square is 1
_RATE = 0.05 / FEATURES  # 0.03 and 0.05 hit the same within 0.3 points, 0.15 a point less
_BLOCK = 16  # tokens learned from at once


def fold(x_TD: Array) -> Array:
    """Inputs as features of mean square 1, float32 [T, F]: the sum of pieces of F columns, with
    random signs from the second on, so that what was folded stays as it is."""
    tokens, columns = x_TD.shape
    pieces = -(-columns // FEATURES)
    padded_TD = np.zeros((tokens, pieces * FEATURES), np.float32)
    padded_TD[:, :columns] = x_TD
    with np.errstate(over="ignore", invalid="ignore"):
        x_TF: Array = (padded_TD.reshape(tokens, pieces, FEATURES) * _signs(pieces)).sum(1)
        x_TF /= np.sqrt(np.square(x_TF).mean(1, keepdims=True) + 1e-12)
    return x_TF


@cache
def _signs(pieces: int) -> Array:
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (pieces, FEATURES))
    signs[0] = 1
    return signs


class Forecast:
    """Each expert's chance begins at 0."""

    def __init__(self, layers: int, experts: int):
        self._weights_MFE = np.zeros((layers, FEATURES + 1, experts), np.float32)
        self._last_MF = np.zeros((layers, FEATURES + 1), np.float32)  # of the token before

    def learn(self, row: int, indices: Sequence[Sequence[int]], x_TD: Array) -> Array | None:
        """The gate of layer ``row`` chose ``indices`` [T, K] for tokens that follow each other, of
        which ``x_TD`` are the newest ones' inputs: each expert's chance that the next token uses
        it, [E], about 0 to 1; None where inputs are not finite."""
        x_TF = fold(x_TD)
        if not np.isfinite(x_TF).all():
            return None
        weights_FE, count = self._weights_MFE[row], len(x_TF)
        x_TF = np.concatenate([x_TF, np.full((count, 1), _CONSTANT, np.float32)], axis=1)
        before_TF = np.concatenate([self._last_MF[row, None], x_TF[:-1]])
        used_TE = np.zeros((count, weights_FE.shape[1]), np.float32)
        used_TE[np.arange(count)[:, None], indices[-count:]] = 1.0
        for start in range(0, count, _BLOCK):
            x_BF = before_TF[start : start + _BLOCK]
            error_BE = used_TE[start : start + _BLOCK] - x_BF @ weights_FE
            weights_FE += x_BF.T @ (_RATE * error_BE)
        self._last_MF[row] = x_TF[-1]
        chance_E: Array = x_TF[-1] @ weights_FE
        return chance_E
