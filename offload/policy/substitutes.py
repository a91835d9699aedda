"""Which experts in memory may stand in for missing ones, without torch.

A swap costs KL divergence, in nats: about ``price * (w^2 + v^2)``, w and v being the gate's weights
of the expert that is left out and of its stand-in, and ``price`` a figure of the layer that
``slotmoe quantize --calibrate`` measures, with what a swap does to later tokens.

By rank: the gate's best experts, K of which a token uses.
"""

from collections.abc import Callable, Sequence

WINDOW = 32  # tokens whose budget can be saved up
_SHARE = 1 / WINDOW  # of what is left that one swap may take


class RouteBudget:
    """Spends ``budget`` nats a decoded token on swaps that save a read.  What is left limits each
    of them, so the limit settles where as much is spent as comes in."""

    def __init__(self, prices: Sequence[float], budget: float, top_k: int):
        self._prices, self.budget, self._top_k = prices, budget, top_k
        self._left, self.active = budget, False
        self.swaps, self.spent, self.tokens = 0, 0.0, 0

    def stats(self) -> dict[str, float]:
        """``swaps`` so far, their estimated cost in nats a token, and how many were decoded."""
        spent = self.spent / max(self.tokens, 1)
        return {"swaps": self.swaps, "estimated_kl": spent, "tokens": self.tokens}

    def advance(self, tokens: int) -> None:
        """A pass begins, in which so many tokens are decoded."""
        self.active = tokens > 0
        self.tokens += tokens
        self._left = min(self._left + tokens * self.budget, WINDOW * self.budget)

    def choose(self, row: int, weights: Sequence[float], present: Sequence[bool]) -> list[int]:
        """The ranks that are used instead of the first K, in order; which of them are ``present``
        says what need not be read.  The first half of K is never swapped."""
        used = list(range(self._top_k))
        others = [rank for rank in range(self._top_k, len(weights)) if present[rank]]
        for rank in reversed(range(_first(self._top_k), self._top_k)):
            if others and not present[rank]:
                cost = self._prices[row] * (weights[rank] ** 2 + weights[others[0]] ** 2)
                if cost <= _SHARE * self._left:
                    self._left -= cost
                    self.spent += cost
                    self.swaps += 1
                    used[rank] = others.pop(0)
        return sorted(used)


class RandomSwaps:
    """Swaps in one layer at random, to price them: ``squares`` is the sum of what the price
    multiplies.  ``uniform()`` is a random number from 0 to 1."""

    RATE = 0.1  # of tokens: few enough for their effects to add up
    active = True

    def __init__(self, row: int, top_k: int, uniform: Callable[[], float]):
        self._row, self._top_k, self._uniform, self.squares = row, top_k, uniform, 0.0

    def stats(self) -> dict[str, float]:
        return {"squares": self.squares}

    def advance(self, tokens: int) -> None:
        """As ``RouteBudget.advance``."""

    def choose(self, row: int, weights: Sequence[float], present: Sequence[bool]) -> list[int]:
        used, others = list(range(self._top_k)), len(weights) - self._top_k
        if row == self._row and others and self._uniform() < self.RATE:
            first = _first(self._top_k)
            rank = first + int(self._uniform() * (self._top_k - first))
            used[rank] = self._top_k + int(self._uniform() * others)
            self.squares += weights[rank] ** 2 + weights[used[rank]] ** 2
        return sorted(used)


def _first(top_k: int) -> int:
    """The first rank that may be swapped."""
    return (top_k + 1) // 2
