"""Ollama's own client."""

import json

from cases import CHAT, CITIES, MODEL, PARAMETERS, URL, both, case, weather
from ollama import Client, ResponseError

CLIENT = Client(host=URL)
OPTIONS = {"temperature": 0, "num_predict": 60, "num_ctx": 4096, "repeat_penalty": 1.1}
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}


def message(stream, **options):
    answer = CLIENT.chat(MODEL, **{"messages": CHAT, "options": OPTIONS, **options}, stream=stream)
    if not stream:
        return answer.message.content
    *parts, last = answer
    assert last.done and last.done_reason and last.total_duration
    return "".join(part.message.content for part in parts)


@both()
def text(stream):
    return message(stream)


@both()
def tools(stream):
    """The client describes a function; the sample decides to call none."""
    told = {"role": "tool", "tool_name": "weather", "content": weather("Rome")}
    messages = [*CHAT, {"role": "assistant", "tool_calls": [CALL]}, told]
    assert isinstance(message(stream, messages=messages, tools=[weather]), str)
    return told["content"]


@both()
def structured(stream):
    city = json.loads(message(stream, format=PARAMETERS))["city"]
    assert city in CITIES
    return city


@both(raw={"raw": True}, template={"system": "Be brief.", "think": False})
def generate(way, stream):
    answer = CLIENT.generate(MODEL, "Call me", **way, options=OPTIONS, stream=stream)
    return "".join(part.response for part in answer) if stream else answer.response


@case
def models():
    (listed,), (running,) = CLIENT.list().models, CLIENT.ps().models
    assert listed.model == running.model == f"{MODEL}:latest" and listed.size
    assert "tools" in CLIENT.show(listed.model).capabilities
    assert CLIENT.generate(listed.model, "", keep_alive=-1).done_reason == "load"


@case
def errors():
    def status(**wrong):
        try:
            return CLIENT.chat(**{"model": MODEL, "messages": CHAT, **wrong})
        except ResponseError as problem:
            return problem.status_code

    assert (status(model="other"), status(options={"top_p": 5})) == (404, 400)
