"""LangChain's ``ChatOllama``, which validates that the model is listed."""

from cases import MODEL, QUESTION, SYSTEM, URL, City, both, case
from cases import weather as answer_of
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama

ABOUT = {"model": MODEL, "base_url": URL, "temperature": 0, "num_predict": 60}
CHAT = ChatOllama(**ABOUT, validate_model_on_init=True)
MESSAGES = [SystemMessage(SYSTEM), HumanMessage(QUESTION)]
weather = tool(args_schema=City)(answer_of)


def text_of(model, messages, stream):
    if not stream:
        return model.invoke(messages).text
    return "".join(chunk.text for chunk in model.stream(messages))


@both()
def text(stream):
    return text_of(CHAT, MESSAGES, stream)


@both()
def tools(stream):
    call = {"name": "weather", "args": {"city": "Rome"}, "id": "1"}
    told = ToolMessage(weather.invoke(call["args"]), tool_call_id="1")
    messages = [*MESSAGES, AIMessage("", tool_calls=[call]), told]
    assert isinstance(text_of(CHAT.bind_tools([weather]), messages, stream), str)
    return told.content


@case
def structured():
    asked = CHAT.with_structured_output(City, method="json_schema")
    assert isinstance(asked.invoke(MESSAGES), City)
