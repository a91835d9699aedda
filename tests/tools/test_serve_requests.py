"""``slotmoe serve``: what a refusal says, what the largest requests cost, and what every response
has beside its content."""

import http.client
import json
import re
import shutil
import socket
import tracemalloc

import pytest

from slotmoe.model.generate import Answer
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.serve import errors as serve_errors
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.guard import MAX_KEYS, MAX_VALUES, check
from tests.support.served import GREEDY, USER, Served, tokenizer_with

CHAT, TEXT, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/messages"
PART = {"type": "image_url", "image_url": {"url": "x"}}
LONG = "x" * 400
RESULT = {"role": "tool", "tool_call_id": "x", "content": "y"}
NAMES = "a b", "x" * 129, ""
NAME = "String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"


def function(name):
    return {"type": "function", "function": {"name": name}}


FUNCTION = function("f")


def user(content, **fields):
    return {"messages": [{"role": "user", "content": content, **fields}]}


MANY_IDS = {str(i): 1 for i in range(1025)}
WRONG = {  # in both of OpenAI's older APIs
    "temperature": [-1, "0"],
    "top_p": [-0.1],
    "top_k": [-2, 1 << 31],
    "min_p": [2],
    "n": [0, 17],
    "max_tokens": [True, -(10**30)],
    "seed": [1.5, 1 << 63],
    "stop": ["x" * 257, ["a", ""], ["a"] * 17, 5],
    "logit_bias": [{"4096": 1}, {"x": 1}, {LONG: 1}, {"1": 101}, MANY_IDS],
    "frequency_penalty": [3],
    "repetition_penalty": [0, 5e-324],
    "stream_options": [{"include_usage": True}],
}
OTHER = {"type": "function", "function": {"name": "other"}}
REASONS = [
    (CHAT, user([PART]), "messages.0.content.0: a part of type 'image_url' can't be read"),
    (CHAT, user(5), "messages.0.content is neither text nor a list"),
    (CHAT, {"messages": [{"role": "wizard"}]}, "messages.0.role: Input should be 'system'"),
    (CHAT, {"messages": USER * 4097}, "messages has more than 4096 items"),
    (CHAT, {"messages": [RESULT]}, "messages: a result answers no call"),
    (CHAT, {"messages": [{"role": "assistant", "content": None}]}, "messages.0: a message of the"),
    (CHAT, user("\ud800"), "messages.0.content: Input should be a valid string"),
    (CHAT, {"stop": ["a", ""]}, "stop.1 is empty"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type: Input should be 'text'"),
    (CHAT, {"tools": [FUNCTION] * 1025}, "tools has more than 1024 items"),
    *((CHAT, {"tools": [function(name)]}, f"tools.0.function.name: {NAME}") for name in NAMES),
    (CHAT, {"tools": [FUNCTION], "tool_choice": OTHER}, "tool_choice: 'other' is none of the"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice can only be given with tools"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": 5}, "tool_choice is none that this"),
    (CHAT, {"max_tokens": 0}, "max_tokens is 0, expected a positive count or -1"),
    (CHAT, {"max_tokens": 4, "min_tokens": 5}, "min_tokens is more than the limit of tokens"),
    (TEXT, {"prompt": ["x"] * 20}, "prompt has more than 16 items"),
    (TEXT, {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
    (TEXT, {"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
    (TEXT, {"best_of": 2}, "best_of: Input should be 1"),
    (TEXT, {"prompt": 5}, "prompt is neither text, token ids nor a list of either"),
    (TEXT, {"prompt": [[1], []]}, "prompt.1 has fewer than 1 items"),
    (ANTHROPIC, {"max_tokens": "x"}, "max_tokens: Input should be a valid integer"),
]
# Of which the message does not begin with the parameter.
ODD = [
    (CHAT, {"max_completion_tokens": 2}, "max_tokens", "give max_tokens or max_completion_tokens"),
    (CHAT, {"tools": [FUNCTION] * 2}, "tools", "tool 'f' is there twice"),
    (CHAT, user("word " * 600), None, "the prompt has 612 tokens and the context holds 512"),
    (TEXT, {"prompt": ["x"] * 9, "n": 2}, "n", "prompts times n is more than 16 answers"),
    (TEXT, {"prompt": [5] * 512}, None, "the prompt has 512 tokens and the context holds 512"),
    (TEXT, {"prompt": [4096]}, "prompt", ""),
    (TEXT, {"suffix": "y"}, None, "this model can't fill in the middle"),
    (TEXT, {"prompt": "word " * 800_000}, None, ""),
]


BODIES = [
    (b'{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
    (b"\xff\xfe", "is not JSON: byte 0 is not UTF-8"),
    (b"[" * 50_000, "it is nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number is too long"),
    (b"[]", "is not a JSON object"),
    (b"", "the body is missing"),
    (b'{"model": "sample", "prompt": "x", "temperature": NaN}', ""),
    (b'{"model": "sample", "prompt": "x", "temperature": 1e999}', ""),
    ('{"model": "sample"}'.encode("utf-16"), "is not UTF-8"),
]


def refusals():
    """Path, fields, the parameter that is wrong, and how the message begins."""
    for path in (CHAT, TEXT):
        for name, values in WRONG.items():
            yield from ((path, {name: value}, name, name) for value in values)
    yield from ODD
    for path, fields, reason in REASONS:
        yield path, fields, re.match(r"\w+", reason)[0], reason


def test_refusals_say_the_reason(roomy):
    for path, fields, param, reason in refusals():
        base = {"prompt": "x"} if path == TEXT else {"messages": USER, "max_tokens": 8}
        status, answer = roomy.post(path, **{**GREEDY, **base, **fields})
        error = answer["error"]
        assert (status, error["type"]) == (400, "invalid_request_error"), fields
        assert error["message"].startswith(reason) and error["message"], answer
        assert path == ANTHROPIC or LONG in fields or error["param"] == param, answer
    for body, reason in BODIES:
        for path in (CHAT, TEXT, ANTHROPIC):
            status, answer, _ = roomy.ask("POST", path, body)
            assert status == 400 and reason in answer["error"]["message"], answer
    assert roomy.post(TEXT, model="other", prompt="x")[0] == 404
    assert roomy.ask("POST", TEXT, b" " * (5 << 20))[0] == 413
    assert roomy.complete("Call me", max_tokens=1)["usage"]["completion_tokens"] == 1


def filled(head, item, tail, count=None):
    """``item`` so often, or as often as 4 MB hold."""
    count = count or ((4 << 20) - len(head) - len(tail)) // (len(item) + 1)
    return (head + ",".join([item] * count) + tail).encode()


KEYS = ",".join(f'"a{i}":1' for i in range(MAX_KEYS - 20))
HEAD = '{"model":"sample","max_tokens":3,'
CONTENT = HEAD + '"messages":[{"role":"user","content":['
HALF = MAX_VALUES // 2 - 50
LARGE = {
    "parts": filled(CONTENT, "{}", "]}]}"),
    "parts within the bound": filled(CONTENT, "{}", "]}]}", HALF),
    "good messages": filled(HEAD + '"messages":[', '{"role":"user","content":""}', "]}", 32_000),
    "prompts": filled(HEAD + '"prompt":[', "[]", "]}", HALF),
    "no ids": filled(HEAD + '"prompt":[', "1.5", "]}", MAX_VALUES - 50),
    "system": filled(HEAD + '"messages":[],"system":[', "{}", "]}", HALF),
    "tools": filled(HEAD + '"messages":[],"tools":[', "{}", "]}", HALF),
    "stop": filled(HEAD + '"messages":[],"stop":[', '""', "]}", HALF),
    "unknown fields": (HEAD + KEYS + "}").encode(),
    "bias": (HEAD + '"logit_bias":{' + KEYS + "}}").encode(),
    "metadata": (HEAD + '"metadata":{' + KEYS + "}}").encode(),
    "text": (HEAD + '"messages":[{"role":"user","content":"' + "word " * 838_000 + '"}]}').encode(),
    "quotes": (HEAD + '"prompt":"' + '\\"' * (2 << 20) + '"}').encode()[-(4 << 20) :],
}


@pytest.fixture(scope="module")
def roomy(network, processes, runtime):
    with Served(runtime, max_body=4 << 20) as served:
        yield served


PATHS = CHAT, TEXT, ANTHROPIC


@pytest.mark.parametrize("shape", LARGE)
def test_largest_requests_cost_little(roomy, shape, monkeypatch):
    """They are refused, and few errors are made of them: these take time."""
    counts, told = [0], serve_errors._invalid

    def counted(problem):
        counts.append(len(problem.errors()))
        return told(problem)

    monkeypatch.setattr(serve_errors, "_invalid", counted)
    for path in PATHS:
        assert roomy.ask("POST", path, LARGE[shape])[0] in (400, 413)
    assert max(counts) < 8


@pytest.mark.parametrize("shape", ["parts within the bound", "unknown fields"])
def test_largest_requests_take_little_memory(roomy, shape):
    tracemalloc.start()
    for path in PATHS:
        roomy.ask("POST", path, LARGE[shape])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.usefixtures("heavy")
def test_values_are_counted_outside_of_strings():
    text = json.dumps({"text": '\\"{[,:' * MAX_VALUES, "more": [1, 2]}).encode()
    check(text)
    check(json.dumps({"ids": [1] * (MAX_VALUES - 10)}).encode())
    for beyond in ({"ids": [1] * MAX_VALUES, "t": '\\"'}, {str(i): 1 for i in range(MAX_KEYS + 1)}):
        with pytest.raises(RefusedError, match="holds more than"):
            check(json.dumps(beyond).encode())


@pytest.fixture
def wider(network, processes, runtime, tmp_path, monkeypatch):
    """A server whose tokenizer has one id more than the model has rows."""
    tokenizer = Tokenizer(tokenizer_with(tmp_path, ["<more>"], 4096), 0)
    monkeypatch.setattr(runtime, "tokenizer", tokenizer)
    assert tokenizer.size == 4097 == runtime.config.vocab_size + 1
    with Served(runtime) as served:
        yield served


def test_tokenizer_with_more_ids_than_the_model_has_rows(wider):
    answer = wider.choice(response_format={"type": "json_object"}, max_tokens=5)
    assert answer["message"]["content"].startswith("{")
    assert wider.chat(min_tokens=3, logprobs=True, top_logprobs=3)[0] == 200
    assert wider.chat(logit_bias={"4096": 1})[0] == 400
    assert wider.chat(messages=[{"role": "user", "content": "a<more>"}])[0] == 400
    for prompt in ([4096], "a<more>"):
        for fields in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
            assert wider.post(TEXT, **GREEDY, prompt=prompt, **fields)[0] == 400
    assert wider.text(echo=True, logprobs=1)
    assert wider.service.engine.alive


def test_exception_of_one_answer_ends_that_answer_alone(served, monkeypatch, capfd):
    alone = served.text(max_tokens=30)
    for name in ("take", "score"):
        real = getattr(Answer, name)

        def work(answer, *given, real=real):
            if 300 in answer._penalties._prompt:
                raise IndexError("nobody foresaw this")
            return real(answer, *given)

        monkeypatch.setattr(Answer, name, work)
        body = {**GREEDY, "prompt": [0, 300], "echo": True, "logprobs": 0}
        status, answer = served.post(TEXT, **body)
        assert status == 500 and "server's log" in answer["error"]["message"]
        assert served.text(max_tokens=30) == alone
        assert "nobody foresaw this" in capfd.readouterr().err
        monkeypatch.undo()
    served.idle()
    assert served.service.engine.alive


UNKNOWN = [  # at any depth, in every API
    (CHAT, {"messages": USER, "thinking_budget": 3, "stream_options": None}),
    (CHAT, {"messages": [{**USER[0], "odd": {"x": 1}}], "tools": [{**FUNCTION, "odd": 1}]}),
    (TEXT, {"prompt": "x", "enable_thinking": False}),
    (
        ANTHROPIC,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "odd": 1}]}]},
    ),
    ("/v1/responses", {"input": [{"role": "user", "content": "x", "status": "completed"}]}),
    (
        "/api/chat",
        {"messages": [{**USER[0], "odd": 1}], "stream": False, "options": {"num_ctx": 8}},
    ),
]


