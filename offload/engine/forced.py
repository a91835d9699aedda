"""A text whose tokens are known, decoded as if a model had chosen them.  Shape: V vocab_size."""

import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from slotmoe.model.generate import Delta


class Forced:
    """A ``Sampler`` that chooses ``ids``, and notes one more than these: the ``moments`` (of
    ``time.perf_counter()``) at which it could choose, and if it ``keeps`` them logits, float32 [V].
    """

    def __init__(self, ids: Sequence[int], keeps: bool = False):
        self.ids: list[int] = []
        self._left, self._keeps = deque(ids), keeps
        self.moments: list[float] = []
        self.logits: list[Tensor] = []

    def score(self, token_id: int, logits_V: Tensor | None) -> None:
        """Its prompt is never scored."""

    def take(self, logits_V: Tensor) -> Delta:
        self.moments.append(time.perf_counter())
        if self._keeps:
            self.logits.append(logits_V.clone())
        if not self._left:
            return self.end("length")
        self.ids.append(self._left.popleft())
        return Delta("", ())

    def end(self, finish: str, error: str = "") -> Delta:
        return Delta("", (), finish, error=error)
