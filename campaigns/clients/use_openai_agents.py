"""OpenAI's Agents SDK, on the API that it uses by default and on the older one."""

import json

import agents
from cases import MODEL, QUESTION, SYSTEM, URL, City, both
from cases import weather as answer_of
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=f"{URL}/v1")
MODELS = {
    "responses": agents.OpenAIResponsesModel(MODEL, client),
    "chat": agents.OpenAIChatCompletionsModel(MODEL, client),
}
weather = agents.function_tool(answer_of)


def agent(model, choice=None, **options):
    parallel = False if choice else None
    settings = agents.ModelSettings(
        temperature=0, max_tokens=60, tool_choice=choice, parallel_tool_calls=parallel
    )
    return agents.Agent("brief", SYSTEM, model=model, model_settings=settings, **options)


async def run(asked, stream):
    if not stream:
        return await agents.Runner.run(asked, QUESTION)
    result = agents.Runner.run_streamed(asked, QUESTION)
    assert "raw_response_event" in {event.type async for event in result.stream_events()}
    return result


@both(**MODELS)
async def text(model, stream):
    return (await run(agent(model), stream)).final_output


@both(**MODELS)
async def tools(model, stream):
    """And the history is sent back."""
    result = await run(agent(model, "required", tools=[weather]), stream)
    kinds, history = [item.type for item in result.new_items], result.to_input_list()
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"] and json.dumps(history), kinds
    more = [*history, {"role": "user", "content": "And now?"}]
    return (await agents.Runner.run(agent(model), more)).final_output is not None


@both(**MODELS)
async def structured(model, stream):
    return (await run(agent(model, output_type=City), stream)).final_output
