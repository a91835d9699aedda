"""The benchmarks of ``python -m bench``: they run here, and what they report adds up."""

import contextlib
import io
import json

import pytest

from bench import codes
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


@pytest.mark.usefixtures("nightly")
@pytest.mark.skipif(bindings.load() is None, reason="the native kernels were not built")
def test_kernels():
    report = benchmark("kernels", "--working-set", 0.05, "--repetitions", 1, "--threads", 1)
    rows = by("kernel", report)
    assert report["threads"] == 1
    assert {"linear int8, 1 row", "linear nf4, 512 rows", "quantize_nf4, bf16"} <= set(rows)
    assert all(row["macs_per_second"] > 0 for row in rows.values())
    row = rows["experts, 1 token, 6 experts"]
    assert row["ratio"] == pytest.approx(row["bytes_per_second"] / row["plain_bytes_per_second"])
    assert row["bytes_per_second"] * row["seconds"] == pytest.approx(6 * 4.6e6, rel=0.01)


@pytest.mark.usefixtures("nightly")
def test_codes_go_on_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    measured, text = [], tmp_path / "text"
    text.write_text("words")
    figures = {"bits_per_weight": 4.25, "relative_rms_error": 0.1, "gigabytes_per_token": 0.7}

    def measure(row, *_):
        measured.append(row)
        return {**figures, "kl_divergence": 0.002 / len(measured)}

    monkeypatch.setattr(codes, "_measure", measure)
    results, chart = tmp_path / "results.json", tmp_path / "chart.svg"
    options = "codes", "--text", text, "--calibrate", text, "--results", results
    for more in (["--rows", 2], ["--chart", chart], []):
        rows = benchmark(*options, *more)["rows"]
    assert len({json.dumps(row) for row in measured}) == len(measured) == len(rows)
    assert "IQ4_XS" in chart.read_text()
