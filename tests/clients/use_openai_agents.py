"""OpenAI's Agents SDK, on the API that it uses by default and on the older one."""

import json
from typing import Literal

import agents
from cases import MODEL, QUESTION, SYSTEM, URL, case, main
from cases import weather as answer_of
from openai import AsyncOpenAI
from pydantic import BaseModel

client = AsyncOpenAI(base_url=f"{URL}/v1")
MODELS = [
    agents.OpenAIResponsesModel(MODEL, client),
    agents.OpenAIChatCompletionsModel(MODEL, client),
]


class City(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]


@agents.function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return answer_of(city)


def agent(model, limit=60, choice=None, **options):
    parallel = False if choice else None
    settings = agents.ModelSettings(
        temperature=0, max_tokens=limit, tool_choice=choice, parallel_tool_calls=parallel
    )
    return agents.Agent("brief", SYSTEM, model=model, model_settings=settings, **options)


async def streamed(asked):
    result = agents.Runner.run_streamed(asked, QUESTION)
    kinds = [event.type async for event in result.stream_events()]
    assert "raw_response_event" in kinds
    return result


@case
async def text_whole_and_streamed():
    for model in MODELS:
        whole = (await agents.Runner.run(agent(model), QUESTION)).final_output
        assert (await streamed(agent(model))).final_output == whole != ""


@case
async def tools_whole_and_streamed():
    for model in MODELS:
        asked = agent(model, 60, "required", tools=[weather])
        for result in (await agents.Runner.run(asked, QUESTION), await streamed(asked)):
            kinds = [item.type for item in result.new_items]
            assert kinds[:2] == ["tool_call_item", "tool_call_output_item"], kinds


@case
async def structured_whole_and_streamed():
    for model in MODELS:
        asked = agent(model, 60, output_type=City)
        for result in (await agents.Runner.run(asked, QUESTION), await streamed(asked)):
            assert isinstance(result.final_output, City)


@case
async def history_is_sent_back():
    for model in MODELS:
        asked = agent(model, 60, "required", tools=[weather])
        history = (await agents.Runner.run(asked, QUESTION)).to_input_list()
        assert json.dumps(history)
        more = [*history, {"role": "user", "content": "And now?"}]
        assert (await agents.Runner.run(agent(model), more)).final_output is not None


main()
