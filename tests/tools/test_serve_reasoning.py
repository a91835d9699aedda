"""``slotmoe serve``: reasoning reaches the clients of each API as they expect it, and comes back.

The sample does not think.  Its marks are taken to be the end of its prompt and a comma, which it
writes soon: what comes before the first comma is then its reasoning."""

import json

import pytest

from slotmoe.model.tokenizer import ReasoningMarks
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.requests import Conversation, Message
from tests.support.served import Served

pytestmark = pytest.mark.usefixtures("processes")

ASK = {"model": "sample", "messages": [{"role": "user", "content": "It is a truth"}]}
SHORT = {**ASK, "temperature": 0, "max_tokens": 60}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False


@pytest.fixture(scope="module")
def served(network, processes, runtime):
    plain = runtime.tokenizer.reasoning
    runtime.tokenizer.reasoning = ReasoningMarks("Assistant:", ",", {})
    with Served(runtime) as served:
        yield served
    runtime.tokenizer.reasoning = plain


@pytest.fixture(scope="module")
def answer(served, runtime):
    """Reasoning and text of a greedy answer, by the model itself."""
    message = Message("user", "It is a truth")
    prompt = Dialect(runtime.tokenizer).prompt(Conversation([message]))
    text = "".join(token.text for token in runtime.generate(prompt, 60))
    before, comma, after = text.partition(",")
    assert comma and before.strip() and after.strip()
    return before.strip(), after.lstrip()


def test_openai(openai_client, answer):
    reply = openai_client.chat.completions.create(**SHORT)
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == answer
    assert message.reasoning == answer[0]
    details = reply.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < reply.usage.completion_tokens
    thoughts, texts = [], []
    for chunk in openai_client.chat.completions.create(**SHORT, stream=True):
        delta = chunk.choices[0].delta
        thoughts.append(getattr(delta, "reasoning_content", None) or "")
        assert getattr(delta, "reasoning", "") == thoughts[-1]
        texts.append(delta.content or "")
        assert not (thoughts[-1] and texts[-1])
    assert ("".join(thoughts), "".join(texts)) == answer


def test_anthropic(anthropic_client, answer):
    client = anthropic_client
    short = {**ASK, "max_tokens": 60, "extra_body": {"temperature": 0}}
    message = client.messages.create(**short)
    thinking, text = message.content
    assert (thinking.type, text.type) == ("thinking", "text")
    assert (thinking.thinking, text.text) == answer and thinking.signature
    with client.messages.stream(**short) as stream:
        final = stream.get_final_message()
    assert (final.content[0].thinking, final.content[1].text) == answer
    history = [
        *ASK["messages"],
        {"role": "assistant", "content": message.content},
        *ASK["messages"],
    ]
    assert client.messages.create(model="sample", max_tokens=1, messages=history)


def test_responses(openai_client, answer):
    client = openai_client
    asked = {"model": "sample", "input": "It is a truth", "temperature": 0}
    asked["max_output_tokens"] = 60
    response = client.responses.create(**asked)
    reasoning, message = response.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert (reasoning.content[0].text, response.output_text) == answer
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    events = list(client.responses.create(**asked, stream=True))
    thoughts = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    texts = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert ("".join(thoughts), "".join(texts)) == answer
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message"]
    history = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in final.output)]
    history.append({"role": "user", "content": "?"})
    assert client.responses.create(**{**asked, "input": history}).output


def test_a_schema_holds_the_answer_and_not_the_reasoning(served, answer):
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    message = served.choice(**SHORT, response_format=wanted)["message"]
    assert message["reasoning_content"] == answer[0]
    assert json.loads(message["content"])["a"] in (1, 2)


def test_template_sees_reasoning_and_its_switch(runtime):
    tokenizer, before = runtime.tokenizer, runtime.tokenizer.template
    tokenizer.template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
        "{% if thinking is defined %}{{ thinking }}{{ enable_thinking }}{{ reasoning_effort }}"
        "{% endif %}"
    )
    try:
        history = [Message("user", "Hi"), Message("assistant", "Yes", thoughts="Hm")]
        dialect = Dialect(tokenizer)
        assert dialect.prompt(Conversation(history)) == "[user]|Hi[assistant]Hm|Yes"
        assert dialect.prompt(Conversation(history, effort="none")).endswith("YesFalseFalsenone")
        assert dialect.prompt(Conversation(history, effort="low")).endswith("YesTrueTruehigh")
    finally:
        tokenizer.template = before
