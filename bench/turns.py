"""What all benchmarks share: the comparison of several ways in turn, and the report, whose last
line is one JSON object.

The speed of a shared machine changes within seconds.  So what is compared runs in turn in one
process, the order changes from round to round, and ratios are taken within a round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

import click
import torch

from slotmoe.tools.bench.speed import Ways, take_turns
from slotmoe.tools.options import Decorator, count, option

Row = dict[str, Any]
EXPORT = click.argument("export", metavar="EXPORT")
THREADS = count("--threads", None, "CPU threads. [default: cores]")
WORKING_SET = option("--working-set", "GIB", "What streaming kernels run through.", default=1.5)


def repetitions(default: int) -> Decorator:
    return count("--repetitions", default, "Rounds, in each of which every way has its turn.")


def compare(
    ways: Ways[float], rounds: int, against: str, unit: str, warm_up: bool = True
) -> list[Row]:
    """A row for each way: the median in ``unit``, its range, and the median and range of the ratios
    to the way ``against``, round by round."""
    results, rows = take_turns(ways, rounds, warm_up), []
    for name, values in results.items():
        ratios = [a / b for a, b in zip(values, results[against], strict=True)]
        row = {"way": name, unit: median(values), "range": [min(values), max(values)]}
        rows.append(row | {"ratio": median(ratios), "ratios": [min(ratios), max(ratios)]})
    return rows


def finish(rows: Sequence[Row], **facts: Any) -> None:
    """Print a line for each row, and all of it as one JSON object in the last line."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(map(shown, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    for row in rows:
        print("  ".join(f"{name} {shown(value)}" for name, value in row.items()))
    print(json.dumps({**facts, "results": rows}))


def random_ids(tokens: int) -> list[int]:
    """The same ids each time."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(2, 1000, (tokens,), generator=generator).tolist()
    return ids
