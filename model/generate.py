"""Sampling and the generation loop.  Shapes: V vocabulary rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Token:
    """One generated token: its id, the text that became printable with it, and its natural
    log-probability under the model's own distribution over the tokenizer's vocabulary (temperature
    1)."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.  ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0
    keep every token.

    ``repetition_penalty`` divides or multiplies the logits of what prompt and answer hold (arXiv
    1909.05858), 1 is off; ``presence_penalty`` and ``frequency_penalty`` are taken from those of
    what the answer holds, once or once per time, as OpenAI's API defines them; ``logit_bias`` (id,
    value) is added.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 1e6:
            raise ConfigError(f"temperature is {self.temperature}, expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected a number above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, expected 0 (off) or a positive count")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}, expected an integer from 0 to 2^63 - 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}, expected a number from 0 to 1")
        if not 0 < self.repetition_penalty < 1e3:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}, expected a number above 0 (1 is off)"
            )
        if not all(
            math.isfinite(one)
            for one in (
                self.presence_penalty,
                self.frequency_penalty,
                *(v for _, v in self.logit_bias),
            )
        ):
            raise ConfigError(
                "presence_penalty, frequency_penalty and logit_bias must be finite numbers"
            )


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from float32 CPU logits: temperature, then top-k, then top-p (arXiv 1904.09751) on
    what is left, then min-p.

    Top-p keeps the smallest set of most likely tokens whose probabilities reach ``top_p``; at least
    one stays.  Min-p drops those less likely than ``min_p`` times the likeliest.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    order = logits_V.argsort(descending=True, stable=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    # The best logit is subtracted before dividing, so that a tiny temperature can't overflow.
    probabilities = (
        (logits_V[order] - logits_V[order[0]]).double() / sampling.temperature
    ).softmax(dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(
            probabilities < sampling.min_p * probabilities[0], 0.0
        )
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def penalize(
    logits_V: Tensor, sampling: Sampling, prompt: Collection[int], counts: Mapping[int, int]
) -> Tensor:
    """``logits_V`` with the penalties and the bias of ``sampling``: ``counts`` is how often the
    answer so far holds an id.

    Without any the same tensor comes back; else a copy.
    """
    s = sampling
    if s.repetition_penalty == 1 and not (
        s.presence_penalty or s.frequency_penalty or s.logit_bias
    ):
        return logits_V
    logits_V = logits_V.clone()
    seen = torch.tensor(
        [one for one in {*prompt, *counts} if one < len(logits_V)], dtype=torch.long
    )
    if s.repetition_penalty != 1 and len(seen):
        values = logits_V[seen]
        logits_V[seen] = torch.where(
            values > 0, values / s.repetition_penalty, values * s.repetition_penalty
        )
    if counts and (s.presence_penalty or s.frequency_penalty):
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits_V[list(counts)] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        logits_V[[one for one, _ in s.logit_bias]] += torch.tensor(
            [value for _, value in s.logit_bias]
        )
    return logits_V


def random_source(seed: int | None) -> torch.Generator:
    """A source of random numbers; the same for the same ``seed``, a fresh one for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def generate(
    step: Callable[[list[int]], Tensor],
    prompt: list[int],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    sampling: Sampling,
) -> Iterator[Token]:
    """Yield tokens until an end-of-sentence token (not yielded) or ``max_new_tokens``.

    ``step(ids)`` appends ids to the sequence and returns the last one's logits, float32 [1, V] on
    any device.  Rows past the tokenizer's vocabulary are never chosen.  The last token's text
    carries what an incomplete character leaves.
    """
    generator, stream, ids = random_source(sampling.seed), TextStream(tokenizer), prompt
    held: list[Token] = []  # tokens of a character that is not complete yet
    for _ in range(max_new_tokens):
        logits_V = step(ids)[0, : tokenizer.size].cpu()
        chosen = sample(logits_V, sampling, generator)
        if not math.isfinite(float(logits_V[chosen])):
            raise CheckpointError(
                "the model computed NaN or infinite logits; its weights are broken"
            )
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
