"""Tool calls in the formats of DeepSeek-V3.1, Kimi K2, GLM and Mistral: what the model reads, what
a mask lets it write, and what clients get of it.  The templates are small ones with the features of
the real ones."""

import pytest

from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import (
    DEEPSEEK_V3_1,
    GLM,
    KIMI,
    MISTRAL,
    NATIVE,
    PLAIN,
    text_arguments,
)
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.reader import ContentDelta, Reader, joined
from slotmoe.tools.serve.requests import Call, Conversation, Function, Message, ToolPolicy
from tests.support.served import WEATHER as WEATHERS
from tests.support.served import tokenizer_with
from tests.support.tiny import SAMPLE

PROPERTIES = {**WEATHERS["properties"], "note": {"type": "string", "description": "free"}}
WEATHER = {**WEATHERS, "properties": {name: PROPERTIES[name] for name in ("city", "note", "days")}}
FUNCTIONS = [Function(name="weather", parameters=WEATHER), Function(name="stop")]
POLICY = ToolPolicy(FUNCTIONS, FUNCTIONS, required=False, single=False)
TEXTS = {function.name: text_arguments(function) for function in FUNCTIONS}
_ROLES = (
    "{% for m in messages %}{% if m.role == 'tool' %}TOOL{% elif m.role == 'assistant' %}[A]"
    "{{ m.content or '' }}{% else %}[{{ m.role }}]{{ m.content }}{% endif %}CALLS{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
D = {
    name: f"<\uff5ctool\u2581{name.replace('_', chr(0x2581))}\uff5c>"
    for name in "calls_begin call_begin sep call_end calls_end".split()
}


def template(tool, before, each, after):
    calls = "{% if m.tool_calls %}" + before + "{% for c in m.tool_calls %}" + each
    return _ROLES.replace("TOOL", tool).replace(
        "CALLS", calls + "{% endfor %}" + after + "{% endif %}"
    )


TEMPLATES = {
    DEEPSEEK_V3_1: template(
        "<out>{{ m.content }}</out>",
        D["calls_begin"],
        D["call_begin"] + "{{ c.function.name }}" + D["sep"] + "{{ c.function.arguments }}"
        + D["call_end"],
        D["calls_end"],
    ),
    KIMI: template(
        "## Return of {{ m.tool_call_id }}\n{{ m.content }}",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments }}"
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    GLM: template(
        "<tool_response>{{ m.content }}</tool_response>",
        "",
        "<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>"
        "{% endfor %}</tool_call>",
        "",
    ),
    MISTRAL: template(
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]",
        "",
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments }}",
        "",
    ),
}  # fmt: skip
ROME = '{"city": "Rome", "note": "a < b </arg", "days": 3}'
TWO = {  # a call of each function
    DEEPSEEK_V3_1: (
        D["calls_begin"]
        + D["call_begin"] + "weather" + D["sep"] + ROME + D["call_end"]
        + D["call_begin"] + "stop" + D["sep"] + "{}" + D["call_end"]
        + D["calls_end"]
    ),
    KIMI: (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{ROME}<|tool_call_end|><|tool_call_begin|>functions.stop:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    GLM: (
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>note"
        "</arg_key><arg_value>a < b </arg</arg_value><arg_key>days</arg_key><arg_value>3"
        "</arg_value></tool_call><tool_call>stop</tool_call>"
    ),
    MISTRAL: f"[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]stop[ARGS]{{}}",
}  # fmt: skip
NAMES = {DEEPSEEK_V3_1: "deepseek", KIMI: "kimi", GLM: "glm", MISTRAL: "mistral"}
FORMATS = pytest.mark.parametrize("form", TEMPLATES, ids=NAMES.values())


@pytest.fixture(scope="module")
def tokenizers(processes, tmp_path_factory):
    """The sample's tokenizer with the tokens and the template of each format."""
    folders = {form: tmp_path_factory.mktemp("tokenizer") for form in TEMPLATES}
    size = Tokenizer(SAMPLE, 0).size
    return {
        form: Tokenizer(tokenizer_with(folder, form.marks, size, TEMPLATES[form]), 0)
        for form, folder in folders.items()
    }


def call(id_, name, arguments):
    return Call(id_, name, arguments)


@FORMATS
def test_format_is_recognised(form, tokenizers):
    assert Dialect(tokenizers[form]).format is form
    sample = Tokenizer(SAMPLE, 0)
    sample.template = TEMPLATES[form]  # without the tokens
    assert Dialect(sample).format is PLAIN


def test_older_deepseek_format_goes_on(tokenizers):
    tokenizer = tokenizers[DEEPSEEK_V3_1]
    before, tokenizer.template = tokenizer.template, tokenizer.template + "{# ```json #}"
    assert Dialect(tokenizer).format is NATIVE
    tokenizer.template = before


@FORMATS
def test_history_is_what_the_model_would_have_written(form, tokenizers):
    calls = [call("a", "weather", ROME), call("b", "stop", "")]
    history = [
        Message("user", "Hi"),
        Message("assistant", "So.", calls),
        Message("tool", "stopped", call_id="b"),
        Message("tool", "wet", call_id="a"),
    ]
    text = Dialect(tokenizers[form]).prompt(Conversation(history))
    assert f"[user]Hi[A]So.{TWO[form]}" in text
    assert text.index("wet") < text.index("stopped") and text.endswith("[A]")
    if form is KIMI:
        assert "## Return of functions.weather:0\nwet## Return of functions.stop:1" in text


@FORMATS
@pytest.mark.parametrize("width", [1, 5, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    text, reader = "So. " + TWO[form], Reader(form, texts=TEXTS)
    parts = []
    for start in range(0, len(text), width):
        parts += reader.feed(text[start : start + width])
    assert joined(parts + reader.end()) == [
        ContentDelta("So. "),
        ContentDelta(ROME, 0, "weather", complete=True),
        ContentDelta("{}", 1, "stop", complete=True),
    ]
    assert reader.calls == 2


def passed(tokenizer, text, policy):
    """The beginning of ``text`` that a mask lets pass, and whether the answer may end there."""
    eos = tokenizer.token_id(tokenizer.eos_token)
    grammars = Grammars(tokenizer, (eos,), Dialect(tokenizer))
    mask, shown = grammars.compile(None, policy).mask(), Dialect(tokenizer).shown
    through = ""
    for id_ in tokenizer.encode(text, add_bos=False):
        if not mask.allowed()[id_]:
            return through, False
        through += shown.get(id_) or tokenizer.decode([id_])
        if mask.consume(id_):
            return through, True
    return through, bool(mask.allowed()[eos])


@FORMATS
def test_mask_holds_calls_to_their_schemas(form, tokenizers):
    tokenizer, two = tokenizers[form], TWO[form]
    assert passed(tokenizer, "So. " + two, POLICY) == ("So. " + two, True)
    required = ToolPolicy(FUNCTIONS, FUNCTIONS, required=True, single=False)
    assert passed(tokenizer, two, required) == (two, True)
    assert passed(tokenizer, "So", required) == ("", False)
    for wrong in (two.replace("Rome", "Oslo"), two.replace("3", "33"), two.replace("stop", "go")):
        assert not passed(tokenizer, wrong, POLICY)[1]
    single = ToolPolicy(FUNCTIONS, FUNCTIONS, required=True, single=True)
    assert passed(tokenizer, two, single)[0] != two


def test_tagged_arguments_need_those_that_are_required(tokenizers):
    one = TWO[GLM].partition("<tool_call>stop")[0]
    without_note = one.replace("<arg_key>note</arg_key><arg_value>a < b </arg</arg_value>", "")
    assert passed(tokenizers[GLM], without_note, POLICY) == (without_note, True)
    without_days = one.replace("<arg_key>days</arg_key><arg_value>3</arg_value>", "")
    assert not passed(tokenizers[GLM], without_days, POLICY)[1]


def test_what_tags_cannot_hold_is_relaxed_or_refused(tokenizers):
    tokenizer = tokenizers[GLM]
    short = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
    grammars = Grammars(tokenizer, (1,), Dialect(tokenizer))
    for strict in (False, True):
        functions = [Function(name="f", parameters=short, strict=strict)]
        policy = ToolPolicy(functions, functions, required=False, single=False)
        if strict:
            with pytest.raises(RefusedError, match="maxLength"):
                grammars.compile(None, policy)
        else:
            assert grammars.compile(None, policy).relaxed == ["tool 'f': a: maxLength"]


def test_history_with_arguments_that_are_no_object_is_refused(tokenizers):
    history = [
        Message("user", "Hi"),
        Message("assistant", calls=[call("a", "stop", "[1]")]),
        Message("tool", "ok", call_id="a"),
    ]
    with pytest.raises(RefusedError, match="no JSON object"):
        Dialect(tokenizers[GLM]).prompt(Conversation(history))
