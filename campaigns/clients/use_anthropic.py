"""Anthropic's client for Python."""

import anthropic
from cases import MODEL, PARAMETERS, QUESTION, SYSTEM, URL, City, both, case, refused, weather

client = anthropic.Anthropic(base_url=URL)
MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED = {"model": MODEL, "system": SYSTEM, "messages": MESSAGES, "max_tokens": 60}
GREEDY = {**ASKED, "max_tokens": 200, "extra_body": {"temperature": 0}}
TOOLS = [{"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}]
CHOICE = {"type": "any", "disable_parallel_tool_use": True}


def message(stream, **options):
    if not stream:
        return client.messages.create(**{**GREEDY, **options})
    with client.messages.stream(**{**GREEDY, **options}) as events:
        list(events)
        return events.get_final_message()


@both()
def text(stream):
    answer = message(stream)
    assert answer.usage.output_tokens > 0
    return answer.content[0].text


@case
def text_deltas():
    with client.messages.stream(**GREEDY) as stream:
        deltas = list(stream.text_stream)
        assert "".join(deltas) == stream.get_final_message().content[0].text


@case
async def text_async():
    async with anthropic.AsyncAnthropic(base_url=URL) as client:
        assert (await client.messages.create(**ASKED)).stop_reason
        async with client.messages.stream(**ASKED) as stream:
            assert (await stream.get_final_message()).stop_reason


@both()
def tools(stream):
    first = message(stream, tools=TOOLS, tool_choice=CHOICE)
    assert first.stop_reason == "tool_use"
    (call,) = (block for block in first.content if block.type == "tool_use")
    content = weather(**call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": content}
    turns = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert message(stream, tools=TOOLS, messages=[*MESSAGES, *turns]).stop_reason
    return content


@case
def tool_runner():
    asked = {**GREEDY, "tools": [anthropic.beta_tool(weather)], "tool_choice": CHOICE}
    for message in client.beta.messages.tool_runner(**asked, max_iterations=2):
        assert message.content[0].type == "tool_use"
    for stream in client.beta.messages.tool_runner(**asked, max_iterations=2, stream=True):
        assert stream.get_final_message().content[0].type == "tool_use"


@case
def structured():
    answer = client.messages.parse(**ASKED, output_format=City)
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
