"""Tool calls of DeepSeek-V3.2 and V4 both ways: what our templates write of a call is read back as
the same call, however it arrives, and a mask lets nothing else through."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.model.own_templates import own_template
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import DEEPSEEK_V3_2, DEEPSEEK_V4
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.reader import ContentDelta, Reader, joined, parse_arguments
from slotmoe.tools.serve.requests import (
    AssistantMessage,
    Function,
    PlainMessage,
    Schema,
    ToolCall,
    ToolMessage,
    ToolPolicy,
)
from tests.support.served import deepseek_files

ARCHITECTURES = {DEEPSEEK_V3_2: "DeepseekV32ForCausalLM", DEEPSEEK_V4: "DeepseekV4ForCausalLM"}
FORMS = pytest.mark.parametrize("form", ARCHITECTURES, ids=["v3.2", "v4"])
BLOCKS = {DEEPSEEK_V3_2: "function_calls", DEEPSEEK_V4: "tool_calls"}
D, EOS = "\uff5cDSML\uff5c", "<\uff5cend\u2581of\u2581sentence\uff5c>"
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
        form: Tokenizer(folder, 0, own_template=own_template(kind))
        for form, kind in ARCHITECTURES.items()
    }


def history(*calls):
    """A conversation with ``calls``, and a result of each."""
    about = {"content": "So.", "reasoning_content": "Hm"}
    called = [ToolCall.of(str(i), name, text) for i, (name, text) in enumerate(calls)]
    return [
        PlainMessage(role="user", content="Hi"),
        AssistantMessage.model_construct(role="assistant", tool_calls=called, **about),
        *(ToolMessage(role="tool", tool_call_id=c.id, content=f"r{c.id}") for c in called[::-1]),
    ]


def read(form, text, width):
    """The deltas of an answer that arrives ``width`` characters at a time."""
    reader, parts = Reader(form), []
    for start in range(0, len(text), width):
        parts += reader.feed(text[start : start + width])
    return joined(parts + reader.end())


@FORMS
def test_format_is_recognised_and_writes_the_history(form, tokenizers):
    dialect = Dialect(tokenizers[form])
    assert dialect.format is form and list(dialect.shown.values()) == [D]
    given = history(("weather", json.dumps(ARGUMENTS)), ("stop", ""))
    text = dialect.prompt(given, POLICY, effort="high")
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
    text = Dialect(tokenizers[form]).prompt(given, POLICY, effort="high")
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
    schema = Schema.model_construct(definition=OBJECT, strict=None)
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
    prompt = Dialect(tokenizers[form]).prompt([PlainMessage(role="user", content=text)], POLICY)
    assert prompt.count(text) == 1


def test_reminders_are_for_models_that_know_them(tokenizers):
    messages = [PlainMessage(role=role, content="Hi") for role in ("latest_reminder", "user")]
    prompt = Dialect(tokenizers[DEEPSEEK_V4]).prompt(messages, None)
    assert "<\uff5clatest_reminder\uff5c>Hi<\uff5cUser\uff5c>Hi" in prompt
    with pytest.raises(RefusedError, match="latest_reminder"):
        Dialect(tokenizers[DEEPSEEK_V3_2]).prompt(messages, None)
