"""AutoGen's client and its assistant."""

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import SystemMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from cases import MODEL, QUESTION, SYSTEM, URL, both
from cases import weather as answer_of

INFO = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown"}
MESSAGES = [SystemMessage(content=SYSTEM), UserMessage(content=QUESTION, source="Ann")]
WEATHER = FunctionTool(answer_of, "The weather of a city.", strict=True)


def client(**options):
    about = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "unused"}
    about["model_info"] = {**INFO, "structured_output": True}
    return OpenAIChatCompletionClient(**about, temperature=0, max_tokens=60, **options)


async def content(client, stream, **options):
    if not stream:
        return (await client.create(MESSAGES, **options)).content
    *parts, last = [part async for part in client.create_stream(MESSAGES, **options)]
    assert "tools" in options or "".join(parts) == last.content
    return last.content


@both()
async def text(stream):
    return await content(client(), stream)


@both()
async def tools(stream):
    calling = client(parallel_tool_calls=False)
    (call,) = await content(calling, stream, tools=[WEATHER], tool_choice="required")
    return call.name, call.arguments


@both()
async def assistant(stream):
    """Whose messages have a name; the model may call the function or not."""
    asked = AssistantAgent("ann", client(), tools=[WEATHER], model_client_stream=stream)
    assert (await asked.run(task=QUESTION)).messages
    events = [event async for event in asked.run_stream(task="And now?")]
    return bool(events[-1].messages)
