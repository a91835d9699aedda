"""Anthropic's side of ``slotmoe serve``: the fields that its clients send, their form of errors,
``count_tokens``, and answers that their request has begun."""

import json
from typing import Literal

import anthropic
import pydantic
import pytest

from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.served import ANTHROPIC_TOOL, USER, Served, until

PATH = "/v1/messages"
ASK = {"model": "sample", "messages": USER, "max_tokens": 6}
BY_CLIENT = {**ASK, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def client(anthropic_client):
    return anthropic_client


def text_of(served, **fields):
    status, answer = served.message(**fields)
    assert status == 200, answer
    return answer["content"][0]["text"]


USE = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
PICTURE = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
PLAIN = {"type": "text", "media_type": "text/plain", "data": "Lear is old."}
DOCUMENT = {"type": "document", "source": PLAIN, "title": "Lear", "citations": {"enabled": False}}
PARTS = {"type": "content", "content": [{"type": "text", "text": "Lear "}]}
PARTS["content"].append({"type": "text", "text": "is old."})
RESULT_OF_SEARCH = {"type": "search_result", "source": "http://a/b", "title": 'A "play"'}
RESULT_OF_SEARCH["content"] = [{"type": "text", "text": "Lear is old."}]
REFUSED = [
    {"thinking": {"type": "hard"}},
    {"output_config": {"format": {"type": "yaml"}}},
    {"messages": [{"role": "user", "content": [{"type": "thinking"}]}]},
    {"messages": [{"role": "user", "content": [PICTURE]}]},
    {"messages": [{"role": "user", "content": [USE]}, RESULT]},
    {"messages": [RESULT]},
    {"messages": [*USER, {"role": "assistant", "content": [USE]}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tools": [{"name": "odd", "input_schema": {"type": "array"}}]},
    {"mcp_servers": [{"type": "url", "url": "http://localhost/", "name": "x"}]},
    {"container": "x"},
    {"messages": [{"role": "user", "content": [{**DOCUMENT, "source": {"type": "url"}}]}]},
    {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool"}},
    {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "other"}},
    {"tool_choice": {"type": "any"}},
]


def test_what_is_not_honoured_is_refused(served):
    for fields in REFUSED:
        status, answer = served.message(**fields)
        assert (status, answer["type"]) == (400, "error"), fields
        assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


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


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("template", "told"),
    [(KEEPS, f"system: {SYSTEM['content']}\n"), (HOISTS, TOLD), (RAISES, TOLD)],
)
def test_later_messages_of_the_systems_stay_in_their_place(runtime, monkeypatch, template, told):
    """The text of a request is the beginning of the next one's, whatever the template."""
    monkeypatch.setattr(runtime.tokenizer, "template", template)
    dialect = Dialect(runtime.tokenizer)
    answer = {"role": "assistant", "content": "yes"}
    turns, texts = [*USER, SYSTEM], list[str]()
    for more in ([], [answer, *USER], [answer, *USER, SYSTEM, *USER]):
        turns = turns + more
        chat = MessagesRequest(**{**ASK, "messages": turns, "system": "Be brief."}).chat()
        texts.append(dialect.prompt(chat).removesuffix("A:"))
    first, second, third = texts
    assert second.startswith(first) and third.startswith(second)
    assert [text.count(told) for text in texts] == [1, 1, 2]


def prompt_of(service, **fields):
    chat = MessagesRequest(**{**ASK, **fields}).chat()
    return service.dialect.prompt(chat)


def test_what_the_system_says_first_is_one_text(served):
    billed = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.34c;"}
    blocks = [billed, {"type": "text", "text": "Be brief."}]
    expected = prompt_of(served.service, system="Be brief.\n\nThe date is now known.")
    for system, messages in ((blocks, [SYSTEM, *USER]), ("Be brief.", [SYSTEM, *USER])):
        assert prompt_of(served.service, system=system, messages=messages) == expected
    assert billed["text"] not in expected


LATE = {**ANTHROPIC_TOOL, "name": "late", "description": "Comes late.", "defer_loading": True}
FIND = {"type": "tool_use", "id": "f", "name": "weather", "input": {"city": "Rome", "days": 1}}
FOUND = {"type": "tool_result", "tool_use_id": "f"}
FOUND["content"] = [{"type": "tool_reference", "tool_name": "late"}]


def test_a_deferred_tool_is_described_where_it_is_offered(served):
    """So that what is before it stays cached, and it can be called from there on."""
    tools, turns = [ANTHROPIC_TOOL, LATE], [*USER, {"role": "assistant", "content": [FIND]}]
    before = prompt_of(served.service, tools=tools[:1], messages=USER)
    assert prompt_of(served.service, tools=tools, messages=USER) == before
    turns += [{"role": "user", "content": [{**FOUND, "content": FOUND["content"] * 3}]}]
    after = prompt_of(served.service, tools=tools, messages=turns)
    assert after.startswith(before) and after.count("Comes late.") == 1
    named = {"tools": tools, "tool_choice": {"type": "tool", "name": "late"}, "max_tokens": 200}
    status, answer = served.message(**named, messages=turns)
    assert status == 200 and answer["content"][0]["name"] == "late"
    assert served.message(**named)[0] == 400  # nothing has offered it
    change = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "late"}}
    system = {"role": "system", "content": [change], "clear_at": "never"}
    assert "Comes late." in prompt_of(served.service, tools=tools, messages=[*USER, system])
    assert served.message(**named, messages=[*USER, system])[0] == 200
    gone = {"role": "system", "content": [{**change, "type": "tool_removal"}]}
    assert served.message(**named, messages=[*USER, system, gone])[0] == 400
    assert served.message(messages=[*USER, system])[0] == 400  # without tools


@pytest.mark.parametrize("block", [DOCUMENT, {**DOCUMENT, "source": PARTS}, RESULT_OF_SEARCH])
def test_documents_and_search_results_are_read_as_text(served, block):
    asked = [{"role": "user", "content": [block, {"type": "text", "text": "Who?"}]}]
    assert "Lear is old.\n" in prompt_of(served.service, messages=asked)
    found = {**FOUND, "content": [block]}
    turns = [*USER, {"role": "assistant", "content": [FIND]}, {"role": "user", "content": [found]}]
    text = prompt_of(served.service, tools=[ANTHROPIC_TOOL], messages=turns)
    assert "Lear is old.\n" in text
    assert served.message(tools=[ANTHROPIC_TOOL], messages=turns)[0] == 200


NOTHING = "cache_control container inference_geo speed diagnostics billing_policy compaction "
NOTHING += "fallbacks fallback_credit_token mcp_servers context_management thread"
MEANINGLESS = [
    dict.fromkeys(NOTHING.split()),
    {"mcp_servers": [], "speed": "standard", "inference_geo": "global", "user_profile_id": "x"},
    {"diagnostics": {"previous_message_id": None}, "thinking": {"type": "between_tools"}},
    {"messages": [*USER, {**SYSTEM, "output_config": {"effort": "low"}}]},
    {"max_tokens": 0},
]


def test_many_tools_are_offered(served):
    tools = [{"name": f"f{n}", "input_schema": {"type": "object"}} for n in range(300)]
    chat = MessagesRequest(**ASK, tools=tools).chat()
    assert "f299" in served.service.chat_text(chat)
    assert served.service.grammars.compile(None, chat.policy, None) is not None


def test_of_no_probability_only_the_likeliest_is_left(served):
    likeliest = text_of(served)
    assert {text_of(served, temperature=1, top_p=0) for _ in range(3)} == {likeliest}


@pytest.mark.parametrize("fields", MEANINGLESS)
def test_what_the_clients_types_allow_is_accepted(served, fields):
    assert served.message(**{"max_tokens": 1, **fields})[0] == 200


MANY = [{}] * 100_000
FLOODS = [
    (MessagesRequest, {"messages": MANY}),
    (MessagesRequest, {"messages": [{"role": "user", "content": MANY}]}),
    (MessagesRequest, {"system": MANY}),
    (MessagesRequest, {"tools": MANY}),
    (ResponsesRequest, {"input": MANY}),
    (ResponsesRequest, {"input": [{"role": "user", "content": MANY}]}),
    (ResponsesRequest, {"include": MANY}),
    (ResponsesRequest, {"tools": MANY}),
]


def test_lists_are_bounded():
    """The first element too many ends the check, so few errors are made of many elements."""
    for kind, fields in FLOODS:
        with pytest.raises(pydantic.ValidationError) as caught:
            kind.model_validate({**ASK, **fields})
        assert caught.value.error_count() < 5000


def test_thread_is_refused_so_that_clients_go_on_without(served, client):
    status, answer = served.message(thread={"type": "create"})
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert (status, answer["error"]["details"]) == (400, details)

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    choice = {"type": "tool", "name": "weather"}
    options = {"tools": [weather], "tool_choice": choice, "max_iterations": 2}
    messages = list(client.beta.messages.tool_runner(**{**ASK, "max_tokens": 300}, **options))
    assert [message.content[0].type for message in messages] == ["tool_use"] * 2


