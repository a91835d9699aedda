"""Tool calls in every format that models write: what the model reads, what a mask lets it write,
and what clients get of it.  The templates of DeepSeek-V3.1, Kimi K2, GLM and Mistral are small ones
with the features of the real ones; those of V3.2 and V4 are ours."""

import shutil

import pytest

from slotmoe.model.chat import render_chat
from slotmoe.model.families import FAMILIES
from slotmoe.model.reasoning import ReasoningMarks, Splitter
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.formats import (
    FORMATS,
    ContentDelta,
    Reader,
    joined,
    parse_arguments,
    text_arguments,
)
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.requests import Call, Conversation, Function, Message, Rule, ToolPolicy
from tests.support.served import (
    WEATHER,
    deepseek_files,
    passed,
    sample_without_last,
    tokenizer_with,
)
from tests.support.tiny import SAMPLE

PLAIN, DEEPSEEK_V3_1, NATIVE, KIMI, GLM_4_5, GLM, MISTRAL, *OTHERS = FORMATS.values()
DEEPSEEK_V3_2, DEEPSEEK_V4, QWEN3, QWEN3_CODER, MINIMAX, HARMONY = OTHERS
CITY = {**WEATHER["properties"], "note": {"type": "string", "description": "free"}}
PARAMETERS = {**WEATHER, "properties": {name: CITY[name] for name in ("city", "note", "days")}}
FUNCTIONS = [Function(name="weather", parameters=PARAMETERS), Function(name="stop")]
TEXTS = {function.name: text_arguments(function) for function in FUNCTIONS}
ROME = '{"city": "Rome", "note": "a < b </arg", "days": 3}'


def policy(required=False, single=False, functions=FUNCTIONS):
    return ToolPolicy(functions, functions, required, single)


def t(name):
    return f"<\uff5ctool\u2581{name.replace('_', chr(0x2581))}\uff5c>"


CALLS, CALL, SEP, END, ENDS = map(t, "calls_begin call_begin sep call_end calls_end".split())
OUTS, OUT, OUT_END, OUTS_END = map(t, "outputs_begin output_begin output_end outputs_end".split())
D = "\uff5cDSML\uff5c"
TAGGED = "".join(
    f'<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'
    for name, kind, value in (
        ("city", "true", "Rome"), ("note", "true", "a < b </arg"), ("days", "false", "3"),
    )
)  # fmt: skip


def dsml(block):
    calls = f'<{D}invoke name="weather">\n{TAGGED}</{D}invoke>\n<{D}invoke name="stop">\n\n'
    return f"<{D}{block}>\n{calls}</{D}invoke>\n</{D}{block}>"


# A call of each function, as each model writes them.
TWO = {
    PLAIN: f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>\n<tool_call>'
    '{"name": "stop", "arguments": {}}</tool_call>',
    NATIVE: f"{CALLS}{CALL}function{SEP}weather\n```json\n{ROME}\n```{END}\n"
    f"{CALL}function{SEP}stop\n```json\n{{}}\n```{END}{ENDS}",
    DEEPSEEK_V3_1: f"{CALLS}{CALL}weather{SEP}{ROME}{END}{CALL}stop{SEP}{{}}{END}{ENDS}",
    KIMI: "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    f"<|tool_call_argument_begin|>{ROME}<|tool_call_end|><|tool_call_begin|>functions.stop:1"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    GLM: "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>note"
    "</arg_key><arg_value>a < b </arg</arg_value><arg_key>days</arg_key><arg_value>3"
    "</arg_value></tool_call><tool_call>stop</tool_call>",
    GLM_4_5: "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "<arg_key>note</arg_key>\n<arg_value>a < b </arg</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>",
    MISTRAL: f"[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]stop[ARGS]{{}}",
    QWEN3: f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>\n<tool_call>\n'
    '{"name": "stop", "arguments": {}}\n</tool_call>',
    QWEN3_CODER: "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
    "<parameter=note>\na < b </arg\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>",
    MINIMAX: '<minimax:tool_call>\n<invoke name="weather">\n'
    '<parameter name="city">Rome</parameter>\n<parameter name="note">a < b </arg</parameter>\n'
    '<parameter name="days">3</parameter>\n'
    '</invoke>\n<invoke name="stop">\n</invoke>\n</minimax:tool_call>',
    DEEPSEEK_V3_2: dsml("function_calls"),
    DEEPSEEK_V4: dsml("tool_calls"),
}
OURS = {DEEPSEEK_V3_2: "deepseek_v32", DEEPSEEK_V4: "deepseek_v4"}
NAMES = {form: name for name, form in FORMATS.items()}
FORMS = pytest.mark.parametrize("form", TWO, ids=[NAMES[form] for form in TWO])


