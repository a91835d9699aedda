"""Sampling and the generation loop.  Shapes: V vocabulary rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.tokenizer import TextStream, Tokenizer
from slotmoe import CheckpointError, ConfigError


@dataclass(frozen=True)
class Token:
    """One generated token: its id, the text that became printable with it, and its natural log-probability under the
    model's own distribution over the tokenizer's vocabulary (temperature 1)."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.  ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 1e6:
            raise ConfigError(f"temperature is {self.temperature}, expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected a number above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, expected 0 (off) or a positive count")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}, expected an integer from 0 to 2^63 - 1")


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from float32 CPU logits: temperature, then top-k, then top-p (arXiv 1904.09751) on what is left.

    Top-p keeps the smallest set of most likely tokens whose probabilities reach ``top_p``; at least one stays.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    order = logits_V.argsort(descending=True, stable=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    # The best logit is subtracted before dividing, so that a tiny temperature can't overflow.
    probabilities = ((logits_V[order] - logits_V[order[0]]).double() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    step: Callable[[list[int]], Tensor],
    prompt: list[int],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    sampling: Sampling,
) -> Iterator[Token]:
    """Yield tokens until an end-of-sentence token (not yielded) or ``max_new_tokens``.

    ``step(ids)`` appends ids to the sequence and returns the last one's logits, float32 [1, V] on any device.  Rows past
    the tokenizer's vocabulary are never chosen.  The last token's text carries what an incomplete character leaves.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    stream, ids = TextStream(tokenizer), prompt
    held: list[Token] = []  # tokens of a character that is not complete yet
    for _ in range(max_new_tokens):
        logits_V = step(ids)[0, : tokenizer.size].cpu()
        chosen = sample(logits_V, sampling, generator)
        if not math.isfinite(float(logits_V[chosen])):
            raise CheckpointError("the model computed NaN or infinite logits; its weights are broken")
        if chosen in eos_token_ids:
            break
        logprob = float(logits_V[chosen] - logits_V.logsumexp(dim=-1))
        held.append(Token(chosen, stream.push(chosen), logprob))
        if stream.complete:
            yield from held
            held = []
        ids = [chosen]
    if held:
        yield from held[:-1]
        yield replace(held[-1], text=held[-1].text + stream.flush())
