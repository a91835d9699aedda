"""Anthropic's client for Python."""

from typing import Literal

import anthropic
from cases import MODEL, PARAMETERS, QUESTION, SYSTEM, URL, case, main, refused
from cases import weather as answer_of
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=URL)
MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED = {"model": MODEL, "system": SYSTEM, "messages": MESSAGES, "max_tokens": 60}
GREEDY = {**ASKED, "extra_body": {"temperature": 0}}
TOOL = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
CALLED = {**ASKED, "max_tokens": 200, "tools": [TOOL]}
CHOICE = {"type": "any", "disable_parallel_tool_use": True}


class City(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]


@anthropic.beta_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return answer_of(city)


@case
def text():
    assert client.messages.create(**ASKED).content[0].text


@case
def text_streamed():
    with client.messages.stream(**GREEDY) as stream:
        deltas = list(stream.text_stream)
        final = stream.get_final_message()
    whole = client.messages.create(**GREEDY)
    assert "".join(deltas) == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens > 0


@case
async def text_async():
    async with anthropic.AsyncAnthropic(base_url=URL) as client:
        assert (await client.messages.create(**ASKED)).stop_reason
        async with client.messages.stream(**ASKED) as stream:
            assert (await stream.get_final_message()).stop_reason


def goes_on(message):
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": answer_of(**block.input)}
        for block in message.content
        if block.type == "tool_use"
    ]
    assert results and message.stop_reason == "tool_use"
    turns = [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    assert client.messages.create(**{**CALLED, "messages": [*MESSAGES, *turns]}).stop_reason


@case
def tools():
    goes_on(client.messages.create(**CALLED, tool_choice=CHOICE))


@case
def tools_streamed():
    with client.messages.stream(**CALLED, tool_choice=CHOICE) as stream:
        assert "input_json" in {event.type for event in stream}
        goes_on(stream.get_final_message())


@case
def tool_runner():
    asked = {**CALLED, "tools": [weather], "tool_choice": CHOICE, "max_iterations": 2}
    for message in client.beta.messages.tool_runner(**asked):
        assert message.content[0].type == "tool_use"
    for stream in client.beta.messages.tool_runner(**asked, stream=True):
        assert stream.get_final_message().content[0].type == "tool_use"


@case
def structured():
    answer = client.messages.parse(**{**ASKED, "max_tokens": 60}, output_format=City)
    assert isinstance(answer.parsed_output, City)


@case
def thinking_and_caching():
    marked = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
    asked = {**ASKED, "system": marked, "thinking": {"type": "adaptive"}}
    assert client.messages.create(**asked).stop_reason


@case
def count_tokens():
    about = {name: ASKED[name] for name in ("model", "system", "messages")}
    counted = client.messages.count_tokens(**about).input_tokens
    usage = client.messages.create(**ASKED).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


@case
def errors():
    with refused(anthropic.BadRequestError, "max_tokens"):
        client.messages.create(**{**ASKED, "max_tokens": -1})


main()
