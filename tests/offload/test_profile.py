"""``slotmoe profile``: what it measures, what it writes, and how it fails."""

import json
import signal
import sys
import weakref
from html.parser import HTMLParser
from itertools import pairwise
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
from slotmoe.tools.profile.report import CHARTS, write_report
from tests.support.engine import decode
from tests.support.forkserver import OnTerminal
from tests.support.kernels import needs_native

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
    """A run with a small cache, so that there are misses, on a terminal: its folder, the
    report, the routing as the trace recorded it, and what the terminal got."""
    folder = tmp_path_factory.mktemp("profile")
    # A process of its own: this one may hold more before a model is open than after.
    options = "-n", 40, "--slots", 60, "-o", folder, "--trace", folder / "x.trace", "--draft", "off"
    with OnTerminal("profile", sample_export, TEXT, *options) as terminal:
        shown = terminal.rest()
        assert terminal.wait() == 0, shown
    steps = [step.indices for step in read_trace(folder / "x.trace")[1]]
    report = json.loads((folder / "profile.json").read_text())
    return SimpleNamespace(folder=folder, steps=steps, report=report, shown=shown.encode())


def test_the_report_adds_up(reported):
    """Counts are those of the routing and of the cache; no time counts twice; memory is split into
    what is there."""
    report, steps = reported.report, reported.report["steps"]
    assert report["complete"] is True and report["predicted"]["decode_tokens_per_second"] > 0
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
    moved = sum(step["moved"]["disk"] for step in steps)
    assert moved == report["io"]["disk"]["bytes"] > 0
    for step, after in pairwise(steps):
        assert step["began"] + sum(step["seconds"].values()) < after["began"] + 1e-6
    spent = report["time"]["decode"]["milliseconds_per_token"]
    for part in ("attention", "gate", "experts", "head", "waiting for disk", "sampling"):
        assert min(spent[part], steps[0]["seconds"][part]) > 0, part
    series, peak = report["memory"]["ram"], report["peak"]["ram"]
    assert max(series["bytes"]) <= peak
    assert sum(sizes["ram"] for sizes in report["components"].values()) == peak
    for place, whole in enumerate(series["bytes"]):
        assert sum(part[place] for part in series["components"].values()) <= whole + (1 << 20)
    slots = series["components"]["expert slots"]
    assert max(slots) == report["components"]["expert slots"]["ram"] == 60 * 28672


@pytest.mark.usefixtures("no_charts")
@needs_native
def test_what_would_have_been_best(heavy, profile):
    """A token uses 28 experts, so in 20 slots what was used last is never used again."""
    code, out, err = profile(TEXT, "-n", 24, "--slots", 20, "--cache-policy", "lru", "--json")
    assert code == 0, err
    report = json.loads(out)
    best, before = report["best"], report["decode_tokens_per_second"]
    assert code == report["cache"]["hits"] == 0 < 0.05 < best["hit_rate"] and before > 0
    assert " --cache-policy lru" not in best["options"] and 0 < best["slots"] <= 20
    assert best["options"] in report["verdict"] and "routes" not in report


def test_watching_changes_no_logits_and_ends(sample_export):
    with Runtime.open(sample_export, slots=60, context=64) as runtime:
        ids = list(range(100, 140))
        plain = runtime.logits(ids)
        with profiled(runtime, 0.0) as watched:
            assert torch.equal(decode(runtime, ids[:20], ids[20:]), plain[19:])
            count = len(watched.passes)
        decode(runtime, ids, [5])
        assert len(watched.passes) == count > 0


class Page(HTMLParser):
    """All that a report could load or run, and its words."""

    loading = ("src", "href", "srcset", "data", "action", "poster", "background", "style")

    def __init__(self, folder):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.handle_data = self.words.append
        self.feed((folder / "report.html").read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in self.loading]
        assert not any(name.startswith("on") for name, _ in attributes)


def test_report_holds_everything_and_asks_for_nothing(reported):
    folder, found = reported.folder, Page(reported.folder)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert all(address.startswith("data:") for address in found.addresses)
    assert "url(" not in (folder / "report.html").read_text()
    charts = [name for name in CHARTS if (folder / f"{name}.png").is_file()]
    assert set(charts) == set(CHARTS) - {"memory-vram"}
    images = [it for it in found.addresses if it.startswith("data:image/png")]
    assert len(images) == len(charts)
    words = " ".join(" ".join(found.words).split())
    assert f"{reported.report['decode_tokens_per_second']:.2f}" in words


def test_words_of_strangers_stay_words(reported, tmp_path, no_charts):
    hostile = "</pre><script>fetch('http://x.org')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    hostile += "\x1b]0;title\x07"
    workload = reported.report["workload"] | {"prompt": hostile, "text": hostile}
    write_report(reported.report | {"model": hostile, "workload": workload}, tmp_path)
    found = Page(tmp_path)
    assert "script" not in found.tags
    assert visible(hostile) in found.words
    assert "\x1b" not in (tmp_path / "report.html").read_text()


def test_stopped_run_writes_what_it_has_and_says_so(profile, monkeypatch, tmp_path, no_charts):
    number, after, original, calls = signal.SIGTERM, 3, Stream.__next__, []

    def following(stream):
        calls.append(1)
        if len(calls) == after + 1:
            signal.raise_signal(number)
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", following)
    code, out, err = profile(TEXT, "-n", "20", "--json")
    assert (code, out) == (128 + number, "")
    assert f"stopped after {after} of 20 tokens" in err and "Traceback" not in err
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert report["workload"]["new_tokens"] == after and not report["complete"]
    assert "was stopped" in " ".join(Page(tmp_path / "out").words)


def test_without_matplotlib_it_says_so(profile, monkeypatch, tmp_path):
    monkeypatch.setattr("slotmoe.tools.options.find_spec", lambda name: None)
    code, out, err = profile(TEXT, "-n", "3")
    assert (code, err.count("\n")) == (0, 1)
    assert "slotmoe[plots]" in err
    assert "ram: peak" in out and "Time of a token" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "profile.json"}
    assert "img" not in Page(tmp_path / "out").tags


REFUSED = {"--ram 1MiB": "needs at least", "x -o fine.txt/below": "can't write a report there"}


def test_bad_input_is_one_line_and_leaves_nothing(slotmoe, sample_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.txt").write_text(TEXT)
    for line, wanted in REFUSED.items():
        code, out, err = slotmoe("profile", sample_export, *line.split())
        assert (code, out) == (2, ""), line
        assert wanted in err and "Traceback" not in err
    assert len([*tmp_path.iterdir()]) == 1


def test_what_takes_memory_of_its_own_begins_when_the_model_is_gone(profile, monkeypatch, tmp_path):
    """Measuring disk and RAM, and drawing: the budget is for the model and them in turn."""
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
    measured = {"drive_bandwidths": [1e9], "ram_bandwidth": 1e9, "disk_latency": 1e-4}
    for name, result in measured.items():
        monkeypatch.setattr(measure, name, alone(name, result))
    monkeypatch.setattr(measure, "read_bandwidth", lambda model: 1e9)
    drawn = SimpleNamespace(draw=alone("draw", {}))
    monkeypatch.setitem(sys.modules, "slotmoe.tools.profile.charts", drawn)
    code, _, err = profile("hello", "-n", 5, "--slots", 60)
    assert (code, "Traceback" in err) == (0, False), err
    assert done == {*measured, "draw"}