@pytest.mark.usefixtures("network")
def test_unknown_fields_are_ignored_and_named_once(runtime, capfd):
    with Served(runtime, is_logged=True) as served:
        for path, body in UNKNOWN * 2:
            given = {**GREEDY, "max_tokens": 1, "max_output_tokens": 1, **body}
            status, answer = served.post(path, **given)
            assert status == 200, answer
        for number in range(40):
            names = {f"n{number}-{i}-{'x' * 99}\n": 1 for i in range(10)}
            assert served.post(TEXT, **GREEDY, prompt="x", max_tokens=1, **names)[0] == 200
    lines = [line for line in capfd.readouterr().err.splitlines() if "unknown here" in line]
    told = [line.partition("the field ")[2].partition(" is")[0] for line in lines]
    wanted = "thinking_budget odd enable_thinking status num_ctx max_output_tokens max_tokens"
    assert {f"'{name}'" for name in wanted.split()} <= set(told)
    assert len(told) == len(set(told)) == 100 and max(map(len, told)) < 70
    assert lines[-1].endswith("further ones are not named")


def test_every_response_has_an_id(served):
    for method, path, body in (
        ("GET", "/nowhere", None),
        ("POST", TEXT, {**GREEDY, "prompt": "x", "max_tokens": 1, "stream": True}),
        ("POST", TEXT, b"{"),
    ):
        own = served.ask(method, path, body)[2]["x-request-id"]
        assert re.fullmatch("req_[0-9a-f]{32}", own)
        headers = served.ask(method, path, body, x_request_id="run-7.a:1")[2]
        assert headers["x-request-id"] == headers["request-id"] == "run-7.a:1"
        strange = served.ask(method, path, body, x_request_id="a b\x1b[31m")[2]["x-request-id"]
        assert strange.startswith("req_")
    assert served.ask("GET", "/health", Host="evil.example")[2]["x-request-id"]