def template(result, before, each, after=""):
    calls = f"{{% if m.tool_calls %}}{before}{{% for c in m.tool_calls %}}{each}{{% endfor %}}"
    return (
        f"{{% for m in messages %}}{{% if m.role == 'tool' %}}{result}"
        "{% elif m.role == 'assistant' %}[A]{{ m.content or '' }}{% else %}"
        f"[{{{{ m.role }}}}]{{{{ m.content }}}}{{% endif %}}{calls}{after}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )


NAME, ARGUMENTS = "{{ c.function.name }}", "{{ c.function.arguments }}"
EACH = "{% for k, v in c.function.arguments.items() %}"
VALUE = "{{ v if v is string else v | tojson }}"
N = "{{ '\\n' }}"
TEMPLATES = {
    NATIVE: "{{ bos_token }}{# knows " + CALLS + " #}{% for m in messages %}"
    "{% if m.role == 'user' %}[user]{{ m.content }}{% elif m.role == 'assistant' %}[A]"
    "{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}",
    DEEPSEEK_V3_1: template(
        "<out>{{ m.content }}</out>", CALLS, CALL + NAME + SEP + ARGUMENTS + END, ENDS
    ),
    KIMI: template(
        "## Return of {{ m.tool_call_id }}\n{{ m.content }}",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>" + ARGUMENTS
        + "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    GLM: template(
        "<tool_response>{{ m.content }}</tool_response>",
        "",
        f"<tool_call>{NAME}{EACH}<arg_key>{{{{ k }}}}</arg_key><arg_value>{VALUE}</arg_value>"
        "{% endfor %}</tool_call>",
    ),
    GLM_4_5: "{# </arg_key>\n<arg_value> #}" + template(
        "<tool_response>{{ m.content }}</tool_response>", "",
        f"{N}<tool_call>{NAME}{N}{EACH}<arg_key>{{{{ k }}}}</arg_key>{N}<arg_value>{VALUE}"
        f"</arg_value>{N}{{% endfor %}}</tool_call>",
    ),
    MISTRAL: template("[RESULT]{{ m.content }}", "", f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}"),
    QWEN3: "{# <args-json-object> #}" + template(
        "<tool_response>{{ m.content }}</tool_response>", "",
        f'{N}<tool_call>{N}{{"name": "{NAME}", "arguments": {ARGUMENTS}}}{N}</tool_call>',
    ),
    QWEN3_CODER: template(
        "<tool_response>{{ m.content }}</tool_response>", "",
        f"{N}<tool_call>{N}<function={NAME}>{N}{EACH}<parameter={{{{ k }}}}>{N}{VALUE}{N}"
        f"</parameter>{N}{{% endfor %}}</function>{N}</tool_call>",
    ),
    MINIMAX: template(
        "<response>{{ m.content }}</response>", f"{N}<minimax:tool_call>",
        f'{N}<invoke name="{NAME}">{N}{EACH}<parameter name="{{{{ k }}}}">{VALUE}</parameter>{N}'
        "{% endfor %}</invoke>", f"{N}</minimax:tool_call>",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(processes, tmp_path_factory):
    """The sample's tokenizer with the tokens and the template of each format."""
    found = {PLAIN: Tokenizer(SAMPLE, 0)}
    for form, text in TEMPLATES.items():
        folder = shutil.copytree(SAMPLE, tmp_path_factory.mktemp("tokenizer") / "sample")
        marks = form.marks if form is not NATIVE else [*form.marks, OUTS, OUT, OUT_END, OUTS_END]
        source, last = sample_without_last(len(marks))
        found[form] = Tokenizer(tokenizer_with(folder, marks, last, text, source), 0)
    folder = deepseek_files(tmp_path_factory.mktemp("tokenizer"))
    for form, kind in OURS.items():
        found[form] = Tokenizer(folder, 0, own_template=FAMILIES[kind].own_template)
    return found


def history(*calls, **about):
    """A conversation with ``calls``, and a result of each, the last one's first."""
    made = [Call(str(n), name, arguments) for n, (name, arguments) in enumerate(calls)]
    results = [Message("tool", f"r{call.id}", call_id=call.id) for call in reversed(made)]
    return [Message("user", "Hi"), Message("assistant", "So.", made, **about), *results]


BOTH = (("weather", ROME), ("stop", ""))


def read(form, text, width, **how):
    """The parts of an answer that arrives ``width`` characters at a time."""
    reader, parts = Reader(form, texts=TEXTS, **how), []
    for start in range(0, len(text), width):
        parts += reader.feed(text[start : start + width])
    return joined(parts + reader.end())


WANTED = [ContentDelta(ROME, 0, "weather", True), ContentDelta("{}", 1, "stop", True)]


@FORMS
def test_the_model_reads_what_it_would_have_written(form, tokenizers):
    dialect = Dialect(tokenizers[form])
    assert dialect.format is form and dialect.is_native == (form is not PLAIN)
    text = dialect.prompt(Conversation(history(*BOTH), policy(), effort="none"))
    gap = form.lead or "\n" * (form is PLAIN)
    assert f"So.{gap}{TWO[form]}" in text
    assert text.index("r0") < text.index("r1") < len(text) - 2
    sample = Tokenizer(SAMPLE, 0)
    sample.template = tokenizers[form].template  # without the tokens
    assert Dialect(sample).format is PLAIN


@FORMS
@pytest.mark.parametrize("width", [1, 5, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    two = TWO[form]
    assert read(form, f"So.{form.lead}{two}", width) == [ContentDelta("So."), *WANTED]
    assert read(form, form.lead + two, width) == read(form, two, width) == WANTED
    for text in ("", "a < b", "So.\n\n", "a\n\n\n<b", "Hi " + form.opening[:-1]):
        assert read(form, text, width) == [ContentDelta(text)] * bool(text)
    thought = ContentDelta("Hm 1 < 2", reasoning=True)
    marks = ReasoningMarks("<think>", "</think>", {})
    answer = f"Hm 1 < 2</think>{form.lead}{two}"
    assert read(form, answer, width, splitter=Splitter(marks, True)) == [thought, *WANTED]
    for end in range(len(form.opening), two.index("days"), 7):
        for part in read(form, two[:end], width):
            assert part.call is not None and not part.complete  # none of it is text


def test_arguments_that_json_cannot_hold_are_none():
    assert parse_arguments('{"a": 1.5}') == {"a": 1.5}
    deep = '{"a":' * 200_000 + "1" + "}" * 200_000  # more than json holds in any version of Python
    for text in ('{"a": 1e999}', '{"a": "\\ud800"}', deep, '{"a": ' + "9" * 5000 + "}"):
        assert parse_arguments(text) is None


@FORMS
def test_mask_holds_calls_to_their_schemas(form, tokenizers):
    tokenizer, two, thinks = tokenizers[form], TWO[form], False if form in OURS else None

    def left(text, asked=policy(), wanted=None):  # noqa: B008
        return passed(tokenizer, text, asked, wanted, thinks)

    for text in (f"So. {form.lead}{two}", "5 < 6", "<", "Any text\n"):
        assert left(text) == (text, True)
    assert left(two, policy(required=True)) == (two, True)
    assert left("So", policy(required=True)) == ("", False)
    assert left(two, policy(required=True, single=True))[0] != two
    for wrong in (two.replace("Rome", "Oslo"), two.replace("3", "33"), two.replace("stop", "go")):
        assert not left(wrong)[1]
    schema = Rule("json", {"type": "object", "properties": {"a": {"const": "yes"}}})
    for text in ('{"a": "yes"}', two):
        assert left(text, wanted=schema) == (text, True)
    assert left("So", wanted=schema)[0] == ""
    if thinks is not None:
        text = f"Hm, 1 < 2 </think>\n\n{two}"
        assert passed(tokenizer, text, policy(required=True), None, True) == (text, True)


HARMONY_TEMPLATE = """Reasoning: {{ reasoning_effort }}{% for m in messages %}
{% if m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary
{{- "<|message|>" }}{{ m.content | tojson }}<|end|>
{%- elif m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception("both") }}{% endif %}
{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
{%- endif %}
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json
{{- "<|message|>" }}{{ m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""


def test_messages_of_gpt_oss(processes, tmp_path):
    tokens = (*HARMONY.marks, "<|start|>", "<|end|>", "<|call|>", "<|return|>")
    source, last = sample_without_last(len(tokens))
    folder = shutil.copytree(SAMPLE, tmp_path / "sample")
    tokenizer = Tokenizer(tokenizer_with(folder, tokens, last, HARMONY_TEMPLATE, source), 0)
    dialect = Dialect(tokenizer)
    assert dialect.format is HARMONY
    chat = Conversation(history(*BOTH, thoughts="Hm"), policy(), effort="none")
    start, json_ = "<|start|>assistant", "<|channel|>commentary json<|message|>"
    one = f"{start}<|channel|>analysis<|message|>Hm\n\nSo.<|end|>{start} to=functions.weather"
    two = '<|channel|>commentary<|message|>"r0"<|end|>' + f"{start} to=functions.stop{json_}{{}}"
    text = dialect.prompt(chat).replace("\n<", "<")
    assert one + json_ + ROME in text and two in text and text.endswith(start)
    for effort, known in (("none", "low"), ("medium", "medium"), ("xhigh", "high")):
        assert f"Reasoning: {known}" in render_chat(tokenizer, [{"role": "user"}], effort=effort)

    called = f"{HARMONY.opening}weather{HARMONY.middle}{ROME}"
    thought = f"<|channel|>analysis<|message|>Hm, 1 < 2<|end|>{start}"
    final = "<|channel|>final<|message|>"
    schema = Rule("json", {"type": "object", "properties": {"a": {"const": "yes"}}})
    for text, asked, wanted in (
        (called, policy(True), None), (f"{final}5 < 6", policy(), None), (called, policy(), None),
        (f'{final}{{"a": "yes"}}', None, schema), (called, policy(), schema),
    ):  # fmt: skip
        for whole in (text, thought + text):
            assert passed(tokenizer, whole, asked, wanted, False) == (whole, True)
            splitter = tokenizer.splitter(tokenizer.encode(start))
            deltas = Reader(asked and HARMONY, texts=TEXTS, splitter=splitter)
            parts = joined(deltas.feed(whole) + deltas.end())
            said = ContentDelta(ROME, 0, "weather", True) if text is called else None
            assert parts[-1] == (said or ContentDelta(text.removeprefix(final)))
            assert (parts[0].text == "Hm, 1 < 2") == parts[0].reasoning == (whole is not text)
    assert passed(tokenizer, final, policy(True), None, False)[0] == "<|channel|>"
    assert passed(tokenizer, '{"a": "yes"}', None, schema, None) == ('{"a": "yes"}', True)
