"""One answer on its way: logits in, text out, with stop strings, penalties and log-probabilities.
Shapes: V vocabulary rows.

``slotmoe.model.generate`` is the loop for one sequence; here the loop belongs to the caller, who
may serve several answers in turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from slotmoe.errors import CheckpointError
from slotmoe.model.generate import Sampling, penalize, random_source, sample
from slotmoe.model.tokenizer import TextStream, Tokenizer

_BROKEN = "the model computed NaN or infinite logits; its weights are broken"


class Grammar(Protocol):
    """What an answer has to look like, token by token."""

    def allowed(self) -> Tensor:
        """Which ids may come next, bool [V]; the end-of-sentence tokens where the answer may end.
        Raises ``ConfigError`` where that is too much work to tell."""

    def consume(self, chosen: int) -> bool:
        """``chosen`` came next; whether the answer is complete and nothing may follow."""


@dataclass(frozen=True)
class Made:
    """One token: the text that became printable with it, its natural log-probability under the
    model's own distribution (before temperature, penalties and bias; None for a prompt's first
    token), and those of the likeliest ids; 0 and none unless asked for."""

    id: int
    text: str
    logprob: float | None = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer.  ``finish`` is None while it goes on, ``stop`` after an
    end-of-sentence token or a stop string (then ``stopped_by``), ``length`` at the limit; whoever
    runs the answer may end it with other words."""

    text: str
    tokens: tuple[Made, ...]
    finish: str | None = None
    stopped_by: str | None = None
    error: str = ""


class Answer:
    """The answer to ``prompt``.  ``take`` chooses the next token; ``logprobs`` is how many
    likeliest ids to tell with each token, None for no log-probabilities at all; ``grammar`` is what
    it has to look like, if anything; ``shown`` are special tokens that appear in its text."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        shown: Mapping[int, str] | None = None,
    ):
        self._prompt, self._tokenizer, self._eos, self._sampling = (
            frozenset(prompt),
            tokenizer,
            eos_token_ids,
            sampling,
        )
        self._left, self._stop, self._logprobs, self._grammar = (
            max_new_tokens,
            stop,
            logprobs,
            grammar,
        )
        self._random, self._stream, self._counts = (
            random_source(sampling.seed),
            TextStream(tokenizer, shown),
            Counter[int](),
        )
        self._held: list[Made] = []  # tokens whose text may turn out to begin a stop string
        self.ids: list[int] = []
        self._reading = TextStream(tokenizer)
        self.read: list[Made] = []  # the prompt's tokens, as far as they were scored

    def score(self, one: int, logits_V: Tensor | None) -> None:
        """Note the prompt's next token in ``read``, foretold by float32 CPU logits of at least the
        tokenizer's size; the first one by none."""
        text = self._reading.push(one)
        self.read.append(
            Made(one, text, None)
            if logits_V is None
            else self._made(one, text, logits_V[: self._tokenizer.size])
        )

    def take(self, logits_V: Tensor) -> Piece:
        """Choose a token from float32 CPU logits of at least the tokenizer's size.  Raises
        ``CheckpointError`` if they, or those before them that judged the prompt, are not finite."""
        if not self.ids and not all(math.isfinite(one.logprob or 0.0) for one in self.read):
            raise CheckpointError(_BROKEN)
        if self._left == 0:
            return self.end("length")
        logits_V = logits_V[: self._tokenizer.size]
        adjusted_V = penalize(logits_V, self._sampling, self._prompt, self._counts)
        if self._grammar is not None:
            adjusted_V = adjusted_V.masked_fill(~self._grammar.allowed(), -math.inf)
        chosen = sample(adjusted_V, self._sampling, self._random)
        if not math.isfinite(float(adjusted_V[chosen])):
            raise CheckpointError(_BROKEN)
        if chosen in self._eos:
            return self.end("stop")
        self.ids.append(chosen)
        self._counts[chosen] += 1
        self._left -= 1
        self._held.append(self._made(chosen, self._stream.push(chosen), logits_V))
        complete = self._grammar is not None and self._grammar.consume(chosen)
        piece = self._release()
        if piece.finish is None and (complete or self._left == 0):
            rest = self.end("stop" if complete else "length")
            return replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)
        return piece

    def end(self, finish: str, error: str = "") -> Piece:
        """All that was held back, and why the answer ends here."""
        tokens, self._held = tuple(self._held), []
        return Piece(
            "".join(one.text for one in tokens) + self._stream.flush(), tokens, finish, error=error
        )

    def _made(self, chosen: int, text: str, logits_V: Tensor) -> Made:
        if self._logprobs is None:
            return Made(chosen, text)
        logprobs_V = logits_V.log_softmax(dim=-1)
        best = logprobs_V.topk(self._logprobs)
        return Made(
            chosen,
            text,
            float(logprobs_V[chosen]),
            tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )

    def _release(self) -> Piece:
        """The held tokens that no stop string can reach any more; or everything before one, if it
        is there."""
        text = "".join(one.text for one in self._held)
        found = [(text.find(one), one) for one in self._stop if one in text]
        if found:
            position, stop = min(found)
            before, reached = [], 0
            for one in self._held:
                if reached < position:
                    before.append(one)
                reached += len(one.text)
            return Piece(text[:position], tuple(before), "stop", stop)
        certain = len(text) - max((overlap(text, one) for one in self._stop), default=0)
        count, reached = 0, 0
        while count < len(self._held) and reached + len(self._held[count].text) <= certain:
            reached += len(self._held[count].text)
            count += 1
        released, self._held = tuple(self._held[:count]), self._held[count:]
        return Piece(text[:reached], released)


def overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
