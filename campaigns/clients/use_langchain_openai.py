"""LangChain's ``ChatOpenAI``, on both of OpenAI's APIs."""

from cases import MODEL, QUESTION, SYSTEM, URL, City, both, case
from cases import weather as answer_of
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

ABOUT = {"base_url": f"{URL}/v1", "model": MODEL, "temperature": 0, "max_tokens": 60}
MODELS = {"chat": ChatOpenAI(**ABOUT), "responses": ChatOpenAI(**ABOUT, use_responses_api=True)}
MESSAGES = [SystemMessage(SYSTEM), HumanMessage(QUESTION, name="Ann")]
weather = tool(args_schema=City)(answer_of)


def message(model, stream):
    if not stream:
        return model.invoke(MESSAGES)
    first, *rest = model.stream(MESSAGES)
    return sum(rest, first)


@both(**MODELS)
def text(model, stream):
    return message(model, stream).text


@both(**MODELS)
def tools(model, stream):
    one_call = {"tool_choice": "required", "parallel_tool_calls": False}
    first = message(model.bind_tools([weather], **one_call), stream)
    results = [weather.invoke(call) for call in first.tool_calls]
    assert isinstance(results[0], ToolMessage)
    assert model.bind_tools([weather]).invoke([*MESSAGES, first, *results]).response_metadata
    return [result.content for result in results]


@case
def structured():
    for method in ("json_schema", "function_calling"):
        asked = MODELS["chat"].with_structured_output(City, method=method)
        assert isinstance(asked.invoke(MESSAGES), City)
