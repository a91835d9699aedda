"""The compressed latent KV cache of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434,
section 2.1).

Shapes: L layers, S context positions, X elements of a row.  A token costs ``kv_lora_rank`` +
``qk_rope_head_dim`` values a layer and nothing else: 31 KB in V2-Lite and 69 KB in V2 at 16 bits,
where expanded keys and values would take V2 4.9 MB.  The backend says what a row is made of
(``latent_row`` of ``slotmoe.quant.backends.base``): the native kernels keep 8 bits a value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slotmoe.model.config import Config


class LatentCache:
    """Latents of one sequence: ``layers`` is [L, S, X], of which the first ``length`` rows of each
    layer are valid.

    A row of X elements of ``dtype`` is the normed latent and the rotated key part that all heads
    share.  ``empty(shape, dtype)`` makes the memory.
    """

    def __init__(
        self,
        config: Config,
        context: int,
        row: tuple[int, torch.dtype],
        empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
    ):
        self.context, self.length = context, 0
        self.written = 0  # positions that some layer has written; a pass may still be on its way
        columns, dtype = row
        self.layers = empty((config.num_hidden_layers, context, columns), dtype)

    def extend(self, layer: int, count: int) -> Tensor:
        """The layer's rows with ``count`` more, which the caller writes: [length + count, X]."""
        self.written = self.length + count
        return self.layers[layer, : self.written]

    def copy(self, source: "LatentCache", length: int) -> None:
        """Take over the first ``length`` rows of each layer of another cache of the same shape."""
        self.layers[:, :length] = source.layers[:, :length]
        self.written = max(self.written, length)

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes
