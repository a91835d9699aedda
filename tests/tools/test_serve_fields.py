"""The tables of docs/api-fields.md: every row is what the server does, and no field is missing."""

import re

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params

from scripts.tables import fields
from tests.support.served import GREEDY

PATHS = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
GO_ON = {"role": "user", "content": "Go on"}
BASES = {
    "chat": {**GREEDY, "messages": [GO_ON], "max_tokens": 6},
    "text": {**GREEDY, "prompt": "Hi", "max_tokens": 6},
    "responses": {**GREEDY, "input": "Hi", "max_output_tokens": 6},
    "messages": {**GREEDY, "messages": [GO_ON], "max_tokens": 6},
}
OFFICIAL = {
    "chat": chat_create_params.CompletionCreateParamsBase,
    "text": completion_create_params.CompletionCreateParamsBase,
    "responses": response_create_params.ResponseCreateParamsBase,
}


def each(**values):
    """A body for each field alone."""
    return {name: {name: value} for name, value in values.items()}


def streamed(**options):
    return {"stream": True, "stream_options": options}


def said(**more):
    return {"messages": [{"role": "assistant", "content": "Hi", **more}, GO_ON]}


def called(function=(), **more):
    function = {"name": "f", "arguments": "{}", **dict(function)}
    call = {"id": "a", "type": "function", "function": function, **more}
    result = {"role": "tool", "tool_call_id": "a", "content": "x"}
    return {"messages": [GO_ON, {"role": "assistant", "tool_calls": [call]}, result]}


def heard(**more):
    block = {"type": "output_text", "text": "Hi", **more}
    return {"input": [{"type": "message", "role": "assistant", "content": [block]}, GO_ON]}


def items(call=(), result=(), *more):
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", **dict(call)}
    result = {"type": "function_call_output", "call_id": "a", "output": "x", **dict(result)}
    return {"input": [GO_ON, call, result, *more]}


def returned(**more):
    return items(result={"output": [{"type": "input_text", "text": "x", **more}]})


def thought(**more):
    thinking = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}], **more}
    return items((), (), thinking, {"role": "assistant", "content": "Hi"}, GO_ON)


def blocks(role, *blocks):
    return {"messages": [GO_ON, {"role": role, "content": [*blocks]}]}


def used(use=(), result=()):
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}, **dict(use)}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "x", **dict(result)}
    answer = {"role": "assistant", "content": [use]}
    return {"messages": [GO_ON, answer, {"role": "user", "content": [result]}]}


def told(**more):
    return {"messages": [GO_ON, {"role": "system", "content": "Now.", **more}]}


def document(field, value):
    source = {"type": "content", "content": [{**TEXT, field: value}]}
    return {"type": "document", "source": source}


def search(field, value):
    about = {"type": "search_result", "source": "x", "title": "x"}
    return {**about, "content": [{**TEXT, field: value}]}


