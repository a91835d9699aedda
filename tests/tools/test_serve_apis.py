"""``slotmoe serve``: the APIs of OpenAI, Anthropic and Ollama.  What one answers the others do,
whole and streamed, by their makers' clients and by hand."""

import json
import shlex
import subprocess
import sys

import pydantic
import pytest

from slotmoe.model.chat import render_chat
from slotmoe.model.reasoning import ReasoningMarks
from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.apis import (
    ASKED,
    CHAT,
    KING,
    MESSAGES,
    OLLAMA,
    OPTIONS,
    RESPONSES,
    TOOL,
    ask,
    events,
    parts_of,
    streamed_parts,
)
from tests.support.served import (
    ANTHROPIC_TOOL,
    GREEDY,
    TOOLS,
    USER,
    WEATHER,
    Served,
    is_weather,
    until,
)


def types_of(path):
    """By what the makers' clients know answers and events."""
    from anthropic.types import Message, RawMessageStreamEvent
    from openai.types import chat, responses

    types = {CHAT: (chat.ChatCompletion, chat.ChatCompletionChunk)}
    types[RESPONSES] = responses.Response, responses.ResponseStreamEvent
    types[MESSAGES] = Message, RawMessageStreamEvent
    return types.get(path, (dict, dict))


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_is_the_same_on_each_route(served, path):
    text = served.choice(max_tokens=12)["message"]["content"]
    answer, found = ask(served, path), events(served, path)
    assert parts_of(path, answer) == streamed_parts(path, found) == ("", text)
    whole, event = types_of(path)
    for kind, one in ((whole, answer), *((event, one) for one in found)):
        pydantic.TypeAdapter(kind).validate_json(json.dumps(one), strict=True)
    end = {
        CHAT: lambda: answer["choices"][0]["finish_reason"] == "length",
        RESPONSES: lambda: answer["incomplete_details"]["reason"] == "max_output_tokens",
        MESSAGES: lambda: answer["stop_reason"] == "max_tokens",
    }
    assert answer.get("eval_count", 12) == 12
    assert end.get(path, lambda: answer["done_reason"] == found[-1]["done_reason"] == "length")()


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, OLLAMA])
def test_reasoning_is_apart_on_each_route(served, runtime, monkeypatch, path):
    """The sample does not think.  Its marks are taken to be the end of its prompt and a comma."""
    monkeypatch.setattr(runtime.tokenizer, "reasoning", ReasoningMarks("Assistant:", ",", {}))
    said = {"messages": [{"role": "user", "content": "It is a truth"}]}
    more = {RESPONSES: {"input": "It is a truth", "max_output_tokens": 60}}
    more[OLLAMA] = {**said, "options": {**OPTIONS, "num_predict": 60}}
    fields = more.get(path, {**said, "max_tokens": 60})
    prompt = served.post("/apply-template", **said)[1]["prompt"]
    thought, comma, text = served.text(prompt, max_tokens=60).partition(",")
    assert comma and thought.strip() and text.strip()
    expected = thought.strip(), text.lstrip()
    answer = ask(served, path, **fields)
    assert parts_of(path, answer) == expected
    assert streamed_parts(path, events(served, path, **fields)) == expected


SCHEMA = {"type": "json_schema", "schema": WEATHER}
ASKED_FOR_SCHEMA = {
    CHAT: {"response_format": {"type": "json_schema", "json_schema": SCHEMA}, "max_tokens": 60},
    RESPONSES: {"text": {"format": {**SCHEMA, "name": "x"}}, "max_output_tokens": 60},
    MESSAGES: {"output_config": {"format": SCHEMA}, "max_tokens": 60},
    OLLAMA: {"format": WEATHER, "options": {**OPTIONS, "num_predict": 60}},
}


@pytest.mark.parametrize("path", ASKED_FOR_SCHEMA)
def test_a_schema_holds_the_answer_of_each_route(served, path):
    assert is_weather(parts_of(path, ask(served, path, **ASKED_FOR_SCHEMA[path]))[1])