def test_page_is_shown_in_no_frame_of_others(served):
    policy = served.ask("GET", "/")[2]["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy


def test_requests_that_come_all_at_once_are_answered_in_turn(served):
    lengths = (1, 3, 2)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        for length in lengths:
            body = json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": length})
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        found, answers = connection.makefile("rb"), []
        for _ in lengths:
            headers = http.client.parse_headers(found) if b" 200 " in found.readline() else {}
            answers.append(json.loads(found.read(int(headers["Content-Length"]))))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [*lengths]


@pytest.mark.usefixtures("network")
def test_a_model_whose_files_are_removed_goes_on(sample_export, tmp_path):
    """Its experts are read where they were."""
    export, texts = shutil.copytree(sample_export, tmp_path / "export"), []
    with (
        Runtime.open(export, ram="2GiB", slots=40, context=128) as runtime,
        Served(runtime, sequences=1) as served,
    ):
        for _ in "ab":
            before = runtime.stats()["io"]["disk"]["bytes"]
            texts.append(served.text(max_tokens=20))
            assert runtime.stats()["io"]["disk"]["bytes"] > before
            shutil.rmtree(export, ignore_errors=True)
    assert texts[0] == texts[1] != ""


@pytest.mark.usefixtures("network")
def test_log_has_a_line_for_each_request_and_nothing_of_it(runtime, capfd):
    with Served(runtime, is_logged=True) as served:
        served.complete("A secret word", max_tokens=3)
        served.ask("GET", "/no%0Awhere%1b[31m", Authorization="Bearer secret")
        for path in ("/health", "/stats", "/metrics"):
            served.ask("GET", path)
    lines = [line[20:] for line in capfd.readouterr().err.splitlines()]
    number = r"\d+\.\d+"
    made = rf"200 in {number} s, \d+ \+ 3 tokens, first after {number} s, length"
    wanted = f"POST {TEXT} {made}", rf"GET /no\\nwhere\\x1b\[31m 404 in {number} s"
    for line, expected in zip(lines, wanted, strict=True):
        assert re.fullmatch(f"{expected}, req_[0-9a-f]{{32}}", line), line
    assert "secret" not in "".join(lines)


def test_usage_in_the_chunks_of_a_stream(served):
    body, options = {**GREEDY, "prompt": "Call me", "max_tokens": 40}, {"include_usage": True}
    assert all("usage" not in event for event in served.events(TEXT, body))
    *events, last = served.events(TEXT, {**body, "stream_options": options})
    assert {event["usage"] for event in events} == {None}
    assert last["usage"]["completion_tokens"] == 40 and last["choices"] == []
    options["continuous_usage_stats"] = True
    sent = 0
    for event in served.events(TEXT, {**body, "logprobs": 1, "stream_options": options}):
        sent += sum(len((one["logprobs"] or {}).get("tokens", ())) for one in event["choices"])
        assert event["usage"]["completion_tokens"] == sent, "the model was ahead"
    assert sent == 40


def test_tools_that_load_a_server_get_answers_of_a_length(served, runtime):
    (end,) = runtime.eos_token_ids
    wish = {"logit_bias": {str(end): 100}, "max_tokens": 9}

    def count(**fields):
        return served.complete("Call me", **wish, **fields)["usage"]["completion_tokens"]

    assert (count(), count(min_tokens=5), count(ignore_eos=True)) == (0, 5, 9)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    answer = served.choice(response_format=form, min_tokens=8)
    assert (answer["message"]["content"], answer["finish_reason"]) == ("1", "stop")
    endless = served.complete("Call me", max_tokens=-1, ignore_eos=True)
    assert endless["usage"]["total_tokens"] == 512
    assert served.chat(max_tokens=-1, ignore_eos=True)[1]["usage"]["total_tokens"] == 512
