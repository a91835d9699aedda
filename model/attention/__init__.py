"""The kinds of attention.  Each is a dataclass of weights (``slotmoe.network.layer_types``), a
sequence's state (``slotmoe.network.state``) and a class here; a layer's weights say by their type
which it is."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, dtype

from slotmoe.model.attention.compressed import CompressedAttention
from slotmoe.model.attention.grouped import DeltaAttention, GroupedAttention
from slotmoe.model.attention.latent import LatentAttention
from slotmoe.model.config import Config
from slotmoe.network import state
from slotmoe.network.layer_types import Chunk, Compressed, Delta, Geometry, Grouped, Mla
from slotmoe.network.recurrent_state import Deltas
from slotmoe.network.shapes import MARKS, Marks
from slotmoe.quant.backends.base import TorchBackend

Attention = Callable[[Chunk, Any, Tensor], Tensor]
"""``attention(chunk, weights, x_TD)``: what attention gives for the chunk's tokens in its layer,
float32 [T, D], of the normed stream ``x_TD``; the tokens' rows are in their states then."""


def attentions(geometry: Geometry, backend: TorchBackend) -> Mapping[type, Attention]:
    """By the type of a layer's weights."""
    return {
        Mla: LatentAttention(geometry, backend),
        Compressed: CompressedAttention(geometry, backend),
        Grouped: GroupedAttention(geometry, backend),
        Delta: DeltaAttention(geometry, backend),
    }


def new_state(
    config: Config,
    context: int,
    row: Callable[[int, int], tuple[int, dtype]],
    empty: state.Empty,
    marks: Marks = MARKS,
) -> state.SequenceState:
    """The state of an empty sequence with room for ``context`` tokens, in memory of ``empty(shape,
    dtype)``; ``row`` of the backend gives the elements of a row of latent and rope values;
    ``marks`` are of a sequence with delta rules."""
    c = config

    def rows(layers: int, count: int, latent: int, rope: int) -> Tensor:
        columns, kind = row(latent, rope)
        return empty((layers, count, columns), kind)

    windows, deltas = [c.window(layer) for layer in range(c.num_hidden_layers)], None
    if (d := c.delta) is not None:
        heads = d.num_value_heads, d.key_head_dim, d.value_head_dim
        deltas = Deltas(windows, heads, d.columns, empty)
    room = state.Room(context, rows, empty, marks, deltas)
    if (g := c.grouped) is not None:
        return state.GroupedCache(room, g.groups, g.head_dim, windows)
    indexed = [c.has_indexer(layer) for layer in range(c.num_hidden_layers)]
    keys = 0 if c.indexer is None else c.indexer.head_dim
    if c.compressed is None:
        widths = c.kv_lora_rank, c.qk_rope_head_dim
        return state.LatentCache(room, widths, indexed, keys)
    v4, layers = c.compressed, [*zip(c.compressed.ratios, indexed, strict=True)]
    return state.CompressedCache(room, v4.sliding_window, (v4.head_dim, keys), layers)
