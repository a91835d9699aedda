"""OpenAI's client for Python."""

import json

import openai
from cases import CHAT, MODEL, QUESTION, URL, WEATHER, City, both, case, refused, weather

client = openai.OpenAI(base_url=f"{URL}/v1")
ASKED = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 200}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}
RESPONSE = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 60}
RESPONSE_TOOLS = {"tools": [{"type": "function", **WEATHER, "strict": True}]}
ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False}


def message(stream, **options):
    asked, chat = {**ASKED, **options}, client.chat.completions
    if not stream:
        ask = chat.parse if "response_format" in options else chat.create
        return ask(**asked).choices[0].message
    with chat.stream(**asked) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion().choices[0].message
    assert "".join(deltas) == (final.content or "")
    return final


@both()
def text(stream):
    return message(stream).content


@both()
async def text_async(stream):
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1") as client:
        answer = await client.chat.completions.create(**ASKED, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        async with answer:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


@both()
def tools(stream):
    first = message(stream, **TOOLS, **ONE_CALL)
    (call,) = first.tool_calls
    content = weather(**json.loads(call.function.arguments))
    answer = {"role": "tool", "tool_call_id": call.id, "content": content}
    assert message(stream, **TOOLS, messages=[*CHAT, first, answer])
    return content


@both()
def structured(stream):
    return message(stream, response_format=City).parsed


@both()
def completions(stream):
    asked = {"model": MODEL, "prompt": "Call me", "temperature": 0, "max_tokens": 8}
    if stream:
        chunks = client.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)
    answer = client.completions.create(**asked, logprobs=2).choices[0]
    assert answer.logprobs.tokens
    return answer.text


def response(stream, **options):
    asked = {**RESPONSE, **options}
    if not stream:
        ask = client.responses.parse if "text_format" in options else client.responses.create
        return ask(**asked)
    with client.responses.stream(**asked) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(deltas) == final.output_text
    return final


@both()
def responses(stream):
    answer = response(stream)
    again = response(stream, previous_response_id=answer.id)
    assert again.usage.input_tokens > answer.usage.input_tokens
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)
    return answer.output_text


@both()
def responses_tools(stream):
    answer = response(stream, **RESPONSE_TOOLS, **ONE_CALL)
    (call,) = answer.output
    output = weather(**json.loads(call.arguments))
    given = [{"type": "function_call_output", "call_id": call.call_id, "output": output}]
    assert response(stream, **RESPONSE_TOOLS, input=given, previous_response_id=answer.id).output
    return output


@both()
def responses_structured(stream):
    return response(stream, text_format=City).output_parsed


@case
def models_and_errors():
    assert MODEL in [model.id for model in client.models.list()]
    with refused(openai.NotFoundError, "another"):
        client.chat.completions.create(**{**ASKED, "model": "another"})