def test_openai_client_calls_and_answers(openai_client):
    completions = openai_client.chat.completions
    named = {"type": "function", "function": {"name": "weather"}}
    options = {**GREEDY, "messages": USER, "max_tokens": 200, "tools": TOOLS, "tool_choice": named}
    answer = completions.create(**options, logprobs=True)
    (call,) = answer.choices[0].message.tool_calls
    assert is_weather(call.function.arguments)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    with completions.stream(**options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.arguments == call.function.arguments
    rain = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "It rains."}
    history = {"messages": [*USER, answer.choices[0].message, rain], "tool_choice": "auto"}
    said = completions.create(**{**options, **history, "max_tokens": 4})
    assert said.usage.prompt_tokens > answer.usage.prompt_tokens


def test_openai_client_calls_by_responses(openai_client):
    asked = {**GREEDY, "input": KING, "max_output_tokens": 200, "tools": [TOOL]}
    named = {**asked, "tool_choice": {"type": "function", "name": "weather"}}
    answer = openai_client.responses.create(**named)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert answer.status == "completed" and is_weather(call.arguments)
    with openai_client.responses.stream(**named) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    items = [{"role": "user", "content": KING}, *answer.output, result]
    said = openai_client.responses.create(**{**asked, "input": items, "max_output_tokens": 4})
    counted = openai_client.responses.input_tokens.count(model="sample", input=items, tools=[TOOL])
    assert said.usage.input_tokens == counted.input_tokens > answer.usage.input_tokens


def test_anthropic_client_calls_and_answers(anthropic_client):
    from anthropic import NotFoundError

    messages = anthropic_client.messages
    options = {"model": "sample", "messages": USER, "max_tokens": 200, "tools": [ANTHROPIC_TOOL]}
    options["extra_body"] = {"temperature": 0}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = messages.create(**options, tool_choice=choice)
    (block,) = answer.content
    assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert is_weather(block.input)
    with messages.stream(**options, tool_choice={"type": "tool", "name": "weather"}) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input == block.input
    rain = {"type": "tool_result", "tool_use_id": block.id, "is_error": False}
    rain["content"] = [{"type": "text", "text": "It rains."}]
    history = [*USER, {"role": "assistant", "content": answer.content}]
    history.append({"role": "user", "content": [rain]})
    said = messages.create(**{**options, "messages": history, "max_tokens": 4})
    read = said.usage.input_tokens + said.usage.cache_read_input_tokens
    counted = messages.count_tokens(model="sample", messages=history, tools=[ANTHROPIC_TOOL])
    assert counted.input_tokens == read > answer.usage.input_tokens
    cut = messages.create(**{**options, "tools": [], "stop_sequences": ["e"]})
    assert cut.stop_reason == "stop_sequence" and "e" not in cut.content[0].text
    with pytest.raises(NotFoundError):
        messages.count_tokens(model="other", messages=USER)


def test_stop_strings_end_text_and_never_a_call(served):
    """Each stop string is in the call that the model is made to write, or in its marks."""
    options = {"tools": TOOLS, "max_tokens": 120, "seed": 3}
    named = {"type": "function", "function": {"name": "weather"}}
    stop = ["city", "<", "_call>", '": ', "}"]
    for how in ({}, {"stop": stop}, {"stop": stop, "temperature": 2}):
        choice = served.choice(**options, tool_choice=named, **how)
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert is_weather(call["function"]["arguments"])
    text = served.choice(**options)["message"]["content"]
    stopped = served.choice(**options, stop=["zzz", text[20:24]])
    assert stopped["message"]["content"] == text[: text.index(text[20:24])]
    assert stopped["finish_reason"] == "stop"


# Errors and streams


ENDLESS = {"properties": {"a": {"$ref": "#/$defs/r"}}, "required": ["a"], "type": "object"}
ENDLESS |= {"additionalProperties": False, "$defs": {"r": {"$ref": "#/$defs/r"}}}


def test_a_failure_in_the_middle_of_a_stream_is_an_event(served):
    tool = {"type": "function", "name": "f", "parameters": ENDLESS}
    must = {"tools": [tool], "tool_choice": "required", "max_output_tokens": 99}
    last = events(served, RESPONSES, **must)[-1]
    pydantic.TypeAdapter(types_of(RESPONSES)[1]).validate_json(json.dumps(last), strict=True)
    code = last["response"]["error"]["code"]
    assert (last["type"], code) == ("response.failed", "invalid_prompt")
    failed = events(served, OLLAMA, format=ENDLESS, options={"num_predict": 99})[-1]
    assert "nothing that could come next" in failed["error"]


