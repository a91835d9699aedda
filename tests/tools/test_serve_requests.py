"""``slotmoe serve``: what a refusal says, what the largest requests cost, and what every response
has beside its content."""

import json
import re
import time
import tracemalloc

import pytest

from slotmoe.model.generate import Answer
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.bodies import MAX_KEYS, MAX_VALUES, check
from slotmoe.tools.serve.errors import RefusedError
from tests.support.served import GREEDY, USER, Served
from tests.support.tiny import SAMPLE

CHAT, TEXT, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/messages"
PART = {"type": "image_url", "image_url": {"url": "x"}}
LONG = "x" * 400
FUNCTION = {"type": "function", "function": {"name": "f"}}


def user(content, **fields):
    return {"messages": [{"role": "user", "content": content, **fields}]}


REASONS = [
    (CHAT, user([PART]), "messages.0.content.0: a part of type 'image_url' can't be read"),
    (CHAT, user(5), "messages.0.content is neither text nor a list of parts"),
    (CHAT, user([{"type": "text"}]), "messages.0.content.0.text is missing"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content is missing"),
    (CHAT, {"messages": [{"role": "wizard"}]}, "messages.0 has the unknown 'role' 'wizard'"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0 has no 'role'"),
    (CHAT, {"messages": USER * 4097}, "messages has more than 4096 items"),
    (CHAT, {"messages": 5}, "messages: Input should be a valid list"),
    (CHAT, user("x", extra=1), "messages.0.extra is not supported by this server"),
    (CHAT, {LONG: 1}, f"{'x' * 300}… is not supported by this server"),
    (CHAT, {"stop": 5}, "stop is neither text nor a list of texts"),
    (CHAT, {"stop": ["a", ""]}, "stop.1 is empty"),
    (CHAT, {"stop": "x" * 257}, "stop has more than 256 characters"),
    (CHAT, {"stop": ["a"] * 17}, "stop has more than 16 items"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": 5}, "tool_choice is neither a word"),
    (CHAT, {"tools": [FUNCTION], "tool_choice": {"type": "x"}}, "tool_choice is neither a word"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function is missing"),
    (
        CHAT,
        {"tools": [{"type": "function", "function": {"name": LONG}}]},
        "tools.0.function.name: String should match pattern '^[a-zA-Z0-9_-]{1,128}$'",
    ),
    (CHAT, {"logit_bias": {LONG: 1}}, f"logit_bias: {'x' * 40!r} is not a token id"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias has 1025 token ids"),
    (CHAT, {"metadata": {str(i): "" for i in range(17)}}, "metadata has 17 labels, more than 16"),
    (CHAT, {"max_tokens": 0}, "max_tokens is 0, expected a positive count or -1"),
    (CHAT, {"max_tokens": 4, "min_tokens": 5}, "min_tokens is more than the limit of tokens"),
    (TEXT, {"prompt": ["x"] * 20}, "prompt has more than 16 items"),
    (TEXT, {"prompt": 5}, "prompt is neither text, token ids nor a list of either"),
    (TEXT, {"prompt": []}, "prompt has fewer than 1 items"),
    (TEXT, {"prompt": [[1], []]}, "prompt.1 has fewer than 1 items"),
    (TEXT, {"prompt": ["x", 5]}, "prompt.1: Input should be a valid string"),
    (TEXT, {"prompt": [5, "x"]}, "prompt.1: Input should be a valid integer"),
    (ANTHROPIC, {"max_tokens": "x"}, "max_tokens: Input should be a valid integer"),
]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(("path", "fields", "reason"), REASONS, ids=lambda value: str(value)[:40])
def test_refusals_say_the_reason(roomy, path, fields, reason):
    base = {"prompt": "x"} if path == TEXT else {"messages": USER, "max_tokens": 8}
    status, answer, _ = roomy.ask("POST", path, {**GREEDY, **base, **fields})
    assert status == 400 and answer["error"]["message"].startswith(reason), answer


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
        (b"\xff\xfe", "is not JSON: byte 0 is not UTF-8"),
        (b"[" * 50_000, "it is nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b"[]", "is a list, expected a JSON object"),
        (b"", "the body is missing"),
        ('{"model": "sample"}'.encode("utf-16"), "is not UTF-8"),
    ],
    ids=range(7),
)
def test_bodies_that_are_no_json_object_are_told_why(served, body, reason):
    for path in (CHAT, TEXT, ANTHROPIC):
        status, answer, _ = served.ask("POST", path, body)
        assert status == 400 and reason in answer["error"]["message"], answer


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
    "numbers for parts": filled(CONTENT, "1", "]}]}", MAX_VALUES - 50),
    "messages": filled(HEAD + '"messages":[', "{}", "]}", HALF),
    "good messages": filled(HEAD + '"messages":[', '{"role":"user","content":""}', "]}", 32_000),
    "prompts": filled(HEAD + '"prompt":[', "[]", "]}", HALF),
    "no ids": filled(HEAD + '"prompt":[', "1.5", "]}", MAX_VALUES - 50),
    "system": filled(HEAD + '"messages":[],"system":[', "{}", "]}", HALF),
    "tools": filled(HEAD + '"messages":[],"tools":[', "{}", "]}", HALF),
    "stop": filled(HEAD + '"messages":[],"stop":[', '""', "]}", HALF),
    "unknown fields": (HEAD + KEYS + "}").encode(),
    "fields of a message": (
        HEAD + '"messages":[{"role":"user","content":"",' + KEYS + "}]}"
    ).encode(),
    "bias": (HEAD + '"logit_bias":{' + KEYS + "}}").encode(),
    "metadata": (HEAD + '"metadata":{' + KEYS + "}}").encode(),
    "text": (HEAD + '"messages":[{"role":"user","content":"' + "word " * 838_000 + '"}]}').encode(),
    "prompt": (HEAD + '"prompt":"' + "word " * 838_000 + '"}').encode(),
    "quotes": (HEAD + '"prompt":"' + '\\"' * (2 << 20) + '"}').encode()[-(4 << 20) :],
}


@pytest.fixture(scope="module")
def roomy(runtime):
    with Served(runtime, max_body=4 << 20) as served:
        yield served


@pytest.mark.parametrize("path", [CHAT, TEXT, ANTHROPIC])
@pytest.mark.parametrize("shape", LARGE)
def test_largest_requests_cost_little(roomy, shape, path):
    assert len(LARGE[shape]) <= 4 << 20
    seconds = []
    for _ in range(2):  # in one of them Python may look through all of torch for garbage
        began = time.process_time()
        assert roomy.ask("POST", path, LARGE[shape])[0] in (400, 413)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "shape", ["parts", "parts within the bound", "no ids", "unknown fields", "prompt"]
)
def test_largest_requests_take_little_memory(roomy, shape):
    tracemalloc.start()
    for path in (CHAT, TEXT, ANTHROPIC):
        roomy.ask("POST", path, LARGE[shape])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_values_are_counted_outside_of_strings():
    text = json.dumps({"text": '\\"{[,:' * MAX_VALUES, "more": [1, 2]}).encode()
    check(text)
    check(json.dumps({"ids": [1] * (MAX_VALUES - 10)}).encode())
    for beyond in ({"ids": [1] * MAX_VALUES, "t": '\\"'}, {str(i): 1 for i in range(MAX_KEYS + 1)}):
        with pytest.raises(RefusedError, match="holds more than"):
            check(json.dumps(beyond).encode())


@pytest.fixture
def wider(runtime, tmp_path, monkeypatch):
    """A server whose tokenizer has one id more than the model has rows."""
    source = json.loads((SAMPLE / "tokenizer.json").read_text())
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    source["added_tokens"].append({"id": 4096, "content": "<more>", "special": False, **about})
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    settings = (SAMPLE / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(settings)
    monkeypatch.setattr(runtime, "tokenizer", Tokenizer(tmp_path, 0))
    assert runtime.tokenizer.size == 4097 == runtime.config.vocab_size + 1
    with Served(runtime) as served:
        yield served


@pytest.mark.usefixtures("network", "processes")
def test_tokenizer_with_more_ids_than_the_model_has_rows(wider):
    status, answer, _ = wider.chat(response_format={"type": "json_object"}, max_tokens=5)
    assert status == 200 and answer["choices"][0]["message"]["content"].startswith("{")
    assert wider.chat(tools=[FUNCTION], tool_choice="required")[0] == 200
    assert wider.chat(min_tokens=3, logprobs=True, top_logprobs=3)[0] == 200
    status, answer, _ = wider.chat(logit_bias={"4096": 1})
    assert status == 400 and "from 0 to 4095" in answer["error"]["message"]
    assert wider.chat(messages=[{"role": "user", "content": "a<more>"}])[0] == 400
    for prompt in ([4096], "a<more>"):
        for fields in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0}):
            body = {**GREEDY, "prompt": prompt, **fields}
            assert wider.ask("POST", TEXT, body)[0] == 400
    assert wider.complete("Call me", echo=True, logprobs=1)["choices"][0]["text"]
    assert wider.batch.alive


def test_exception_of_one_answer_ends_that_answer_alone(served, monkeypatch, capfd):
    alone = served.complete("Call me", max_tokens=30)["choices"][0]["text"]
    for name in ("take", "score"):
        real = getattr(Answer, name)

        def work(answer, *given, real=real):
            if 300 in answer._prompt:
                raise IndexError("nobody foresaw this")
            return real(answer, *given)

        monkeypatch.setattr(Answer, name, work)
        body = {**GREEDY, "prompt": [0, 300], "echo": True, "logprobs": 0}
        status, answer, _ = served.ask("POST", TEXT, body)
        assert status == 500 and "server's log" in answer["error"]["message"]
        assert served.complete("Call me", max_tokens=30)["choices"][0]["text"] == alone
        assert "nobody foresaw this" in capfd.readouterr().err
        monkeypatch.undo()
    served.idle()
    assert served.batch.alive


def test_every_response_has_an_id(served):
    for method, path, body in (
        ("GET", "/health", None),
        ("GET", "/nowhere", None),
        ("POST", CHAT, {**GREEDY, "messages": USER, "max_tokens": 1}),
        ("POST", TEXT, {**GREEDY, "prompt": "x", "stream": True}),
        ("POST", TEXT, b"{"),
    ):
        own = served.ask(method, path, body)[2]["x-request-id"]
        assert re.fullmatch("req_[0-9a-f]{32}", own)
        headers = served.ask(method, path, body, x_request_id="run-7.a:1")[2]
        assert headers["x-request-id"] == headers["request-id"] == "run-7.a:1"
        strange = served.ask(method, path, body, x_request_id="a b\x1b[31m")[2]["x-request-id"]
        assert strange.startswith("req_")
    assert served.ask("GET", "/health", Host="evil.example")[2]["x-request-id"]


def test_head_is_answered_wherever_get_is(served):
    for path, status in (("/health", 200), ("/v1/models", 200), ("/", 200), (TEXT, 405)):
        connection, response = served.open("HEAD", path)
        assert (response.status, response.read()) == (status, b"")
        connection.close()
        length = served.ask("GET", path)[2]["content-length"]
        assert response.headers["content-length"] == length


def test_page_is_shown_in_no_frame_of_others(served):
    policy = served.ask("GET", "/")[2]["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy


@pytest.mark.usefixtures("network")
def test_log_has_a_line_for_each_request_and_nothing_of_it(runtime, capfd):
    with Served(runtime, is_logged=True) as served:
        served.complete("A secret word", max_tokens=3)
        served.chat(n=2, max_tokens=1)
        served.ask("POST", TEXT, {"model": "a secret model", "prompt": "x"})
        served.ask("GET", "/no%0Awhere%1b[31m", Authorization="Bearer secret")
        for path in ("/health", "/stats", "/metrics"):
            served.ask("GET", path)
    lines = [line[20:] for line in capfd.readouterr().err.splitlines()]
    number, id_ = r"\d+\.\d+", "req_[0-9a-f]{32}"
    for line, expected in zip(
        lines,
        [
            rf"POST {TEXT} 200 in {number} s, \d+ \+ 3 tokens, first after {number} s, length",
            rf"POST {CHAT} 200 in {number} s, \d+ \+ 2 tokens, first after {number} s, "
            "length length",
            rf"POST {TEXT} 404 in {number} s",
            rf"GET /no\\nwhere\\x1b\[31m 404 in {number} s",
        ],
        strict=True,
    ):
        assert re.fullmatch(f"{expected}, {id_}", line), line
    assert "secret" not in "".join(lines)


def test_usage_in_the_chunks_of_a_stream(served):
    chat, text = {"messages": USER, "max_tokens": 4}, {"prompt": "Call me", "max_tokens": 4}
    for path, body in ((CHAT, chat), (TEXT, text)):
        events = served.events(path, {**GREEDY, **body, "stream_options": {"include_usage": True}})
        assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["usage"]["completion_tokens"] == 4 and events[-1]["choices"] == []
        options = {"include_usage": True, "continuous_usage_stats": True}
        scored = {**body, "logprobs": 1 if path == TEXT else True, "max_tokens": 40}
        sent, counts, scores = 0, [], "content" if path == CHAT else "tokens"
        for event in served.events(path, {**GREEDY, **scored, "stream_options": options}):
            for choice in event["choices"]:
                sent += len((choice["logprobs"] or {}).get(scores, ()))
            counts.append(event["usage"]["completion_tokens"])
            assert counts[-1] == sent, "the model was ahead"
        assert sent == 40 and counts == sorted(counts)
        assert all("usage" not in event for event in served.events(path, {**GREEDY, **body}))


def test_tools_that_load_a_server_get_answers_of_a_length(served, runtime):
    (end,) = runtime.eos_token_ids
    wish = {"logit_bias": {str(end): 100}, "max_tokens": 9}

    def count(**fields):
        return served.complete("Call me", **wish, **fields)["usage"]["completion_tokens"]

    assert (count(), count(min_tokens=5), count(ignore_eos=True)) == (0, 5, 9)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}}}
    answer = served.chat(response_format=form, min_tokens=8)[1]["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("1", "stop")
    endless = served.complete("Call me", max_tokens=-1, ignore_eos=True)
    assert endless["usage"]["total_tokens"] == 512
    assert served.chat(max_tokens=-1, ignore_eos=True)[1]["usage"]["total_tokens"] == 512
