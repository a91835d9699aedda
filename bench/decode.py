"""Comparisons of decode, by the milliseconds of a token: ``engine``; and what drafts gain.

``drafts`` forces the tokens of a known continuation, as if the model had chosen them, so that a
model of random weights measures it too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import click
from torch import Tensor

from bench import turns
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.policy.passes import Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import speed
from slotmoe.tools.options import count, option


class _WithoutEngine:
    """A runtime's experts without the engine: every record is in its slot, and no cache, policy or
    lookahead learns of its use."""

    def __init__(self, experts: Experts) -> None:
        self.slot_table = experts.slot_table
        assert self.slot_table().complete

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        raise AssertionError("a decode step computes all experts by the slot table")

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        pass


def _milliseconds(runtime: Runtime, ids: list[int]) -> float:
    """Of one token.  The first isn't counted: what ran before has moved the memory it needs."""
    return 1e3 * fmean(speed.token_seconds(runtime, ids)[1:])


@click.command()
@turns.EXPORT
@click.option("--slots", type=int, help="Also compare prefetch on and off with this many slots.")
@count("--decode-tokens", 32, "Tokens of one turn; the first is not counted.", least=2)
@turns.repetitions(7)
def engine(export: str, slots: int | None, decode_tokens: int, repetitions: int) -> None:
    """What the offload engine costs where every expert is in memory, and what prefetch gains where
    --slots are too few for that."""
    ids = turns.random_ids(decode_tokens)
    with Runtime.open(export, context=256) as runtime:
        runtime.warm()

        def without() -> float:
            experts = _WithoutEngine(runtime.model.quantized("compare"))
            with patch.object(runtime.model.network, "experts", experts):
                return _milliseconds(runtime, ids)

        ways = {"with the engine": lambda: _milliseconds(runtime, ids), "without it": without}
        rows = turns.compare(ways, repetitions, "with the engine", "milliseconds")
    if slots is not None:
        few = partial(Runtime.open, export, context=256, slots=slots)
        with few() as ahead, few(prefetch=False) as never:
            opened = {"with prefetch": ahead, "without prefetch": never}
            ways = {name: partial(_milliseconds, it, ids) for name, it in opened.items()}
            rows += turns.compare(ways, repetitions, "with prefetch", "milliseconds")
    turns.finish(rows)


_EDIT = "Rewrite this file and replace {} by {}.\n\n{}\n\nThe whole file after the change:\n\n"
_REPLACE = "The answer is TEXT with one word in place of another, and TEXT is in the prompt."


def _texts(text: str, replace: tuple[str, str] | None) -> tuple[str, str]:
    """A prompt and its answer."""
    if replace is None:
        return text[: len(text) // 2], text[len(text) // 2 :]
    return _EDIT.format(*replace, text), text.replace(*replace)


@click.command()
@turns.EXPORT
@click.argument("text", metavar="TEXT", type=Path)
@option("--replace", "OLD NEW", _REPLACE, nargs=2)
@option("--ram", "SIZE", "RAM budget.")
@count("--prompt-tokens", 4096, "Of the prompt its last N tokens.")
@count("--decode-tokens", 256, "Of the answer its first N tokens.")
@turns.repetitions(5)
@turns.THREADS
def drafts(
    export: str, text: Path, replace: tuple[str, str] | None, repetitions: int, **given: Any
) -> None:
    """Decode the answer to TEXT with drafts and without: its second half, or, with --replace, all
    of it anew.  The ratio is of tokens a second; each turn learns what drafts are worth anew."""
    prompt, answer = _texts(text.read_text("utf-8"), replace)
    read, decoded = given.pop("prompt_tokens"), given.pop("decode_tokens")
    with Runtime.open(export, context=read + decoded, draft="ngram", **given) as runtime:
        runtime.warm()
        ids = runtime.tokenizer.encode(prompt)[-read:]
        following = runtime.tokenizer.encode(answer, add_bos=False)[:decoded]
        passes = runtime.engine.batch.passes
        runtime.engine.empty()
        runtime.engine.force(ids)
        used: dict[str, dict[str, float]] = {}

        def decode(way: str, drafting: Drafting | None) -> float:
            passes.drafting, before = drafting, runtime.stats()["io"]["disk"]["bytes"]
            moments = runtime.engine.force(ids, following).moments
            size = runtime.stats()["io"]["disk"]["bytes"] - before
            used[way] = {"disk_bytes_per_token": size / len(following)}
            if drafting is not None:
                used[way] |= drafting.stats()
            return len(following) / (moments[-1] - moments[0])

        ways: dict[str, Callable[[], float]] = {
            "without drafts": lambda: decode("without drafts", None),
            "with drafts": lambda: decode("with drafts", Drafting(runtime.plan.drafted)),
        }
        of = ways, repetitions, "without drafts", "tokens_per_second"
        rows = turns.compare(*of, warm_up=False)  # the prompt has warmed all
    turns.finish([row | used[row["way"]] for row in rows], tokens=len(following), prompt=len(ids))