PINGS = {CHAT: ": ping\n\n", MESSAGES: 'event: ping\ndata: {"type":"ping"}\n\n'}


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize("path", PINGS)
def test_silent_streams_are_pinged(runtime, monkeypatch, gate, path):
    """Until a place is free, and again while an answer shows nothing."""
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.02)
    with Served(runtime, sequences=1) as served:
        first, _ = served.open("POST", CHAT, {**ASKED[CHAT], "stream": True})
        until(lambda: served.service.running)
        connection, response = served.open("POST", path, {**ASKED[path], "stream": True})
        data = b""
        while data.count(PINGS[path].encode()) < 3 and (more := response.read1(4096)):
            data += more
        gate.set()
        data += response.read()
        first.close()
        connection.close()
        others = data.decode().replace(PINGS[path], "").split("\n\n")
        assert all(part.startswith(("data: ", "event: ")) for part in others[:-1])
        served.idle()


def test_errors_have_the_form_of_their_api(served):
    for method, path, status, kind in (
        ("POST", f"{MESSAGES}/batches", 404, "not_found_error"),
        ("GET", f"{MESSAGES}/count_tokens", 405, "invalid_request_error"),
        ("POST", f"{MESSAGES}/count_tokens", 400, "invalid_request_error"),
    ):
        found, answer, _ = served.ask(method, path, {} if method == "POST" else None)
        assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kind), path
    answer = served.ask("POST", MESSAGES, ASKED[MESSAGES], Origin="http://evil.example")[1]
    assert answer["error"]["type"] == "permission_error"
    assert list(served.ask("GET", "/api/nothing")[1]) == ["error"]


# Anthropic

SYSTEM = {"role": "system", "content": "The date is now known."}
TOLD = "<system>\nThe date is now known.\n</system>"
ENDED = "{% if add_generation_prompt %}A:{% endif %}"
KEEPS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + ENDED
# As DeepSeek-V3 has it: all of the system's come first.
HOISTS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endif %}{% endfor %}" + ENDED
)


@pytest.fixture
def prompt_of(served):
    """What the model reads of a request."""

    def prompt_of(**fields):
        chat = MessagesRequest(**{**ASKED[MESSAGES], **fields}).chat()
        return type(served.service.dialect)(served.service.tokenizer).prompt(chat)

    return prompt_of


@pytest.mark.parametrize(
    ("template", "told"), [(KEEPS, f"system: {SYSTEM['content']}\n"), (HOISTS, TOLD)]
)
def test_later_messages_of_the_systems_stay_in_their_place(
    prompt_of, runtime, monkeypatch, template, told
):
    """The text of a request is the beginning of the next one's, whatever the template."""
    monkeypatch.setattr(runtime.tokenizer, "template", template)
    answer = {"role": "assistant", "content": "yes"}
    turns, texts = [*USER, SYSTEM], list[str]()
    for more in ([], [answer, *USER], [answer, *USER, SYSTEM, *USER]):
        turns = turns + more
        texts.append(prompt_of(messages=turns, system="Be brief.").removesuffix("A:"))
    first, second, third = texts
    assert second.startswith(first) and third.startswith(second)
    assert [text.count(told) for text in texts] == [1, 1, 2]


LATE = {**ANTHROPIC_TOOL, "name": "late", "description": "Comes late.", "defer_loading": True}
FIND = {"type": "tool_use", "id": "f", "name": "weather", "input": {"city": "Rome", "days": 1}}
FOUND = {"type": "tool_result", "tool_use_id": "f"}
FOUND["content"] = [{"type": "tool_reference", "tool_name": "late"}]


