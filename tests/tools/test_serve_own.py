"""``slotmoe serve``: what each API has of its own."""

import json
from datetime import datetime
from typing import Literal

import anthropic
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from slotmoe.tools.serve import requests
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.apis import (
    ASKED,
    CHAT,
    MESSAGES,
    OLLAMA,
    RESPONSES,
    TOOL,
    ask,
    counts_of,
    events,
    parts_of,
)
from tests.support.served import ANTHROPIC_TOOL, TOOLS, USER, Served, is_weather

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def context():
    return 1024


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
# As Mistral has it: of the user's and the assistant's messages none follow each other.
RAISES = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if not loop.first %}"
RAISES += "{% if (m['role'] == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
RAISES += "{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}" + KEEPS


@pytest.fixture
def prompt_of(served):
    """What the model reads of a request."""

    def prompt_of(**fields):
        chat = MessagesRequest(**{**ASKED[MESSAGES], **fields}).chat()
        return type(served.service.dialect)(served.service.tokenizer).prompt(chat)

    return prompt_of


@pytest.mark.parametrize(
    ("template", "told"),
    [(KEEPS, f"system: {SYSTEM['content']}\n"), (HOISTS, TOLD), (RAISES, TOLD)],
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


def test_what_the_system_says_first_is_one_text(prompt_of):
    billed = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.34c;"}
    blocks = [billed, {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    expected = prompt_of(system="Be brief.\n\nThe date is now known.")
    for system in (blocks, "Be brief."):
        assert prompt_of(system=system, messages=[SYSTEM, *USER]) == expected


LATE = {**ANTHROPIC_TOOL, "name": "late", "description": "Comes late.", "defer_loading": True}
FIND = {"type": "tool_use", "id": "f", "name": "weather", "input": {"city": "Rome", "days": 1}}
FOUND = {"type": "tool_result", "tool_use_id": "f"}
FOUND["content"] = [{"type": "tool_reference", "tool_name": "late"}]


def test_a_deferred_tool_is_described_where_it_is_offered(served, prompt_of):
    """So that what is before it stays cached, and it can be called from there on."""
    tools, turns = [ANTHROPIC_TOOL, LATE], [*USER, {"role": "assistant", "content": [FIND]}]
    before = prompt_of(tools=tools[:1])
    assert prompt_of(tools=tools) == before
    turns += [{"role": "user", "content": [{**FOUND, "content": FOUND["content"] * 3}]}]
    after = prompt_of(tools=tools, messages=turns)
    assert after.startswith(before) and after.count("Comes late.") == 1
    named = {"tools": tools, "tool_choice": {"type": "tool", "name": "late"}, "max_tokens": 200}
    assert ask(served, MESSAGES, **named, messages=turns)["content"][0]["name"] == "late"
    change = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "late"}}
    system = {"role": "system", "content": [change], "clear_at": "never"}
    assert "Comes late." in prompt_of(tools=tools, messages=[*USER, system])
    gone = {"role": "system", "content": [{**change, "type": "tool_removal"}]}
    for messages, status in (
        (USER, 400),  # nothing has offered it
        ([*USER, system], 200),
        ([*USER, system, gone], 400),
    ):
        assert served.message(**named, messages=messages)[0] == status
    assert served.message(messages=[*USER, system])[0] == 400  # without tools
    many = [{"name": f"f{n}", "input_schema": {"type": "object"}} for n in range(300)]
    assert "f299" in prompt_of(tools=many)
    assert served.message(tools=many, max_tokens=1)[1]["error"]["message"].startswith("the prompt")


PLAIN = {"type": "text", "media_type": "text/plain", "data": "Lear is old."}
PARTS = [{"type": "text", "text": "Lear "}, {"type": "text", "text": "is old."}]
DOCUMENT = {"type": "document", "source": PLAIN, "title": "Lear", "citations": {"enabled": False}}
QUOTED = [
    DOCUMENT,
    {**DOCUMENT, "source": {"type": "content", "content": PARTS}},
    {"type": "search_result", "source": "http://a/b", "title": 'A "play"', "content": PARTS},
]


@pytest.mark.parametrize("block", QUOTED)
def test_documents_and_search_results_are_read_as_text(prompt_of, block):
    asked = [{"role": "user", "content": [block, {"type": "text", "text": "Who?"}]}]
    assert "Lear is old.\n" in prompt_of(messages=asked)
    found = {**FOUND, "content": [block]}
    turns = [*USER, {"role": "assistant", "content": [FIND]}, {"role": "user", "content": [found]}]
    assert "Lear is old.\n" in prompt_of(tools=[ANTHROPIC_TOOL], messages=turns)


def test_thread_is_refused_so_that_clients_go_on_without(served, anthropic_client):
    status, answer = served.message(thread={"type": "create"})
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert (status, answer["error"]["details"]) == (400, details)

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    asked = {"model": "sample", "messages": USER, "max_tokens": 300, "tools": [weather]}
    choice = {"type": "tool", "name": "weather"}
    run = anthropic_client.beta.messages.tool_runner
    messages = list(run(**asked, tool_choice=choice, max_iterations=2))
    assert [message.content[0].type for message in messages] == ["tool_use"] * 2


def test_last_message_of_the_assistants_is_gone_on_with(served, runtime):
    whole = parts_of(MESSAGES, ask(served, MESSAGES))[1]
    messages = [*USER, {"role": "assistant", "content": whole[: len(whole) // 2]}]
    answer = ask(served, MESSAGES, messages=messages)
    text = runtime.tokenizer.chat(messages, begun=True)
    assert text.endswith(whole[: len(whole) // 2])
    assert parts_of(MESSAGES, answer)[1] == served.text(text, max_tokens=12)
    likeliest = ask(served, MESSAGES, temperature=1, top_p=0)
    assert parts_of(MESSAGES, likeliest)[1] == whole


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


def test_ollamas_results_need_no_ids(served, monkeypatch):
    """What the model reads is what it reads of the same conversation with ids."""
    made = [("weather", {"city": "Rome"}), ("stop", {}), ("weather", {"city": "Paris"})]
    calls = [{"function": {"name": name, "arguments": given}} for name, given in made]
    results = [("stop", "2", "1"), ("weather", "1", "0"), ("weather", "3", "2")]
    named = [{"role": "tool", "tool_name": name, "content": text} for name, text, _ in results]
    ours = [*USER, {"role": "assistant", "content": "", "tool_calls": calls}, *named]
    numbered = [
        {"id": str(n), "type": "function", "function": {"name": name, "arguments": json.dumps(of)}}
        for n, (name, of) in enumerate(made)
    ]
    answered = [{"role": "tool", "tool_call_id": n, "content": text} for _, text, n in results]
    theirs = [*USER, {"role": "assistant", "content": "", "tool_calls": numbered}, *answered]
    texts, encode = [], served.service.encode
    monkeypatch.setattr(served.service, "encode", lambda text: texts.append(text) or encode(text))
    want = ask(served, CHAT, messages=theirs, tools=TOOLS)
    got = ask(served, OLLAMA, messages=ours, tools=TOOLS)
    assert texts[0] == texts[1]
    assert parts_of(CHAT, want) == parts_of(OLLAMA, got) and counts_of(want) == counts_of(got)
    status, answer = served.post(OLLAMA, **{**ASKED[OLLAMA], "messages": [*USER, named[0]]})
    assert status == 400 and "answers no call" in answer["error"]


def test_ollamas_options_and_texts(served):
    def text(**options):
        fields = {"prompt": "Call me", "raw": True, "options": {"num_predict": 20, **options}}
        return ask(served, "/api/generate", **fields)["response"]

    hot = {"temperature": 2, "seed": 5, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    hot |= {"presence_penalty": 1, "frequency_penalty": 0.5}
    assert text(**hot, repeat_penalty=1.3) == served.text(
        max_tokens=20, **hot, repetition_penalty=1.3
    )
    greedy = text(temperature=0)
    assert text(temperature=0, stop=[greedy[5:8]]) == greedy[: greedy.index(greedy[5:8])]
    for count in (-1, -2, 0):
        assert text(temperature=0, num_predict=count, stop=[greedy[-4:]]) in greedy
    begun = [*USER, {"role": "assistant", "content": " I"}]
    want = parts_of(MESSAGES, ask(served, MESSAGES, messages=begun))
    assert parts_of(OLLAMA, ask(served, OLLAMA, messages=begun)) == want
    told = [{"role": "system", "content": "Be brief."}, *USER]
    generated = ask(served, "/api/generate", system="Be brief.", images=[], template="")
    assert generated["response"] == parts_of(CHAT, ask(served, CHAT, messages=told))[1]
    spans = [generated[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
    assert sum(spans) == generated["total_duration"] and min(spans) >= 0
    assert datetime.fromisoformat(generated["created_at"]).tzinfo
    scored = ask(served, OLLAMA, logprobs=True, top_logprobs=2)["logprobs"]
    assert len(scored) == 12 and {len(token["top_logprobs"]) for token in scored} == {2}
    assert ask(served, "/api/generate", prompt="", suffix="")["done_reason"] == "load"
    assert ask(served, OLLAMA, messages=None, keep_alive=0)["done_reason"] == "unload"


def test_ollama_lists_and_shows_the_model(served, runtime, network):
    for path in ("/api/tags", "/api/ps"):
        (model,) = served.ask("GET", path)[1]["models"]
        assert (model["name"], model["context_length"]) == ("sample:latest", runtime.context)
        assert model["size"] > 1 << 20 and model["details"]["family"] == "deepseekv2"
    for about in ({"model": "sample"}, {"name": "sample:latest"}):
        shown = served.post("/api/show", **about)[1]
        assert shown["capabilities"] == ["completion", "tools"]
        assert shown["model_info"]["deepseekv2.context_length"] == runtime.context
        assert "temperature 0.7" in shown["parameters"].splitlines()
    with Served(runtime, names=("a:8b", "hub/b", "*")) as other:
        listed = [model["name"] for model in other.ask("GET", "/api/tags")[1]["models"]]
        assert listed == ["a:8b", "hub/b:latest"]
        assert {other.post("/api/show", model=n)[0] for n in (*listed, "anything")} == {200}
    # As ``curl -d`` sends bodies; from a page only what it had to ask for.
    own = {"Host": "localhost:1", "Origin": "http://localhost:1"}
    for headers, status in (({}, 200), (own, 415)):
        about = {**headers, "Content_Type": "application/x-www-form-urlencoded"}
        assert served.ask("POST", "/api/show", {"model": "sample"}, **about)[0] == status


# Responses


def test_events_of_responses_are_those_of_the_clients_types(served):
    scored = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    fields = {**scored, "metadata": {"a": "b"}, "tools": [TOOL], "tool_choice": "auto"}
    whole, found = ask(served, RESPONSES, **fields), events(served, RESPONSES, **fields)
    parsed = pydantic.TypeAdapter(Response).validate_json(json.dumps(whole), strict=True)
    assert (parsed.metadata, parsed.tools[0].name, parsed.temperature) == ({"a": "b"}, "weather", 0)
    for event in found:
        EVENT.validate_json(json.dumps(event), strict=True)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-1] == "incomplete" and set(kinds[4:-4]) == {"output_text.delta"}
    assert found[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]
    chat = ask(served, CHAT, logprobs=True, top_logprobs=2, tools=TOOLS[:1])
    scores = whole["output"][0]["content"][0]["logprobs"]
    assert len(scores) == len(chat["choices"][0]["logprobs"]["content"]) == 12
    assert [s for e in found[4:-4] for s in e["logprobs"]] == found[-4]["logprobs"] == scores


def test_items_become_messages():
    call = {"type": "function_call", "arguments": "{}"}
    result = {"type": "function_call_output"}
    items = [
        {"role": "developer", "content": "system"},
        {"role": "latest_reminder", "content": "a"},
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
    assert found == [
        ("system", "be\n\nsystem", [], ""),
        ("latest_reminder", "a", [], ""),
        ("assistant", "b", ["1", "2"], ""),
        ("tool", "two", [], ""),
        ("tool", "one", [], ""),
        ("assistant", "", ["3"], "Hm"),
    ]


CODEX = {
    "instructions": "You are a coding agent.",
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "List the files."}]}],
    "tools": [
        {**TOOL, "strict": False},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    ],
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199a1b2",
    "client_metadata": {"x-codex-installation-id": "0199a1b3"},
    "text": {"verbosity": "low"},
    "max_output_tokens": 60,
}


def test_what_codex_sends(served):
    last = events(served, RESPONSES, **CODEX, tool_choice="required")[-1]["response"]
    assert [tool["name"] for tool in last["tools"]] == ["weather"]
    (item, *_) = last["output"]
    thought = {"type": "reasoning", "summary": [], "encrypted_content": None, "content": None}
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "a.py"}
    history = [*CODEX["input"], thought, {**item, "status": None}, result]
    assert events(served, RESPONSES, **{**CODEX, "input": history})[-1]["response"]
    assert ask(served, RESPONSES, model=None)["model"] == "sample"


def test_nothing_is_stored(served, openai_client):
    answer = openai_client.responses.create(**ASKED[RESPONSES], store=True)
    assert answer.store is False
    for method in ("GET", "DELETE"):
        for path in (answer.id, f"{answer.id}/input_items"):
            status, found, _ = served.ask(method, f"{RESPONSES}/{path}")
            assert status == 404 and "whole conversation" in found["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(answer.id)
