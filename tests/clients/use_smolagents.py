"""smolagents: its model class, and an agent whose every step is a call."""

from cases import CITIES, MODEL, QUESTION, URL, case, main
from cases import weather as answer_of
from smolagents import ActionStep, AgentGenerationError, OpenAIModel, Tool, ToolCallingAgent

ABOUT = {"model_id": MODEL, "api_base": f"{URL}/v1", "api_key": "unused", "temperature": 0}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]


class Weather(Tool):
    name, description, output_type = "weather", "The weather of a city.", "string"
    inputs = {"city": {"type": "string", "description": "A city.", "enum": CITIES}}  # noqa: RUF012

    def forward(self, city):
        return answer_of(city)


def model(limit):
    return OpenAIModel(**ABOUT, max_tokens=limit)


def run(streams):
    """The model may call one function or the other until no step is left, wisely or not."""
    agent = ToolCallingAgent([Weather()], model(200), max_steps=2, stream_outputs=streams)
    agent.run(QUESTION)
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    assert any(step.model_output_message.tool_calls for step in steps)
    assert not any(isinstance(step.error, AgentGenerationError) for step in steps)


@case
def text():
    assert model(60).generate(MESSAGES).content


@case
def text_streamed():
    parts = [delta.content or "" for delta in model(60).generate_stream(MESSAGES)]
    assert "".join(parts) == model(60).generate(MESSAGES).content


@case
def tools():
    run(streams=False)


@case
def tools_streamed():
    run(streams=True)


main()
