"""How well a model predicts text, and how far it is from a reference: bits per byte, perplexity, KL
divergence.

A text is tokenized whole and read in windows, each a sequence of its own that begins with the
beginning-of-sentence token if the tokenizer wants one.  Window k begins ``stride`` tokens after the
one before and scores what none has scored yet, so that every token of the text is scored exactly
once.  (Without a beginning token the text's first can't be.)

Probabilities are a softmax over all ``vocab_size`` rows of the model, in float64, as in
transformers and llama.cpp; rows past the tokenizer's vocabulary count too.  With p the reference's
probabilities and q the model's, a token's KL divergence is ``sum p (ln p - ln q)`` in nats over the
distribution that predicts it.

Shape legend: R rows of logits, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.calibration import read_text
from slotmoe.offload.model_source import read_model
from slotmoe.offload.runtime import Runtime

_ROWS = 32  # at a time in float64


@dataclass(frozen=True)
class Text:
    """A tokenized file: ``ids``, the ``begin`` of each window (no or one token), and the bytes of
    text up to each token's end, with a 0 in front."""

    path: Path
    ids: list[int]
    begin: list[int]
    ends: list[int]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> "Text":
        """Raises ``ConfigError`` as ``read_text`` does, and for fewer than two tokens."""
        text = read_text(path)
        ids, ends = tokenizer.encode_with_ends(text)
        if len(ids) < 2:
            needed = "evaluation needs 2 or more; give a longer text"
            raise ConfigError(f"{path}: has {len(ids)} token, {needed}")
        ends[-1] = len(text)  # with whatever the tokenizer drops at the end
        sizes = (len(text[start:end].encode()) for start, end in pairwise([0, *ends]))
        return cls(path, ids, tokenizer.begin, list(accumulate(sizes, initial=0)))


def read_texts(paths: Sequence[Path], model: Path, reference: Path | None = None) -> list[Text]:
    """The texts as the tokens of ``model``.  Raises ``ConfigError`` as ``Text.read`` does, and
    unless the ``reference`` has as many vocabulary rows and reads the texts alike."""
    (rows, texts), *compared = [
        (config.vocab_size, [Text.read(path, tokenizer) for path in paths])
        for config, tokenizer in map(read_model, [model, *([reference] if reference else [])])
    ]
    for other_rows, others in compared:
        different = [t.path for t, o in zip(texts, others, strict=True) if t != o]
        if rows == other_rows and not different:
            continue
        problem = f"has {other_rows} vocabulary rows and {model} has {rows}"
        if rows == other_rows:
            problem = f"has a tokenizer that reads {different[0]} as other tokens than {model}'s"
        advice = "divergence compares probabilities of the same tokens: give the checkpoint that"
        raise ConfigError(f"{reference}: the reference {problem}; {advice} the model was made of")
    return texts


class Window(NamedTuple):
    """Tokens ``start`` to ``stop`` of a text, of which those from ``first`` on are scored."""

    start: int
    first: int
    stop: int


def windows_of(text: Text, window: int, stride: int | None) -> list[Window]:
    """The windows of a text.  ``stride`` None: as long as possible.  Raises ``ConfigError``."""
    count, begin = len(text.ids), len(text.begin)
    longest = window - 1  # the beginning token, or else the window's first, is not scored
    if longest < 1:
        expected = "expected at least 2: a token to predict, and one before it"
        raise ConfigError(f"--window is {window}, {expected}")
    if stride is not None and not 1 <= stride <= longest:
        expected = f"expected 1 to {longest} for windows of {window}: no token may be left out"
        raise ConfigError(f"--stride is {stride}, {expected}")
    windows, start, done = [], 0, 1 - begin
    while done < count:
        windows.append(Window(start, done, min(start + window - begin, count)))
        start, done = start + (stride or longest), windows[-1].stop
    return windows


def _figures(sums: Counter[str], compared: bool) -> Json:
    """What ``slotmoe eval --json`` says of sums over scored tokens: their ``bytes``, ``nll`` in
    nats and, if ``compared``, the reference's, ``divergence`` in nats, and how many ``agreed``."""
    tokens = sums["tokens"]
    report: Json = {"tokens": tokens, "bytes": sums["bytes"]}
    for prefix in ("", "reference_") if compared else ("",):
        nll = sums[f"{prefix}nll"]
        bits = nll / math.log(2) / sums["bytes"] if sums["bytes"] else 0.0
        # e^700 is the last power that a float holds
        perplexity = math.exp(min(nll / tokens, 700.0))
        report |= {f"{prefix}bits_per_byte": bits, f"{prefix}perplexity": perplexity}
    if compared:
        report["kl_divergence"] = sums["divergence"] / tokens
        report["top1_agreement"] = sums["agreed"] / tokens
    return report


@dataclass
class Evaluation:
    """A running evaluation of ``runtime``, compared with ``reference`` if there is one."""

    runtime: Runtime
    reference: Runtime | None = None
    files: dict[Path, Counter[str]] = field(default_factory=dict)  # sums, as ``_figures`` has them

    def run(self, text: Text, windows: Iterable[Window]) -> Iterator[int]:
        """Score one text; yields how many bytes of it are done, again and again."""
        sums = self.files.setdefault(text.path, Counter())
        for window in windows:
            fed = text.begin + text.ids[window.start : window.stop - 1]  # the last has no successor
            row, at = window.first - window.start + len(text.begin) - 1, window.first
            rows, other = _rows(self.runtime, fed, row), self.reference
            others = repeat(None) if other is None else _rows(other, fed, row)
            for logits_RV, wanted_RV in zip(rows, others, strict=other is not None):
                at = self._score(text, at, sums, logits_RV, wanted_RV)
                yield text.ends[at]
        yield text.ends[-1]

    def _score(
        self, text: Text, at: int, sums: Counter[str], logits_RV: Tensor, wanted_RV: Tensor | None
    ) -> int:
        """Count the tokens from ``at`` on, one a row; returns the first that is not."""
        stop = at + len(logits_RV)
        target_R1 = torch.tensor(text.ids[at:stop], device=logits_RV.device)[:, None]
        log_q_RV = logits_RV.double().log_softmax(dim=-1)
        part: dict[str, Any] = {"tokens": stop - at, "bytes": text.ends[stop] - text.ends[at]}
        part["nll"] = -log_q_RV.gather(1, target_R1).sum().item()
        if wanted_RV is not None:
            log_p_RV = wanted_RV.double().log_softmax(dim=-1)
            part["reference_nll"] = -log_p_RV.gather(1, target_R1).sum().item()
            part["divergence"] = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
            part["agreed"] = int((log_q_RV.argmax(dim=-1) == log_p_RV.argmax(dim=-1)).sum())
        if not math.isfinite(sum(part.values())):
            problem = "the model or its reference computed NaN or infinite logits"
            raise CheckpointError(f"{problem}; its weights are broken")
        sums.update(part)
        return stop

    def report(self) -> Json:
        """All texts together, and ``files`` one by one."""
        compared, total = self.reference is not None, Counter[str]()
        for sums in self.files.values():
            total.update(sums)
        files = [
            {"file": str(path), **_figures(sums, compared)}
            for path, sums in self.files.items()
            if sums["tokens"]
        ]
        return {**_figures(total, compared), "files": files}


def _rows(runtime: Runtime, ids: list[int], first: int) -> Iterator[Tensor]:
    """The logits of ``ids`` from position ``first`` on, a few rows at a time."""
    for logits_RV in runtime.logits_from(ids, first):
        yield from logits_RV.split(_ROWS)
