"""What a route budget costs in text and saves in bytes, on texts that priced nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from slotmoe.errors import naming
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study.calibrate import read_text, split
from slotmoe.tools.bench import turns
from slotmoe.tools.options import NEW_FILE, count, option

_BUDGETS = (0.0025, 0.005, 0.01, 0.02, 0.04)
_GRAM = 4  # tokens


def repeated(ids: list[int]) -> float:
    """Share of the runs of four tokens that have been there before."""
    grams = [tuple(ids[at : at + _GRAM]) for at in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / max(1, len(grams))


def _divergence(wanted_V: Tensor, got_V: Tensor) -> float:
    log_p_V, log_q_V = (row_V.double().log_softmax(-1) for row_V in (wanted_V, got_V))
    return float((log_p_V.exp() * (log_p_V - log_q_V)).sum())


@dataclass
class _Way:
    """A runtime with a budget, and what was counted of it."""

    runtime: Runtime
    budget: float
    divergence: float = 0.0
    tokens: int = 0

    def row(self, text: str) -> turns.Row:
        stats, count = self.runtime.stats(), max(1, self.tokens)
        row: turns.Row = {"text": text, "budget": self.budget, "kl": self.divergence / count}
        row["bytes_per_token"] = stats["io"]["disk"]["bytes"] / count
        if self.budget:
            row["estimated_kl"] = stats["routing"]["estimated_kl"]
            row["swaps_per_token"] = stats["routing"]["swaps"] / count
        return row


@click.command()
@turns.EXPORT
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=Path)
@click.option("--slots", metavar="N", type=int, required=True, help="Experts in slots.")
@count("--tokens", 1000, "Tokens of each text, decoded one by one.")
@count("--generate", 0, "Tokens to generate after the first 32 of each text.", least=0)
@option("--budget budgets", "NATS", "Route budget, repeatable.", type=float, multiple=True)
@option("-o --output", "CHART.png", "Draw bytes against KL divergence.", type=NEW_FILE)
@turns.THREADS
def routing(
    export: str, texts: Sequence[Path], budgets: Sequence[float], output: Path | None, **given: Any
) -> None:
    """For each TEXT and route budget, bytes read a token and the KL divergence from the text
    without a budget; and of generated text how much repeats."""
    rows, counts = list[turns.Row](), (given.pop("tokens"), given.pop("generate"))
    for path in texts:
        with ExitStack() as opened:
            ways = []
            for budget in (0.0, *(budgets or _BUDGETS)):
                runtime = Runtime.open(export, route_budget=budget, **given)
                ways.append(_Way(opened.enter_context(runtime), budget))
            rows += _measure(ways, path, *counts)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        chosen = [row for row in rows if row["budget"] == budget]
        figures = [name for name in chosen[0] if name not in ("text", "budget")]
        means = {name: sum(row[name] for row in chosen) / len(chosen) for name in figures}
        rows.append({"text": "mean", "budget": budget, **means})
    if output is not None:
        _draw(rows, output)
    turns.finish(rows, export=export, slots=given["slots"])


def _draw(rows: list[turns.Row], output: Path) -> None:
    from slotmoe.tools.profile.charts import picture

    def fill(axes: Any) -> str:
        for text in dict.fromkeys(row["text"] for row in rows):
            points = [row for row in rows if row["text"] == text]
            whole = points[0]["bytes_per_token"]
            saved = [100 * (1 - point["bytes_per_token"] / whole) for point in points]
            style = {"linewidth": 2.5, "color": "black"} if text == "mean" else {"linewidth": 1.2}
            axes.plot([point["kl"] for point in points], saved, marker="o", label=text, **style)
        axes.set(xlabel="KL divergence, nats a token", ylabel="fewer bytes read (%)")
        axes.set(xlim=0, ylim=0)
        axes.grid(alpha=0.3)
        axes.legend()
        return "What a route budget saves, and costs"

    with naming(output):
        output.write_bytes(picture(fill)[1])


def _measure(ways: list[_Way], path: Path, tokens: int, generate: int) -> list[turns.Row]:
    tokenizer, context = ways[0].runtime.tokenizer, ways[0].runtime.context
    ids = tokenizer.encode(read_text(path), add_bos=False)[:tokens]
    for window in split(ids, tokenizer, context):
        for way in ways:
            way.runtime.engine.empty()
        for end in range(1, len(window) + 1):
            made = [way.runtime.engine.force(window[:end], keeps=True).logits[0] for way in ways]
            for way, logits_V in zip(ways, made, strict=True):
                way.divergence += _divergence(made[0], logits_V)  # of the first 0
                way.tokens += 1
    rows = [way.row(path.name) for way in ways]
    if generate:
        prompt = tokenizer.encode(read_text(path))[:32]
        for way, row in zip(ways, rows, strict=True):
            text = way.runtime.generate(prompt, generate, temperature=0.7, seed=0)
            row["repeated"] = repeated([token.id for token in text])
    return rows
