"""Tool calls of DeepSeek-V3.2 and V4 both ways: what our templates write of a call is read back as
the same call, however it arrives, and a mask lets nothing else through."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.model.families import FAMILIES
from slotmoe.model.tokenizer import ReasoningMarks, Splitter, Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import DEEPSEEK_V3_2, DEEPSEEK_V4
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.reader import ContentDelta, Reader, joined, parse_arguments
from slotmoe.tools.serve.requests import Call, Conversation, Function, Message, Rule, ToolPolicy
from slotmoe.tools.serve.responses import Item, messages_of
from tests.support.served import ANTHROPIC_TOOL, TOOLS, Served, deepseek_files, is_weather
from tests.support.served import WEATHER as CITY

KINDS = {DEEPSEEK_V3_2: "deepseek_v32", DEEPSEEK_V4: "deepseek_v4"}
FORMS = pytest.mark.parametrize("form", KINDS, ids=["v3.2", "v4"])
BLOCKS = {DEEPSEEK_V3_2: "function_calls", DEEPSEEK_V4: "tool_calls"}
D = "\uff5cDSML\uff5c"
BOS, EOS = (f"<\uff5c{at}\u2581of\u2581sentence\uff5c>" for at in ("begin", "end"))
OBJECT = {"type": "object", "properties": {"at": {"type": "number"}}, "required": ["at"]}
PROPERTIES = {
    "city": {"enum": ["Paris", "Rome"]},
    "note": {"type": "string", "description": "free"},
    "days": {"type": "integer", "minimum": 1, "maximum": 9},
    "more": {**OBJECT, "additionalProperties": False},
    "any": {},
    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
}
WEATHER = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
FUNCTIONS = [Function(name="weather", parameters=WEATHER), Function(name="stop")]
POLICY = ToolPolicy(FUNCTIONS, FUNCTIONS, required=False, single=False)
REQUIRED = ToolPolicy(FUNCTIONS, FUNCTIONS, required=True, single=False)
ARGUMENTS = {
    **{"city": "Rome", "note": 'a < b </ "\n', "days": 3},
    **{"more": {"at": 0.5}, "any": "x", "maybe": None},
}
PARAMETERS = (
    f'<{D}parameter name="city" string="true">Rome</{D}parameter>\n'
    f'<{D}parameter name="note" string="true">a < b </ "\n</{D}parameter>\n'
    f'<{D}parameter name="days" string="false">3</{D}parameter>\n'
    f'<{D}parameter name="more" string="false">{{"at": 0.5}}</{D}parameter>\n'
    f'<{D}parameter name="any" string="true">x</{D}parameter>\n'
    f'<{D}parameter name="maybe" string="false">null</{D}parameter>\n'
)


def two(form):
    """A call of each function, as DeepSeek's encoders write them."""
    return (
        f'<{D}{BLOCKS[form]}>\n<{D}invoke name="weather">\n{PARAMETERS}</{D}invoke>\n'
        f'<{D}invoke name="stop">\n\n</{D}invoke>\n</{D}{BLOCKS[form]}>'
    )


@pytest.fixture(scope="module")
def tokenizers(processes, tmp_path_factory):
    folder = deepseek_files(tmp_path_factory.mktemp("tokenizer"))
    return {
        form: Tokenizer(folder, 0, own_template=FAMILIES[kind].own_template)
        for form, kind in KINDS.items()
    }


def history(*calls):
    """A conversation with ``calls``, and a result of each."""
    called = [Call(str(i), name, text) for i, (name, text) in enumerate(calls)]
    return [
        Message("user", "Hi"),
        Message("assistant", "So.", called, "Hm"),
        *(Message("tool", f"r{c.id}", call_id=c.id) for c in called[::-1]),
    ]


def read(form, text, width, splitter=None):
    """The deltas of an answer that arrives ``width`` characters at a time."""
    reader, parts = Reader(form, splitter=splitter), []
    for start in range(0, len(text), width):
        parts += reader.feed(text[start : start + width])
    return joined(parts + reader.end())


@FORMS
def test_format_is_recognised_and_writes_the_history(form, tokenizers):
    dialect = Dialect(tokenizers[form])
    assert dialect.format is form and list(dialect.shown.values()) == [D]
    given = history(("weather", json.dumps(ARGUMENTS)), ("stop", ""))
    text = dialect.prompt(Conversation(given, POLICY, effort="high"))
    assert f"<think>Hm</think>So.\n\n{two(form)}{EOS}" in text
    assert text.index("r0") < text.index("r1") and text.endswith("<think>")
    assert '{"name": "stop", "description": "", "parameters"' in text