def test_answers_follow_a_schema(served, client):
    def form(schema):
        return {"format": {"type": "json_schema", "schema": schema}}

    text = text_of(served, output_config=form({"enum": ["yes", "no"]}), max_tokens=20)
    assert json.loads(text) in ("yes", "no")
    begun = [*USER, {"role": "assistant", "content": "{"}]
    status, answer = served.message(messages=begun, output_config=form({"type": "object"}))
    assert status == 400 and "has begun it" in answer["error"]["message"]
    with pytest.raises(anthropic.BadRequestError, match="schema"):
        client.messages.create(**BY_CLIENT, output_config=form({"type": "odd"}))


def test_last_message_of_the_assistants_is_gone_on_with(served, client, runtime):
    whole = text_of(served, max_tokens=12)
    begun = whole[: len(whole) // 2]
    messages = [*USER, {"role": "assistant", "content": begun}]
    message = client.messages.create(**{**BY_CLIENT, "messages": messages, "max_tokens": 12})
    text = runtime.tokenizer.chat(messages, begun=True)
    assert text.endswith(begun)
    served.idle()
    ids = runtime.tokenizer.encode(text)
    alone = "".join(token.text for token in runtime.generate(ids, 12))
    assert message.content[0].text == alone
    turn, counted = (
        client.messages.count_tokens(model="sample", messages=given).input_tokens
        for given in (USER, messages)
    )
    assert counted == len(ids) > turn


def test_count_tokens_is_what_the_answer_says(client):
    def count(messages=USER, **fields):
        fields = {"model": "sample", "messages": messages, **fields}
        return client.messages.count_tokens(**fields).input_tokens

    asked = {"system": "Be brief.", "tools": [ANTHROPIC_TOOL]}
    counted = count(**asked, thinking={"type": "disabled"})
    usage = client.messages.create(**{**ASK, "max_tokens": 1}, **asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens > count()
    long = [{"role": "user", "content": "word " * 3000}]  # more than the context holds
    assert count(long) > 3000
    with pytest.raises(anthropic.NotFoundError):
        count(model="other")


def test_errors_below_its_paths_have_its_form(served):
    for method, path, status, kind in (
        ("POST", f"{PATH}/batches", 404, "not_found_error"),
        ("GET", f"{PATH}/count_tokens", 405, "invalid_request_error"),
        ("POST", f"{PATH}/count_tokens", 400, "invalid_request_error"),
    ):
        found, answer, _ = served.ask(method, path, {} if method == "POST" else None)
        assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kind), path
    answer = served.ask("POST", PATH, ASK, Origin="http://evil.example")[1]
    assert answer["error"]["type"] == "permission_error"
    assert "type" not in served.ask("POST", f"{PATH}s", {})[1]


def test_client_gets_why_an_answer_stopped(client):
    answer = client.messages.create(**BY_CLIENT)
    text = answer.content[0].text
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 6
    with client.messages.stream(**BY_CLIENT) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == 6
    cut = client.messages.create(**BY_CLIENT, stop_sequences=[text[3:6]])
    assert (cut.stop_reason, cut.content[0].text) == ("stop_sequence", text[:3])


def test_models_are_listed_for_its_client(client, runtime):
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("sample", "model", "sample")
    found = client.models.retrieve("sample")
    assert found.max_input_tokens == runtime.context and found.created_at.year >= 2024


PINGS = {"/v1/chat/completions": ": ping\n\n", "/v1/responses": ": ping\n\n"}
PINGS[PATH] = 'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize("path", PINGS)
def test_silent_streams_are_pinged(runtime, monkeypatch, gate, path):
    """Until a place is free, and again while an answer shows nothing."""
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.02)
    ping, body = PINGS[path], {**ASK, "stream": True}
    if path == "/v1/responses":
        body = {"model": "sample", "stream": True, "input": "x", "max_output_tokens": 3}
    with Served(runtime, sequences=1) as served:
        first, _ = served.open("POST", PATH, {**ASK, "stream": True})
        until(lambda: served.service.running)
        connection, response = served.open("POST", path, body)
        data = b""
        while data.count(ping.encode()) < 3 and (more := response.read1(4096)):
            data += more
        gate.set()
        data += response.read()
        first.close()
        connection.close()
        parts = [part + "\n\n" for part in data.decode().split("\n\n")[:-1]]
        others = [part for part in parts if part != ping]
        assert len(parts) - len(others) >= 3
        assert all(part.startswith(("data: ", "event: ")) for part in others)
        served.idle()
