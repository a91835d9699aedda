"""The gate of DeepSeekMoE: which experts a token uses and how much each counts.

Shapes: T tokens, G groups, E routed experts, K experts a token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.border import Router
from slotmoe.model.config import Config


def router_of(config: Config) -> Router:
    """The router that ``config`` describes."""
    c, family = config, config.family
    normalized = c.norm_topk_prob and c.num_experts_per_tok > 1
    scaled = family.scales_normalized or not normalized
    factor = c.routed_scaling_factor if scaled else 1.0
    sizes = c.n_group, c.topk_group, c.num_experts_per_tok
    return Router(*sizes, factor, normalized, family.group_best, family.scoring)


def _scores(logits_TE: Tensor, scoring: str) -> Tensor:
    if scoring == "sqrtsoftplus":
        return F.softplus(logits_TE).sqrt()
    return logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(dim=-1)


def route(
    logits_TE: Tensor, router: Router, bias_E: Tensor | None = None, chosen_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and expert indices int64 [T, K], best first, from the gate's logits,
    float32 [T, E].  ``bias``, float32 [E], is added to what is compared, never to a weight.
    ``chosen``, int64 [T, K], are the indices where the token's id says them."""
    scores_TE = _scores(logits_TE, router.scoring)
    indices_TK = _best(scores_TE, router, bias_E) if chosen_TK is None else chosen_TK
    weights_TK = scores_TE.gather(1, indices_TK)
    if router.normalized:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if router.factor != 1.0:
        weights_TK = weights_TK * router.factor
    return weights_TK, indices_TK


def _best(scores_TE: Tensor, router: Router, bias_E: Tensor | None) -> Tensor:
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if router.topk_group < router.n_group:
        choice_TGE = choice_TE.unflatten(-1, (router.n_group, -1))
        best_TG = choice_TGE.topk(router.group_best, dim=-1).values.sum(dim=-1)
        kept = best_TG.topk(router.topk_group, dim=-1).indices
        mask_TG = torch.zeros(best_TG.shape, dtype=torch.bool, device=scores_TE.device)
        mask_TG.scatter_(1, kept, True)
        choice_TE = choice_TGE.masked_fill(~mask_TG[..., None], -math.inf).flatten(-2)
    return choice_TE.topk(router.top_k, dim=-1).indices
