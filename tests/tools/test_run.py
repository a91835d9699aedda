"""``slotmoe run`` and ``Runtime.generate``: why a text ends, what a terminal shows and a pipe does
not get, and where the prompt comes from."""

import io
import json
import os
import pty
import re
import sys
from types import SimpleNamespace

import pytest

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.generate import Answer
from slotmoe.model.reasoning import Reasoning, Splitter
from slotmoe.model.tokenizer import TextStream, Tokenizer
from slotmoe.offload.runtime import Runtime
from slotmoe.tools import run
from slotmoe.tools.cli import main
from slotmoe.tools.options import MAX_PROMPT_BYTES
from slotmoe.tools.screen import Reading, echo_of, tokens_read, visible
from tests.support.tiny import write_checkpoint

THINKS = Reasoning("<think>", "</think>", {})
CHAT = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A tiny export with a chat template, and a context of 64."""
    from slotmoe.offload.ingest.quantize import quantize

    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint", max_position_embeddings=64)
    path = folder / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    quantize(folder / "checkpoint", folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def runtime(export):
    with Runtime.open(export) as runtime:
        yield runtime


@pytest.fixture
def slotmoe(capsys):
    """Run a command line that succeeds: stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 0, capsys.readouterr().err
        return capsys.readouterr()

    return call


def ending_after(monkeypatch, count):
    """Let the model end its answers after so many tokens."""
    original = Answer.take

    def take(self, logits_V):
        return self.end("stop") if len(self.ids) == count else original(self, logits_V)

    monkeypatch.setattr(Answer, "take", take)


def finishes(runtime, *arguments, **options):
    return [token.finish for token in runtime.generate(*arguments, **options)]


def test_the_last_token_says_which_limit_ended_the_text(runtime, monkeypatch):
    assert finishes(runtime, (5, 6), 4) == [None] * 3 + ["length"]
    assert finishes(runtime, [5] * 60, 9) == [None] * 3 + ["context"]
    assert finishes(runtime, [5] * 60, 4) == [None] * 3 + ["length"]
    assert finishes(runtime, [5] * 60, None) == [None] * 3 + ["context"]
    ending_after(monkeypatch, 2)
    assert finishes(runtime, [5, 6], 4) == [None, None]
    assert finishes(runtime, [5, 6], 2) == [None, "length"]


def test_why_a_run_ends(export, slotmoe, monkeypatch):
    def report(*options):
        report = json.loads(slotmoe("run", export, "Hello", "--json", *options).out)
        return report["finish_reason"], len(report["ids"])

    assert report("-n", 5) == ("length", 5)
    reason, count = report()
    assert reason == "context" and count < 64
    err = slotmoe("run", export, "Hello").err
    assert err.startswith(f"stopped at {count} tokens: the context of 64 is full · ")
    ending_after(monkeypatch, 3)
    assert report() == ("stop", 3)
    assert slotmoe("run", export, "Hello").err.startswith("3 tokens · ")


@pytest.mark.usefixtures("processes")
def test_a_continuation_has_128_tokens_and_a_chat_no_limit(sample_export, export, slotmoe):
    report = json.loads(slotmoe("run", sample_export, "The sea", "--json").out)
    assert (report["finish_reason"], len(report["ids"])) == ("length", 128)
    for options, reason in (([], "context"), (["-n", 7], "length")):
        arguments = ["run", export, "Hi", "--chat", "--json", *options]
        assert json.loads(slotmoe(*arguments).out)["finish_reason"] == reason


