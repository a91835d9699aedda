"""Texts whose tokens are known, for measurements."""

from collections.abc import Sequence

from slotmoe.offload.engine.forced import Forced
from slotmoe.offload.runtime import Runtime


def force(
    runtime: Runtime, prompt: list[int], ids: Sequence[int] = (), keeps: bool = False
) -> Forced:
    """``Engine.force``."""
    return runtime.engine.force(prompt, ids, keeps)


def begin(runtime: Runtime, depth: int = 0) -> list[int]:
    """Empty all sequences, and let the first hold ``depth`` unknown tokens with random latents: the
    beginning of a prompt that goes on from there."""

    def empty() -> None:
        for sequence in engine.batch.sequences:
            sequence.cut(0)
        engine.batch.sequences[0].fill(depth, engine.model.config, engine.model.backend)

    engine = runtime.engine
    engine.call(empty)
    return [-1] * depth
