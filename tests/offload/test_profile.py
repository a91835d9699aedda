"""``slotmoe profile``: what it measures, what it writes, and how it fails."""

import base64
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import weakref
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.replay import read_trace
from slotmoe.errors import visible
from slotmoe.offload import runtime as runtimes
from slotmoe.offload.engine.requests import Stream
from slotmoe.offload.observe import measure
from slotmoe.offload.observe.profiler import profiled
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import speed
from slotmoe.tools.profile.report import CHARTS, compared, write_report
from tests.support.engine import decode

ROOT = Path(__file__).parents[2]
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. "
)


@pytest.fixture
def no_charts(monkeypatch):
    """They take a second."""
    drawn = SimpleNamespace(draw=lambda report: {})
    monkeypatch.setitem(sys.modules, "slotmoe.tools.profile.charts", drawn)


@pytest.fixture
def profile(slotmoe, sample_export, tmp_path):
    """Run ``slotmoe profile`` on the sample in this process: exit code, stdout, stderr."""

    def run(*arguments, output=tmp_path / "out"):
        return slotmoe("profile", sample_export, *arguments, "-o", output)

    return run


@pytest.fixture(scope="module")
def reported(processes, sample_export, tmp_path_factory):
    """A run with a small cache, so that there are misses, shown live on a terminal: its folder, the
    report, the routing as the trace recorded it, and what the terminal got."""
    folder = tmp_path_factory.mktemp("profile")
    # A process of its own: this one may hold more before a model is open than after.
    command = [sys.executable, "-m", "slotmoe", "profile", sample_export, TEXT, "-n", "40"]
    command += ["--slots", "60", "--live", "-o", folder, "--trace", folder / "x.trace"]
    terminal, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": theirs}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 1 << 16):
            shown += data
    os.close(terminal)
    assert child.wait() == 0, shown
    steps = [step.indices for step in read_trace(folder / "x.trace")[1]]
    report = json.loads((folder / "profile.json").read_text())
    return SimpleNamespace(folder=folder, steps=steps, report=report, shown=shown)


def test_the_report_adds_up(reported):
    """Keys that others read; counts are those of the routing and of the cache; no time counts
    twice; memory is split into what is there."""
    report, steps = reported.report, reported.report["steps"]
    total = sum(sizes.get("ram", 0) for sizes in report["predicted"]["components"].values())
    assert report["predicted"]["peak"] == {"ram": total}
    assert report["predicted"]["decode_tokens_per_second"] > 0
    assert report["complete"] is True
    assert " of a token's time is " in report["verdict"]["text"]
    speeds = [it["decode_tokens_per_second"] for it in report["verdict"]["budgets"]]
    assert report["decode_tokens_per_second"] < speeds[-1]
    assert "without --slots about " in report["verdict"]["text"]
    for part in (b"tokens/s", b"ram: peak", b"expert slots", b"Time of a token", b"attention"):
        assert part in reported.shown
    assert [step["kind"] for step in steps] == ["prefill"] + ["decode"] * 39
    layers, cache = report["layers"], report["cache"]
    for index, layer in enumerate(layers):
        used = [[int(expert) for expert in step[:, index].flatten()] for step in reported.steps]
        every = [expert for step in used for expert in step]
        assert layer["uses"] == [every.count(expert) for expert in range(32)]
        assert layer["hits"] + layer["misses"] == sum(len(set(step)) for step in used)
    for count in ("hits", "misses"):
        assert cache[count] == sum(layer[count] for layer in layers) > 0
    assert cache["hit_rate"] == cache["hits"] / (cache["hits"] + cache["misses"])
    moved = sum(step["moved"]["disk"] for step in steps)
    assert moved == report["io"]["disk"]["bytes"] > 0
    for step, after in pairwise(steps):
        assert step["began"] + sum(step["seconds"].values()) < after["began"] + 1e-6
    assert 0 < steps[0]["began"] < report["memory"]["ram"]["seconds"][-1]
    spent = report["time"]["decode"]["milliseconds_per_token"]
    for part in ("attention", "gate", "experts", "head", "waiting for disk", "sampling"):
        assert min(spent[part], steps[0]["seconds"][part]) > 0, part
    series, peak = report["memory"]["ram"], report["peak"]["ram"]
    assert series["seconds"] == sorted(series["seconds"]) and max(series["bytes"]) <= peak
    assert sum(sizes["ram"] for sizes in report["components"].values()) == peak
    for place, whole in enumerate(series["bytes"]):
        assert sum(part[place] for part in series["components"].values()) <= whole + (1 << 20)
    slots = series["components"]["expert slots"]
    assert max(slots) == report["components"]["expert slots"]["ram"] == 60 * 28672
    rows = {row["name"]: row for row in compared(report)}
    assert rows["resident weights"]["measured"] == rows["resident weights"]["predicted"] > 0


def test_watching_changes_no_logits_and_ends(sample_export):
    with Runtime.open(sample_export, slots=60, context=64) as runtime:
        ids = list(range(100, 140))
        plain = runtime.logits(ids)
        with profiled(runtime, 0.0) as watched:
            runtime.engine.empty()
            assert torch.equal(decode(runtime, ids[:20], ids[20:]), plain[19:])
            assert len(watched.passes) == 21
        decode(runtime, ids, [5])
        assert len(watched.passes) == 21


