"""``slotmoe run`` and ``Runtime.generate``: why a text ends, what a terminal shows and a pipe does
not get, and where the prompt comes from."""

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from slotmoe.model.generate import Answer
from slotmoe.model.reasoning import ReasoningMarks, Splitter
from slotmoe.model.tokenizer import TextStream, Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.tools import list as list_module
from slotmoe.tools import options
from slotmoe.tools.options import MAX_PROMPT_BYTES
from tests.support.forkserver import PIPE, ROOT, Forked, OnTerminal
from tests.support.tiny import SMALL, write_checkpoint

THINKS = ReasoningMarks("<think>", "</think>", {})
CHAT = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The least export with a chat template, and a context of 64."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint", **SMALL, max_position_embeddings=64)
    path = folder / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    quantize(folder / "checkpoint", folder / "export")
    return folder / "export"


@pytest.fixture
def run(slotmoe):
    """``slotmoe run`` that succeeds: stdout and stderr."""

    def call(*arguments):
        code, out, err = slotmoe("run", *arguments)
        assert code == 0, err
        return out, err

    return call


@pytest.fixture
def reported(run):
    """What ``slotmoe run --json`` reports."""
    return lambda *arguments: json.loads(run(*arguments, "--json")[0])


@pytest.mark.usefixtures("processes")
def test_why_a_run_ends(export, run, reported, monkeypatch):
    def why(*options):
        report = reported(export, "Hello", *options)
        return report["finish_reason"], len(report["ids"])

    assert [why("--chat")[0], why("--chat", "-n", 7)] == ["context", ("length", 7)]
    reason, count = why()
    assert reason == "context" and count < 64
    full = f"stopped at {count} tokens: the context of 64 is full · "
    assert run(export, "Hello")[1].startswith(full)
    original = Answer.take

    def take(self, logits_V):
        return self.end("stop") if len(self.ids) == 3 else original(self, logits_V)

    monkeypatch.setattr(Answer, "take", take)
    assert why() == ("stop", 3)
    assert run(export, "Hello")[1].startswith("3 tokens · ")


@pytest.mark.usefixtures("processes")
def test_a_system_message_and_stop_strings(export, run, reported):
    """A session's own system message makes way."""
    text = run(export, "Hello", "-n", 9)[0]
    assert reported(export, "Hello", "-n", 9, "--stop", text[3:5])["text"] == text[:3]
    chat = [export, "Hi", "-n", 2, "--session", "s", "--session-dir", export.parent / "sessions"]
    for system in ("Be brief.", "Be kind."):
        run(*chat, "--system", system)
    (saved,) = (export.parent / "sessions" / "names").glob("*.json")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[0]["content"] == "Be kind."


@pytest.mark.usefixtures("processes")
def test_a_terminal_shows_waiting_and_the_prompt_and_a_pipe_does_not(sample_export, run):
    arguments = [sample_export.relative_to(ROOT), "It is a truth", "-n", 5]
    with OnTerminal("run", *arguments) as terminal:
        shown = terminal.rest()
    assert f"loading {arguments[0]}…"[:60] in shown
    text = shown.rpartition("\x1b[?25h")[2]
    out, err = run(sample_export, *arguments[1:])
    assert text.replace("\r\n", "\n").startswith(f"\x1b[2mIt is a truth\x1b[22m{out}")
    assert "\x1b" not in out + err and "loading" not in err and "truth" not in out


@pytest.mark.usefixtures("processes")
def test_reasoning_is_apart(export, run, reported, monkeypatch):
    """On a pipe it goes to stderr, with --json under a key of its own."""
    monkeypatch.setattr(Tokenizer, "splitter", lambda self, ids: Splitter(THINKS, False))
    texts = iter(["<think>Hm", ".", "</think>", "\n", "Yes"] * 2)
    monkeypatch.setattr(TextStream, "push", lambda self, id_: next(texts))
    options = ("--chat", "-n", 5, "--context", 64)
    out, err = run(export, "Hi", *options)
    assert out == "Yes\n" and err.startswith("Hm.\n\n")
    report = reported(export, "Hi", *options)
    assert (report["reasoning"], report["text"]) == ("Hm.", "Yes")