def test_a_deferred_tool_is_described_where_it_is_offered(served, prompt_of):
    """So that what is before it stays cached, and it can be called from there on."""
    tools, turns = [ANTHROPIC_TOOL, LATE], [*USER, {"role": "assistant", "content": [FIND]}]
    before = prompt_of(tools=tools[:1])
    assert prompt_of(tools=tools) == before
    turns += [{"role": "user", "content": [FOUND]}]
    after = prompt_of(tools=tools, messages=turns)
    assert after.startswith(before) and after.count("Comes late.") == 1
    named = {"tools": tools, "tool_choice": {"type": "tool", "name": "late"}, "max_tokens": 200}
    assert ask(served, MESSAGES, **named, messages=turns)["content"][0]["name"] == "late"
    change = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "late"}}
    system = {"role": "system", "content": [change]}
    gone = {"role": "system", "content": [{**change, "type": "tool_removal"}]}
    for messages, status in (([], 400), ([system], 200), ([system, gone], 400)):
        asked = {**ASKED[MESSAGES], **named, "messages": [*USER, *messages]}
        assert served.post(MESSAGES, **asked)[0] == status


PLAIN = {"type": "text", "media_type": "text/plain", "data": "Lear is old."}
PARTS = [{"type": "text", "text": "Lear "}, {"type": "text", "text": "is old."}]
QUOTED = [
    {"type": "document", "source": PLAIN, "title": "Lear", "citations": {"enabled": False}},
    {"type": "document", "source": {"type": "content", "content": PARTS}},
    {"type": "search_result", "source": "http://a/b", "title": 'A "play"', "content": PARTS},
]


def test_documents_and_search_results_are_read_as_text(prompt_of):
    found = {**FOUND, "content": QUOTED}
    turns = [*USER, {"role": "assistant", "content": [FIND]}, {"role": "user", "content": [found]}]
    for messages in ([{"role": "user", "content": QUOTED}], turns):
        assert prompt_of(tools=[ANTHROPIC_TOOL], messages=messages).count("Lear is old.\n") == 3


# Ollama


@pytest.mark.parametrize("limit", [200, 40])
def test_ollamas_calls_have_objects(served, monkeypatch, limit):
    """The last one may be cut off.  Ollama's API has no word for a call that must be."""
    policy = requests.tool_policy
    monkeypatch.setattr(requests, "tool_policy", lambda tools, _: policy(tools, "required"))
    fields = {"tools": TOOLS, "options": {"temperature": 2, "seed": 7, "num_predict": limit}}
    calls = ask(served, OLLAMA, **fields)["message"]["tool_calls"]
    parts = events(served, OLLAMA, **fields)
    streamed = [call for part in parts for call in part["message"].get("tool_calls", ())]
    assert [one["function"] for one in streamed] == [one["function"] for one in calls] != []
    for index, call in enumerate(calls):
        given, name = call["function"]["arguments"], call["function"]["name"]
        assert is_weather(given) if name == "weather" else given == {}
        assert call["function"]["index"] == index


def test_ollamas_results_need_no_ids(served, texts):
    """What the model reads is what it reads of the same conversation with ids."""
    made = [("weather", {"city": "Rome"}), ("stop", {}), ("weather", {"city": "Paris"})]
    ours, theirs = [], []
    for n, (name, of) in enumerate(made):
        ours.append({"function": {"name": name, "arguments": of}})
        function = {"name": name, "arguments": json.dumps(of)}
        theirs.append({"id": str(n), "type": "function", "function": function})
    said = {"role": "assistant", "content": ""}
    results = ("stop", "1"), ("weather", "0"), ("weather", "2")
    ours = [*USER, {**said, "tool_calls": ours}]
    ours += [{"role": "tool", "tool_name": name, "content": n} for name, n in results]
    theirs = [*USER, {**said, "tool_calls": theirs}]
    theirs += [{"role": "tool", "tool_call_id": n, "content": n} for _, n in results]
    ask(served, CHAT, messages=theirs, tools=TOOLS)
    ask(served, OLLAMA, messages=ours, tools=TOOLS)
    assert texts[0] == texts[1]
    status, answer = served.post(OLLAMA, **{**ASKED[OLLAMA], "messages": [*USER, ours[-1]]})
    assert status == 400 and "answers no call" in answer["error"]


