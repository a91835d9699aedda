"""Sizes of what a sequence keeps, and what an MLP does with its gate, without torch."""

from dataclasses import dataclass
from typing import NamedTuple

# What is remembered of a sequence where tokens are compressed.  A mark is a length that it can be
# cut to, and what the next token behind that needs of the tokens before, beside what stays.
SPARE = 16  # tokens that can be cut off without a mark
CONVOLVED = 4  # tokens that the convolution before a delta rule sees


class Marks(NamedTuple):
    """Which marks a sequence has: one ``early`` tokens before each multiple of ``tokens``, whatever
    the passes are, and where texts have ended.  When a pass begins it remembers ``most``, of them
    the last ``ends`` of texts."""

    tokens: int = 256
    most: int = 8
    ends: int = 4
    early: int = 0
    nbytes: int = 0  # of one, and what is there without, where that is not but a few rows
    constant: int = 0

    def between(self, start: int, end: int) -> range:
        """Those behind ``start``, up to ``end``, that are no text's."""
        first = (start + self.early) // self.tokens + 1
        return range(first * self.tokens - self.early, end + 1, self.tokens)


MARKS = Marks()


class Activation(NamedTuple):
    """``(up + offset) * gate * sigmoid(alpha * gate)``, of a gate that is at most ``limit`` and an
    up between it and its negative; a limit of 0 is none."""

    limit: float = 0.0
    alpha: float = 1.0
    offset: float = 0.0


SWIGLU = Activation()


def latent_bytes(r: int, p: int) -> int:
    """Bytes of a row of the native kernels' latent cache: one for each of R latent and P rope
    columns, either rounded up to 4, and a scale and a sum of 4 bytes for each."""
    return -(-r // 4) * 4 + -(-p // 4) * 4 + 16


@dataclass
class GroupShape:
    """Compressed rows of `layers` with one ratio, or with `index` the keys of those layers."""

    ratio: int
    width: int
    overlaps: bool
    index: bool
    layers: int = 0


Groups = dict[tuple[int, bool], GroupShape]
"""By ratio, and whether they are keys of an indexer."""