QUOTED = {
    "source.content": lambda *given: blocks("user", document(*given)),
    "content.source.content": lambda *given: used({}, {"content": [document(*given)]}),
    "content.content": lambda *given: used({}, {"content": [search(*given)]}),
}
CACHE = {"type": "ephemeral"}
TEXT = {"type": "text", "text": "Hi"}
CACHED = {**TEXT, "cache_control": CACHE}
REDACTED = {"type": "redacted_thinking", "data": "x"}
CALLED = {"type": "function", "function": {"name": "f"}}
FUNCTION = {"type": "function", "name": "f"}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CALLED]}}
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
LABELS = {"user": "ann", "metadata": {"run": "7"}, "safety_identifier": "x", "service_tier": "auto"}
LABELS |= {"prompt_cache_key": "x", "prompt_cache_options": {}, "prompt_cache_retention": "24h"}
ALL = each(model="sample", stream=False, top_p=0.9, top_k=-1, temperature=0.5)
OPENAI = {
    **ALL,
    **each(seed=7, n=2, stop=["\n", "END"], max_tokens=-1, min_tokens=3, ignore_eos=True),
    **each(min_p=0.1, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.1),
    **each(logprobs=None, logit_bias={"300": 5}, store=True, **LABELS),
    **each(response_format={"type": "json_object"}, structured_outputs={"regex": "[a-c]{4}"}),
    **each(grammar='root ::= "yes" | "no"', json_schema=SCHEMA),
    **each(stop_token_ids=[300], prompt_logprobs=1),
    "stream_options": streamed(include_usage=True),
    "stream_options.continuous_usage_stats": streamed(
        include_usage=True, continuous_usage_stats=True
    ),
    "stream_options.include_obfuscation": streamed(include_obfuscation=False),
}
EXAMPLES = {
    "text": {**OPENAI, **each(prompt=["Call me", "Hi"], echo=True, suffix=None, best_of=1)},
    "chat": {
        **OPENAI,
        **each(messages=[GO_ON], reasoning_effort="low"),
        **each(verbosity="low", modalities=["text"], audio={"voice": "alloy", "format": "wav"}),
        **each(prediction={"type": "content", "content": "x"}, moderation={"model": "x"}),
        **each(functions=[{"name": "f"}], function_call="auto", web_search_options={}),
        "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 4},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        **each(tools=[CALLED]),
        "tool_choice": {"tools": [CALLED], "tool_choice": ALLOWED},
        "parallel_tool_calls": {"tools": [CALLED], "parallel_tool_calls": False},
        "messages.name": {"messages": [{**GO_ON, "name": "Ann"}]},
        "messages.content.cache_control": {"messages": [{"role": "user", "content": [CACHED]}]},
        "messages.annotations": said(annotations=[]),
        "messages.parsed": said(parsed={}),
        "messages.provider_specific_fields": said(provider_specific_fields={}),
        "messages.reasoning_content": said(reasoning_content="Hm"),
        "messages.reasoning": said(reasoning="Hm"),
        "messages.reasoning_details": said(reasoning_details=[{"type": "reasoning.text"}]),
        "messages.id": said(id="x"),
        "continue_final_message": {
            "messages": [GO_ON, {"role": "assistant", "content": "Hi"}],
            "continue_final_message": True,
        },
        **each(add_generation_prompt=True, chat_template_kwargs={"thinking": False}),
        "messages.refusal": said(refusal="No"),
        "messages.audio": said(audio={"id": "x"}),
        "messages.function_call": said(function_call={"name": "f"}),
        "messages.tool_calls.index": called(index=0),
        "messages.tool_calls.provider_specific_fields": called(provider_specific_fields={}),
        "messages.tool_calls.function.provider_specific_fields": called(
            {"provider_specific_fields": {}}
        ),
        "messages.tool_calls.function.parsed_arguments": called({"parsed_arguments": {}}),
    },
    "responses": {
        **ALL,
        **each(input=[GO_ON], instructions="Be brief", max_output_tokens=4, store=False, **LABELS),
        **each(previous_response_id=None, include=["message.output_text.logprobs"], prompt={}),
        **each(top_logprobs=2, tools=[FUNCTION], truncation="disabled", background=False, image={}),
        **each(client_metadata={"x": "y"}, max_tool_calls=3, background_options={}),
        **each(
            personality="friendly",
            access_programs=[{}],
            context_management=[{}],
            conversation="c",
            moderation={},
        ),
        "text": {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        "tool_choice": {"tools": [FUNCTION], "tool_choice": FUNCTION},
        "parallel_tool_calls": {"tools": [FUNCTION], "parallel_tool_calls": False},
        "stream_options": streamed(),
        "stream_options.include_obfuscation": OPENAI["stream_options.include_obfuscation"],
        "input.content.annotations": heard(annotations=[]),
        "input.content.logprobs": heard(logprobs=[]),
        "input.status": {"input": [{**GO_ON, "status": "completed"}]},
        "input.phase": {"input": [{**GO_ON, "phase": "final_answer"}]},
        "input.caller": items({"caller": {"type": "direct"}}),
        "input.namespace": items({"namespace": "n"}),
        "input.output.annotations": returned(annotations=[]),
        "input.output.logprobs": returned(logprobs=[]),
        "input.summary": thought(summary=[]),
        "input.encrypted_content": thought(encrypted_content="x"),
        "tools.defer_loading": {"tools": [{**FUNCTION, "defer_loading": False}]},
        "tools.allowed_callers": {"tools": [{**FUNCTION, "allowed_callers": ["direct"]}]},
        "tools.output_schema": {"tools": [{**FUNCTION, "output_schema": {}}]},
        "text.verbosity": {"text": {"verbosity": "low"}},
        "reasoning": {"reasoning": {"effort": "low"}},
        "reasoning.summary": {"reasoning": {"summary": "auto"}},
        "reasoning.generate_summary": {"reasoning": {"generate_summary": "auto"}},
        "reasoning.context": {"reasoning": {"context": "auto"}},
        "reasoning.mode": {"reasoning": {"mode": "auto"}},
    },
    "messages": {
        **ALL,
        **each(messages=[GO_ON], system="Be brief", max_tokens=4, stop_sequences=["END"]),
        **each(tools=[TOOL], cache_control=CACHE, context_management={}, metadata={"user_id": "x"}),
        **each(service_tier="auto", thinking={"type": "adaptive"}, thread={"type": "create"}),
        "tool_choice": {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
        "output_config": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "output_config.effort": {"output_config": {"effort": "low"}},
        "output_config.task_budget": {"output_config": {"task_budget": {"type": "tokens"}}},
        "thinking.budget_tokens": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "thinking.display": {"thinking": {"type": "adaptive", "display": "omitted"}},
        "system.cache_control": {"system": [CACHED]},
        "system.citations": {"system": [{**TEXT, "citations": []}]},
        "tools.cache_control": {"tools": [{**TOOL, "cache_control": CACHE}]},
        "tools.defer_loading": {"tools": [{**TOOL, "defer_loading": False}]},
        "tools.allowed_callers": {"tools": [{**TOOL, "allowed_callers": ["direct"]}]},
        "tools.eager_input_streaming": {"tools": [{**TOOL, "eager_input_streaming": True}]},
        "tools.input_examples": {"tools": [{**TOOL, "input_examples": [{}]}]},
        "messages.content.cache_control": blocks("user", CACHED),
        "messages.content.citations": blocks("user", {**TEXT, "citations": []}),
        "messages.content.data": blocks("assistant", REDACTED, TEXT),
        "messages.content.caller": used({"caller": {"type": "direct"}}),
        "messages.content.toolset_name": used({"toolset_name": None}),
        "messages.content.content.cache_control": used({}, {"content": [CACHED]}),
        "messages.content.content.citations": used({}, {"content": [{**TEXT, "citations": []}]}),
        **each(speed="fast", inference_geo="us", user_profile_id="x", workspace_id="x"),
        **each(
            diagnostics={}, billing_policy={}, compaction={}, container="x", fallbacks="default"
        ),
        **each(fallback_credit_token="x", mcp_servers=[{}]),
        "messages.clear_at": told(clear_at="next_user_message"),
        "messages.output_config": told(output_config={"effort": "low"}),
        **{
            f"messages.content.{place}.{field}": quoted(field, value)
            for field, value in (("cache_control", CACHE), ("citations", []))
            for place, quoted in QUOTED.items()
        },
    },
}
EXAMPLES["chat"]["stream_options.include_usage"] = OPENAI["stream_options"]
EXAMPLES["text"]["stream_options.include_usage"] = OPENAI["stream_options"]
EXAMPLES["responses"]["reasoning.effort"] = EXAMPLES["responses"]["reasoning"]


def without(value, name):
    if isinstance(value, list):
        return [without(one, name) for one in value]
    if isinstance(value, dict):
        return {key: without(one, name) for key, one in value.items() if key != name}
    return value


def text_of(served, route, body):
    status, answer, _ = served.ask("POST", PATHS[route], body)
    assert status == 200, answer
    if isinstance(answer, str):  # a stream
        return re.findall(r'"(?:content|text|delta)":"(?:[^"\\]|\\.)*"', answer)
    if route == "messages":
        return [block.get("text", block.get("input")) for block in answer["content"]]
    if route == "responses":
        return [item.get("content") or item["arguments"] for item in answer["output"]]
    return [choice.get("text") or choice["message"] for choice in answer["choices"]]


@pytest.mark.parametrize("route", PATHS)
def test_a_row_is_what_happens(served, route):
    for field in fields(route).values():
        body = {**BASES[route], **EXAMPLES[route][field.name]}
        if field.kind == "refused":
            status, answer = served.post(PATHS[route], **body)
            place, message = field.name.partition(".")[0], answer["error"]["message"]
            assert status == 400 and place in message, field
            if route != "messages":
                assert field.note in message and answer["error"]["param"] == place, field
            continue
        found = text_of(served, route, body)
        if field.kind == "accepted":
            name = field.name.rpartition(".")[2]
            if name == "data":  # the block has to have it
                body["messages"][1]["content"].pop(0)
            assert found == text_of(served, route, without(body, name)), field


@pytest.mark.parametrize("route", OFFICIAL)
def test_tables_have_every_field_of_openai(route):
    names, options = set(fields(route)), ChatCompletionStreamOptionsParam.__annotations__
    assert {*OFFICIAL[route].__annotations__, "stream"} <= names
    assert {f"stream_options.{name}" for name in options.keys() - {"include_usage"}} <= names


@pytest.mark.parametrize("route", OFFICIAL)
def test_other_names_are_refused(served, route):
    for name in ("temprature", "max_token", "top_a", "Seed", "store "):
        status, answer = served.post(PATHS[route], **BASES[route], **{name: None})
        assert (status, answer["error"]["param"]) == (400, name)
        assert answer["error"]["message"] == f"{name} is not supported by this server"
