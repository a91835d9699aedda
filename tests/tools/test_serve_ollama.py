"""Ollama's API on ``slotmoe serve``: what it answers is what OpenAI's answers to the same."""

import json
from datetime import datetime

import pytest

from slotmoe.tools.serve import requests
from tests.support.served import TOOLS, USER, WEATHER, Served, is_weather, until

TEXT = "/v1/completions"
ASK = {"model": "sample:latest", "messages": USER}
SHORT = {"temperature": 0, "num_predict": 12, "num_ctx": 2048, "mirostat": 0}


@pytest.fixture(scope="module")
def context():
    return 1024


def lines(served, path, **body):
    connection, response = served.open("POST", path, body)
    data = response.read().decode()
    connection.close()
    assert response.status == 200 and response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in data.splitlines()]


def whole(served, path="/api/chat", **body):
    status, answer = served.post(path, **{**ASK, "stream": False, **body})
    assert status == 200, answer
    return answer


def message(served, **body):
    return whole(served, **body)["message"]


def test_a_chat_whole_and_streamed(served):
    text = served.choice(max_tokens=12)["message"]["content"]
    answer = whole(served, options=SHORT)
    assert answer["message"] == {"role": "assistant", "content": text}
    *parts, last = lines(served, "/api/chat", **ASK, options=SHORT)
    assert "".join(part["message"]["content"] for part in parts) == text and len(parts) == 12
    assert not any(part["done"] for part in parts) and last["message"]["content"] == ""
    for end in (answer, last):
        assert (end["done"], end["done_reason"], end["eval_count"]) == (True, "length", 12)
        spans = [end[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
        assert sum(spans) == end["total_duration"] and min(spans) >= 0
        assert datetime.fromisoformat(end["created_at"]).tzinfo and end["model"] == "sample"


def test_options_are_honoured(served):
    def text(**options):
        body = {"model": "sample", "stream": False, "options": {"num_predict": 20, **options}}
        return served.post("/api/generate", **body, prompt="Call me", raw=True)[1]["response"]

    hot = {"temperature": 2, "seed": 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    hot |= {"presence_penalty": 1, "frequency_penalty": 0.5}
    same = {**hot, "repetition_penalty": 1.3}
    assert text(**hot, repeat_penalty=1.3) == served.text(max_tokens=20, **same)
    greedy = text(temperature=0)
    assert text(temperature=0, stop=[greedy[5:8]]) == greedy[: greedy.index(greedy[5:8])]
    for count in (-1, -2, 0):
        assert text(temperature=0, num_predict=count, stop=[greedy[-4:]]) in greedy
    own = served.post(TEXT, model="sample", prompt="Call me", max_tokens=20, seed=3)[1]
    assert text(seed=3) == own["choices"][0]["text"]


def test_texts(served):
    """Raw, through the template, and none at all."""
    about = {"model": "sample", "options": SHORT}
    raw = lines(served, "/api/generate", **about, prompt="Call me", raw=True)
    assert "".join(part["response"] for part in raw) == served.text(max_tokens=12)
    system = {"role": "system", "content": "Be brief."}
    told = served.choice(messages=[system, *USER], max_tokens=12)["message"]["content"]
    asked = {
        "system": system["content"],
        "prompt": USER[0]["content"],
        "images": [],
        "template": "",
    }
    assert "".join(p["response"] for p in lines(served, "/api/generate", **about, **asked)) == told
    empty = served.post("/api/generate", model="sample", prompt="", suffix="")[1]
    assert (empty["response"], empty["done"], empty["done_reason"]) == ("", True, "load")
    assert served.post("/api/chat", model="sample", keep_alive=0)[1]["done_reason"] == "unload"


def test_formats(served):
    schema = {**WEATHER, "type": "object"}
    assert is_weather(message(served, format=schema, options={"num_predict": 60})["content"])
    asked = {"path": "/api/generate", "prompt": "x", "raw": True, "format": schema}
    asked |= {"model": "sample", "stream": False}
    assert is_weather(served.post(**asked)[1]["response"])
    begun = message(served, format="json", options={"num_predict": 8})["content"]
    assert begun.lstrip().startswith("{")
    scored = whole(served, logprobs=True, top_logprobs=2, options=SHORT)["logprobs"]
    assert len(scored) == 12 and {len(token["top_logprobs"]) for token in scored} == {2}


@pytest.fixture
def must_call(monkeypatch):
    """Ollama's API has no word for it."""
    policy = requests.tool_policy
    monkeypatch.setattr(requests, "tool_policy", lambda tools, _: policy(tools, "required"))


@pytest.mark.parametrize("limit", [200, 40])
def test_calls_have_objects_whole_and_streamed(served, must_call, limit):
    """The last one may be cut off."""
    options = {"temperature": 2, "seed": 7, "num_predict": limit}
    answer = whole(served, tools=TOOLS, options=options)
    calls = answer["message"]["tool_calls"]
    *parts, last = lines(served, "/api/chat", **ASK, tools=TOOLS, options=options)
    streamed = [call for part in parts for call in part["message"].get("tool_calls", ())]
    assert [one["function"] for one in streamed] == [one["function"] for one in calls] != []
    for index, call in enumerate(calls):
        given, name = call["function"]["arguments"], call["function"]["name"]
        assert is_weather(given) if name == "weather" else given == {}
        assert call["function"]["index"] == index
    assert last["done_reason"] == answer["done_reason"]


CALLS = [("weather", {"city": "Rome"}), ("stop", {}), ("weather", {"city": "Paris"})]
RESULTS = [("stop", "2"), ("weather", "1"), ("weather", "3")]


def test_results_need_no_ids(served):
    """What the model reads is what it reads of the same conversation with ids."""
    calls = [{"function": {"name": name, "arguments": given}} for name, given in CALLS]
    results = [{"role": "tool", "tool_name": name, "content": text} for name, text in RESULTS]
    ours = [*USER, {"role": "assistant", "tool_calls": calls}, *results]
    numbered = [
        {"id": str(n), "type": "function", "function": {"name": f, "arguments": json.dumps(given)}}
        for n, (f, given) in enumerate(CALLS)
    ]
    answered = [
        {"role": "tool", "tool_call_id": number, "content": text}
        for number, (_, text) in zip("102", RESULTS, strict=True)
    ]
    theirs = [*USER, {"role": "assistant", "tool_calls": numbered}, *answered]
    asked = {"tools": TOOLS, "max_tokens": 12}
    want = served.choice(messages=theirs, **asked)["message"]["content"]
    answer = whole(served, messages=ours, tools=TOOLS, options=SHORT)
    assert answer["message"]["content"] == want
    assert (
        answer["prompt_eval_count"]
        == served.chat(messages=theirs, **asked)[1]["usage"]["prompt_tokens"]
    )
    named = [{**result, "tool_call_id": str(n)} for n, result in enumerate(results)]
    with_ids = [{**call, "id": i} for call, i in zip(calls, "102", strict=True)]
    ours = [*USER, {"role": "assistant", "tool_calls": with_ids}, *named]
    assert message(served, messages=ours, tools=TOOLS, options=SHORT)["content"] == want
    status, answer = served.post("/api/chat", **{**ASK, "messages": [*USER, results[0]]})
    assert status == 400 and "answers no call" in answer["error"]


def test_a_begun_answer_goes_on(served):
    begun = {"role": "assistant", "content": " I"}
    body = {"messages": [*USER, begun], "max_tokens": 12}
    want = "".join(block["text"] for block in served.message(**body)[1]["content"])
    assert message(served, messages=[*USER, begun], options=SHORT)["content"] == want


WRONG = {
    "messages: images is not supported by this server": {
        "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]
    },
    "options.temperature": {"options": {"temperature": "hot"}},
    "'other' is not here": {"model": "other"},
    "format": {"format": "xml"},
}


@pytest.mark.parametrize("reason", WRONG)
def test_refusals_are_in_ollamas_form(served, reason):
    status, answer = served.post("/api/chat", **{**ASK, **WRONG[reason]})
    assert status in (400, 404) and list(answer) == ["error"] and reason in answer["error"]
    assert "error" in served.ask("GET", "/api/nothing")[1]
    for path, more in (("generate", {"suffix": "x"}), ("generate", {"context": [1]})):
        assert served.post(f"/api/{path}", model="sample", prompt="x", **more)[0] == 400


def test_bodies_are_json_whatever_clients_call_them(served):
    """As ``curl -d`` sends them; from a page only what it had to ask for."""
    own = {"Host": "localhost:1", "Origin": "http://localhost:1"}
    for headers, status in (({}, 200), (own, 415)):
        for kind in ("application/x-www-form-urlencoded", ""):
            about = {**headers, "Content_Type": kind}
            assert served.ask("POST", "/api/show", {"model": "sample"}, **about)[0] == status
    assert served.ask("POST", TEXT, {}, Content_Type="text/plain")[0] == 415


def test_a_stream_that_fails_says_so_in_its_last_line(served, gate):
    connection, response = served.open("POST", "/api/chat", {**ASK, "options": SHORT})
    until(lambda: served.service.running)
    for job in [*served.service._open]:
        job.cancel("error")
    gate.set()
    assert list(json.loads(response.read().splitlines()[-1])) == ["error"]
    connection.close()


def test_the_model_is_listed_and_shown(served, runtime):
    for path in ("/api/tags", "/api/ps"):
        (model,) = served.ask("GET", path)[1]["models"]
        assert (model["name"], model["context_length"]) == ("sample:latest", runtime.context)
        assert model["size"] > 1 << 20 and model["details"]["family"] == "deepseekv2"
    for about in ({"model": "sample"}, {"name": "sample:latest"}):
        shown = served.post("/api/show", **about)[1]
        assert shown["capabilities"] == ["completion", "tools"]
        assert shown["model_info"]["deepseekv2.context_length"] == runtime.context
        assert "temperature 0.7" in shown["parameters"].splitlines()
    assert served.post("/api/show", model="other")[0] == 404
    names = ("a:8b", "hub/b", "*")
    with Served(runtime, names=names) as other:
        listed = [model["name"] for model in other.ask("GET", "/api/tags")[1]["models"]]
        assert listed == ["a:8b", "hub/b:latest"]
        for name in (*listed, "anything"):
            assert other.post("/api/show", model=name)[0] == 200
    assert served.ask("GET", "/api/version")[1]["version"].count(".") == 2


def test_thinking(served, runtime, monkeypatch):
    from slotmoe.model.tokenizer import ReasoningMarks

    monkeypatch.setattr(runtime.tokenizer, "reasoning", ReasoningMarks("Assistant:", ",", {}))
    asked = {**ASK, "messages": [{"role": "user", "content": "It is a truth"}]}
    options = {"temperature": 0, "num_predict": 60}
    want = served.choice(messages=asked["messages"], max_tokens=60)["message"]
    answer = whole(served, **asked, options=options)["message"]
    assert (answer["thinking"], answer["content"]) == (want["reasoning_content"], want["content"])
    parts = [part["message"] for part in lines(served, "/api/chat", **asked, options=options)]
    assert "".join(part.get("thinking", "") for part in parts) == answer["thinking"]
    assert "".join(part["content"] for part in parts) == answer["content"]
    assert "thinking" in served.post("/api/show", model="sample")[1]["capabilities"]
    seen = []
    monkeypatch.setattr(served.service, "chat_text", lambda chat: seen.append(chat.effort) or "x")
    for think in (None, True, False, "max"):
        whole(served, **asked, think=think, options=options)
    assert seen == [None, "high", "none", "max"]
