"""``slotmoe serve``: calls of functions and the masks that hold them to their schemas, and the
log-probabilities of a prompt."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pydantic
import pytest
import torch

from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime, Sequence
from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import NATIVE, PLAIN
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import MAX_CALLS, Grammars
from slotmoe.tools.serve.reader import ContentDelta, Reader, joined, parse_arguments
from slotmoe.tools.serve.requests import (
    AssistantMessage,
    CalledFunction,
    FailedToolMessage,
    Function,
    PlainMessage,
    Schema,
    ToolCall,
    ToolMessage,
    ToolPolicy,
)
from tests.support.served import GREEDY, USER, Served
from tests.support.tiny import SAMPLE

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": WEATHER,
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
ANTHROPIC_TOOLS = [
    {"name": "weather", "description": "The weather of a city", "input_schema": WEATHER}
]
MARKS = [
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")
]
MARKS += [
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("outputs\u2581begin", "output\u2581begin", "output\u2581end", "outputs\u2581end")
]
NATIVE_TEMPLATE = (
    "{{ bos_token }}{# knows " + MARKS[0] + " #}"
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}"
    "{% elif m.role == 'assistant' %}[A]{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)


def is_weather(arguments):
    found = json.loads(arguments)
    return (
        set(found) == {"city", "days"}
        and found["city"] in ("Paris", "Rome")
        and found["days"] in range(1, 10)
    )


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def served(runtime):
    with Served(runtime, waiting=16, max_body=1 << 20) as served:
        yield served


@pytest.fixture(scope="module")
def native_export(tmp_path_factory):
    """The sample with DeepSeek-V2.5's tokens in place of its last nine, half of them special, and a
    template that knows them."""
    folder = tmp_path_factory.mktemp("native") / "sample"
    shutil.copytree(SAMPLE, folder)
    source = json.loads((folder / "tokenizer.json").read_text())
    last = len(source["model"]["vocab"]) - len(MARKS)
    gone = {token for token, number in source["model"]["vocab"].items() if number >= last}
    source["model"]["vocab"] = {
        token: number for token, number in source["model"]["vocab"].items() if number < last
    }
    pairs = [one if isinstance(one, list) else one.split(" ") for one in source["model"]["merges"]]
    source["model"]["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & gone]
    for number, token in enumerate(MARKS):
        about = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": number % 2 == 0,
        }
        source["added_tokens"].append({"id": last + number, "content": token, **about})
    (folder / "tokenizer.json").write_text(json.dumps(source))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "chat_template": NATIVE_TEMPLATE
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    quantize(folder, folder.parent / "export")
    return folder.parent / "export"


def policy(*names, required=False, single=False):
    functions = [Function(name=name, parameters=WEATHER) for name in names]
    return ToolPolicy(functions, functions, required, single)


def user(text):
    return PlainMessage(role="user", content=text)


def tool_call(id_, name, arguments):
    return ToolCall(id=id_, function=CalledFunction(name=name, arguments=arguments))


def result(id_, text, kind=ToolMessage, name=None):
    return kind(role="tool", tool_call_id=id_, content=text, name=name)


def calls_in_two_rounds():
    both = [tool_call("a", "weather", '{"city": "Rome", "days": 1}'), tool_call("b", "stop", "")]
    return [
        user("Weather?"),
        AssistantMessage(role="assistant", content="Let me see.", tool_calls=both),
        result("b", "stopped", FailedToolMessage),
        result("a", "wet"),
        AssistantMessage(role="assistant", tool_calls=[tool_call("c", "stop", "{}")]),
        result("c", "ok"),
    ]


@pytest.mark.usefixtures("processes")
def test_model_without_tool_tokens_is_told_in_plain_words(runtime):
    dialect = Dialect(runtime.tokenizer)
    text = dialect.prompt(
        [PlainMessage(role="system", content="Be brief."), *calls_in_two_rounds()],
        policy("weather"),
    )
    begin, end = runtime.tokenizer.settings["bos_token"], runtime.tokenizer.eos_token
    told = json.dumps({"name": "weather", "description": "", "parameters": WEATHER})
    assert text.startswith(
        f"{begin}Be brief.\n\nYou can call these functions:\n{told}\n\n"
        "To call one, write <tool_call>"
    )
    assert text.partition("User: Weather?")[2] == (
        "\n\nAssistant: Let me see.\n"
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 1}}</tool_call>\n'
        '<tool_call>{"name": "stop", "arguments": {}}</tool_call>' + end + "User: "
        '<tool_response name="weather">\nwet\n</tool_response>\n'
        '<tool_response name="stop" error="true">\nstopped\n</tool_response>\n\n'
        'Assistant: <tool_call>{"name": "stop", "arguments": {}}</tool_call>' + end + "User: "
        '<tool_response name="stop">\nok\n</tool_response>\n\nAssistant:'
    )
    assert dialect.prompt([user("Hi")], None) == f"{begin}User: Hi\n\nAssistant:"


@pytest.mark.usefixtures("processes")
def test_model_with_tool_tokens_reads_its_own_format(native_export):
    tokenizer = Tokenizer(native_export, 0)
    calls, call, sep, end_call, end_calls, outputs, output, end_output, end_outputs = MARKS
    begin, end = tokenizer.settings["bos_token"], tokenizer.eos_token
    text = Dialect(tokenizer).prompt(calls_in_two_rounds(), policy("weather"))
    function = json.dumps({"name": "weather", "description": "", "parameters": WEATHER}, indent=4)
    head = (
        "You are a helpful Assistant.\n\n## Tools\n\n### Function\n\n"
        "You have the following functions available:\n\n"
    )
    stop = f"{call}function{sep}stop\n```json\n{{}}\n```{end_call}"
    assert text == (
        f"{begin}{head}- `weather`:\n```json\n{function}\n```[U]Weather?"
        f"[A]Let me see.{calls}{call}function{sep}weather\n```json\n"
        f'{{"city": "Rome", "days": 1}}\n```{end_call}\n{stop}{end_calls}{end}'
        f"{outputs}{output}wet{end_output}\n{output}stopped{end_output}{end_outputs}"
        f"{calls}{stop}{end_calls}{end}{outputs}{output}ok{end_output}{end_outputs}"
    )
    untaught, other = Tokenizer(SAMPLE, 0), Tokenizer(native_export, 0)
    untaught.template, other.template = (NATIVE_TEMPLATE, untaught.template)
    assert [Dialect(one).is_native for one in (tokenizer, untaught, other)] == [True, False, False]
    tokenizer.template = (
        NATIVE_TEMPLATE + "{% for one in tools %}{{ one.function.name }}{% endfor %}"
    )
    assert (
        Dialect(tokenizer).prompt([user("Hi")], policy("weather", "stop"))
        == f"{begin}[U]Hi[A]weatherstop"
    )


def test_results_belong_to_the_calls_before_them(runtime):
    turns = calls_in_two_rounds()
    for wrong in (
        turns[:2],
        turns[:3],
        turns[:2] + turns[:1],
        turns[2:],
        [*turns, turns[-1]],
        turns[:3] + turns[2:],
    ):
        with pytest.raises(RefusedError, match=r"has no result|answers no call"):
            Dialect(runtime.tokenizer).prompt(wrong, None)
    renamed = result("c", "ok", name="weather")
    with pytest.raises(RefusedError, match="name of another"):
        Dialect(runtime.tokenizer).prompt([*turns[:-1], renamed], None)


@pytest.mark.parametrize("form", [PLAIN, NATIVE], ids=["plain", "native"])
@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    odd = json.dumps({"a": '}"{\\', "b": {"c": [{}], "d": form.tail}})
    calls = [tool_call("x", "one", odd), tool_call("y", "two", "{}")]
    for said, made in (("Hi <tool", []), ("a < b", calls), ("", calls[:1]), ("", [])):
        text, reader = said + form.write(made), Reader(form)
        parts = [
            part
            for start in range(0, len(text), width)
            for part in reader.feed(text[start : start + width])
        ] + reader.end()
        assert joined(parts) == [
            *([ContentDelta(said)] if said else []),
            *(
                ContentDelta(one.function.arguments, index, one.function.name, complete=True)
                for index, one in enumerate(made)
            ),
        ] and reader.calls == len(made)
    cut = Reader(form)
    text = form.write(calls)
    parts = [
        part for character in text[: text.rindex(form.tail)] for part in cut.feed(character)
    ] + cut.end()
    first, *_, last = joined(parts)
    assert first == ContentDelta(odd, 0, "one", complete=True) and not last.complete
    assert Reader(form, either=True).feed(f'"{form.opening}"') == [
        ContentDelta(f'"{form.opening}"')
    ]
    assert Reader(None).feed(form.opening) == [ContentDelta(form.opening)]


def test_arguments_that_json_cannot_hold_are_none():
    assert parse_arguments('{"a": 1.5}') == {"a": 1.5}
    assert {
        parse_arguments(text) is None
        for text in (
            '{"a": 1e999}',
            '{"a": "\\ud800"}',
            '{"a": ' + "9" * 5000 + "}",
            '{"a":' * 5000 + "1" + "}" * 5000,
        )
    } == {True}


def follows(runtime, text, wish, schema=None, tokenizer=None):
    """How many characters of ``text`` a mask lets pass, and whether the answer may, or must, end
    there."""
    tokenizer = tokenizer or runtime.tokenizer
    if schema is not None:
        schema = Schema(name="x", schema=schema)
    grammars = Grammars(tokenizer, runtime.eos_token_ids, Dialect(tokenizer))
    mask = grammars.compile(schema, wish).mask()
    passed = []
    for one in tokenizer.encode(text, add_bos=False):
        if not mask.allowed()[one]:
            return len(tokenizer.decode(passed)), False
        passed.append(one)
        if mask.consume(one):
            return len(tokenizer.decode(passed)), True
    return len(tokenizer.decode(passed)), bool(mask.allowed()[list(runtime.eos_token_ids)].any())


def test_text_is_free_until_a_call_begins(runtime):
    wish, call = (
        policy("weather", "weathers"),
        PLAIN.write([tool_call("x", "weather", '{"city": "Rome", "days": 3}')]),
    )

    def passes(text, wish=wish, schema=None):
        count, may_end = follows(runtime, text, wish, schema)
        return text[count:], may_end

    assert passes("Any <tool_cal of text\n") == ("", True)
    assert passes("So: " + call) == ("", True)
    assert passes(call.replace("weather", "weathers")) == ("", True)
    assert passes("So: <tool_call>no") == ("no", False)
    assert passes("So: " + call.replace("weather", "other"))[0].startswith("other")
    assert passes(call.replace("Rome", "Oslo"))[0].startswith("Oslo")
    assert passes(call[:-12]) == ("", False)
    assert passes(call + "and more") == ("and more", False)
    assert passes(call + call[: len("<tool_call>")])[0] == "<tool_call>"  # not on a line of its own
    assert passes("\n".join([call] * MAX_CALLS)) == ("", True)
    assert passes("\n".join([call] * (MAX_CALLS + 1)))[0].lstrip("\n") == call
    single = policy("weather", required=True, single=True)
    assert (
        passes(call, single) == ("", True)
        and passes(f"{call}\n{call}", single)[0].lstrip("\n") == call
    )
    assert passes("So", single) == ("So", False)
    answer = {
        "type": "object",
        "properties": {"a": {"const": "<tool_call>"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert passes('{"a": "<tool_call>"}', wish, answer) == ("", True)
    assert passes(call, wish, answer) == ("", True) and passes("So", wish, answer) == ("So", False)
    # A sign and what follows it, with one space or none.
    assert passes(
        call.replace(": ", ":")
        .replace('"name":', '"name": ')
        .replace('"arguments":', '"arguments": ')
    ) == ("", True)


def test_native_calls_begin_with_their_token_alone(runtime, native_export):
    tokenizer, wish = Tokenizer(native_export, 0), policy("weather")
    call = NATIVE.write([tool_call("x", "weather", '{"city": "Rome", "days": 3}')])
    spelled = [one for character in MARKS[0] for one in tokenizer.encode(character, add_bos=False)]
    assert tokenizer.decode(spelled) == MARKS[0] and tokenizer.token_id(MARKS[0]) not in spelled
    for text, may_end in (
        ("Any text", True),
        (call, True),
        (f"So: {call}", True),
        (f"So: {MARKS[0]}", False),
    ):
        assert follows(runtime, text, wish, tokenizer=tokenizer) == (
            len(tokenizer.decode(tokenizer.encode(text, False))),
            may_end,
        ), text
    assert follows(runtime, f"So: {MARKS[1]}", wish, tokenizer=tokenizer) == (4, False)
    grammars = Grammars(tokenizer, runtime.eos_token_ids, Dialect(tokenizer))
    mask = grammars.compile(None, wish).mask()
    for one in spelled[:-1]:
        assert mask.allowed()[one] and not mask.consume(one)
    assert not mask.allowed()[spelled[-1]]


@pytest.mark.usefixtures("network", "processes")
def test_forced_calls_fit_the_schema_with_every_seed(served):
    options = {"tools": TOOLS, "temperature": 2.0, "seed": 7, "max_tokens": 120}
    for choice in served.chat(**options, tool_choice=NAMED, n=4)[1]["choices"]:
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert call["function"]["name"] == "weather" and is_weather(call["function"]["arguments"])
    names = set()
    for choice in served.chat(**options, tool_choice="required", parallel_tool_calls=False, n=4)[1][
        "choices"
    ]:
        (call,) = choice["message"]["tool_calls"]
        names.add(call["function"]["name"])
        assert (
            is_weather(call["function"]["arguments"])
            if call["function"]["name"] == "weather"
            else call["function"]["arguments"] == "{}"
        )
    assert names == {"weather", "stop"}
    several = served.chat(**options, tool_choice="required", n=2)[1]["choices"]
    assert max(len(one["message"]["tool_calls"]) for one in several) > 1


@pytest.mark.usefixtures("processes")
def test_calls_of_eight_clients_at_once_each_follow_their_own_schema(served):
    def ask(number):
        schema = {
            "type": "object",
            "properties": {f"key{number}": {"const": number}},
            "required": [f"key{number}"],
        }
        schema["additionalProperties"] = False
        tool = {
            "type": "function",
            "function": {"name": f"f{number}", "parameters": schema, "strict": True},
        }
        choice = {"type": "function", "function": {"name": f"f{number}"}}
        answer = served.chat(tools=[tool], tool_choice=choice, temperature=1.5, max_tokens=100)[1]
        call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
        return call["name"], json.loads(call["arguments"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [
            (f"f{number}", {f"key{number}": number}) for number in range(8)
        ]


@pytest.mark.usefixtures("processes")
def test_a_bad_schema_leaves_no_trace_and_is_named(served):
    def ask(schema):
        tools = [*TOOLS, {"type": "function", "function": {"name": "odd", "parameters": schema}}]
        status, answer, _ = served.chat(tools=tools, tool_choice=NAMED, max_tokens=1)
        return status, answer.get("error", {"message": ""})["message"]

    bad = [
        {"type": "nonsense"},
        {"type": "string"},
        {"properties": {"a": {"pattern": "(", "type": "string"}}},
        {"$ref": "#/nowhere"},
        {"x-guidance": {"lenient": True}},
        {"properties": {"a": {"enum": ["x" * 66_000]}}},
    ]
    for schema in bad:
        good, (status, message), again = ask(WEATHER), ask(schema), ask(WEATHER)
        assert (good[0], status, again[0]) == (200, 413 if "x" * 99 in str(schema) else 400, 200), (
            message
        )
        assert "tool 'odd'" in message
    deep = {}
    for _ in range(300):
        deep = {"properties": {"a": deep}}
    assert ask(deep)[0] == 400
    endless = {
        "properties": {"a": {"$ref": "#/$defs/r"}},
        "required": ["a"],
        "$defs": {"r": {"$ref": "#/$defs/r"}},
    }
    for whole in (endless, endless | {"additionalProperties": False}):
        tools = [{"type": "function", "function": {"name": "weather", "parameters": whole}}]
        status, answer, _ = served.chat(
            tools=tools, tool_choice=NAMED, max_tokens=100, temperature=1
        )
        assert status == 400 and "nothing that could come next" in answer["error"]["message"], (
            answer
        )
    large = {"properties": {"a": {"enum": ["x" * 60_000]}}}
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": large}}
        for number in range(5)
    ]
    status, answer, _ = served.chat(tools=tools)
    assert status == 413 and "together" in answer["error"]["message"]


REFUSED = [
    ({"tools": TOOLS * 65}, "tools"),
    ({"tools": TOOLS + TOOLS[:1]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
    ),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [], "parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"functions": [{"name": "x"}]}, "functions"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
    ({"messages": [*USER, {"role": "user", "content": "x", "tool_calls": []}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_called_is_refused(served, fields, param):
    status, answer, _ = served.chat(**fields)
    assert (status, answer["error"]["param"]) == (400, param) and answer["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": "x"}]},
        {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool"}},
        {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any", "name": "weather"}},
        {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "other"}},
        {"tool_choice": {"type": "any"}},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_use", "id": "x", "name": "weather", "input": {}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        {
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "x", "name": "weather", "input": {}}],
                },
            ]
        },
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_anthropics_api_cannot_call_is_refused(served, fields):
    status, answer, _ = served.ask(
        "POST", "/v1/messages", {"model": "sample", "messages": USER, "max_tokens": 4, **fields}
    )
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error") and answer["error"][
        "message"
    ]


@pytest.mark.usefixtures("processes")
def test_stop_strings_end_text_and_never_a_call(served):
    """Each stop string is in the call that the model is made to write, or in its marks."""
    options = {"tools": TOOLS, "max_tokens": 120, "seed": 3}
    called = served.chat(**options, tool_choice=NAMED)[1]["choices"][0]["message"]["tool_calls"]
    for stop in ("city", "<", "_call>", '": ', "}"):
        choice = served.chat(**options, tool_choice=NAMED, stop=stop)[1]["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == called[0]["function"]
    text = served.chat(**options)[1]["choices"][0]["message"]["content"]
    stopped = served.chat(**options, stop=["zzz", text[20:24]])[1]["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(text[20:24])]
    assert stopped["finish_reason"] == "stop"
    body = {"model": "sample", "messages": USER, "max_tokens": 120, "tools": ANTHROPIC_TOOLS}
    body |= {"stop_sequences": ["city"], "tool_choice": {"type": "tool", "name": "weather"}}
    assert served.ask("POST", "/v1/messages", body)[1]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_no_beginning_of_a_required_call_is_text(served, limit):
    for choice in ("required", NAMED):
        options = {"tools": TOOLS, "tool_choice": choice, "max_tokens": limit}
        answer = served.chat(**options)[1]["choices"][0]
        assert answer["finish_reason"] == "length" and not answer["message"]["content"]
        events = served.events("/v1/chat/completions", {**GREEDY, "messages": USER, **options})
        deltas = [event["choices"][0]["delta"] for event in events]
        assert not any(delta.get("content") for delta in deltas)
    body = {"model": "sample", "messages": USER, "max_tokens": limit, "tools": ANTHROPIC_TOOLS}
    answer = served.ask("POST", "/v1/messages", {**body, "tool_choice": {"type": "any"}})[1]
    assert answer["content"] == [{"type": "text", "text": ""}]


def test_allowed_tools_are_those_that_can_be_called(served):
    def ask(mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        return served.chat(
            tools=TOOLS, tool_choice=allowed, temperature=2.0, seed=7, max_tokens=60, n=4
        )

    untold = served.chat(tools=TOOLS, max_tokens=1)[1]["usage"]["prompt_tokens"]
    status, answer, _ = ask("required", "stop")
    assert status == 200 and answer["usage"]["prompt_tokens"] == untold
    for choice in answer["choices"]:
        calls = choice["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"stop"}
    assert ask("auto", "stop", "weather")[0] == 200
    status, answer, _ = ask("required", "other")
    assert status == 400 and "'other' is none of the tools" in answer["error"]["message"]
    assert ask("required")[0] == ask("any", "stop")[0] == 400


def test_calls_that_are_cut_off(served):
    whole = served.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=200)[1]
    made, arguments = (
        whole["usage"]["completion_tokens"],
        whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"],
    )
    choice = served.chat(tools=TOOLS, tool_choice=NAMED, max_tokens=made - 12)[1]["choices"][0]
    cut = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert choice["finish_reason"] == "length" and cut != arguments and arguments.startswith(cut)
    body = {
        "model": "sample",
        "messages": USER,
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "any"},
        "max_tokens": made - 12,
    }
    answer = served.ask("POST", "/v1/messages", body)[1]
    assert answer["stop_reason"] == "max_tokens" and answer["content"] == [
        {"type": "text", "text": ""}
    ]


def test_a_schema_of_the_answer_beside_functions(served, runtime):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    quote, opening = (str(runtime.tokenizer.encode(sign, add_bos=False)[0]) for sign in '"<')
    plain, called = (
        served.chat(
            tools=TOOLS,
            response_format=form,
            parallel_tool_calls=False,
            max_tokens=100,
            logit_bias={one: 100},
        )[1]["choices"][0]
        for one in (quote, opening)
    )
    assert (
        json.loads(plain["message"]["content"]) in ("yes", "no")
        and plain["finish_reason"] == "stop"
    )
    assert len(called["message"]["tool_calls"]) == 1 and called["finish_reason"] == "tool_calls"
    (call,) = served.chat(tools=TOOLS, tool_choice=NAMED, response_format=form, max_tokens=100)[1][
        "choices"
    ][0]["message"]["tool_calls"]
    assert is_weather(call["function"]["arguments"])
    told = served.chat(tools=TOOLS, max_tokens=4)[1]
    untold = served.chat(tools=TOOLS, tool_choice="none", max_tokens=4)[1]
    assert (
        "tool_calls" not in told["choices"][0]["message"]
        and told["choices"][0]["finish_reason"] == "length"
    )
    assert (
        untold["usage"]["prompt_tokens"]
        == served.chat(max_tokens=4)[1]["usage"]["prompt_tokens"]
        < told["usage"]["prompt_tokens"]
    )


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=0, le=9)


@pytest.mark.usefixtures("processes")
def test_openai_client_calls_and_answers(served):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0
    ) as client:
        options = {
            **GREEDY,
            "messages": USER,
            "max_tokens": 200,
            "tools": TOOLS,
            "tool_choice": NAMED,
        }
        answer = client.chat.completions.create(**options, logprobs=True)
        (call,) = answer.choices[0].message.tool_calls
        assert (
            is_weather(call.function.arguments)
            and len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        )
        parts = [part.choices[0] for part in client.chat.completions.create(**options, stream=True)]
        deltas = [one for part in parts for one in part.delta.tool_calls or ()]
        assert [one.function.name for one in deltas if one.id] == ["weather"] and {
            one.index for one in deltas
        } == {0}
        assert "".join(one.function.arguments for one in deltas) == call.function.arguments
        assert parts[-1].finish_reason == "tool_calls" and not any(
            part.delta.content for part in parts
        )
        with client.chat.completions.stream(**options) as stream:
            assert (
                stream.get_final_completion().choices[0].message.tool_calls[0].function.arguments
                == call.function.arguments
            )
        result = {
            "role": "tool",
            "tool_call_id": call.id,
            "name": "weather",
            "content": "It rains.",
        }
        history = [*USER, answer.choices[0].message, result]
        said = client.chat.completions.create(
            **{**options, "messages": history, "tool_choice": "auto", "max_tokens": 4}
        )
        assert (
            said.choices[0].message.content
            and said.usage.prompt_tokens > answer.usage.prompt_tokens
        )
        tool = openai.pydantic_function_tool(Weather)
        choice = {"type": "function", "function": {"name": "Weather"}}
        hot = {**options, "tools": [tool], "tool_choice": choice, "temperature": 1, "seed": 1}
        parsed = (
            client.chat.completions.parse(**{**hot, "max_tokens": 400})
            .choices[0]
            .message.tool_calls[0]
            .function.parsed_arguments
        )
        assert isinstance(parsed, Weather)
        with pytest.raises(openai.BadRequestError, match="'weather' is there twice"):
            client.chat.completions.create(**{**options, "tools": TOOLS + TOOLS})


@pytest.mark.usefixtures("processes")
def test_anthropic_client_calls_and_answers(served):
    with anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{served.port}", api_key="none", max_retries=0
    ) as client:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        options = {
            "model": "sample",
            "messages": USER,
            "max_tokens": 200,
            "tools": ANTHROPIC_TOOLS,
            "extra_body": {"temperature": 0},
        }
        answer = client.messages.create(**options, tool_choice=choice)
        (block,) = answer.content
        assert (answer.stop_reason, block.type, block.name) == (
            "tool_use",
            "tool_use",
            "weather",
        ) and is_weather(json.dumps(block.input))
        with client.messages.stream(
            **options, tool_choice={"type": "tool", "name": "weather"}
        ) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert (
            json.loads("".join(pieces)) == final.content[0].input == block.input
            and final.stop_reason == "tool_use"
        )
        result = {
            "type": "tool_result",
            "tool_use_id": block.id,
            "content": [{"type": "text", "text": "It rains."}],
            "is_error": False,
        }
        history = [
            *USER,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ]
        said = client.messages.create(**{**options, "messages": history, "max_tokens": 4})
        assert (
            said.content[0].type == "text"
            and said.usage.input_tokens + said.usage.cache_read_input_tokens
            > answer.usage.input_tokens
        )
        with client.messages.stream(**{**options, "max_tokens": 4}) as stream:
            assert stream.get_final_message().content[0].text
        with pytest.raises(anthropic.BadRequestError, match="odd"):
            client.messages.create(
                **{**options, "tools": [{"name": "odd", "input_schema": {"type": "array"}}]}
            )


@pytest.mark.usefixtures("network", "processes")
def test_a_model_with_tool_tokens_calls_as_soon_as_it_wants_to(native_export):
    with (
        Runtime.open(native_export, ram="2GiB", context=1024, sequences=8) as runtime,
        Served(runtime) as served,
    ):
        wanted = {
            "tools": TOOLS,
            "logit_bias": {str(runtime.tokenizer.token_id(MARKS[0])): 100},
            "max_tokens": 300,
        }
        choice = served.chat(**wanted, parallel_tool_calls=False, temperature=1, seed=3)[1][
            "choices"
        ][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert is_weather(call["function"]["arguments"]) or call["function"] == {
            "name": "stop",
            "arguments": "{}",
        }
        events = served.events(
            "/v1/chat/completions", {**GREEDY, "messages": USER, **wanted, "tool_choice": NAMED}
        )
        deltas = [
            one for event in events for one in event["choices"][0]["delta"].get("tool_calls", ())
        ]
        assert is_weather("".join(one["function"]["arguments"] for one in deltas))
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        text = served.chat(tools=TOOLS, max_tokens=8)[1]["choices"][0]
        assert text["message"]["content"] and "tool_calls" not in text["message"]


def scores(runtime, ids):
    """What the log-probabilities of ``ids`` should be."""
    logits_TV = runtime.logits(ids)[:, : runtime.tokenizer.size].log_softmax(dim=-1)
    return [None, *logits_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


def test_log_probabilities_of_a_prompt(served, runtime):
    text = "It is a truth universally acknowledged, that a single café " * 12
    ids = runtime.tokenizer.encode(text)
    served.idle()
    expected = scores(runtime, ids)
    plain = served.complete(text, max_tokens=4, logprobs=1)["choices"][0]
    only = served.complete(text, max_tokens=0, echo=True, logprobs=1)
    found = only["choices"][0]
    told = found["logprobs"]
    assert (found["text"], found["finish_reason"]) == (text, "length") and only["usage"][
        "completion_tokens"
    ] == 0 < 128 < len(ids)
    assert told["token_logprobs"][0] is None is told["top_logprobs"][0] and told["token_logprobs"][
        1:
    ] == pytest.approx(expected[1:], abs=1e-5)
    assert all(
        max(one.values()) >= score
        for one, score in zip(told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True)
    )
    assert len(told["tokens"]) == len(ids) == len(told["text_offset"])
    assert all(
        text[at:].startswith(token)
        for at, token in zip(told["text_offset"], told["tokens"], strict=True)
        if not token.startswith("bytes:")
    )
    both = served.complete(text, max_tokens=4, echo=True, logprobs=1)["choices"][0]
    assert (
        both["text"] == text + plain["text"]
        and both["logprobs"]["token_logprobs"][: len(ids)] == told["token_logprobs"]
    )
    assert both["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-5
    )
    events = served.events(
        "/v1/completions", {**GREEDY, "prompt": ids, "max_tokens": 4, "echo": True, "logprobs": 1}
    )
    pieces = [event["choices"][0] for event in events]
    assert "".join(one["text"] for one in pieces) == both["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for one in pieces for value in one["logprobs"][key]] == both["logprobs"][
            key
        ], key


def test_scored_prompts_beside_answers_under_way(served, runtime):
    texts = [
        f"{word} is a truth universally acknowledged " * 8
        for word in ("It", "This", "That", "There")
    ]
    served.idle()
    expected = [scores(runtime, runtime.tokenizer.encode(text)) for text in texts]

    def score(text):
        return served.complete([text, text], max_tokens=0, echo=True, logprobs=0)["choices"][1][
            "logprobs"
        ]["token_logprobs"]

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.complete, "Call me", max_tokens=60) for _ in range(2)]
        for found, wanted in zip(pool.map(score, texts), expected, strict=True):
            assert found[1:] == pytest.approx(wanted[1:], abs=1e-5)
        assert len({answer.result()["choices"][0]["text"] for answer in answers}) == 1


def test_scores_that_cannot_be_told(served, runtime, monkeypatch):
    body = {**GREEDY, "prompt": "Call me Ishmael", "max_tokens": 0, "echo": True, "logprobs": 1}
    monkeypatch.setattr(serve_answers, "MAX_SCORES", 10)
    status, answer, _ = served.ask("POST", "/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == "logprobs"
    monkeypatch.undo()
    real = Sequence.append_rows
    monkeypatch.setattr(
        Sequence, "append_rows", lambda *given: (rows * float("nan") for rows in real(*given))
    )
    status, answer, _ = served.ask("POST", "/v1/completions", body)
    assert status == 500 and "weights are broken" in answer["error"]["message"]
    monkeypatch.undo()
    assert served.ask("POST", "/v1/completions", body)[0] == 200
