"""Tool calls in every format that models write: what the model reads, what a mask lets it write,
and what clients get of it.  The templates of DeepSeek-V3.1, Kimi K2, GLM and Mistral are small ones
with the features of the real ones; those of V3.2 and V4 are ours."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.model.families import FAMILIES
from slotmoe.model.tokenizer import ReasoningMarks, Splitter, Tokenizer
from slotmoe.tools.serve import formats
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import (
    DEEPSEEK_V3_1,
    DEEPSEEK_V3_2,
    DEEPSEEK_V4,
    GLM,
    KIMI,
    MISTRAL,
    NATIVE,
    PLAIN,
    ContentDelta,
    Reader,
    joined,
    parse_arguments,
    text_arguments,
)
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import MAX_CALLS, Grammars
from slotmoe.tools.serve.requests import Call, Conversation, Function, Message, Rule, ToolPolicy
from tests.support.served import (
    TOOLS,
    USER,
    WEATHER,
    deepseek_files,
    is_weather,
    passed,
    sample_without_last,
    tokenizer_with,
)
from tests.support.tiny import SAMPLE

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
    MISTRAL: f"[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]stop[ARGS]{{}}",
    DEEPSEEK_V3_2: dsml("function_calls"),
    DEEPSEEK_V4: dsml("tool_calls"),
}
OURS = {DEEPSEEK_V3_2: "deepseek_v32", DEEPSEEK_V4: "deepseek_v4"}
NAMES = {form: name for name, form in vars(formats).items() if isinstance(form, type(PLAIN))}
FORMS = pytest.mark.parametrize("form", TWO, ids=[NAMES[form] for form in TWO])
TAGS = pytest.mark.parametrize("form", OURS, ids=OURS.values())


def template(result, before, each, after=""):
    calls = f"{{% if m.tool_calls %}}{before}{{% for c in m.tool_calls %}}{each}{{% endfor %}}"
    return (
        f"{{% for m in messages %}}{{% if m.role == 'tool' %}}{result}"
        "{% elif m.role == 'assistant' %}[A]{{ m.content or '' }}{% else %}"
        f"[{{{{ m.role }}}}]{{{{ m.content }}}}{{% endif %}}{calls}{after}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )


NAME, ARGUMENTS = "{{ c.function.name }}", "{{ c.function.arguments }}"
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
        "<tool_call>" + NAME + "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}"
        "</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}"
        "</tool_call>",
    ),
    MISTRAL: template("[RESULT]{{ m.content }}", "", f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}"),
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


def test_functions_and_failed_results_in_plain_words(tokenizers):
    dialect, tokenizer = Dialect(tokenizers[PLAIN]), tokenizers[PLAIN]
    told = json.dumps({"name": "weather", "description": "", "parameters": PARAMETERS})
    messages = [Message("system", "Be brief."), *history(("stop", "{}"))]
    messages[-1].failed = True
    text = dialect.prompt(Conversation(messages, policy(functions=FUNCTIONS[:1])))
    begin, end = tokenizer.spelling(0), tokenizer.eos_token
    head = f"{begin}Be brief.\n\nYou can call these functions:\n{told}\n\nTo call one, write <tool"
    assert text.startswith(head)
    assert text.endswith(
        '\n\nAssistant: So.\n<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
        + end
        + 'User: <tool_response name="stop" error="true">\nr0\n</tool_response>\n\nAssistant:'
    )
    assert dialect.prompt(Conversation([Message("user", "Hi")])) == f"{begin}User: Hi\n\nAssistant:"


def test_functions_in_the_words_of_the_model_card(tokenizers):
    tokenizer = tokenizers[NATIVE]
    text = Dialect(tokenizer).prompt(Conversation(history(*BOTH), policy()))
    told = json.dumps({"name": "weather", "description": "", "parameters": PARAMETERS}, indent=4)
    head = "You are a helpful Assistant.\n\n## Tools\n\n### Function\n\nYou have the following "
    head += f"functions available:\n\n- `weather`:\n```json\n{told}\n```\n- `stop`:"
    assert text.startswith(tokenizer.spelling(0) + head)
    results = f"{OUTS}{OUT}r0{OUT_END}\n{OUT}r1{OUT_END}{OUTS_END}"
    assert text.endswith(f"[user]Hi[A]So.{TWO[NATIVE]}{tokenizer.eos_token}{results}")


def test_results_belong_to_the_calls_before_them(tokenizers):
    turns, dialect = history(*BOTH), Dialect(tokenizers[PLAIN])
    for messages in (turns[:2], turns[:3], turns[2:], [*turns, turns[-1]], turns[:3] + turns[2:3]):
        with pytest.raises(RefusedError, match=r"has no result|answers no call"):
            dialect.prompt(Conversation(messages))
    turns[-1].name = "stop"
    with pytest.raises(RefusedError, match="name of another"):
        dialect.prompt(Conversation(turns))
    with pytest.raises(RefusedError, match="no JSON object"):
        Dialect(tokenizers[GLM]).prompt(Conversation(history(("stop", "[1]"))))


@FORMS
@pytest.mark.parametrize("width", [1, 5, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    two = TWO[form]
    assert read(form, f"So.{form.lead}{two}", width) == [ContentDelta("So."), *WANTED]
    assert read(form, form.lead + two, width) == read(form, two, width) == WANTED
    for text in ("", "a < b", "So.\n\n", "a\n\n\n<b", "Hi " + form.opening[:-1]):
        assert read(form, text, width) == [ContentDelta(text)] * bool(text)
    thought, marks = (
        ContentDelta("Hm 1 < 2", reasoning=True),
        ReasoningMarks("<think>", "</think>", {}),
    )
    answer = f"Hm 1 < 2</think>{form.lead}{two}"
    assert read(form, answer, width, splitter=Splitter(marks, True)) == [thought, *WANTED]
    for end in range(len(form.opening), two.index("stop"), 7):
        parts = read(form, two[:end], width)
        assert all(part.call is not None for part in parts)  # none of it is text
    assert not any(part.complete for part in read(form, two[: two.index("days")], width))
    quoted = f'"{form.opening}"'
    assert read(form, quoted, width, either=True) == [ContentDelta(quoted)]
    assert read(None, two, width) == [ContentDelta(two)]


def test_arguments_that_json_cannot_hold_are_none():
    assert parse_arguments('{"a": 1.5}') == {"a": 1.5}
    deep = '{"a":' * 200_000 + "1" + "}" * 200_000  # more than json holds in any version of Python
    for text in ('{"a": 1e999}', '{"a": "\\ud800"}', deep, '{"a": ' + "9" * 5000 + "}"):
        assert parse_arguments(text) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<"), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
ARGUMENTS = st.dictionaries(st.text("key_ .1", min_size=1), VALUES)
CALLED = st.lists(st.tuples(st.text("abc_-1", min_size=1), ARGUMENTS), min_size=1, max_size=3)


@TAGS
@settings(max_examples=25, deadline=None)
@given(calls=CALLED, width=st.integers(1, 40))
def test_what_is_written_of_a_call_is_read_as_the_same_call(form, tokenizers, calls, width):
    said = history(*((name, json.dumps(made)) for name, made in calls), thoughts="Hm")
    text = Dialect(tokenizers[form]).prompt(Conversation(said, policy(), effort="high"))
    answer = text.partition("<think>Hm</think>")[2].partition(tokenizers[form].eos_token)[0]
    first, *parts = read(form, answer, width)
    assert first == ContentDelta("So.") and all(part.complete for part in parts)
    assert [(part.name, parse_arguments(part.text)) for part in parts] == calls


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
    word = "<tool_call>" if form is PLAIN else "yes"
    schema = Rule("json", {"type": "object", "properties": {"a": {"const": word}}})
    for text in (json.dumps({"a": word}), two):
        assert left(text, wanted=schema) == (text, True)
    assert left("So", wanted=schema)[0] == ""
    if thinks is not None:
        text = f"Hm, 1 < 2 </think>\n\n{two}"
        assert passed(tokenizer, text, policy(required=True), None, True) == (text, True)


def test_calls_are_bounded_and_begin_on_their_lines(tokenizers):
    call, tokenizer = TWO[PLAIN].partition("\n")[0], tokenizers[PLAIN]
    assert passed(tokenizer, call[:-12], policy()) == (call[:-12], False)
    assert passed(tokenizer, call + "and more", policy())[0] == call
    for count, fits in ((MAX_CALLS, True), (MAX_CALLS + 1, False)):
        text = "\n".join([call] * count)
        assert (passed(tokenizer, text, policy())[0] == text) is fits


def test_native_calls_begin_with_their_token_alone(tokenizers):
    tokenizer = tokenizers[NATIVE]
    spelled = [one for sign in CALLS for one in tokenizer.encode(sign, add_bos=False)]
    assert tokenizer.decode(spelled) == CALLS and tokenizer.token_id(CALLS) not in spelled
    mask = Grammars(tokenizer, (1,), Dialect(tokenizer)).compile(None, policy()).mask()
    for one in spelled[:-1]:
        assert mask.allowed()[one] and not mask.consume(one)
    assert not mask.allowed()[spelled[-1]]


OPEN = {"any": {}, "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, **CITY}


@TAGS
def test_mask_takes_text_where_the_type_is_open(form, tokenizers):
    functions = [Function(name="f", parameters={"type": "object", "properties": OPEN})]
    for name, kind, value, fits in (
        ("any", "true", "x", True), ("any", "false", "[1]", True), ("any", "false", "x", False),
        ("maybe", "true", "x", True), ("maybe", "false", "1", False), ("days", "true", "x", False),
        ("note", "false", '"x"', False), ("city", "true", "Oslo", False),
    ):  # fmt: skip
        tag = f'<{D}parameter name="{name}" string="{kind}">{value}</{D}parameter>\n'
        text = f'{form.opening}\n<{D}invoke name="f">\n{tag}</{D}invoke>{form.closing}'
        found = passed(tokenizers[form], text, policy(functions=functions), None, False)
        assert found[1] is fits, (name, kind, value)


def test_what_tags_cannot_hold_is_relaxed_or_refused(tokenizers):
    tokenizer = tokenizers[GLM]
    one = TWO[GLM].partition("<tool_call>stop")[0]
    for key, needed in (("note", False), ("days", True)):
        before, _, after = one.partition(f"<arg_key>{key}")
        text = before + after.partition("</arg_value>")[2]
        assert passed(tokenizer, text, policy())[1] is not needed
    short = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
    grammars = Grammars(tokenizer, (1,), Dialect(tokenizer))
    loose, strict = (
        policy(functions=[Function(name="f", parameters=short, strict=strict)])
        for strict in (False, True)
    )
    assert grammars.compile(None, loose).relaxed == ["tool 'f': a: maxLength"]
    with pytest.raises(RefusedError, match="maxLength"):
        grammars.compile(None, strict)


def test_reminders_are_for_models_that_know_them(tokenizers):
    chat = Conversation([Message("latest_reminder", "Hi"), Message("user", "Hi")])
    prompt = Dialect(tokenizers[DEEPSEEK_V4]).prompt(chat)
    assert "<\uff5clatest_reminder\uff5c>Hi<\uff5cUser\uff5c>Hi" in prompt
    with pytest.raises(RefusedError, match="latest_reminder"):
        Dialect(tokenizers[DEEPSEEK_V3_2]).prompt(chat)


def test_template_sees_reasoning_and_its_switch(tokenizers):
    tokenizer = Tokenizer(SAMPLE, 0)
    tokenizer.template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
        "{% if thinking is defined %}{{ thinking }}{{ enable_thinking }}{{ reasoning_effort }}"
        "{% endif %}"
    )
    said = [Message("user", "Hi"), Message("assistant", "Yes", thoughts="Hm")]
    for effort, end in ((None, ""), ("none", "FalseFalsenone"), ("low", "TrueTruehigh")):
        text = Dialect(tokenizer).prompt(Conversation(said, effort=effort))
        assert text == f"[user]|Hi[assistant]Hm|Yes{end}"


# Over HTTP

NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def context():
    return 1024


def called(choice):
    """The function of the only call of an answer."""
    (call,) = choice["message"]["tool_calls"]
    return call["function"]


def test_forced_calls_fit_the_schema_with_every_seed(served):
    options = {"tools": TOOLS, "temperature": 2.0, "seed": 7, "max_tokens": 120, "n": 4}
    for choice in served.chat(**options, tool_choice=NAMED)[1]["choices"]:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert called(choice)["name"] == "weather" and is_weather(called(choice)["arguments"])
    answer = served.chat(**options, tool_choice="required", parallel_tool_calls=False)[1]
    calls = [called(choice) for choice in answer["choices"]]
    assert {call["name"] for call in calls} == {"weather", "stop"}
    only = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    allowed = {"type": "allowed_tools", "allowed_tools": only}
    for choice in served.chat(**options, tool_choice=allowed)[1]["choices"]:
        names = {call["function"]["name"] for call in choice["message"]["tool_calls"]}
        assert names == {"stop"}


def test_stop_strings_end_text_and_never_a_call(served):
    """Each stop string is in the call that the model is made to write, or in its marks."""
    options = {"tools": TOOLS, "max_tokens": 120, "seed": 3}
    call = called(served.choice(**options, tool_choice=NAMED))
    stopped = served.choice(**options, tool_choice=NAMED, stop=["city", "<", "_call>", '": ', "}"])
    assert stopped["finish_reason"] == "tool_calls" and called(stopped) == call
    text = served.choice(**options)["message"]["content"]
    stopped = served.choice(**options, stop=["zzz", text[20:24]])
    assert stopped["message"]["content"] == text[: text.index(text[20:24])]
    assert stopped["finish_reason"] == "stop"


def test_calls_that_are_cut_off(served):
    options = {"tools": TOOLS, "tool_choice": NAMED}
    whole = served.chat(**options, max_tokens=200)[1]
    arguments, limit = called(whole["choices"][0])["arguments"], whole["usage"]["completion_tokens"]
    choice = served.choice(**options, max_tokens=limit - 12)
    cut = called(choice)["arguments"]
    assert choice["finish_reason"] == "length" and cut != arguments and arguments.startswith(cut)
    for count in (1, 5):  # no beginning of a required call is text
        answer = served.choice(tools=TOOLS, tool_choice="required", max_tokens=count)
        assert answer["finish_reason"] == "length" and not answer["message"]["content"]


def test_a_schema_of_the_answer_beside_functions(served, runtime):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    quote, opening = (str(runtime.tokenizer.encode(sign, add_bos=False)[0]) for sign in '"<')
    both = {"tools": TOOLS, "response_format": form, "max_tokens": 100}
    plain, call = (
        served.choice(**both, parallel_tool_calls=False, logit_bias={one: 100})
        for one in (quote, opening)
    )
    assert json.loads(plain["message"]["content"]) in ("yes", "no")
    assert called(call) and call["finish_reason"] == "tool_calls"
    counts = [
        served.chat(**wish, messages=USER, max_tokens=4)[1]["usage"]["prompt_tokens"]
        for wish in ({"tools": TOOLS, "tool_choice": "none"}, {}, {"tools": TOOLS})
    ]
    assert counts[0] == counts[1] < counts[2]
