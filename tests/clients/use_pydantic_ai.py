"""Pydantic AI, on OpenAI's two APIs and on Anthropic's."""

from typing import Literal

from cases import MODEL, QUESTION, SYSTEM, URL, case, main
from cases import weather as answer_of
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

openai = OpenAIProvider(base_url=f"{URL}/v1")
MODELS = [
    OpenAIChatModel(MODEL, provider=openai),
    OpenAIResponsesModel(MODEL, provider=openai),
    AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL)),
]


class City(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]


def agent(model, limit=60, **options):
    settings = {"temperature": 0, "max_tokens": limit}
    return Agent(model, system_prompt=SYSTEM, model_settings=settings, **options)


@case
async def text_whole_and_streamed():
    for model in MODELS:
        whole = (await agent(model).run(QUESTION)).output
        async with agent(model).run_stream(QUESTION) as stream:
            parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
        assert "".join(parts) == whole != ""


@case
async def output_by_a_tool_whole_and_streamed():
    for model in MODELS:
        asking = agent(model, 200, output_type=ToolOutput(City))
        result = await asking.run(QUESTION)
        assert isinstance(result.output, City)
        again = await asking.run("And now?", message_history=result.all_messages())
        assert isinstance(again.output, City)
        async with asking.run_stream(QUESTION) as stream:
            assert isinstance(await stream.get_output(), City)


@case
async def tools_whole_and_streamed():
    """With a tool that may be called beside the one that gives the output."""
    for model in MODELS:
        asking = agent(model, 200, output_type=ToolOutput(City), retries=3)

        @asking.tool_plain
        def weather(city: Literal["Paris", "Rome"]) -> str:
            """The weather of a city."""
            return answer_of(city)

        assert isinstance((await asking.run(QUESTION)).output, City)
        async with asking.run_stream(QUESTION) as stream:
            assert isinstance(await stream.get_output(), City)


main()
