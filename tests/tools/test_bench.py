"""The benchmarks of ``python -m bench``: they run here, and what they report adds up."""

import contextlib
import io
import json

import pytest

from bench.__main__ import bench
from bench.replay import read_trace
from slotmoe.errors import ConfigError
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools.cli import main


def benchmark(*arguments):
    """The JSON object of a benchmark's last line."""
    native = bindings.load()
    before = native and native.threads
    printed = io.StringIO()
    try:
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(printed):
            main([str(argument) for argument in arguments], group=bench)
    finally:
        if native:
            native.set_threads(before)
    assert not ended.value.code
    return json.loads(printed.getvalue().splitlines()[-1])


def by(key, report):
    return {row[key]: row for row in report["results"]}


BENCHMARKS = {
    "depth": ("after 60", "--depth", 60, "--against", 10, "--decode-tokens", 3),
    "engine": ("with the engine", "--slots", 60, "--decode-tokens", 3),
    "drafts": ("without drafts", "TEXT", "--prompt-tokens", 40, "--decode-tokens", 20),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_ways_are_compared(name, sample_export, tmp_path):
    """Medians lie in their ranges."""
    (tmp_path / "text").write_text("the same words, " * 40)
    against, *options = BENCHMARKS[name]
    options = [tmp_path / "text" if word == "TEXT" else word for word in options]
    rows = by("way", benchmark(name, sample_export, *options, "--repetitions", 1))
    assert rows[against]["ratios"] == [1.0, 1.0]
    for row in rows.values():
        assert 0 < row["range"][0] <= row["range"][1] and row["ratio"] > 0


def test_replay(slotmoe, sample_export, tmp_path):
    trace = tmp_path / "trace"
    assert slotmoe("run", sample_export, "Hello", "-n", 8, "--trace", trace)[0] == 0
    report = benchmark("replay", trace, trace, "--slots", 50, "--slots", 224, "--policy", "lru")
    rows = {(row["policy"], row["slots"]): row for row in report["results"]}
    assert report["experts"] == 7 * 32 == 224
    assert 0 < rows["lru", 50]["hit_rate"] < rows["optimum", 50]["hit_rate"] < 1
    assert rows["lru", 224]["of_optimum"] == rows["optimum", 50]["of_optimum"] == 1
    trace.write_bytes(trace.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="is cut off"):
        read_trace(trace)
