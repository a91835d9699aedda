"""A token's phases on machines that are not here: how many, and how evenly their parts spread."""

import re
from pathlib import Path

import pytest

from slotmoe.model.config import read_config
from slotmoe.offload.plan.advice import geometry_path
from tests.support.spread import Phase, barriers, phases, spread

DOCS = Path(__file__).parents[2] / "docs" / "decisions" / "cpu-kernels.md"
GEOMETRIES = "v2-lite", "v2"


def token(name, context=4096):
    return phases(read_config(geometry_path(name)), context)


def test_the_thread_with_most_parts_counts():
    found = [Phase("a", 8, 1.0, 2), Phase("b", 9, 3.0)]
    assert barriers(found) == 3
    shares = spread(found, 8)
    assert shares == {"a": 1.0, "b": 27 / 48, "all": 43 / 64}


def test_phases_are_those_of_the_kernels():
    """86 of a token of the sample: counted by a breakpoint where ``Job::run`` wakes workers."""
    assert barriers(token("sample", 105)) == barriers(token("sample", 130)) == 86


@pytest.mark.parametrize("threads", [8, 16, 64])
def test_the_documented_shares(threads):
    line = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| {threads} |"))
    found = [float(cell) for cell in re.findall(r"\d\.\d\d", line)]
    names = "all", "experts", "attention", "absorbed products", "router"
    shares = [spread(token(name), threads) for name in GEOMETRIES]
    assert found == [round(share[name], 2) for share in shares for name in names]
