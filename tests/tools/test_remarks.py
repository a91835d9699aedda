"""What only informs ends nothing: each such call fails, and what is made is the same."""

import io
import sys

import prometheus_client
import pytest

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.observe.profiler import profiled
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.screen import guard_streams
from slotmoe.tools.serve import guard
from slotmoe.tools.tables import _Bars
from tests.support.disk import tree
from tests.support.served import Served
from tests.support.tiny import SMALL, write_checkpoint

FULL = OSError(28, "No space left on device")


class Full(io.StringIO):
    """A log on a full disk, or without a reader."""

    def write(self, _):
        raise FULL


@pytest.fixture
def failing():
    """Make a function that fails; which were called."""

    def make(name):
        def fail(*_, **__):
            make.called.add(name)
            raise FULL

        return fail

    make.called = set()
    return make


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "source"
    write_checkpoint(folder, **SMALL)
    return folder


COMMANDS = {
    "run": ("run", "EXPORT", "Call me", "-n", 6, "--verbose", "--session", "x"),
    "chat": ("chat", "EXPORT", "-n", 6, "--seed", 1, "--session", "x"),
    "quantize": ("quantize", "SOURCE", "PLACE"),
    "a refusal": ("run", "EXPORT", "Call me", "--context", 9 << 30),
}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_needs_no_stderr(
    slotmoe, small_export, source, tmp_path, monkeypatch, failing, words
):
    found = []
    for name in ("wanted", "found"):
        place = tmp_path / name
        known = {"EXPORT": small_export, "SOURCE": source, "PLACE": place}
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n/stats\n")))
        options = ("--session-dir", place) * ("x" in words)
        code, out, err = slotmoe(*(known.get(word, word) for word in words), *options)
        assert bool(err) == (name == "wanted")
        found.append((code, out, tree(place) if "SOURCE" in words else None))
        monkeypatch.setattr(sys, "stderr", Full())
        monkeypatch.setattr(_Bars, "update", failing("bar"))
    assert found[0] == found[1]


def test_a_callers_functions_end_no_work(source, tmp_path, monkeypatch, failing, caplog):
    names, notes = ("progress", "reading", "arriving", "notify"), ("progress", "checking", "notify")
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    prompt = [5 + n for n in range(70)]
    with Runtime.open(source, **{name: failing(name) for name in names}) as runtime:
        runtime.warm(failing("warm"))
        want = [*runtime.generate(prompt, 4)]
        runtime.engine.call(lambda: runtime.model.experts.on_layer(failing("listener")))
        for _ in range(2):
            runtime.engine.empty()
            runtime.keep_in(tmp_path / "kept", notify=failing("sessions"))
            with profiled(runtime, 0.0):
                monkeypatch.setattr(runtime.model.network.timer, "_count", failing("timer"))
                assert [*runtime.generate(prompt, 4)] == want
            for path in (tmp_path / "kept").rglob("*-*"):
                path.write_bytes(b"damaged")
    for _ in range(2):
        quantize(source, tmp_path / "export", **{name: failing(f"q {name}") for name in notes})
    seen = {"progress", "reading", "notify", "listener", "warm", "sessions", "timer"}
    assert failing.called == seen | {f"q {name}" for name in notes}
    said = [record.getMessage() for record in caplog.records]
    assert said and len(said) == len(set(said)), said


@pytest.mark.usefixtures("network")
def test_a_server_needs_no_log_and_no_metrics(runtime, tmp_path, monkeypatch, failing):
    runtime.keep_in(tmp_path, notify=failing("sessions"))
    prompt = "My fellow citizens, " * 40
    with Served(runtime, is_logged=True) as served:
        want = served.text(prompt)
        for path in tmp_path.rglob("*-*"):
            path.write_bytes(b"damaged")
        monkeypatch.setattr(sys, "stderr", Full())
        guard_streams()
        monkeypatch.setattr(prometheus_client.Histogram, "observe", failing("metrics"))
        monkeypatch.setattr(guard, "_line", failing("line"))
        runtime.engine.empty()
        assert [served.text(prompt) for _ in range(3)] == [want] * 3
        assert served.ask("GET", "/health")[0] == 200
    assert failing.called == {"sessions", "metrics", "line"}
