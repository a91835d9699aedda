"""LiteLLM, which speaks OpenAI's two APIs and Anthropic's."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks for the newest one
import litellm
from cases import CHAT, MODEL, QUESTION, URL, WEATHER, both, weather

litellm.telemetry, litellm.suppress_debug_info = False, True
WAYS = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1"},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL},
}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}


def message(way, stream, **options):
    asked = {"messages": CHAT, "temperature": 0, "max_tokens": 200, **options}
    answer = litellm.completion(**way, **asked, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=CHAT)
    return answer.choices[0].message


@both(**WAYS)
def text(way, stream):
    return message(way, stream).content


@both(**WAYS)
def tools(way, stream):
    """The documented loop: a call, its result, an answer."""
    first = message(way, stream, **TOOLS, tool_choice="required")
    messages, results = [*CHAT, first], []
    for call in first.tool_calls:
        results.append(weather(**json.loads(call.function.arguments)))
        about = {"tool_call_id": call.id, "role": "tool", "name": call.function.name}
        messages.append({**about, "content": results[-1]})
    assert message(way, stream, **TOOLS, messages=messages)
    return results


@both()
def responses(stream):
    asked = {"input": QUESTION, "max_output_tokens": 60, "temperature": 0}
    answer = litellm.responses(**WAYS["openai"], **asked, stream=stream)
    if stream:
        *_, last = answer
        answer = last.response
    return answer.output[0].content[0].text