@pytest.fixture
def encoded(processes, monkeypatch):
    """The texts that the tokenizer was given."""
    texts, encode = [], Tokenizer.encode

    def keep(*given):
        texts.append(given[1])
        return encode(*given)

    monkeypatch.setattr(Tokenizer, "encode", keep)
    return texts


def test_a_long_prompt_from_stdin_or_a_file(export, encoded, monkeypatch, slotmoe, tmp_path):
    for command, size, told in (
        ("run", 20_000, "20000 characters"),
        ("chat", MAX_PROMPT_BYTES + 9, "more than 32 MiB"),
    ):
        stdin = SimpleNamespace(buffer=io.BytesIO(b"a" * size), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = slotmoe(command, export, *["-"] * (command == "run"))
        assert code == 2 and told in err
        assert max(map(len, encoded), default=0) < 100  # chat tries the template
        assert stdin.buffer.tell() <= MAX_PROMPT_BYTES + 1
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", 1 << 40)
    code, _, err = slotmoe("run", export, "--file", tmp_path / "long")
    assert code == 2 and "long: the prompt has more than 32 MiB" in err
    (tmp_path / "short").write_text("Hello")
    given = slotmoe("run", export, "--file", tmp_path / "short", "-n", 5)
    assert given[1] == slotmoe("run", export, "Hello", "-n", 5)[1]


PROMPT = "It is a truth universally acknowledged, that"


@pytest.mark.usefixtures("processes")
def test_a_reader_that_leaves(sample_export):
    options = "-n 400 --temperature 1 --seed 5".split()
    with Forked("run", sample_export, PROMPT, *options) as child:
        assert child.stdout.read(1)
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 1)


@pytest.mark.usefixtures("processes")
def test_interrupted_command_exits_130(sample_export, small_export):
    """While it decodes, and in a process of its own while torch is on its way."""
    options = "-n 800 --temperature 1 --seed 5 --threads 1".split()
    with Forked("run", sample_export, PROMPT, *options) as child:
        assert len(child.stdout.read(200)) == 200
        child.send_signal(signal.SIGINT)
        err = child.communicate()[1].decode()
    assert child.returncode == 130, err
    assert "interrupted" in err and "tokens/s · first token" in err and "Traceback" not in err
    command = [sys.executable, "-X", "importtime", "-m", "slotmoe", "run", str(small_export), "x"]
    with subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as child:
        next(line for line in child.stderr if "torch._utils" in line)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (child.returncode, out, said) == (130, "", ["", "slotmoe: interrupted"])


FAULTS = [
    (RuntimeError("can't start new\x1b[2J thread"), r"RuntimeError: can't start new\x1b[2J th"),
    (MemoryError(), "out of memory"),
    (RuntimeError("can't start new thread"), "out of threads; lower --threads"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory; end"),
]


def test_a_fault_of_ours_is_one_line(slotmoe, monkeypatch):
    for problem, shown in FAULTS:

        def fail(problem=problem):
            raise problem

        monkeypatch.setattr(list_module, "cache_folder", fail)
        code, _, err = slotmoe("list")
        assert (code, err.count("\n")) == (1, 1)
        assert shown in err
        assert "Traceback" in slotmoe("--traceback", "list")[2] or "internal" not in err


def test_a_missing_extra_is_one_line_and_pipes_need_none(monkeypatch, slotmoe):
    find_spec, missing = options.find_spec, ["fastapi", "prompt_toolkit"]
    monkeypatch.setattr(options, "find_spec", lambda n: None if n in missing else find_spec(n))
    monkeypatch.setattr("slotmoe.tools.chat.open_runtime", lambda *_: 1 / 0)
    for command, library, terminal in (
        ("serve", "fastapi", True),
        ("chat", "prompt_toolkit", True),
        ("chat", "ZeroDivisionError", False),
    ):
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda is_one=terminal: is_one, raising=False)
        code, _, err = slotmoe(command, "sample")
        assert (code, err.count("\n")) == (2 if terminal else 1, 1)
        assert library in err and (f"pip install 'slotmoe[{command}]'" in err) == terminal
