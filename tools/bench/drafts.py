"""What drafts gain on a text whose continuation is known: its tokens are forced, as if the model
had chosen them, so that a model of random weights measures it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from slotmoe.offload.policy.drafts import Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study.calibrate import read_text
from slotmoe.tools.bench import turns
from slotmoe.tools.options import count, option

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
    prompt, answer = _texts(read_text(text), replace)
    read, decoded = given.pop("prompt_tokens"), given.pop("decode_tokens")
    with Runtime.open(export, context=read + decoded, draft="ngram", **given) as runtime:
        runtime.warm()
        ids = runtime.tokenizer.encode(prompt)[-read:]
        following = runtime.tokenizer.encode(answer, add_bos=False)[:decoded]
        passes = runtime.engine.batch.passes
        runtime.engine.empty()
        runtime.engine.force(ids)
        used: dict[str, dict[str, float]] = {}

        def speed(way: str, drafting: Drafting | None) -> float:
            passes.drafting, before = drafting, runtime.stats()["io"]["disk"]["bytes"]
            moments = runtime.engine.force(ids, following).moments
            size = runtime.stats()["io"]["disk"]["bytes"] - before
            used[way] = {"disk_bytes_per_token": size / len(following)}
            if drafting is not None:
                used[way] |= drafting.stats()
            return len(following) / (moments[-1] - moments[0])

        ways: dict[str, Callable[[], float]] = {
            "without drafts": lambda: speed("without drafts", None),
            "with drafts": lambda: speed("with drafts", Drafting(runtime.plan.drafted)),
        }
        of = ways, repetitions, "without drafts", "tokens_per_second"
        rows = turns.compare(*of, warm_up=False)  # the prompt has warmed all
    turns.finish([row | used[row["way"]] for row in rows], tokens=len(following), prompt=len(ids))
