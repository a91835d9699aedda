"""``slotmoe run`` and ``Runtime.generate``: why a text ends, what a terminal shows and a pipe does
not get, and where the prompt comes from."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

from slotmoe.errors import PlanError
from slotmoe.model.generate import Answer
from slotmoe.model.tokenizer import ReasoningMarks, Splitter, TextStream, Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.options import MAX_PROMPT_BYTES
from tests.support.forkserver import ROOT, OnTerminal
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


@pytest.fixture(scope="module")
def runtime(export):
    with Runtime.open(export) as runtime:
        yield runtime


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


def ending_after(monkeypatch, count):
    """Let the model end its answers after so many tokens."""
    original = Answer.take

    def take(self, logits_V):
        return self.end("stop") if len(self.ids) == count else original(self, logits_V)

    monkeypatch.setattr(Answer, "take", take)


def test_the_last_token_says_which_limit_ended_the_text(runtime, monkeypatch):
    for prompt, most, reason in (
        ([5, 6], 4, "length"),
        ([5] * 60, 9, "context"),
        ([5] * 60, 4, "length"),
        ([5] * 60, None, "context"),
    ):
        assert [it.finish for it in runtime.generate(prompt, most)] == [None] * 3 + [reason]
    ending_after(monkeypatch, 2)
    assert [it.finish for it in runtime.generate([5, 6], 4)] == [None, None]


@pytest.mark.usefixtures("processes")
def test_why_a_run_ends(export, sample_export, run, reported, monkeypatch):
    """A continuation has 128 tokens, a chat no limit."""

    def why(*options):
        report = reported(export, "Hello", *options)
        return report["finish_reason"], len(report["ids"])

    assert len(reported(sample_export, "The sea")["ids"]) == 128
    assert [why("--chat")[0], why("--chat", "-n", 7)] == ["context", ("length", 7)]
    assert why("-n", 5) == ("length", 5)
    reason, count = why()
    assert reason == "context" and count < 64
    full = f"stopped at {count} tokens: the context of 64 is full · "
    assert run(export, "Hello")[1].startswith(full)
    ending_after(monkeypatch, 3)
    assert why() == ("stop", 3)
    assert run(export, "Hello")[1].startswith("3 tokens · ")


@pytest.mark.usefixtures("processes")
def test_a_system_message_and_stop_strings(export, run, reported):
    """A session's own system message makes way."""
    text = run(export, "Hello", "-n", 9)[0]
    report = reported(export, "Hello", "-n", 9, "--stop", text[3:5])
    assert (report["text"], report["finish_reason"]) == (text[: text.index(text[3:5])], "stop")
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
    with OnTerminal("run", *arguments, NO_COLOR="1", TERM="dumb") as terminal:
        assert "\x1b" not in terminal.rest()
        assert terminal.wait() == 0


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


# What no context can hold is refused before it is tokenized, and before all of it is read.


@pytest.fixture
def encoded(processes, monkeypatch):
    """The texts that the tokenizer was given."""
    texts, encode = [], Tokenizer.encode

    def keep(*given):
        texts.append(given[1])
        return encode(*given)

    monkeypatch.setattr(Tokenizer, "encode", keep)
    return texts


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_prompt_is_refused_by_its_length(runtime, encoded, chat):
    most = runtime.context * runtime.tokenizer.longest
    with pytest.raises(PlanError, match=f"{most + 1} characters, and the context holds 64"):
        next(runtime.generate("a" * (most + 1), chat=chat))
    assert not encoded
    with pytest.raises(PlanError, match="tokens"):
        next(runtime.generate("a" * most, chat=chat))
    assert encoded


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_long_prompt_from_stdin_or_a_file(
    export, command, encoded, monkeypatch, slotmoe, tmp_path
):
    for size, told in ((20_000, "20000 characters"), (MAX_PROMPT_BYTES + 9, "more than 32 MiB")):
        stdin = SimpleNamespace(buffer=io.BytesIO(b"a" * size), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = slotmoe(command, export, *["-"] * (command == "run"))
        assert code == 2 and told in err
        assert max(map(len, encoded), default=0) < 100  # chat tries the template
        assert stdin.buffer.tell() <= MAX_PROMPT_BYTES + 1
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", 1 << 40)
    if command == "run":
        code, _, err = slotmoe("run", export, "--file", tmp_path / "long")
        assert code == 2 and "long: the prompt has more than 32 MiB" in err
        (tmp_path / "short").write_text("Hello")
        texts = [
            slotmoe("run", export, *prompt, "-n", 5)[1]
            for prompt in (["Hello"], ["--file", tmp_path / "short"])
        ]
        assert texts[0] == texts[1]