@FORMS
@pytest.mark.parametrize("width", [1, 3, 7, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    wanted = [
        ContentDelta(json.dumps(ARGUMENTS), 0, "weather", complete=True),
        ContentDelta("{}", 1, "stop", complete=True),
    ]
    assert read(form, f"So.\n\n{two(form)}", width) == [ContentDelta("So."), *wanted]
    assert read(form, f"\n\n{two(form)}", width) == wanted
    assert read(form, two(form), width) == wanted
    thought = [ContentDelta("Hm 1 < 2", reasoning=True)]
    for said, text in {"": [], "So.": [ContentDelta("So.")]}.items():
        splitter = Splitter(ReasoningMarks("<think>", "</think>", {}), True)
        answer = f"Hm 1 < 2</think>{said}\n\n{two(form)}"
        assert read(form, answer, width, splitter) == thought + text + wanted
    # Text that only begins like a call; the blank lines before it are its own.
    for text in (f"So.\n\n<{D}tool", "So.\n\n", "a\n\n\n<b", f"5 < 6 {D} <"):
        assert read(form, text, width) == [ContentDelta(text)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(
        st.text("abc_-1", min_size=1), st.dictionaries(st.text("key_ .1", min_size=1), VALUES)
    ),
    min_size=1,
    max_size=3,
)


@FORMS
@settings(max_examples=25, deadline=None)
@given(calls=CALLS, width=st.integers(1, 40))
def test_what_is_written_of_a_call_is_read_as_the_same_call(form, tokenizers, calls, width):
    given = history(*((name, json.dumps(arguments)) for name, arguments in calls))
    text = Dialect(tokenizers[form]).prompt(Conversation(given, POLICY, effort="high"))
    _, _, answer = text.partition("<think>Hm</think>")
    parts = read(form, answer.partition(EOS)[0], width)
    assert parts[0] == ContentDelta("So.")
    assert [(part.name, parse_arguments(part.text)) for part in parts[1:]] == calls
    assert all(part.complete for part in parts[1:])


@FORMS
def test_calls_that_end_in_the_middle_are_not_complete(form):
    text = two(form)
    for end in range(len(f"<{D}{BLOCKS[form]}>"), text.index("stop")):
        parts = read(form, text[:end], 5)
        assert all(part.call is not None for part in parts)  # none of it is text
        is_whole = f"</{D}invoke>" in text[:end]
        assert any(part.complete for part in parts) is is_whole
    cut = read(form, text[: text.index('"note"')], 5)
    assert cut == [ContentDelta('{"city": "Rome"', 0, "weather")]


def passed(tokenizer, text, policy, schema=None, is_thinking=False):
    """The beginning of ``text`` that a mask lets pass, and whether the answer may end there."""
    eos = tokenizer.token_id(tokenizer.eos_token)
    dialect = Dialect(tokenizer)
    mask = Grammars(tokenizer, (eos,), dialect).compile(schema, policy, is_thinking).mask()
    shown, through = {**dialect.shown, **tokenizer.reasoning.shown}, ""
    for id_ in tokenizer.encode(text, add_bos=False):
        if not mask.allowed()[id_]:
            return through, False
        through += shown.get(id_) or tokenizer.decode([id_])
        if mask.consume(id_):
            return through, True
    return through, bool(mask.allowed()[eos])


@FORMS
def test_mask_holds_calls_to_their_schemas(form, tokenizers):
    tokenizer, calls = tokenizers[form], two(form)
    for text in ("So.\n\n" + calls, "\n\n" + calls, calls, "5 < 6", "<", f"a <{calls}"):
        assert passed(tokenizer, text, POLICY) == (text, True)
    for text in (calls, "\n\n" + calls):
        assert passed(tokenizer, text, REQUIRED) == (text, True)
    thought = "Hm, 1 < 2 </think>\n\n"
    assert passed(tokenizer, thought + calls, REQUIRED, None, True) == (thought + calls, True)
    assert passed(tokenizer, "So", REQUIRED) == ("", False)
    for old, new in {
        "Rome": "Oslo", ">3<": ">33<", "stop": "go", '"false">3': '"true">3', ' string="true"': "",
        '{"at": 0.5}': '{"at": 0.5', '"days"': '"hours"', "</": f"<{D}", "null": "nul",
        f'"\n</{D}': f'"\n{D}',
    }.items():  # fmt: skip
        assert not passed(tokenizer, calls.replace(old, new), POLICY)[1], new
    single = ToolPolicy(FUNCTIONS, FUNCTIONS, required=True, single=True)
    assert passed(tokenizer, calls, single)[0] != calls


@FORMS
def test_mask_takes_text_where_the_type_is_open(form, tokenizers):
    one = f'<{D}{BLOCKS[form]}>\n<{D}invoke name="weather">\n{{}}</{D}invoke>\n</{D}{BLOCKS[form]}>'
    city = f'<{D}parameter name="city" string="true">Rome</{D}parameter>\n'
    for name, kind, value, fits in (
        ("any", "true", "x", True), ("any", "false", "[1]", True), ("any", "false", '"x"', True),
        ("any", "false", "x", False), ("maybe", "true", "x", True), ("maybe", "false", "1", False),
        ("note", "false", '"x"', False), ("days", "true", "x", False),
    ):  # fmt: skip
        text = f'{city}<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'
        assert passed(tokenizers[form], one.format(text), POLICY)[1] is fits, (name, kind, value)


@FORMS
def test_mask_takes_a_schema_or_calls(form, tokenizers):
    schema = Rule("json", OBJECT)
    for text in ('{"at": 1}', two(form), "\n\n" + two(form)):
        assert passed(tokenizers[form], text, POLICY, schema) == (text, True)
        calls = [part.call for part in joined(_either(form, text))]
        assert calls == ([None] if text[0] == "{" else [0, 1])
    assert not passed(tokenizers[form], "So.", POLICY, schema)[1]


def _either(form, text):
    reader = Reader(form, either=True)
    return [delta for sign in text for delta in reader.feed(sign)] + reader.end()


@FORMS
def test_marks_in_a_text_are_left_as_they_are(form, tokenizers):
    # As with every template: what spells a token is that token.  An answer alone can call.
    text = f'Say <{D}invoke name="stop">'
    prompt = Dialect(tokenizers[form]).prompt(Conversation([Message("user", text)], POLICY))
    assert prompt.count(text) == 1


def test_reminders_are_for_models_that_know_them(tokenizers):
    messages = [Message(role, "Hi") for role in ("latest_reminder", "user")]
    items = [Item(role=message.role, content="Hi") for message in messages]
    assert [message.role for message in messages_of(items)] == ["latest_reminder", "user"]
    prompt = Dialect(tokenizers[DEEPSEEK_V4]).prompt(Conversation(messages))
    assert "<\uff5clatest_reminder\uff5c>Hi<\uff5cUser\uff5c>Hi" in prompt
    with pytest.raises(RefusedError, match="latest_reminder"):
        Dialect(tokenizers[DEEPSEEK_V3_2]).prompt(Conversation(messages))


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def served(network, processes, runtime, tokenizers):
    """The sample as if it were DeepSeek-V4."""
    own, runtime.tokenizer = runtime.tokenizer, tokenizers[DEEPSEEK_V4]
    with Served(runtime) as served:
        yield served
    runtime.tokenizer = own


USER_SAYS = [{"role": "user", "content": "Weather?"}]
QUIET = {"model": "sample", "messages": USER_SAYS, "max_tokens": 200}


def test_openai_chat(openai_client):
    asked = {**QUIET, "tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
    asked |= {"temperature": 0, "parallel_tool_calls": False}
    choice = openai_client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    name, arguments = "", ""
    for chunk in openai_client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name, arguments = name + (part.function.name or ""), arguments + part.function.arguments
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert name == "stop" or is_weather(arguments)
    history = [
        *USER_SAYS,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "ok"},
    ]
    history.insert(0, {"role": "latest_reminder", "content": "It rains."})
    again = openai_client.chat.completions.create(**{**asked, "messages": history, "max_tokens": 1})
    assert again.usage.prompt_tokens > 0


def test_openai_responses(openai_client):
    asked = {"model": "sample", "input": "Weather?", "max_output_tokens": 200, "temperature": 0}
    asked |= {"tools": [{"type": "function", "name": "weather", "parameters": CITY}]}
    asked |= {"tool_choice": "required", "reasoning": {"effort": "none"}}
    asked |= {"parallel_tool_calls": False}
    (call,) = openai_client.responses.create(**asked).output
    assert (call.type, call.name) == ("function_call", "weather") and is_weather(call.arguments)
    events = list(openai_client.responses.create(**asked, stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments and len(deltas) > 1
    reminder = {"role": "latest_reminder", "content": "It rains."}
    items = [reminder, {"role": "user", "content": "Hi"}, call.model_dump(exclude_none=True)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "wet"})
    assert openai_client.responses.create(**{**asked, "input": items}).output


def test_anthropic(anthropic_client):
    asked = {**QUIET, "tools": [ANTHROPIC_TOOL], "thinking": {"type": "disabled"}}
    asked |= {"tool_choice": {"type": "tool", "name": "weather"}}
    asked["extra_body"] = {"temperature": 0}
    message = anthropic_client.messages.create(**asked)
    (call,) = message.content
    assert message.stop_reason == "tool_use" and is_weather(call.input)
    with anthropic_client.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[0].input == call.input
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "wet"}]
    history = [*USER_SAYS, {"role": "assistant", "content": [call]}]
    history.append({"role": "user", "content": [*results, {"type": "text", "text": "So?"}]})
    assert anthropic_client.messages.create(**{**asked, "messages": history}).content


def test_effort_schema_and_functions_reach_the_prompt(served, monkeypatch):
    texts, encode = [], served.service.encode
    monkeypatch.setattr(served.service, "encode", lambda text: texts.append(text) or encode(text))
    schema = {"name": "a", "schema": OBJECT}
    wanted = {"type": "json_schema", "json_schema": schema}
    chat = {"model": "sample", "messages": USER_SAYS, "max_tokens": 1}
    served.choice(**chat, reasoning_effort="max", response_format=wanted)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    for more in ({"output_config": {"effort": "max"}}, {}):
        assert served.message(messages=USER_SAYS, max_tokens=1, thinking=thinking, **more)[0] == 200
    for text in texts[:2]:
        assert text.startswith(f"{BOS}Reasoning Effort: Absolute maximum")
    assert "## Response Format:\n\nYou MUST strictly adhere" in texts[0]
    assert json.dumps(OBJECT) in texts[0]
    assert "Effort" not in texts[2] and all(text.endswith("<think>") for text in texts)