def test_the_prompt_of_a_file(export, slotmoe, tmp_path):
    (tmp_path / "prompt").write_text("Hello")
    given = slotmoe("run", export, "Hello", "-n", 5).out
    assert slotmoe("run", export, "--file", tmp_path / "prompt", "-n", 5).out == given


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([{"role": "user", "content": "Hi"}], r"holds a dict.*tokenizer\.chat\(messages\)"),
        (["Hi"], "holds a str, expected text or token ids"),
        ({"role": "user"}, "is a dict, expected text or token ids"),
        (None, "is a NoneType, expected text or token ids"),
        ([], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(runtime, prompt, problem):
    with pytest.raises(ConfigError, match=problem):
        runtime.generate(prompt)


def on_terminal(*arguments, **environment):
    """What a command prints on a terminal."""
    pid, handle = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", "COLUMNS": "100", **environment})
        os.execv(sys.executable, [sys.executable, "-m", "slotmoe", *map(str, arguments)])
    printed = b""
    while True:
        try:
            block = os.read(handle, 1 << 16)
        except OSError:  # as Linux ends it
            break
        if not block:
            break
        printed += block
    os.close(handle)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, printed
    return printed.decode()


def test_a_terminal_shows_waiting_and_the_prompt_and_a_pipe_does_not(sample_export, slotmoe):
    arguments = ["run", sample_export, "It is a truth", "-n", 5]
    shown = on_terminal(*arguments)
    assert f"loading {sample_export}…"[:60] in shown
    text = shown.rpartition("\x1b[?25h")[2]
    out, err = slotmoe(*arguments)
    assert text.replace("\r\n", "\n").startswith(f"\x1b[2mIt is a truth\x1b[22m{out}")
    assert "\x1b" not in out + err
    assert "loading" not in err
    assert "truth" not in out
    plain = on_terminal(*arguments, NO_COLOR="1", TERM="dumb")
    assert "\x1b" not in plain


def test_control_codes_of_the_model_reach_no_terminal(monkeypatch, capsys):
    tokens = [SimpleNamespace(text=text, id=1, logprob=0.0, finish=None) for text in "a\x1b[2J\n"]

    def printed(on_terminal):
        made = SimpleNamespace(generate=lambda ids, **_: iter(tokens), model=None)
        made.tokenizer = SimpleNamespace(encode=lambda text: [1])
        made.check_length = lambda count: None
        monkeypatch.setattr(run, "is_terminal", lambda stream: on_terminal)
        monkeypatch.setattr(run, "Reading", lambda *_: SimpleNamespace(begin=id, end=int))
        run.Continuation(made, "x\x07", {"chat": False}, quiet=False).run()
        return capsys.readouterr().out

    assert printed(on_terminal=False) == "a\x1b[2J\n"
    assert printed(on_terminal=True) == echo_of("x\x07") + "a\\x1b[2J\n"
    assert visible("\x9b31m\u202e\t") == "\\x9b31m\\u202e\t"


def test_a_long_prompt_is_echoed_by_its_end(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert echo_of("a" * 1000) == "a" * 1000
    assert echo_of("b" + "a" * 1000) == "…" + "a" * 1000


@pytest.mark.parametrize("step", [512, 16])
def test_how_much_is_read(export, capsys, monkeypatch, step):
    """Every gate of a pass brings the count forward, up to the pass's tokens."""
    monkeypatch.setattr("slotmoe.offload.loading.PREFILL_CHUNK", step)
    monkeypatch.setattr("slotmoe.tools.screen.is_terminal", lambda stream: True)
    monkeypatch.setattr("slotmoe.tools.screen._FIRST_SECONDS", 0.0)
    monkeypatch.setattr("slotmoe.tools.screen._NEXT_SECONDS", 0.0)
    with Runtime.open(export) as runtime:
        reading = Reading(runtime, quiet=False)
        reading.begin(41)
        next(runtime.generate([7] * 41, 1))
        reading.end()
        layers = len(runtime.config.moe_layers)
        seen = [41] if step > 41 else [16, 32, 41]
        wanted = [(41 * layer + count) // layers for layer in range(layers) for count in seen]
        shown = re.findall(r"reading (\d+) of 41 tokens", capsys.readouterr().err)
        assert [int(count) for count in shown] == wanted
        assert tokens_read(runtime, 60) == 41  # nothing is counted twice
        next(runtime.generate([8] * 41, 1))
        Reading(runtime, quiet=True).begin(41)
        assert capsys.readouterr().err == ""  # it listens no more


def test_a_model_that_is_not_there(sample_export, tmp_path, capsys):
    """Its name alone is compared with what stands beside it."""
    (tmp_path / "lite-export").symlink_to(sample_export)
    for name, hint in {"lite-exprt": "did you mean", "absent": "no such folder or file"}.items():
        with pytest.raises(SystemExit) as caught:
            main(["run", str(tmp_path / name), "x"])
        told = capsys.readouterr().err
        assert caught.value.code == 2 and hint in told
        assert ("lite-export" in told) == (name == "lite-exprt")


def test_reasoning_is_apart(export, slotmoe, monkeypatch):
    """On a pipe it goes to stderr, with --json under a key of its own."""
    monkeypatch.setattr(Tokenizer, "splitter", lambda self, ids: Splitter(THINKS, False))
    texts = iter(["<think>Hm", ".", "</think>", "\n", "Yes"] * 2)
    monkeypatch.setattr(TextStream, "push", lambda self, id_: next(texts))
    options = ("--chat", "-n", 5, "--context", 64)
    printed = slotmoe("run", export, "Hi", *options)
    assert printed.out == "Yes\n" and printed.err.startswith("Hm.\n\n")
    report = json.loads(slotmoe("run", export, "Hi", *options, "--json").out)
    assert (report["reasoning"], report["text"]) == ("Hm.", "Yes")


class TestLongPrompts:
    """What no context can hold is refused before it is tokenized, and before all of it is read."""

    @pytest.fixture
    def encoded(self, monkeypatch):
        """The texts that the tokenizer was given."""
        texts, encode = [], Tokenizer.encode
        monkeypatch.setattr(
            Tokenizer, "encode", lambda *given: texts.append(given[1]) or encode(*given)
        )
        return texts

    @pytest.mark.parametrize("chat", [False, True])
    def test_refused_by_its_length(self, runtime, encoded, chat):
        most = runtime.context * runtime.tokenizer.longest
        with pytest.raises(PlanError, match=f"{most + 1} characters, and the context holds 64"):
            next(runtime.generate("a" * (most + 1), chat=chat))
        assert not encoded
        with pytest.raises(PlanError, match="tokens"):
            next(runtime.generate("a" * most, chat=chat))
        assert encoded

    @pytest.mark.parametrize("command", [["run", "EXPORT", "-"], ["chat", "EXPORT"]])
    @pytest.mark.parametrize("size", [20_000, MAX_PROMPT_BYTES + 9])
    def test_from_stdin(self, export, command, size, encoded, monkeypatch, capsys):
        stdin = SimpleNamespace(buffer=io.BytesIO(b"a" * size), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as caught:
            main([argument.replace("EXPORT", str(export)) for argument in command])
        wanted = "20000 characters" if size == 20_000 else "more than 32 MiB"
        assert caught.value.code == 2
        assert wanted in capsys.readouterr().err
        assert max(map(len, encoded), default=0) < 100  # chat tries the template
        assert stdin.buffer.tell() <= MAX_PROMPT_BYTES + 1

    def test_from_a_file(self, export, tmp_path, capsys):
        (tmp_path / "long").touch()
        os.truncate(tmp_path / "long", 1 << 40)
        with pytest.raises(SystemExit) as caught:
            main(["run", str(export), "--file", str(tmp_path / "long")])
        assert caught.value.code == 2
        assert "long: the prompt has more than 32 MiB" in capsys.readouterr().err
