"""smolagents: its model class, and an agent whose every step is a call."""

from cases import CITIES, MODEL, QUESTION, URL, both
from cases import weather as answer_of
from smolagents import ActionStep, AgentGenerationError, OpenAIModel, Tool, ToolCallingAgent

ABOUT = {"model_id": MODEL, "api_base": f"{URL}/v1", "api_key": "unused", "temperature": 0}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]


class Weather(Tool):
    name, description, output_type = "weather", "The weather of a city.", "string"
    inputs = {"city": {"type": "string", "description": "A city.", "enum": CITIES}}  # noqa: RUF012

    def forward(self, city):
        return answer_of(city)


@both()
def text(stream):
    model = OpenAIModel(**ABOUT, max_tokens=60)
    if stream:
        return "".join(delta.content or "" for delta in model.generate_stream(MESSAGES))
    return model.generate(MESSAGES).content


@both()
def tools(stream):
    """The model may call one function or the other until no step is left, wisely or not."""
    model = OpenAIModel(**ABOUT, max_tokens=200)
    agent = ToolCallingAgent([Weather()], model, max_steps=2, stream_outputs=stream)
    agent.run(QUESTION)
    steps = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    assert not any(isinstance(step.error, AgentGenerationError) for step in steps)
    return any(step.model_output_message.tool_calls for step in steps)
