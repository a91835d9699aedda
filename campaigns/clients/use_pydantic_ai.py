"""Pydantic AI, on OpenAI's two APIs and on Anthropic's."""

from cases import MODEL, QUESTION, SYSTEM, URL, City, both
from cases import weather as answer_of
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

openai = OpenAIProvider(base_url=f"{URL}/v1")
MODELS = {
    "chat": OpenAIChatModel(MODEL, provider=openai),
    "responses": OpenAIResponsesModel(MODEL, provider=openai),
    "anthropic": AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL)),
}


def agent(model, limit=200, **options):
    settings = {"temperature": 0, "max_tokens": limit}
    return Agent(model, system_prompt=SYSTEM, model_settings=settings, **options)


@both(**MODELS)
async def text(model, stream):
    if not stream:
        return (await agent(model, 60).run(QUESTION)).output
    async with agent(model, 60).run_stream(QUESTION) as answer:
        return "".join([part async for part in answer.stream_text(delta=True, debounce_by=None)])


async def output(asking, stream):
    if stream:
        async with asking.run_stream(QUESTION) as answer:
            assert isinstance(await answer.get_output(), City)
    else:
        answer = await asking.run(QUESTION)
        assert isinstance(answer.output, City)
    return answer


@both(**MODELS)
async def output_by_a_tool(model, stream):
    asking = agent(model, output_type=ToolOutput(City))
    answer = await output(asking, stream)
    again = await asking.run("And now?", message_history=answer.all_messages())
    return isinstance(again.output, City)


@both(**MODELS)
async def tools(model, stream):
    """With a tool that may be called beside the one that gives the output."""
    asking = agent(model, output_type=ToolOutput(City), retries=3)
    asking.tool_plain(answer_of)
    return bool(await output(asking, stream))
