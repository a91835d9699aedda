"""The kinds of attention.  Each is a dataclass of weights (``slotmoe.border``), a sequence's state
(``slotmoe.state``) and a class here; a layer's weights say by their type which it is."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from slotmoe.border import Chunk, Compressed, Geometry, Mla
from slotmoe.model.attention.compressed import CompressedAttention
from slotmoe.model.attention.latent import LatentAttention
from slotmoe.model.config import Config
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.state import CompressedCache, Empty, LatentCache, Row, SequenceState

Attention = Callable[[Chunk, Any, Tensor], Tensor]
"""``attention(chunk, weights, x_TD)``: what attention gives for the chunk's tokens in its layer,
float32 [T, D], of the normed stream ``x_TD``; the tokens' rows are in their states then."""


def attentions(geometry: Geometry, backend: TorchBackend) -> Mapping[type, Attention]:
    """By the type of a layer's weights."""
    return {
        Mla: LatentAttention(geometry, backend),
        Compressed: CompressedAttention(geometry, backend),
    }


def new_state(config: Config, context: int, row: Row, empty: Empty) -> SequenceState:
    """The state of an empty sequence with room for ``context`` tokens, in memory of ``empty(shape,
    dtype)`` and with rows as ``row`` of the backend says."""
    c = config
    indexed = [c.has_indexer(layer) for layer in range(c.num_hidden_layers)]
    key_width = 0 if c.indexer is None else c.indexer.head_dim
    if c.compressed is None:
        widths = c.kv_lora_rank, c.qk_rope_head_dim
        return LatentCache(context, widths, indexed, key_width, row, empty)
    window, width, ratios = c.compressed.sliding_window, c.compressed.head_dim, c.compressed.ratios
    return CompressedCache(context, window, width, ratios, indexed, key_width, row, empty)
