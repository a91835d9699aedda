"""Which state a model's sequences have."""

import torch

from slotmoe.model.compressed_cache import CompressedCache
from slotmoe.model.config import Config
from slotmoe.model.kv_cache import Empty, LatentCache, Row, SequenceState


def plain_row(latent: int, rope: int) -> tuple[int, torch.dtype]:
    """Rows of the reference path: every value in float32."""
    return latent + rope, torch.float32


def new_state(config: Config, context: int, row: Row, empty: Empty) -> SequenceState:
    """The state of an empty sequence with room for ``context`` tokens, in memory of ``empty(shape,
    dtype)`` and with rows as ``row`` of the backend says."""
    kind = LatentCache if config.compressed is None else CompressedCache
    return kind(config, context, row, empty)
