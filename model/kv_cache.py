"""The compressed latent KV cache of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: S context positions, R ``kv_lora_rank``, P ``qk_rope_head_dim``.  A token costs R + P values a layer and nothing
else: 31 KB in V2-Lite and 69 KB in V2 at 16 bits, where expanded keys and values would take V2 4.9 MB.
"""

from __future__ import annotations

import torch

from model.config import Config


class LatentCache:
    """Latents of one sequence: ``layers[l]`` is [S, R + P], of which the first ``length`` rows are valid.

    The first R columns hold the normed latent, the last P the rotated key part that all heads share.
    """

    def __init__(self, config: Config, context: int, dtype: torch.dtype, device: torch.device):
        self.context, self.length = context, 0
        self.written = 0  # positions that some layer has written; a pass may still be on its way
        shape = (config.num_hidden_layers, context, config.latent_width)
        self.layers = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, start: int, latent_TW: torch.Tensor) -> torch.Tensor:
        """Store float32 rows from position ``start``; returns all rows up to the end of these, in the cache's dtype."""
        self.written = end = start + len(latent_TW)
        if self.layers.dtype == torch.float16:  # saturate instead of overflowing to infinity
            latent_TW = latent_TW.clamp(-65504.0, 65504.0)
        self.layers[layer, start:end] = latent_TW
        return self.layers[layer, :end]

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes
