"""Answers: how tokens are chosen, their text, and when an answer ends.  V: vocabulary rows."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, starmap
from struct import Struct
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slotmoe.errors import CheckpointError
from slotmoe.model.reasoning import overlap
from slotmoe.model.sampling import Sampling
from slotmoe.model.tokenizer import TextStream, Tokenizer
from slotmoe.quant.kernels.cpu.bindings import load

_SCORED = Struct("<if")  # an id and its log-probability, float32 as logits are
_BROKEN = "the model computed NaN or infinite logits; its weights are broken"


@dataclass(frozen=True, slots=True)
class Token:
    """One token: the text that became printable with it, its natural log-probability under the
    model's own distribution over the tokenizer's vocabulary (before temperature, penalties and
    bias; None for a prompt's first token), and those of the likeliest ids, if asked for.

    ``finish`` says of a text's last token which limit ended it: ``length`` (so many tokens were
    asked for) or ``context`` (the context is full).  It is None everywhere else, so a text whose
    last token has None ended by itself, with an end-of-sentence token.
    """

    id: int
    text: str
    logprob: float | None = 0.0
    packed: bytes = field(default=b"", repr=False)  # the likeliest, in 8 bytes each
    finish: str | None = None

    @property
    def likeliest(self) -> tuple[tuple[int, float], ...]:
        """Ids and their log-probabilities, the likeliest first."""
        return (*_SCORED.iter_unpack(self.packed),)


class Delta(NamedTuple):
    """What one step added to an answer; its text ends with a ``complete`` character, or does not.
    ``finish`` is None while it goes on, ``stop`` after an end-of-sentence token or a stop string
    (then ``stopped_by``), ``length`` at the limit, or what the caller of ``Answer.end`` gives."""

    text: str
    tokens: tuple[Token, ...]
    finish: str | None = None
    stopped_by: str | None = None
    error: str = ""
    complete: bool = True


def numbers(generator: torch.Generator) -> Iterator[float]:
    """Random numbers from 0 to 1, some of them ahead: to draw one takes as long."""
    while True:
        yield from torch.rand(64, dtype=torch.float64, generator=generator).tolist()


def sample(
    logits_V: Tensor, sampling: Sampling, numbers: Iterator[float]
) -> tuple[int, float, float]:
    """One id by float32 CPU logits: the likeliest at temperature 0, else by the next of
    ``numbers``; as ``scored`` gives it.  Its logarithms are not finite where logits are not."""
    number, native = next(numbers) if sampling.temperature else 0.0, load()
    if native is not None:  # it knows when it may give another id than what follows
        limits = sampling.top_p, min(sampling.top_k, logits_V.shape[0]), sampling.min_p
        chosen = native.choose(logits_V, (sampling.temperature, *limits, number))
        if chosen[0] >= 0:
            return chosen
    if sampling.temperature == 0:
        return scored(logits_V, int(logits_V.argmax()))
    ids, weights = candidates(logits_V, sampling)
    sums = weights.cumsum(dim=-1)
    # Below the whole sum even where the product was rounded up, so never past the last candidate.
    mark = (number * sums[-1:]).minimum(sums[-1:].nextafter(sums[-1:] * 0))
    return scored(logits_V, int(ids[torch.searchsorted(sums, mark, right=True)]))


def scored(logits_V: Tensor, id: int) -> tuple[int, float, float]:
    """``id``, the logarithm of its probability by float32 CPU logits, and that of the sum of all
    exponentials, both float32."""
    if (native := load()) is not None:
        return native.choose(logits_V, id=id)
    total = logits_V.logsumexp(dim=-1)
    return id, float(logits_V[id] - total), float(total)


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The ids that may be drawn and their probabilities up to a factor, float64: temperature, then
    top-k, then top-p (arXiv 1904.09751) on what is left, then min-p.

    Top-p keeps the smallest set of most likely tokens whose probabilities reach ``top_p``; at least
    one stays.  Min-p drops those less likely than ``min_p`` times the likeliest.  Of equals the
    lower id counts as the likelier.
    """
    # The best logit is subtracted before dividing, so that a tiny temperature can't overflow.
    weights_V = ((logits_V - logits_V.max()).double() / sampling.temperature).exp()
    ids, weights = torch.arange(len(logits_V)), weights_V
    if 0 < sampling.top_k < len(ids) or sampling.top_p < 1:
        ids = logits_V.argsort(descending=True, stable=True)
        ids = ids[: min(sampling.top_k, len(ids)) or None]
        weights = weights_V[ids]
    if sampling.top_p < 1:
        total = weights_V.sum() if len(ids) == len(weights_V) else weights.sum()
        sums = weights.cumsum(dim=-1)
        kept = sums - weights < sampling.top_p * total
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p  # the likeliest has the weight 1
        ids, weights = ids[kept], weights[kept]
    return ids, weights


class Penalties:
    """The penalties and the bias of ``sampling`` on what follows ``prompt``; a token costs the same
    however long prompt and answer are."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._repetition, self._prompt = sampling.repetition_penalty, prompt
        self._ids = [token_id for token_id, _ in sampling.logit_bias]
        self._bias = torch.tensor([value for _, value in sampling.logit_bias])
        self.are_on = bool(self._repetition != 1 or self._presence or self._frequency or self._ids)
        self._times_V: Tensor | None = None  # how often the answer holds an id

    def __call__(self, logits_V: Tensor) -> Tensor:
        """A copy of ``logits_V`` with penalties and bias, where they ``are_on``."""
        if self._times_V is None:
            self._times_V, self._seen_V = torch.zeros_like(logits_V), torch.zeros_like(logits_V) > 0
            ids = torch.tensor(self._prompt)
            self._seen_V[ids[ids < len(logits_V)]] = True
        if self._repetition != 1:
            by = self._repetition
            less_V = torch.where(logits_V > 0, logits_V / by, logits_V * by)
            logits_V = torch.where(self._seen_V, less_V, logits_V)
        less_V = self._presence + self._frequency * self._times_V
        logits_V = torch.where(self._times_V > 0, logits_V - less_V, logits_V)
        logits_V[self._ids] += self._bias
        return logits_V

    def add(self, chosen: int) -> None:
        """The answer holds this id now."""
        assert self._times_V is not None
        self._times_V[chosen] += 1
        self._seen_V[chosen] = True


@dataclass(frozen=True)
class Stops:
    """Strings that end an answer.  They count in text alone: not in tool calls, which begin with
    ``calls`` (where it is not empty) and go on to the answer's end."""

    strings: tuple[str, ...] = ()
    calls: str = ""

    def text_before_calls(self, text: str, whole: bool) -> str:
        """The part of ``text`` that no tool call can hold; ``whole``: nothing follows ``text``."""
        before, found, _ = text.partition(self.calls) if self.calls else (text, "", "")
        begun = 0 if found or whole else overlap(text, self.calls)
        return before[: len(before) - begun]


class Grammar(Protocol):
    """What an answer has to look like, token by token."""

    def allowed(self) -> Tensor:
        """Which ids may come next, bool [V]; the end-of-sentence tokens where the answer may end.
        Raises ``ConfigError`` where that is too much work to compute."""

    def consume(self, chosen: int) -> bool:
        """``chosen`` came next; whether the answer is complete and nothing may follow."""


