"""The gate of DeepSeekMoE: which experts a token uses and how much each counts.

Shapes: T tokens, G groups, E routed experts, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.model.config import Config


class Router(NamedTuple):
    """Group-limited greedy choice (DeepSeek-V2, arXiv 2405.04434, section 2.2.2): of ``n_group``
    groups of experts the ``topk_group`` best take part, and of their experts the ``top_k`` best.
    Weights are probabilities times ``factor``, or add up to 1 if it is None."""

    n_group: int
    topk_group: int
    top_k: int
    factor: float | None

    @classmethod
    def of(cls, config: Config) -> "Router":
        """The router that ``config`` describes.  ``norm_topk_prob`` replaces the scaling factor, as
        in DeepSeek's code."""
        grouped = config.topk_method == "group_limited_greedy"
        groups = (config.n_group, config.topk_group) if grouped else (1, 1)
        normalized = config.norm_topk_prob and config.num_experts_per_tok > 1
        factor = None if normalized else config.routed_scaling_factor
        return cls(*groups, config.num_experts_per_tok, factor)


def route(logits_TE: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert indices int64 [T, K], best first, from the gate's logits,
    float32 [T, E]: softmax over all experts, then groups, then top-k."""
    scores_TE = logits_TE.softmax(dim=-1)
    if router.topk_group < router.n_group:
        scores_TGE = scores_TE.unflatten(-1, (router.n_group, -1))
        kept = scores_TGE.amax(dim=-1).topk(router.topk_group, dim=-1).indices
        mask_TG = torch.zeros(scores_TGE.shape[:2], dtype=torch.bool, device=logits_TE.device)
        mask_TG.scatter_(1, kept, True)
        scores_TE = scores_TGE.masked_fill(~mask_TG[..., None], 0.0).flatten(-2)
    weights_TK, indices_TK = scores_TE.topk(router.top_k, dim=-1)
    if router.factor is None:
        return weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20), indices_TK
    if router.factor != 1.0:
        weights_TK = weights_TK * router.factor
    return weights_TK, indices_TK