class Page(HTMLParser):
    """All that a report could load or run, and its words."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed((folder / "report.html").read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster", "background", "style"):
                self.addresses.append(value)
            assert not name.startswith("on"), name

    def handle_data(self, data):
        self.words.append(data)


def test_report_holds_everything_and_asks_for_nothing(reported):
    folder, found = reported.folder, Page(reported.folder)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert all(address.startswith("data:") for address in found.addresses)
    assert "url(" not in (folder / "report.html").read_text()
    charts = [name for name in CHARTS if (folder / f"{name}.png").is_file()]
    assert set(charts) == set(CHARTS) - {"memory-vram"}
    images = [it.partition(",")[2] for it in found.addresses if it.startswith("data:image/png")]
    wanted = sorted((folder / f"{name}.png").read_bytes() for name in charts)
    assert sorted(map(base64.b64decode, images)) == wanted
    words = " ".join(" ".join(found.words).split())
    assert f"{reported.report['decode_tokens_per_second']:.2f}" in words
    assert "was stopped" not in words


def test_words_of_strangers_stay_words(reported, tmp_path, no_charts):
    hostile = "</pre><script>fetch('http://x.org')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    hostile += "\x1b]0;title\x07"
    workload = reported.report["workload"] | {"prompt": hostile, "text": hostile}
    write_report(reported.report | {"model": hostile, "workload": workload}, tmp_path)
    found = Page(tmp_path)
    assert "script" not in found.tags
    assert visible(hostile) in found.words
    assert "\x1b" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 0), (signal.SIGTERM, 3)])
def test_stopped_run_writes_what_it_has_and_says_so(
    number, after, profile, monkeypatch, tmp_path, no_charts
):
    original, calls = Stream.__next__, []

    def following(stream):
        calls.append(1)
        if len(calls) == after + 1:
            signal.raise_signal(number)
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", following)
    code, out, err = profile(TEXT, "-n", "20", "--json")
    assert (code, out) == (128 + number, "")
    assert f"stopped after {after} of 20 tokens" in err
    assert "report.html" in err
    assert "Traceback" not in err
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert report["complete"] is False
    assert report["workload"]["new_tokens"] == after <= len(report["steps"])
    assert "was stopped" in " ".join(Page(tmp_path / "out").words)


def test_earlier_report_is_replaced_whole(profile, tmp_path, heavy):
    out = tmp_path / "out"
    out.mkdir()
    (out / "memory-vram.png").write_bytes(b"of an earlier run on a GPU")
    (out / "notes.txt").write_text("mine")
    assert profile(TEXT, "-n", "1")[0] == 0
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "report.html", "profile.json", "memory-ram.png"} <= names
    assert not {"memory-vram.png", "time-decode.png"} & names  # one new token needs no decode step
    assert not [name for name in names if name.endswith(".tmp")]
    assert "No token was decoded." in " ".join(Page(out).words)


def test_without_matplotlib_and_a_terminal_it_says_so(profile, monkeypatch, tmp_path):
    monkeypatch.setattr("slotmoe.tools.options.find_spec", lambda name: None)
    code, out, err = profile(TEXT, "-n", "3", "--live")
    assert (code, err.count("\n")) == (0, 2)
    assert "slotmoe[plots]" in err and "--live needs a terminal" in err
    assert "ram: peak" in out and "Time of a token" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "profile.json"}
    assert "img" not in Page(tmp_path / "out").tags


REFUSED = {
    "--text latin.txt": "latin.txt: byte 3 is not UTF-8 (try iconv",
    "x --text empty.txt": "PROMPT and --text are both given",
    "--text fine.txt --context 64 -n 64": "no room for fine.txt",
    "--ram 1MiB": "needs at least",
    "x -o fine.txt": "can't write a report there",
    "x -o fine.txt/below": "can't write a report there",
    "x -o /proc/report": "can't write a report there",
}


def test_bad_input_is_one_line_and_leaves_nothing(slotmoe, sample_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {"latin.txt": b"caf\xe9 au lait", "empty.txt": b"", "fine.txt": TEXT.encode()}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for line, wanted in REFUSED.items():
        code, out, err = slotmoe("profile", sample_export, *line.split())
        assert (code, out) == (2, ""), line
        assert wanted in err and "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == set(contents)


COMMANDS = {
    "profile": "hello -n 5 --slots 60",
    "bench": "--prompt-tokens 20 --decode-tokens 5 --repetitions 1 --slots 60 --calibrate",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_takes_memory_of_its_own_begins_when_the_model_is_gone(
    command, slotmoe, sample_export, monkeypatch, tmp_path
):
    """Measuring disk and RAM, and drawing: the budget is for the model and them in turn."""
    monkeypatch.chdir(tmp_path)
    opened, done, open_model = [], set(), runtimes.open_model

    def watched(*arguments):
        model = open_model(*arguments)
        opened.extend(map(weakref.ref, (model.network, model.experts.slots.slab, *model.states)))
        return model

    def alone(name, result):
        def do(*_, **__):
            assert opened and not [type(part()) for part in opened if part() is not None]
            done.add(name)
            return result

        return do

    monkeypatch.setattr(runtimes, "open_model", watched)
    for name, result in {
        "drive_bandwidths": [1e9],
        "ram_bandwidth": 1e9,
        "disk_latency": 1e-4,
    }.items():
        monkeypatch.setattr(measure, name, alone(name, result))
    monkeypatch.setattr(measure, "read_bandwidth", lambda model: 1e9)
    monkeypatch.setattr(speed, "core_rates", alone("core_rates", {"all_bytes": 1e9}))
    drawn = SimpleNamespace(draw=alone("draw", {}))
    monkeypatch.setitem(sys.modules, "slotmoe.tools.profile.charts", drawn)
    monkeypatch.setattr("slotmoe.tools.bench.store_bandwidths", alone("store", None))
    code, _, err = slotmoe(command, sample_export, *COMMANDS[command].split())
    assert (code, "Traceback" in err) == (0, False), err
    wanted = {"profile": {"ram_bandwidth", "draw"}, "bench": {"core_rates", "store"}}[command]
    assert done == wanted | {"drive_bandwidths", "disk_latency"}