class Answer:
    """The answer to ``prompt``.  ``take`` chooses the next token; ``logprobs`` is how many
    likeliest ids to report with each token, None for no log-probabilities at all; ``shown`` are
    special tokens that appear in its text."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        sampling: Sampling,
        max_new_tokens: int,
        stops: Stops | None = None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        shown: Mapping[int, str] | None = None,
    ):
        self._tokenizer, self._eos = tokenizer, eos_token_ids
        generator, seed = torch.Generator(), sampling.seed
        generator.manual_seed(generator.seed() if seed is None else seed)
        self._sampling, self._numbers = sampling, numbers(generator)
        self._left, self._stops, self._logprobs = max_new_tokens, stops or Stops(), logprobs
        self._grammar, self._penalties = grammar, Penalties(sampling, prompt)
        self.stream, self._prompt_stream = TextStream(tokenizer, shown), TextStream(tokenizer)
        self._held: list[Token] = []  # tokens whose text may turn out to begin a stop string
        self.ids: list[int] = []
        self.read: list[Token] = []  # the prompt's tokens, as far as they were scored

    def score(self, token_id: int, logits_V: Tensor | None) -> None:
        """Note the prompt's next token in ``read``, scored by float32 CPU logits of at least the
        tokenizer's size; the first one has none."""
        text = self._prompt_stream.push(token_id)
        if logits_V is None:
            self.read.append(Token(token_id, text, None))
        else:
            logits_V = logits_V[: self._tokenizer.size]
            self.read.append(self._token(text, logits_V, scored(logits_V, token_id)))

    def take(self, logits_V: Tensor) -> Delta:
        """Choose a token from float32 CPU logits; of a tokenizer and a model of different sizes,
        only ids that both have.  Raises ``CheckpointError`` if the logits, or those that scored the
        prompt, are not finite."""
        if not self.ids and not all(math.isfinite(token.logprob or 0.0) for token in self.read):
            raise CheckpointError(_BROKEN)
        if self._left == 0:
            return self.end("length")
        if logits_V.shape[0] > self._tokenizer.size:
            logits_V = logits_V[: self._tokenizer.size]
        adjusted_V = self._penalties(logits_V) if self._penalties.are_on else logits_V
        if self._grammar is not None:
            allowed_V = self._grammar.allowed()[: logits_V.shape[0]]
            adjusted_V = adjusted_V.masked_fill(~allowed_V, -math.inf)
        of = sample(adjusted_V, self._sampling, self._numbers)
        if not math.isfinite(of[1]):
            raise CheckpointError(_BROKEN)
        if (chosen := of[0]) in self._eos:
            return self.end("stop")
        if adjusted_V is not logits_V and self._logprobs is not None:
            of = scored(logits_V, chosen)
        self.ids.append(chosen)
        if self._penalties.are_on:
            self._penalties.add(chosen)
        self._left -= 1
        self._held.append(self._token(self.stream.push(chosen), logits_V, of))
        complete = self._grammar is not None and self._grammar.consume(chosen)
        delta = self._release()
        if delta.finish is None and (complete or self._left == 0):
            rest = self.end("stop" if complete else "length")
            return rest._replace(text=delta.text + rest.text, tokens=delta.tokens + rest.tokens)
        return delta

    def end(self, finish: str, error: str = "") -> Delta:
        """All that was held back, and why the answer ends here."""
        if finish in ("stop", "length") and (stopped := self._stopped(_text(self._held), True)):
            return stopped
        tokens, self._held = tuple(self._held), []
        return Delta(_text(tokens) + self.stream.flush(), tokens, finish, error=error)

    def _token(self, text: str, logits_V: Tensor, of: tuple[int, float, float]) -> Token:
        id, logprob, total = of  # as ``scored`` gives them
        if self._logprobs is None:
            return Token(id, text)
        if not self._logprobs:
            return Token(id, text, logprob)
        best = logits_V.topk(self._logprobs)
        pairs = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
        return Token(id, text, logprob, b"".join(starmap(_SCORED.pack, pairs)))

    def _release(self) -> Delta:
        """Tokens that no stop string can reach any more, or all before a complete one."""
        if not (self._stops.strings or self._stops.calls):  # as most often
            released, self._held = tuple(self._held), []
            return Delta(_text(released), released, complete=self.stream.complete)
        text = _text(self._held)
        if stopped := self._stopped(text, False):
            return stopped
        before = len(self._stops.text_before_calls(text, False))
        if self._stops.calls and self._stops.calls in text:
            certain, self._stops = len(text), Stops()
        else:
            reached = max((overlap(text, stop) for stop in self._stops.strings), default=0)
            certain = min(before, len(text) - reached)
        count = bisect_right(_ends(self._held), certain)
        released, self._held = tuple(self._held[:count]), self._held[count:]
        return Delta(_text(released), released, complete=self.stream.complete)

    def _stopped(self, text: str, whole: bool) -> Delta | None:
        """The last delta, if ``text``, which is held back, has a stop string."""
        if not self._stops.strings:
            return None
        before = self._stops.text_before_calls(text, whole)
        stops = [(before.find(stop), stop) for stop in self._stops.strings if stop in before]
        if not stops:
            return None
        position, stop = min(stops)
        count = bisect_left([0, *_ends(self._held)[:-1]], position)
        return Delta(text[:position], tuple(self._held[:count]), "stop", stop)


def _ends(tokens: Sequence[Token]) -> list[int]:
    """Characters up to the end of each token."""
    return list(accumulate(len(token.text) for token in tokens))


def _text(tokens: Sequence[Token]) -> str:
    return "".join([token.text for token in tokens])