def test_ollamas_options_and_texts(served, runtime):
    def text(**options):
        fields = {"prompt": "Call me", "raw": True, "options": {"num_predict": 20, **options}}
        return ask(served, "/api/generate", **fields)["response"]

    hot = {"temperature": 2, "seed": 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    hot |= {"presence_penalty": 1, "frequency_penalty": 0.5}
    want = served.text(max_tokens=20, **hot, repetition_penalty=1.3)
    assert text(**hot, repeat_penalty=1.3) == want
    greedy = text(temperature=0)
    assert text(temperature=0, stop=[greedy[5:8]]) == greedy[: greedy.index(greedy[5:8])]
    assert text(temperature=0, num_predict=-1, stop=[greedy[-4:]]) in greedy
    begun = [*USER, {"role": "assistant", "content": " I"}]  # it is gone on with
    want = served.text(render_chat(runtime.tokenizer, begun, begun=True), max_tokens=12)
    for path in (MESSAGES, OLLAMA):
        assert parts_of(path, ask(served, path, messages=begun)) == ("", want)
    told = [{"role": "system", "content": "Be brief."}, *USER]
    generated = ask(served, "/api/generate", system="Be brief.", images=[], template="")
    assert generated["response"] == parts_of(CHAT, ask(served, CHAT, messages=told))[1]
    spans = [generated[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
    assert sum(spans) == generated["total_duration"] and min(spans) >= 0
    assert len(ask(served, OLLAMA, logprobs=True, top_logprobs=2)["logprobs"]) == 12
    assert ask(served, "/api/generate", prompt="", suffix="")["done_reason"] == "load"
    assert ask(served, OLLAMA, messages=None, keep_alive=0)["done_reason"] == "unload"


def test_ollama_lists_and_shows_the_model(served, runtime):
    for path in ("/api/tags", "/api/ps"):
        (model,) = served.ask("GET", path)[1]["models"]
        assert (model["name"], model["context_length"]) == ("sample:latest", runtime.context)
        assert model["size"] > 1 << 20 and model["details"]["family"] == "deepseekv2"
    shown = served.post("/api/show", name="sample:latest")[1]
    assert shown["capabilities"] == ["completion", "tools"]
    assert shown["model_info"]["deepseekv2.context_length"] == runtime.context
    assert "temperature 0.7" in shown["parameters"].splitlines()
    # As ``curl -d`` sends bodies; from a page only what it had to ask for.
    own = {"Host": "localhost:1", "Origin": "http://localhost:1"}
    for headers, status in (({}, 200), (own, 415)):
        about = {**headers, "Content_Type": "application/x-www-form-urlencoded"}
        assert served.ask("POST", "/api/show", {"model": "sample"}, **about)[0] == status


# Responses


def test_items_become_messages():
    call, result = {"type": "function_call", "arguments": "{}"}, {"type": "function_call_output"}
    items = [
        {"role": "developer", "content": "system"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {**call, "call_id": "1", "name": "f"},
        {"type": "reasoning", "id": "r", "summary": []},
        {**call, "call_id": "2", "name": "g"},
        {**result, "call_id": "2", "output": "two"},
        {**result, "call_id": "1", "output": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {**call, "call_id": "3", "name": "f"},
    ]
    body = ResponsesRequest(model="x", input=items, instructions="be")
    found = [(m.role, m.text, [c.id for c in m.calls], m.thoughts) for m in body.chat().messages]
    assert found[:2] == [("system", "be\n\nsystem", [], ""), ("assistant", "b", ["1", "2"], "")]
    assert found[2:4] == [("tool", "two", [], ""), ("tool", "one", [], "")]
    assert found[4:] == [("assistant", "", ["3"], "Hm")]


# The time-outs: the model's speed is not the interface's.
FUZZ = """--no-color --checks all --continue-on-failure --exclude-checks positive_data_acceptance
    --output-sanitize false --phases fuzzing --max-examples 100
    --request-timeout 90 --max-response-time 90"""
# Of what breaks a rule; 413 of many small items, whose bytes are too many before they are counted.
REFUSALS = "[checks]\nnegative_data_rejection.expected-statuses = [400, 404, 413]\n"


@pytest.mark.usefixtures("nightly")
def test_schemathesis(network, runtime, tmp_path):
    """What ``schemathesis run`` finds with its checks, whatever name it gives the model."""
    (config := tmp_path / "schemathesis.toml").write_text(REFUSALS)
    with Served(runtime, names=("sample", "*")) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)]
        command += ["run", *shlex.split(FUZZ)]
        command.append(f"{served.address}/openapi.json")
        found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
