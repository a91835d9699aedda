"""A text whose tokens are known, decoded as if a model had chosen them: for measurements.

Shapes: V vocab_size.
"""

import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue

from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError
from slotmoe.model.generate import Delta
from slotmoe.offload.engine.requests import Request, wait_for
from slotmoe.offload.runtime import Runtime


class Forced:
    """A sampler that chooses ``ids`` and notes the ``moments`` (of ``time.perf_counter()``) at
    which it could choose, and if it ``keeps`` them the logits, float32 [V] each: one more than
    there are ids."""

    def __init__(self, ids: Sequence[int], keeps: bool = False):
        self.ids: list[int] = []
        self._left, self._keeps = deque(ids), keeps
        self.moments: list[float] = []
        self.logits: list[Tensor] = []

    def score(self, token_id: int, logits_V: Tensor | None) -> None:
        """Its prompt is never scored."""

    def take(self, logits_V: Tensor) -> Delta:
        """See ``slotmoe.offload.engine.requests.Sampler``."""
        self.moments.append(time.perf_counter())
        if self._keeps:
            self.logits.append(logits_V.clone())
        if not self._left:
            return self.end("length")
        self.ids.append(self._left.popleft())
        return Delta("", ())

    def end(self, finish: str, error: str = "") -> Delta:
        """See ``slotmoe.offload.engine.requests.Sampler``."""
        return Delta("", (), finish, error=error)


def force(
    runtime: Runtime, prompt: list[int], ids: Sequence[int] = (), keeps: bool = False
) -> Forced:
    """Read ``prompt``, of which what a sequence holds is not computed again, and decode ``ids``
    after it.  Raises what the engine could not do."""
    forced, deltas = Forced(ids, keeps), SimpleQueue[Delta]()

    def emit(delta: Delta) -> None:
        if delta.finish is not None:
            deltas.put(delta)

    request = Request(prompt, forced, emit)
    runtime.engine.submit(request)
    try:
        delta = wait_for(deltas, request.alive)
    finally:
        request.cancel()
    if delta.finish != "length":
        raise request.problem or ConfigError(CLOSED)
    return forced


def begin(runtime: Runtime, depth: int = 0) -> list[int]:
    """Empty all sequences, and let the first hold ``depth`` unknown tokens with random latents: the
    beginning of a prompt that goes on from there."""

    def empty() -> None:
        for sequence in engine.sequences:
            sequence.cut(0)
        engine.sequences[0].fill(depth, engine.model.config, engine.model.backend)

    engine = runtime.engine
    engine.call(empty)
    return [-1] * depth
