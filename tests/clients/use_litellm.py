"""LiteLLM, which speaks both APIs, and OpenAI's newer one."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks for the newest one
import litellm
from cases import MODEL, QUESTION, SYSTEM, URL, WEATHER, case, main, weather

litellm.telemetry, litellm.suppress_debug_info = False, True
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
WAYS = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1"},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL},
}
TOOLS = [{"type": "function", "function": WEATHER}]


def asked(way, **options):
    return litellm.completion(
        **WAYS[way], **{"messages": MESSAGES, "temperature": 0, "max_tokens": 60, **options}
    )


def streamed_is_whole(way):
    whole = asked(way).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in asked(way, stream=True)]
    assert "".join(parts) == whole != ""


def loop(way, stream):
    """The documented loop: a call, its result, an answer."""
    messages, options = [*MESSAGES], {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    answer = asked(way, **options, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=messages)
    message = answer.choices[0].message
    messages.append(message)
    assert message.tool_calls
    for call in message.tool_calls:
        content = weather(**json.loads(call.function.arguments))
        name = call.function.name
        messages.append({"tool_call_id": call.id, "role": "tool", "name": name, "content": content})
    assert asked(way, messages=messages, tools=TOOLS).choices[0].finish_reason


@case
def text_whole_and_streamed():
    streamed_is_whole("openai")


@case
def tools():
    loop("openai", stream=False)


@case
def tools_streamed():
    loop("openai", stream=True)


@case
def anthropic_text_whole_and_streamed():
    streamed_is_whole("anthropic")


@case
def anthropic_tools():
    loop("anthropic", stream=False)


@case
def anthropic_tools_streamed():
    loop("anthropic", stream=True)


@case
def responses():
    options = {"input": QUESTION, "max_output_tokens": 60}
    assert litellm.responses(**WAYS["openai"], **options).output
    *_, last = litellm.responses(**WAYS["openai"], **options, stream=True)
    assert last.response.output


main()
