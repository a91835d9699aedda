"""The compressed latent KV cache of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434,
section 2.1).

Shapes: S context positions, R ``kv_lora_rank``, P ``qk_rope_head_dim``.  A token costs R + P values
a layer and nothing else: 31 KB in V2-Lite and 69 KB in V2 at 16 bits, where expanded keys and
values would take V2 4.9 MB.  What a row is made of is for the operations to say
(``slotmoe.model.network.Ops.latent_row``): the native kernels keep 8 bits a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from slotmoe.model.config import Config


class LatentCache:
    """Latents of one sequence: ``layers[l]`` is [S, X], of which the first ``length`` rows are
    valid.

    A row of X elements of ``dtype`` is the normed latent, R values, and the rotated key part that
    all heads share, P values. ``empty(shape, dtype)`` makes their memory; without it torch does, on
    ``device``.
    """

    def __init__(
        self,
        config: Config,
        context: int,
        row: tuple[int, torch.dtype],
        device: torch.device,
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ):
        self.context, self.length = context, 0
        self.written = 0  # positions that some layer has written; a pass may still be on its way
        columns, dtype = row
        shape = config.num_hidden_layers, context, columns
        self.layers = (
            empty(shape, dtype)
            if empty is not None
            else torch.empty(shape, dtype=dtype, device=device)
        )

    def extend(self, layer: int, count: int) -> torch.Tensor:
        """The layer's rows with ``count`` more, which the caller writes: [length + count, X]."""
        self.written = self.length + count
        return self.layers[layer, : self.written]

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes
