"""The benchmarks of ``python -m bench``: they run here, and what they report adds up."""

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import codes
from bench.__main__ import bench
from bench.replay import read_trace
from slotmoe.errors import ConfigError
from slotmoe.offload.plan import advice
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


def assert_compared(rows, against, unit):
    """Medians lie in their ranges, and ratios are those of the rounds."""
    for row in rows.values():
        least, most = row["range"]
        assert 0 < least <= row[unit] <= most
        assert 0 < row["ratios"][0] <= row["ratio"] <= row["ratios"][1]
    assert rows[against]["ratios"] == [1.0, 1.0]


def test_depth_and_engine(sample_export):
    short = "--decode-tokens", 3, "--repetitions", 2
    rows = by("way", benchmark("depth", sample_export, "--depth", 60, "--against", 10, *short))
    assert list(rows) == ["after 10", "after 60"]
    assert_compared(rows, "after 60", "milliseconds")
    rows = by("way", benchmark("engine", sample_export, "--slots", 60, *short))
    engine = {name: rows.pop(name) for name in ("with the engine", "without it")}
    assert_compared(engine, "with the engine", "milliseconds")
    assert_compared(rows, "with prefetch", "milliseconds")


def test_drafts(small_export, tmp_path):
    (tmp_path / "text").write_text("the same words, " * 40)
    options = "--prompt-tokens", 40, "--decode-tokens", 20, "--repetitions", 1
    rows = by("way", benchmark("drafts", small_export, tmp_path / "text", *options))
    assert_compared(rows, "without drafts", "tokens_per_second")
    assert rows["with drafts"]["drafted"] > 0


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


@pytest.mark.usefixtures("heavy")
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


@pytest.mark.usefixtures("network")
def test_serve(sample_export, monkeypatch):
    """With clients that are threads."""
    monkeypatch.setattr("bench.serve.ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    options = ["--tokens", 20, "--repetitions", 1, "--clients", 2, "--long", 40, "--context", 256]
    *rows, together, first = benchmark("serve", sample_export, *options)["results"]
    assert_compared({row["way"]: row for row in rows}, "bench", "seconds")
    assert [row["way"] for row in rows] == ["bench", "generate", "serve"]
    assert together["clients"] == 2 and 0 < together["counted"] <= 40
    assert first["cached"] > 0 < first["cold"]


@pytest.mark.usefixtures("heavy")
def test_codes_go_on_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    """And ``plan`` adds up what experts and resident weights lose."""
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
    assert len({json.dumps(row) for row in measured}) == len(measured) == 4 + 3 + 3 + 1
    assert len(rows) == len(measured) and "IQ4_XS" in chart.read_text()
    monkeypatch.setattr(advice, "measured", lambda: {"rows": rows})
    wanted = {"codec": "lut", "bits": "3", "calibrated": True}, {"resident": "int8"}
    total = sum(
        row["kl_divergence"] for row in rows if any(w.items() <= row.items() for w in wanted)
    )
    assert advice.expected("lut", "3", "int8", calibrated=True) == pytest.approx(total)
    assert advice.expected("lut", "7", "int8", calibrated=False) is None


@pytest.mark.usefixtures("nightly")
def test_codes(tmp_path):
    texts = sorted((Path(__file__).parents[1] / "data" / "heldout").glob("*.txt"))[:1]
    options = ["--text", texts[0], "--results", tmp_path / "results.json", "--rows", 1]
    (row,) = benchmark("codes", *options)["rows"]
    assert (row["codec"], row["bits_per_weight"]) == ("lut", 4.268)
    assert 0.07 < row["relative_rms_error"] < 0.075 and 0.0005 < row["kl_divergence"] < 0.004
