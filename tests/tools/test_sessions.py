"""Sessions of ``slotmoe run``, ``chat`` and ``serve``, as their users meet them."""

import io
import json
import re
import signal
import sys
import urllib.request

import pytest

from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS
from tests.support.forkserver import COMMAND_LINE
from tests.support.served import SLOW, Served, start

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

    def call(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        options = (*RUN, "--seed", "1", "--session-dir", folder, *arguments)
        code, out, err = slotmoe("chat", sample_export, *options)
        assert code == 0, err
        return out, err

    return call


def test_run_goes_on_with_a_text_without_computing_it_again(run, sample_export):
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


@pytest.mark.usefixtures("processes")
def test_run_holds_a_conversation_that_chat_goes_on_with(run, chat, slotmoe, sample_export, folder):
    run("Who goes there?", "--chat", session="talk")
    again = run("Speak!", "--chat", session="talk")
    assert again["sessions"]["restored_tokens"] > 0
    _, err = chat("And now?\n/stats\n", "--resume")
    assert "session talk: " in err and "3 of 3 exchanges" in err
    code, _, err = slotmoe("run", sample_export, "x", "--session", "talk", "--session-dir", folder)
    assert code == 2 and "session talk: is a chat; " in err


def test_sessions_are_listed_and_deleted(chat, run, slotmoe, folder):
    place = ("--sessions", "--session-dir", folder)
    chat("My fellow citizens,\n", "--session", "plans")
    run(TEXT)
    shown = slotmoe("list", *place)[1]
    assert re.search(r"novel\b.*\btext\b.*\bjust now\b.*\n.*plans\b.*\bchat\b", shown)
    assert slotmoe("rm", *place, "plans")[0] == 0
    listed = json.loads(slotmoe("list", *place, "--json")[1])
    assert [session["name"] for session in listed["sessions"]] == ["novel"]
    assert slotmoe("rm", *place, "novel", "novel")[0] == 0
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    code, _, err = slotmoe("rm", *place, "novel")
    assert code == 2 and "holds no session 'novel'" in err


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

    serving(go_on)


def test_another_key_sees_nothing_whatever_its_place_in_the_list(serving):
    def reused(*keys):
        return lambda served: [cached(served, x_api_key=key)[0] for key in keys]

    assert serving(reused("first", "second"), keys=("first", "second")) == [0, 0]
    none, some = serving(reused("third", "first"), keys=("third", "first"))
    assert none == 0 and some > 100


def ask(port, body):
    address, kind = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
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
        text, body = "", {"model": "sample", "temperature": 0, "prompt": TEXT, "max_tokens": 300}
        with ask(port, {**body, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if len(text) > 200:
                    break
            first.send_signal(signal.SIGKILL)
        with ask(other, {**body, "prompt": TEXT + text, "max_tokens": 1}) as response:
            usage = json.load(response)["usage"]
        second.terminate()
    assert len(text) > 200
    # All but the tokens behind the last full block; the answer's text may have other tokens.
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= usage["prompt_tokens"] - 2 * BLOCK_TOKENS
