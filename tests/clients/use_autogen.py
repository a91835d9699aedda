"""AutoGen's client and its assistant."""

from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import SystemMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from cases import MODEL, QUESTION, SYSTEM, URL, case, main
from cases import weather as answer_of

INFO = {"vision": False, "function_calling": True, "json_output": True, "family": "unknown"}
INFO["structured_output"] = True
MESSAGES = [SystemMessage(content=SYSTEM), UserMessage(content=QUESTION, source="Ann")]


async def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return answer_of(city)


WEATHER = FunctionTool(weather, "The weather of a city.", strict=True)


def client(limit=60, **options):
    about = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "unused", "model_info": INFO}
    return OpenAIChatCompletionClient(**about, temperature=0, max_tokens=limit, **options)


@case
async def text_whole_and_streamed():
    whole = (await client().create(MESSAGES)).content
    *parts, result = [part async for part in client().create_stream(MESSAGES)]
    assert "".join(parts) == whole == result.content != ""


@case
async def tools_whole_and_streamed():
    options = {"tools": [WEATHER], "tool_choice": "required"}
    calling = client(60, parallel_tool_calls=False)
    (call,) = (await calling.create(MESSAGES, **options)).content
    assert call.name == "weather" and "city" in call.arguments
    *_, result = [part async for part in calling.create_stream(MESSAGES, **options)]
    assert result.content[0].name == "weather"


@case
async def assistant_whole_and_streamed():
    """Whose messages have a name; the model may call the function or not."""
    for streams in (False, True):
        asked = AssistantAgent("ann", client(60), tools=[WEATHER], model_client_stream=streams)
        assert (await asked.run(task=QUESTION)).messages
        events = [event async for event in asked.run_stream(task="And now?")]
        assert events[-1].messages


main()
