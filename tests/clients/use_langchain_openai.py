"""LangChain's ``ChatOpenAI``, on both of OpenAI's APIs."""

from typing import Literal

from cases import MODEL, QUESTION, SYSTEM, URL, case, main
from cases import weather as answer_of
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

ABOUT = {"base_url": f"{URL}/v1", "model": MODEL, "temperature": 0}
chat = ChatOpenAI(**ABOUT, max_tokens=60)
responses = ChatOpenAI(**ABOUT, max_tokens=60, use_responses_api=True)
MESSAGES = [SystemMessage(SYSTEM), HumanMessage(QUESTION, name="Ann")]


class City(BaseModel, extra="forbid"):
    """A city."""

    city: Literal["Paris", "Rome"]


@tool(args_schema=City)
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return answer_of(city)


def loop(model, stream):
    asking = model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    if stream:
        first, *rest = asking.stream(MESSAGES)
        message = sum(rest, first)
    else:
        message = asking.invoke(MESSAGES)
    assert message.tool_calls
    results = [weather.invoke(call) for call in message.tool_calls]
    assert isinstance(results[0], ToolMessage)
    assert model.bind_tools([weather]).invoke([*MESSAGES, message, *results]).response_metadata


@case
def text():
    assert chat.invoke(MESSAGES).content


@case
def text_streamed():
    assert "".join(part.content for part in chat.stream(MESSAGES)) == chat.invoke(MESSAGES).content


@case
def tools():
    loop(chat, stream=False)


@case
def tools_streamed():
    loop(chat, stream=True)


@case
def structured():
    for method in ("json_schema", "function_calling"):
        asked = chat.with_structured_output(City, method=method)
        assert isinstance(asked.invoke(MESSAGES), City)


@case
def responses_text_whole_and_streamed():
    parts = [part.text for part in responses.stream(MESSAGES)]
    assert "".join(parts) == responses.invoke(MESSAGES).text != ""


@case
def responses_tools():
    loop(responses, stream=False)


@case
def responses_tools_streamed():
    loop(responses, stream=True)


main()
