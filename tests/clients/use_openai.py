"""OpenAI's client for Python."""

import json
from typing import Literal

import openai
from cases import MODEL, QUESTION, SYSTEM, URL, WEATHER, case, main, refused, weather
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1")
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
ASKED = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 200}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required"}
RESPONSE = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 60}
RESPONSE_TOOLS = {"tools": [{"type": "function", **WEATHER, "strict": True}]}


class City(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]


def whole():
    return client.chat.completions.create(**ASKED).choices[0].message.content


@case
def text():
    assert whole()


@case
def text_streamed():
    with client.chat.completions.stream(**ASKED) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.content
    assert "".join(deltas) == final == whole() and len(deltas) > 1


@case
async def text_async():
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1") as client:
        answer = await client.chat.completions.create(**ASKED)
        stream = await client.chat.completions.create(**ASKED, stream=True)
        async with stream:
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == answer.choices[0].message.content


def goes_on(message):
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(arguments))}
        for call in message.tool_calls
        if (arguments := call.function.arguments)
    ]
    asked = {**ASKED, "messages": [*MESSAGES, message, *results]}
    assert client.chat.completions.create(**asked, tools=TOOLS["tools"]).choices[0].finish_reason


@case
def tools():
    asked = {**ASKED, **TOOLS}
    choice = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    goes_on(choice.message)


@case
def tools_streamed():
    asked = {**ASKED, **TOOLS}
    with client.chat.completions.stream(**asked, parallel_tool_calls=False) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    goes_on(message)


@case
def structured():
    answer = client.chat.completions.parse(**ASKED, response_format=City).choices[0].message
    assert isinstance(answer.parsed, City)
    with client.chat.completions.stream(**ASKED, response_format=City) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.parsed


@case
def completions():
    asked = {"model": MODEL, "prompt": "Call me", "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(**asked, logprobs=2).choices[0]
    parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(parts) == answer.text and answer.logprobs.tokens


@case
def responses():
    answer = client.responses.create(**RESPONSE)
    with client.responses.stream(**RESPONSE) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response().output_text
    assert answer.output_text == final == "".join(deltas) != ""
    again = client.responses.create(**RESPONSE, previous_response_id=answer.id)
    assert again.usage.input_tokens > answer.usage.input_tokens
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)


@case
def responses_tools():
    asked = {**RESPONSE, **RESPONSE_TOOLS}
    answer = client.responses.create(**asked, tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.output
    output = weather(**json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    asked = {**RESPONSE, **RESPONSE_TOOLS, "input": [result]}
    with client.responses.stream(**asked, previous_response_id=answer.id) as stream:
        assert stream.get_final_response().output


@case
def responses_structured():
    asked = {**RESPONSE, "text_format": City}
    parsed = client.responses.parse(**asked).output_parsed
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == parsed
    assert isinstance(parsed, City)


@case
def models_and_errors():
    assert MODEL in [model.id for model in client.models.list()]
    with refused(openai.NotFoundError, "another"):
        client.chat.completions.create(**{**ASKED, "model": "another"})


main()
