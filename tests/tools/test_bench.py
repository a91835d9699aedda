"""The benchmarks of ``python -m slotmoe.tools.bench``: they run, and what they report adds up."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slotmoe.offload.plan import divergence
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools.bench import codes
from tests.support.bench import benchmark


def by(key, report):
    return {row[key]: row for row in report["results"]}


def assert_compared(rows, against, unit):
    """Medians lie in their ranges, and ratios are those of the rounds."""
    for row in rows.values():
        least, most = row["range"]
        assert 0 < least <= row[unit] <= most
        assert 0 < row["ratios"][0] <= row["ratio"] <= row["ratios"][1]
    assert rows[against]["ratios"] == [1.0, 1.0]


def test_depth_engine_and_profile(sample_export):
    short = "--decode-tokens", 3, "--repetitions", 2
    rows = by("way", benchmark("depth", sample_export, "--depth", 60, "--against", 10, *short))
    assert list(rows) == ["after 10", "after 60"]
    assert_compared(rows, "after 60", "milliseconds")
    rows = by("way", benchmark("engine", sample_export, "--slots", 60, *short))
    engine = {name: rows.pop(name) for name in ("with the engine", "without it")}
    assert_compared(engine, "with the engine", "milliseconds")
    assert_compared(rows, "with prefetch", "milliseconds")
    rows = by("of", benchmark("profile", sample_export, *short))
    assert list(rows) == ["lower quartile", "median"]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["watched"] / row["plain"])


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


@pytest.mark.usefixtures("heavy")
def test_quantizers_give_the_weights_of_bitsandbytes():
    rows = by("way", benchmark("quantize", "--repetitions", 1))
    different = {name: row["different_weights"] for name, row in rows.items() if len(row) > 5}
    assert different and set(different.values()) == {0}
    assert_compared(rows, "bitsandbytes", "GB/s")


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_download():
    rows = by("way", benchmark("download", "--gigabytes", 0.01, "--repetitions", 1))
    assert_compared(rows, "curl", "seconds")
    for row in rows.values():
        assert row["megabytes_per_second"] == pytest.approx(10 / row["seconds"], abs=1)


@pytest.mark.usefixtures("network")
def test_serve(sample_export, monkeypatch):
    """With clients that are threads."""
    monkeypatch.setattr("slotmoe.tools.bench.serve.ProcessPoolExecutor", ThreadPoolExecutor)
    options = ["--tokens", 20, "--repetitions", 1, "--clients", 2, "--long", 40, "--context", 256]
    *rows, together, threads, first = benchmark("serve", sample_export, *options)["results"]
    assert_compared({row["way"]: row for row in rows}, "bench", "seconds")
    assert [row["way"] for row in rows] == ["bench", "generate", "serve"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(19 / row["seconds"])
    assert (together["clients"], threads["threads"]) == (2, 2)
    assert 0 < together["counted"] <= 40
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
    options = ["--text", text, "--calibrate", text, "--results", results]
    for more in (["--rows", 2], ["--chart", chart], []):
        codes.codes.main([*map(str, [*options, *more])], standalone_mode=False)
    assert len(measured) == 4 + 3 + 3 + 1
    assert len({json.dumps(row) for row in measured}) == len(measured)
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == len(measured) and "IQ4_XS" in chart.read_text()
    monkeypatch.setattr(divergence, "measured", lambda: {"rows": rows})
    wanted = {"codec": "lut", "bits": "3", "calibrated": True}, {"resident": "int8"}
    total = sum(
        row["kl_divergence"] for row in rows if any(w.items() <= row.items() for w in wanted)
    )
    assert divergence.expected("lut", "3", "int8", calibrated=True) == pytest.approx(total)
    assert divergence.expected("lut", "7", "int8", calibrated=False) is None


@pytest.mark.usefixtures("nightly")
def test_codes(tmp_path):
    texts = sorted((Path(__file__).parents[1] / "data" / "heldout").glob("*.txt"))[:1]
    options = ["--text", texts[0], "--results", tmp_path / "results.json", "--rows", 1]
    (row,) = benchmark("codes", *options)["rows"]
    assert (row["codec"], row["bits_per_weight"]) == ("lut", 4.268)
    assert 0.07 < row["relative_rms_error"] < 0.075 and 0.0005 < row["kl_divergence"] < 0.004
