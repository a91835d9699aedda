"""``slotmoe profile``: what it measures, what it writes, and how it fails."""

import base64
import contextlib
import dataclasses
import json
import mmap
import os
import pty
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from slotmoe.model.network import Network
from slotmoe.offload.observe.memory import LONGEST, MemorySampler
from slotmoe.offload.observe.profiler import STAGES, Profiler, attach
from slotmoe.offload.observe.trace import read_trace
from slotmoe.offload.plan.speed import Bandwidths
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.cli import main
from slotmoe.tools.profile.report import CHARTS, compared, write_report
from slotmoe.tools.profile.verdict import verdict
from tests.support.bench import benchmark
from tests.support.browser import BROWSER, Browser, Tab
from tests.support.engine import start

ROOT = Path(__file__).parents[2]
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. "
)


@pytest.fixture
def profile(sample_export, tmp_path, capsys):
    """Run ``slotmoe profile`` on the sample in this process: exit code, stdout, stderr."""

    def run(*arguments, output=tmp_path / "out"):
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main(["profile", str(sample_export), *map(str, arguments), "-o", str(output)])
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def reported(sample_export, tmp_path_factory):
    """A small cache, so that there are misses; the folder, and the routing as the trace recorded
    it."""
    folder = tmp_path_factory.mktemp("profile")
    command = [
        "profile",
        str(sample_export),
        TEXT,
        "-n",
        "40",
        "--slots",
        "60",
        "-o",
        str(folder),
        "--trace",
        str(folder / "x.trace"),
    ]
    # A process of its own: this one may hold more before a model is open than after.
    subprocess.run(
        [sys.executable, "-m", "slotmoe", *command], cwd=ROOT, check=True, capture_output=True
    )
    return (
        folder,
        [step.indices for step in read_trace(folder / "x.trace")[1]],
        json.loads((folder / "profile.json").read_text()),
    )


@pytest.mark.usefixtures("processes")
def test_counts_are_those_of_the_routing_and_of_the_cache(reported):
    _, steps, report = reported
    assert len(report["steps"]) == len(steps) == 40
    layers = report["layers"]
    for row, layer in enumerate(layers):
        uses = [0] * 32
        for step in steps:
            for expert in step[:, row].flatten():
                uses[expert] += 1
        assert layer["uses"] == uses
        needed = sum(len({int(expert) for expert in step[:, row].flatten()}) for step in steps)
        assert layer["hits"] + layer["misses"] == needed
    cache = report["cache"]
    assert cache["hits"] == sum(layer["hits"] for layer in layers)
    assert cache["misses"] == sum(layer["misses"] for layer in layers) > 0
    assert cache["hit_rate"] == cache["hits"] / (cache["hits"] + cache["misses"])
    assert (
        sum(step["moved"]["disk"] for step in report["steps"]) == report["io"]["disk"]["bytes"] > 0
    )


def test_parts_add_up_to_the_time_of_the_run(reported):
    _, _, report = reported
    assert 0 < report["steps"][0]["began"] < report["memory"]["ram"]["seconds"][-1]
    assert [step["kind"] for step in report["steps"]] == ["prefill"] + ["decode"] * 39
    for step, after in pairwise(report["steps"]):
        assert set(step["seconds"]) <= set(STAGES)
        assert step["began"] + sum(step["seconds"].values()) == pytest.approx(
            after["began"], abs=1e-4
        )
    for part in (
        "attention",
        "gate",
        "experts",
        "shared experts and dense layers",
        "head",
        "waiting for disk",
        "sampling",
    ):
        assert report["time"]["decode"]["milliseconds_per_token"][part] > 0, part
        assert all(step["seconds"][part] > 0 for step in report["steps"][:1]), part


