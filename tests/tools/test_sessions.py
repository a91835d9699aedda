"""Sessions of ``slotmoe run``, ``chat`` and ``serve``, as their users meet them."""

import io
import json
import os
import re
import signal
import sys
import urllib.request

import pytest

from slotmoe.model.sampling import Sampling
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS
from slotmoe.offload.sessions.names import NamedSession
from slotmoe.tools.chat.conversation import Dialogue
from tests.support.forkserver import COMMAND_LINE
from tests.support.served import SLOW, Served, start

JSON = "application/json"
RUN = ("--ram", "2GiB", "-n", "12")
TEXT = "The people of the United States have a government of laws and not of men. " * 8


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sessions"


@pytest.fixture
def run(slotmoe, sample_export, folder):
    """``slotmoe run --json`` with a session: its report."""

    def call(*arguments, session="novel"):
        place = ("--session", session, "--session-dir", folder)
        code, out, err = slotmoe("run", sample_export, *arguments, *RUN, *place, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture
def chat(slotmoe, processes, sample_export, folder, monkeypatch):
    """``slotmoe chat`` through pipes: answers, and what it said."""

    def call(lines, *arguments, code=0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        options = (*RUN, "--seed", "1", "--session-dir", folder, *arguments)
        got, out, err = slotmoe("chat", sample_export, *options)
        assert got == code, err
        return out, err

    return call


def restored(runtime, ids):
    """How many of ``ids`` are on disk."""
    engine = runtime.engine
    return engine.call(lambda: engine.batch.sessions.restore(engine.batch.sequences[0], ids))


# run


def test_run_goes_on_with_a_text_without_computing_it_again(run, sample_export, monkeypatch):
    first = run(TEXT)
    second = run(" And so")
    with Runtime.open(sample_export) as runtime:
        ids = runtime.tokenizer.encode(TEXT) + first["ids"]
        ids += runtime.tokenizer.encode(" And so", add_bos=False)
        wanted = [*runtime.generate(ids, 12)]
    assert second["ids"] == [token.id for token in wanted]
    assert second["logprobs"] == [token.logprob for token in wanted]
    computed = second["tokens"]["prefill_tokens"]
    assert second["sessions"]["restored_tokens"] == len(ids) - computed
    assert computed < 8
    # What another version has written is read anew.
    monkeypatch.setattr("slotmoe.offload.sessions.store.version", lambda name: "9.9")
    assert run(" that")["sessions"]["restored_tokens"] == 0


@pytest.mark.usefixtures("processes")
def test_run_holds_a_conversation_that_chat_goes_on_with(run, chat, slotmoe, sample_export, folder):
    run("Who goes there?", "--chat", session="talk")
    again = run("Speak!", "--chat", session="talk")
    assert again["sessions"]["restored_tokens"] > 0
    _, err = chat("And now?\n/stats\n", "--resume")
    assert "session talk: " in err and "3 of 3 exchanges" in err
    refused = slotmoe("run", sample_export, "x", "--session", "talk", "--session-dir", folder)
    assert refused[0] == 2 and "session talk: is a chat; " in refused[2]
    assert refused[2].count("\n") == 1


# chat


def test_the_answer_is_what_one_process_gives(chat):
    both, _ = chat("My fellow citizens,\nAnd then?\n", "--temperature", "0")
    first, _ = chat("My fellow citizens,\n", "--temperature", "0", "--session", "x")
    second, _ = chat("And then?\n", "--temperature", "0", "--session", "x")
    assert first + second == both


@pytest.mark.usefixtures("processes")
def test_an_interrupted_answer_is_kept(sample_export, folder):
    with NamedSession(folder, "x") as session, Runtime.open(sample_export) as runtime:
        runtime.keep_in(folder)
        conversation = Dialogue(runtime, 40, Sampling(), None, session)
        answer = conversation.answer(TEXT)
        text = next(answer) + next(answer)
        answer.close()
    with NamedSession(folder, "x") as session, Runtime.open(sample_export) as runtime:
        assert session.saved.messages[-1] == {"role": "assistant", "content": text}
        assert text in runtime.tokenizer.decode(session.saved.tokens)
        runtime.keep_in(folder)  # what came after the last token was shown may not be there
        assert restored(runtime, session.saved.tokens) >= len(session.saved.tokens) - 1


def test_sessions_are_listed_and_deleted(chat, run, slotmoe, folder):
    place = ("--sessions", "--session-dir", folder)
    chat("My fellow citizens,\n", "--session", "plans")
    run(TEXT)
    _, err = chat("/sessions\n/sessions delete plans\n/sessions\n")
    assert re.search(r"novel  text, \d+ tokens, just now\nplans  chat, \d+ tokens, just now\n", err)
    assert re.search(r"plans: deleted, \d+\.\d KiB are free again", err)
    assert err.count("plans") == 2
    listed = json.loads(slotmoe("list", *place, "--json")[1])
    assert [session["name"] for session in listed["sessions"]] == ["novel"]
    assert slotmoe("rm", *place, "novel", "novel")[0] == 0
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    code, _, err = slotmoe("rm", *place, "novel")
    assert code == 2 and "holds no session 'novel'" in err


@pytest.mark.parametrize("stuck", ["plans.json", "blocks"])
def test_what_can_t_be_removed_is_said(stuck, run, slotmoe, folder, monkeypatch):
    """A session whose file stays keeps its blocks, too."""
    run(TEXT, session="plans")
    place, unlink = ("--sessions", "--session-dir", folder), os.unlink

    def refuse(path, **options):
        if stuck in str(path):
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        code, out, err = slotmoe("rm", *place, "plans")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert re.match(rf"slotmoe: {folder}/\S*{stuck}\S*: can't be removed \(Operation not", err)
    assert re.search(r"; \d.* are free again\n$", err) and [*folder.glob("blocks/*/*")]
    assert slotmoe("rm", *place, "--all")[0] == 0
    assert not [*folder.glob("blocks/*/*")]


def test_a_full_disk_does_not_end_the_chat(chat, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    out, err = chat("My fellow citizens,\nAnd then?\n/stats\n", "--session", "x")
    assert len(out.splitlines()) >= 2 and "2 of 2 exchanges" in err
    assert "No space left on device" in err


# serve


def cached(served, **headers):
    """Tokens of a request's prompt that were there, its answer, and all tokens of its prompt."""
    body = {"model": "sample", "temperature": 0, "prompt": TEXT, "max_tokens": 8}
    status, answer, _ = served.ask("POST", "/v1/completions", body, **headers)
    assert status == 200, answer
    usage = answer["usage"]
    reused = usage["prompt_tokens_details"]["cached_tokens"]
    return reused, answer["choices"][0]["text"], usage["prompt_tokens"]


@pytest.fixture
def serving(network, sample_export, folder):
    """Call a function with a server that is started anew with the same folder."""

    def call(use, **options):
        with Runtime.open(sample_export, ram="2GiB", context=512, sequences=2) as runtime:
            runtime.keep_in(folder)
            with Served(runtime, sequences=2, **options) as served:
                return use(served)

    return call


def test_a_conversation_goes_on_after_a_restart(serving):
    none, text, length = serving(cached)
    assert none == 0

    def go_on(served):
        assert cached(served) == (length - 1, text, length)
        stats = served.ask("GET", "/stats")[1]
        assert stats["sessions"]["restored_tokens"] == stats["reused_tokens"] == length - 1
        metrics = served.ask("GET", "/metrics")[1]
        assert f"slotmoe_session_tokens_total {length - 1}.0" in metrics
        options = {"max_tokens": 0, "echo": True, "logprobs": 0}  # scored prompts are computed
        usage = served.complete("The people of the United States", **options)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    serving(go_on)


def test_another_key_sees_nothing_whatever_its_place_in_the_list(serving):
    def reused(*keys):
        return lambda served: [cached(served, x_api_key=key)[0] for key in keys]

    assert serving(reused("first", "second"), keys=("first", "second")) == [0, 0]
    none, some = serving(reused("third", "first"), keys=("third", "first"))
    assert none == 0 and some > 100


def ask(port, **body):
    """A streamed answer of many tokens."""
    body = {"model": "sample", "max_tokens": 300, "stream": True, "temperature": 0} | body
    address, kind = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": JSON}
    request = urllib.request.Request(address, json.dumps(body).encode(), kind)
    return urllib.request.urlopen(request, timeout=30)


@pytest.mark.usefixtures("processes")
def test_another_server_goes_on_where_a_killed_one_stopped(sample_export, folder):
    """Both have started before, and share the folder at the same time."""
    options = "--session-dir", folder
    (first, port), (second, other) = (
        start(sample_export, *options, program=program) for program in (SLOW, COMMAND_LINE)
    )
    with first, second:
        text = ""
        with ask(port, prompt=TEXT) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if len(text) > 200:
                    break
            first.send_signal(signal.SIGKILL)
        with ask(other, prompt=TEXT + text, stream=False, max_tokens=1) as response:
            usage = json.load(response)["usage"]
        second.terminate()
    assert len(text) > 200
    # All but the tokens behind the last full block; the answer's text may have other tokens.
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= usage["prompt_tokens"] - 2 * BLOCK_TOKENS


@pytest.mark.usefixtures("processes")
def test_a_server_that_is_stopped_keeps_what_it_has_read(sample_export, folder):
    """Ctrl-C in the middle of an answer."""
    options = "--session-dir", folder, "--session-limit", "1GiB"
    child, port = start(sample_export, *options, program=SLOW)
    with child:
        with ask(port, prompt=TEXT) as response:
            response.readline()
            child.send_signal(signal.SIGINT)
            response.read()
        assert child.wait() == 130
    with Runtime.open(sample_export, ram="2GiB") as runtime:
        ids = runtime.tokenizer.encode(TEXT)
        runtime.keep_in(folder)
        assert restored(runtime, ids) == len(ids)