def test_keys_that_others_read(profile):
    code, out, err = profile(TEXT, "-n", "5", "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert set(report["peak"]) == {"ram"}
    assert {"hits", "misses", "hit_rate", "prefetch_used", "prefetch_wasted"} <= set(
        report["cache"]
    )
    assert {"bytes", "seconds"} <= set(report["io"]["disk"])
    assert set(report["predicted"]["components"]["expert slots"]) == {"ram"}
    total = sum(sizes["ram"] for sizes in report["predicted"]["components"].values())
    assert report["predicted"]["peak"] == {"ram": total}
    assert report["predicted"]["decode_tokens_per_second"] > 0
    assert report["complete"] is True


def test_memory_is_split_into_what_is_there(reported):
    _, _, report = reported
    series, peak, record = report["memory"]["ram"], report["peak"]["ram"], 28672
    assert series["seconds"] == sorted(series["seconds"])
    assert max(series["bytes"]) <= peak
    assert sum(sizes["ram"] for sizes in report["components"].values()) == peak
    for place, whole in enumerate(series["bytes"]):
        assert sum(part[place] for part in series["components"].values()) <= whole + (1 << 20)
    slots = series["components"]["expert slots"]
    assert max(slots) == report["components"]["expert slots"]["ram"] == 60 * record
    rows = {row["name"]: row for row in compared(report)}
    assert rows["resident weights"]["measured"] == rows["resident weights"]["predicted"] > 0


def test_sampler_sees_memory_come_and_thins_out_but_keeps_the_peak():
    with MemorySampler(interval=1e-4) as sampler:
        block = mmap.mmap(-1, 64 << 20)  # pages of its own, whatever the allocator has left over
        for page in range(0, len(block), 4096):
            block[page] = 1
        seen, until = len(sampler.samples), time.monotonic() + 20
        while len(sampler.samples) < seen + 3 and time.monotonic() < until:
            time.sleep(0.001)
        block.close()
        while sampler._interval == 1e-4 and time.monotonic() < until:
            time.sleep(0.01)
    assert sampler._interval == 2e-4
    assert len(sampler.samples) <= LONGEST
    highest = sampler.highest("ram")
    assert highest.total["ram"] >= sampler.baseline + (60 << 20)
    assert highest.components["ram"]["resident weights"] >= 60 << 20


def test_prefetch_is_counted_by_layer():
    class Shelf(dict):
        def prefetch(self, key, urgency):
            self[key] = urgency
            return True

        def drop(self, key):
            self.pop(key, None)

    ahead = Prefetcher(3, 10, 1, Shelf(), lambda: 100.0)
    ahead._idle.value = 1.0
    ahead.guess(1, [11, 12], "token")
    ahead.guess(2, [21], "token")
    ahead.more(0)
    ahead.chosen(1, [12, 15], 2)
    ahead.guess(2, [22], "layer")
    assert [(one.guessed, one.right, one.used, one.wasted) for one in ahead.by_row["token"]] == [
        (0, 0, 0, 0),
        (2, 1, 1, 1),
        (0, 0, 0, 0),
    ]
    assert [one.cancelled for one in ahead.by_row["token"]] == [0, 0, 1]
    assert (ahead.stats()["token"]["guessed"], ahead.stats()["token"]["cancelled"]) == (2, 1)


def test_watching_changes_no_logits_and_ends(sample_export):
    with Runtime.open(sample_export, slots=60, context=64) as runtime:
        ids = list(range(100, 140))
        plain = runtime.logits(ids)
        profiler, detach = attach(runtime)
        assert isinstance(profiler, Profiler)
        step = start(runtime)
        watched = [step(ids[:20])] + [step([one]) for one in ids[20:]]
        assert all(bool((one[0] == plain[19 + number]).all()) for number, one in enumerate(watched))
        assert len(profiler.passes) == 21
        detach()
        step([5])
        assert len(profiler.passes) == 21


class Addresses(HTMLParser):
    """All that a page could load or run."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster", "background", "style"):
                self.addresses.append(value)
            assert not name.startswith("on"), name

    def handle_data(self, data):
        self.words.append(data)


def page(folder):
    parser = Addresses()
    parser.feed((folder / "report.html").read_text())
    return parser


def test_report_holds_everything_and_asks_for_nothing(reported):
    folder, _, report = reported
    found = page(folder)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert found.addresses
    assert all(address.startswith("data:") for address in found.addresses)
    assert "url(" not in (folder / "report.html").read_text()
    charts = [name for name in CHARTS if (folder / f"{name}.png").is_file()]
    assert set(charts) == set(CHARTS) - {"memory-vram"}
    embedded = [
        base64.b64decode(address.split(",")[1])
        for address in found.addresses
        if address.startswith("data:image/png")
    ]
    assert sorted(embedded) == sorted((folder / f"{name}.png").read_bytes() for name in charts)
    words = " ".join(" ".join(found.words).split())
    for heading in (
        "Memory",
        "Predicted beside measured",
        "Time of a token",
        "Experts by layer",
        "Bytes by tier",
        "Workload",
    ):
        assert heading in words
    assert f"{report['decode_tokens_per_second']:.2f}" in words
    assert "was stopped" not in words


def test_every_stage_of_a_token_can_be_drawn(reported, tmp_path):
    """Those of a GPU too: captured layers, waiting for RAM."""
    _, _, report = reported
    spent = dict.fromkeys(STAGES, 1.0)
    times = {
        kind: time | {"milliseconds_per_token": spent} for kind, time in report["time"].items()
    }
    steps = [step | {"seconds": spent} for step in report["steps"]]
    write_report(report | {"time": times, "steps": steps}, tmp_path)
    assert {"time-decode.png", "tokens.png"} <= {path.name for path in tmp_path.iterdir()}


def test_words_of_strangers_stay_words(reported, tmp_path):
    _, _, report = reported
    hostile = (
        "</pre><script>fetch('http://example.org')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    )
    report = report | {
        "model": hostile,
        "workload": report["workload"] | {"prompt": hostile, "text": hostile},
    }
    write_report(report, tmp_path)
    found = page(tmp_path)
    assert not {"script"} & set(found.tags)
    assert hostile in found.words


@pytest.mark.usefixtures("processes")
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium-headless-shell"
)
def test_report_in_chromium(reported, tmp_path):
    folder, _, _ = reported
    with Browser() as browser, Tab(browser) as tab:
        tab.open(folder / "report.html")
        sizes = tab.evaluate("[...document.images].map(one => one.complete && one.naturalWidth)")
        assert len(sizes) == len(CHARTS) - 1
        assert all(size > 600 for size in sizes)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            "wider than the window"
        )
        assert [address for address in tab.requests if not address.startswith("data:")] == [
            (folder / "report.html").as_uri()
        ]
        assert tab.complaints == []
        # The same eyes see what is wrong in a page that has it.
        bad = tmp_path / "bad.html"
        bad.write_text(
            "<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); missing()</script>"
        )
        tab.open(bad)
        assert "http://127.0.0.1:9/x.png" in tab.requests
        assert len(tab.complaints) >= 3


def test_predicted_beside_measured_by_tier():
    report = {
        "peak": {"vram": 90, "ram": 55},
        "components": {
            "resident weights": {"vram": 60},
            "runtime": {"ram": 40},
            "scratch and rest": {"vram": 30, "ram": 15},
        },
        "predicted": {
            "components": {
                "attention": {"vram": 50},
                "router": {"vram": 10},
                "prefill scratch": {"vram": 40},
                "runtime": {"ram": 50},
            },
            "peak": {"vram": 100, "ram": 50},
            "prefill_tokens_per_second": None,
            "decode_tokens_per_second": 4.0,
        },
        "prefill_tokens_per_second": None,
        "decode_tokens_per_second": 5.0,
    }
    rows = [
        (row["name"], row["unit"], row["predicted"], row["measured"]) for row in compared(report)
    ]
    assert rows == [
        ("resident weights", "vram", 60, 60),
        ("runtime and scratch", "vram", 40, 30),
        ("all of vram", "vram", 100, 90),
        ("runtime and scratch", "ram", 50, 55),
        ("all of ram", "ram", 50, 55),
        ("decode speed", "tokens/s", 4.0, 5.0),
    ]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143)])
@pytest.mark.parametrize("after", [0, 3])
def test_stopped_run_writes_what_it_has_and_says_so(stop, after, profile, monkeypatch, tmp_path):
    original, calls = Network.forward, []

    def forward(self, *arguments, **options):
        calls.append(1)
        if len(calls) == after + 1:
            raise stop
        return original(self, *arguments, **options)

    monkeypatch.setattr(Network, "forward", forward)
    code, out, err = profile(TEXT, "-n", "20", "--json")
    assert (code, out) == (130 if stop is KeyboardInterrupt else 143, "")
    assert f"stopped after {after} of 20 tokens" in err
    assert "report.html" in err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert (report["complete"], report["workload"]["new_tokens"], len(report["steps"])) == (
        False,
        after,
        after,
    )
    assert "was stopped" in " ".join(page(tmp_path / "out").words)


def test_ctrl_c_while_the_report_is_written(profile, monkeypatch, tmp_path):
    from slotmoe.tools.profile import report as profile_report

    original = profile_report._html

    def html(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(profile_report, "_html", html)
    assert profile(TEXT, "-n", "3")[0] == 130
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["complete"] is True
    assert page(tmp_path / "out").tags


def test_earlier_report_is_replaced_whole(profile, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "memory-vram.png").write_bytes(b"of an earlier run on a GPU")
    (out / "notes.txt").write_text("mine")
    assert profile(TEXT, "-n", "1")[0] == 0
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "report.html", "profile.json", "memory-ram.png"} <= names
    assert not {"memory-vram.png", "time-decode.png"} & names  # one new token needs no decode step
    assert not [name for name in names if name.endswith(".tmp")]
    assert "No token was decoded." in " ".join(page(out).words)


def test_without_matplotlib_the_report_has_no_charts_and_says_so(profile, monkeypatch, tmp_path):
    monkeypatch.setattr("slotmoe.tools.options.find_spec", lambda name: None)
    code, _, err = profile(TEXT, "-n", "3")
    assert (code, err.count("\n"), "slotmoe[plots]" in err) == (0, 1, True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "profile.json"}
    assert "img" not in page(tmp_path / "out").tags


def test_long_text_is_cut_and_said(profile, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT * 500)
    code, _, err = profile("--text", tmp_path / "long.txt", "--context", "64", "-n", "4")
    assert code == 0
    assert "the first 60 tokens are used" in err
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert report["time"]["prefill"]["tokens"] == 60


def test_character_at_the_cut_of_a_text_is_no_error(profile, tmp_path):
    (tmp_path / "long.txt").write_text(
        "x" + "é" * 5000
    )  # every even byte from the start is inside a character
    assert profile("--text", tmp_path / "long.txt", "--context", "32", "-n", "4")[0] == 0


BAD = {
    "not-utf8": (["--text", "latin.txt"], "latin.txt: byte 3 is not UTF-8 (try iconv"),
    "empty-text": (["--text", "empty.txt"], "empty.txt: is empty; give text"),
    "no-text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "text-is-folder": (["--text", "."], "is a directory"),
    "two-prompts": (["x", "--text", "empty.txt"], "PROMPT and --text are both given"),
    "context-too-large": (["--context", "100000000"], "max_position_embeddings"),
    "no-room": (
        ["--text", "fine.txt", "--context", "64", "-n", "64"],
        "leaves no room for fine.txt",
    ),
    "prompt-too-long": (["word " * 200, "--context", "64"], "the context holds 64"),
    "too-little-memory": (["--ram", "1MiB"], "needs at least"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "fine.txt").write_text(TEXT)
    arguments, wanted = BAD[name]
    code, out, err = profile(*arguments)
    assert (code, out) == (2, "")
    assert wanted in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/report"])
def test_folder_that_cannot_be_written(place, profile, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(Runtime, "open", None)  # it is refused before any work
    code, out, err = profile(TEXT, output=tmp_path / place)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "can't write a report there" in err
    assert "-o" in err
    assert (tmp_path / "taken").read_text() == "a file"


def test_live_without_a_terminal_says_so(profile):
    code, out, err = profile(TEXT, "-n", "2", "--live")
    assert code == 0
    assert "--live needs a terminal" in err
    assert "ram: peak" in out
    assert "Time of a token" in out


@pytest.mark.usefixtures("processes")
def test_live_on_a_terminal_shows_the_figures(sample_export, tmp_path):
    terminal, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "slotmoe",
        "profile",
        sample_export,
        TEXT,
        "-n",
        "40",
        "--live",
        "-o",
        tmp_path / "out",
    ]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 1 << 16):
            shown += data
    os.close(terminal)
    assert child.wait() == 0
    for part in (b"tokens/s", b"ram: peak", b"expert slots", b"Time of a token", b"attention"):
        assert part in shown


@pytest.mark.usefixtures("nightly")
def test_watching_costs_at_most_a_twentieth(sample_export):
    report = benchmark("profile", sample_export, "--decode-tokens", 40, "--repetitions", 150)
    lower_quartile = report["results"][0]
    print(lower_quartile)
    assert lower_quartile["ratio"] <= 1.05


def test_warm_slots_are_full_before_the_first_token(profile):
    report = json.loads(profile(TEXT, "-n", "5", "--slots", "224", "--warm", "--json")[1])
    assert report["cache"]["hit_rate"] == 1.0
    assert (
        json.loads(profile(TEXT, "-n", "5", "--slots", "224", "--json")[1])["cache"]["hit_rate"]
        < 1.0
    )


def test_the_verdict_says_what_more_memory_gives(sample_export):
    spent = {"waiting for disk": 75.0, "experts": 25.0}
    report = {"time": {"decode": {"milliseconds_per_token": spent}}}
    report["decode_tokens_per_second"] = 10.0
    rates = Bandwidths()
    with Runtime.open(sample_export, slots=56, context=64) as runtime:
        model, total = runtime.model, runtime.plan.total
        capped = verdict(report, model, 10, 10, rates)
        tight = dataclasses.replace(runtime.plan, budget=total)
        small = verdict(report, dataclasses.replace(model, plan=tight), 10, 10, rates)
        nothing = {**report, "decode_tokens_per_second": None}
        assert verdict(nothing, model, 10, 10, rates)["budgets"] == []
    start = "Decode makes 10.0 tokens/s; 75% of a token's time is waiting for disk. "
    assert re.fullmatch(
        re.escape(start) + r"It would make without --slots about [\d.]+ tokens/s\.", capped["text"]
    )
    assert re.fullmatch(
        re.escape(start) + r"It would make (with --ram [\d.]+[MG]iB about [\d.]+(, )?)+ tokens/s\.",
        small["text"],
    )
    *_, most = small["budgets"]
    assert most["ram"] > total
    speeds = [10.0, *(budget["decode_tokens_per_second"] for budget in small["budgets"])]
    assert speeds == sorted(speeds) and speeds[-1] > 20
    with Runtime.open(sample_export, context=64) as runtime:
        whole = verdict(report, runtime.model, 10, 10, rates)
        assert runtime.plan.slots == 7 * 32
    assert whole["budgets"] == [] and "more --ram makes it no faster" in whole["text"]
