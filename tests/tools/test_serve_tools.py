"""``slotmoe serve``: calls of functions and the masks that hold them to their schemas, and the
log-probabilities of a prompt."""

import json
import shutil

import openai
import pytest
import torch

from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.engine.passes import Passes
from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import NATIVE, PLAIN
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import MAX_CALLS, Grammars
from slotmoe.tools.serve.reader import ContentDelta, Reader, joined, parse_arguments
from slotmoe.tools.serve.requests import Call, Conversation, Function, Message, Rule, ToolPolicy
from tests.support.served import (
    ANTHROPIC_TOOL,
    GREEDY,
    TOOLS,
    USER,
    WEATHER,
    is_weather,
    sample_without_last,
    tokenizer_with,
)
from tests.support.tiny import SAMPLE

CHAT = "/v1/chat/completions"
NAMED = {"type": "function", "function": {"name": "weather"}}
NAMES = "calls_begin call_begin sep call_end calls_end outputs_begin output_begin output_end"
MARKS = [
    f"<\uff5ctool\u2581{name.replace('_', chr(0x2581))}\uff5c>"
    for name in [*NAMES.split(), "outputs_end"]
]
NATIVE_TEMPLATE = (
    "{{ bos_token }}{# knows " + MARKS[0] + " #}"
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}"
    "{% elif m.role == 'assistant' %}[A]{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def native(processes, tmp_path_factory):
    """The sample with DeepSeek-V2.5's tokens in place of its last nine, half of them special, and a
    template that knows them."""
    folder = shutil.copytree(SAMPLE, tmp_path_factory.mktemp("native") / "sample")
    source, last = sample_without_last(len(MARKS))
    return tokenizer_with(folder, MARKS, last, NATIVE_TEMPLATE, source)


def policy(*names, required=False, single=False):
    functions = [Function(name=name, parameters=WEATHER) for name in names]
    return ToolPolicy(functions, functions, required, single)


def user(text):
    return Message("user", text)


def tool_call(id_, name, arguments):
    return Call(id_, name, arguments)


def result(id_, text, **about):
    return Message("tool", text, call_id=id_, **about)


def function(name, schema, **more):
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


def calls_in_two_rounds():
    both = [tool_call("a", "weather", '{"city": "Rome", "days": 1}'), tool_call("b", "stop", "")]
    return [
        user("Weather?"),
        Message("assistant", "Let me see.", both),
        result("b", "stopped", failed=True),
        result("a", "wet"),
        Message("assistant", calls=[tool_call("c", "stop", "{}")]),
        result("c", "ok"),
    ]


@pytest.mark.usefixtures("processes")
def test_model_without_tool_tokens_is_told_in_plain_words(runtime):
    dialect = Dialect(runtime.tokenizer)
    system = Message("system", "Be brief.")
    text = dialect.prompt(Conversation([system, *calls_in_two_rounds()], policy("weather")))
    begin, end = runtime.tokenizer.spelling(0), runtime.tokenizer.eos_token
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
    assert dialect.prompt(Conversation([user("Hi")])) == f"{begin}User: Hi\n\nAssistant:"


def test_model_with_tool_tokens_reads_its_own_format(native):
    tokenizer = Tokenizer(native, 0)
    calls, call, sep, end_call, end_calls, outputs, output, end_output, end_outputs = MARKS
    begin, end = tokenizer.spelling(0), tokenizer.eos_token
    text = Dialect(tokenizer).prompt(Conversation(calls_in_two_rounds(), policy("weather")))
    told = json.dumps({"name": "weather", "description": "", "parameters": WEATHER}, indent=4)
    head = (
        "You are a helpful Assistant.\n\n## Tools\n\n### Function\n\n"
        "You have the following functions available:\n\n"
    )
    stop = f"{call}function{sep}stop\n```json\n{{}}\n```{end_call}"
    assert text == (
        f"{begin}{head}- `weather`:\n```json\n{told}\n```[U]Weather?"
        f"[A]Let me see.{calls}{call}function{sep}weather\n```json\n"
        f'{{"city": "Rome", "days": 1}}\n```{end_call}\n{stop}{end_calls}{end}'
        f"{outputs}{output}wet{end_output}\n{output}stopped{end_output}{end_outputs}"
        f"{calls}{stop}{end_calls}{end}{outputs}{output}ok{end_output}{end_outputs}"
    )
    untaught, other = Tokenizer(SAMPLE, 0), Tokenizer(native, 0)
    untaught.template, other.template = NATIVE_TEMPLATE, untaught.template
    assert [Dialect(one).is_native for one in (tokenizer, untaught, other)] == [True, False, False]
    tokenizer.template += "{% for one in tools %}{{ one.function.name }}{% endfor %}"
    text = Dialect(tokenizer).prompt(Conversation([user("Hi")], policy("weather", "stop")))
    assert text == f"{begin}[U]Hi[A]weatherstop"


def test_results_belong_to_the_calls_before_them(runtime):
    turns = calls_in_two_rounds()
    wrong = [turns[:2], turns[:3], turns[:2] + turns[:1], turns[2:], [*turns, turns[-1]]]
    for messages in [*wrong, turns[:3] + turns[2:]]:
        with pytest.raises(RefusedError, match=r"has no result|answers no call"):
            Dialect(runtime.tokenizer).prompt(Conversation(messages))
    renamed = result("c", "ok", name="weather")
    with pytest.raises(RefusedError, match="name of another"):
        Dialect(runtime.tokenizer).prompt(Conversation([*turns[:-1], renamed]))


def read(reader, text, width):
    pieces = [text[start : start + width] for start in range(0, len(text), width)]
    return joined([*(part for piece in pieces for part in reader.feed(piece)), *reader.end()])


@pytest.mark.parametrize("form", [PLAIN, NATIVE], ids=["plain", "native"])
@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_answers_are_taken_apart_however_they_arrive(form, width):
    odd = json.dumps({"a": '}"{\\', "b": {"c": [{}], "d": form.tail}})
    calls = [tool_call("x", "one", odd), tool_call("y", "two", "{}")]
    for said, made in (("Hi <tool", []), ("a < b", calls), ("", calls[:1]), ("", [])):
        reader = Reader(form)
        wanted = [ContentDelta(said)] if said else []
        for index, (arguments, name) in enumerate([(odd, "one"), ("{}", "two")][: len(made)]):
            wanted.append(ContentDelta(arguments, index, name, complete=True))
        assert read(reader, said + form.write(made), width) == wanted
        assert reader.calls == len(made)
    text = form.write(calls)
    first, *_, last = read(Reader(form), text[: text.rindex(form.tail)], 1)
    assert first == ContentDelta(odd, 0, "one", complete=True) and not last.complete
    quoted = f'"{form.opening}"'
    assert Reader(form, either=True).feed(quoted) == [ContentDelta(quoted)]
    assert Reader(None).feed(form.opening) == [ContentDelta(form.opening)]


def test_arguments_that_json_cannot_hold_are_none():
    assert parse_arguments('{"a": 1.5}') == {"a": 1.5}
    levels = 200_000  # more than json holds in any version of Python
    deep, long = '{"a":' * levels + "1" + "}" * levels, '{"a": ' + "9" * 5000 + "}"
    for text in ('{"a": 1e999}', '{"a": "\\ud800"}', deep, long):
        assert parse_arguments(text) is None


def follows(runtime, text, wish, schema=None, tokenizer=None):
    """What of ``text`` a mask lets not pass, and whether the answer may, or must, end there."""
    tokenizer = tokenizer or runtime.tokenizer
    if schema is not None:
        schema = Rule("json", schema)
    grammars = Grammars(tokenizer, runtime.eos_token_ids, Dialect(tokenizer))
    mask = grammars.compile(schema, wish).mask()
    ids = tokenizer.encode(text, add_bos=False)
    for place, one in enumerate(ids):
        if not mask.allowed()[one]:
            return tokenizer.decode(ids[place:]), False
        if mask.consume(one):
            return tokenizer.decode(ids[place + 1 :]), True
    return "", bool(mask.allowed()[list(runtime.eos_token_ids)].any())


ROME = tool_call("x", "weather", '{"city": "Rome", "days": 3}')


def test_text_is_free_until_a_call_begins(runtime):
    wish, call = policy("weather", "weathers"), PLAIN.write([ROME])

    def left(text, wish=wish, schema=None):
        return follows(runtime, text, wish, schema)

    for text in ("Any <tool_cal of text\n", f"So: {call}", call.replace("weather", "weathers")):
        assert left(text) == ("", True)
    assert left("So: " + call.replace("weather", "other"))[0].startswith("other")
    assert left(call.replace("Rome", "Oslo"))[0].startswith("Oslo")
    assert left(call[:-12]) == ("", False)
    assert left(call + "and more") == ("and more", False)
    assert left(call + call[: len("<tool_call>")])[0] == "<tool_call>"  # not on a line of its own
    assert left("\n".join([call] * MAX_CALLS)) == ("", True)
    assert left("\n".join([call] * (MAX_CALLS + 1)))[0].lstrip("\n") == call
    single = policy("weather", required=True, single=True)
    assert left(call, single) == ("", True) and left("So", single) == ("So", False)
    assert left(f"{call}\n{call}", single)[0].lstrip("\n") == call
    answer = {"type": "object", "properties": {"a": {"const": "<tool_call>"}}, "required": ["a"]}
    answer["additionalProperties"] = False
    for text in ('{"a": "<tool_call>"}', call):
        assert left(text, wish, answer) == ("", True)
    assert left("So", wish, answer) == ("So", False)


def test_native_calls_begin_with_their_token_alone(runtime, native):
    tokenizer, wish = Tokenizer(native, 0), policy("weather")
    call = NATIVE.write([ROME])
    spelled = [one for character in MARKS[0] for one in tokenizer.encode(character, add_bos=False)]
    assert tokenizer.decode(spelled) == MARKS[0] and tokenizer.token_id(MARKS[0]) not in spelled
    whole = {"Any text": True, call: True, f"So: {call}": True, f"So: {MARKS[0]}": False}
    for text, may_end in whole.items():
        assert follows(runtime, text, wish, tokenizer=tokenizer) == ("", may_end), text
    wrong = f"So: {MARKS[1]}"
    refused = tokenizer.decode([tokenizer.token_id(MARKS[1])])
    assert follows(runtime, wrong, wish, tokenizer=tokenizer) == (refused, False)
    grammars = Grammars(tokenizer, runtime.eos_token_ids, Dialect(tokenizer))
    mask = grammars.compile(None, wish).mask()
    for one in spelled[:-1]:
        assert mask.allowed()[one] and not mask.consume(one)
    assert not mask.allowed()[spelled[-1]]


def called(choice):
    """The function of the only call of an answer."""
    (call,) = choice["message"]["tool_calls"]
    return call["function"]


def test_forced_calls_fit_the_schema_with_every_seed(served):
    options = {"tools": TOOLS, "temperature": 2.0, "seed": 7, "max_tokens": 120}
    for choice in served.chat(**options, tool_choice=NAMED, n=4)[1]["choices"]:
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert called(choice)["name"] == "weather" and is_weather(called(choice)["arguments"])
    required = {**options, "tool_choice": "required"}
    answer = served.chat(**required, parallel_tool_calls=False, n=4)[1]
    calls = [called(choice) for choice in answer["choices"]]
    assert {call["name"] for call in calls} == {"weather", "stop"}
    for call in calls:
        arguments = call["arguments"]
        assert is_weather(arguments) if call["name"] == "weather" else arguments == "{}"


BAD_SCHEMAS = [
    {"type": "string"},
    {"properties": {"a": {"pattern": "(", "type": "string"}}},
    {"x-guidance": {"lenient": True}},
    {"properties": {"a": {"enum": ["x" * 66_000]}}},
]


def test_a_bad_schema_leaves_no_trace_and_is_named(served):
    def ask(schema):
        tools = [*TOOLS, function("odd", schema)]
        status, answer, _ = served.chat(tools=tools, tool_choice=NAMED, max_tokens=1)
        return status, answer.get("error", {"message": ""})["message"]

    for schema in BAD_SCHEMAS:
        wanted = 413 if schema is BAD_SCHEMAS[-1] else 400
        good, (status, message), again = ask(WEATHER), ask(schema), ask(WEATHER)
        assert (good[0], status, again[0]) == (200, wanted, 200), message
        assert "tool 'odd'" in message
    deep = {}
    for _ in range(300):
        deep = {"properties": {"a": deep}}
    assert ask(deep)[0] == 400
    endless = {"properties": {"a": {"$ref": "#/$defs/r"}}, "required": ["a"]}
    endless["$defs"] = {"r": {"$ref": "#/$defs/r"}}
    options = {"tools": [function("weather", endless)], "tool_choice": NAMED, "max_tokens": 100}
    status, answer, _ = served.chat(**options)
    assert status == 400 and "nothing that could come next" in answer["error"]["message"]
    large = {"properties": {"a": {"enum": ["x" * 60_000]}}}
    tools = [function(f"f{number}", large) for number in range(5)]
    status, answer, _ = served.chat(tools=tools)
    assert status == 413 and "together" in answer["error"]["message"]


def test_stop_strings_end_text_and_never_a_call(served):
    """Each stop string is in the call that the model is made to write, or in its marks."""
    options = {"tools": TOOLS, "max_tokens": 120, "seed": 3}
    call = called(served.choice(**options, tool_choice=NAMED))
    for stop in ("city", "<", "_call>", '": ', "}"):
        choice = served.choice(**options, tool_choice=NAMED, stop=stop)
        assert choice["finish_reason"] == "tool_calls" and called(choice) == call
    text = served.choice(**options)["message"]["content"]
    stopped = served.choice(**options, stop=["zzz", text[20:24]])
    assert stopped["message"]["content"] == text[: text.index(text[20:24])]
    assert stopped["finish_reason"] == "stop"


def test_no_beginning_of_a_required_call_is_text(served):
    for limit in (1, 5, 8):
        options = {"tools": TOOLS, "tool_choice": "required", "max_tokens": limit}
        answer = served.choice(**options)
        assert answer["finish_reason"] == "length" and not answer["message"]["content"]
        events = served.events(CHAT, {**GREEDY, "messages": USER, **options})
        assert not any(event["choices"][0]["delta"].get("content") for event in events)


def test_allowed_tools_are_those_that_can_be_called(served):
    def ask(mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        options = {"temperature": 2.0, "seed": 7, "max_tokens": 60, "n": 4}
        return served.chat(tools=TOOLS, tool_choice=allowed, **options)[:2]

    for choice in ask("required", "stop")[1]["choices"]:
        calls = choice["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"stop"}
    assert ask("required", "other")[0] == ask("required")[0] == ask("any", "stop")[0] == 400


def test_calls_that_are_cut_off(served):
    options = {"tools": TOOLS, "tool_choice": NAMED}
    whole = served.chat(**options, max_tokens=200)[1]
    arguments, limit = called(whole["choices"][0])["arguments"], whole["usage"]["completion_tokens"]
    choice = served.choice(**options, max_tokens=limit - 12)
    cut = called(choice)["arguments"]
    assert choice["finish_reason"] == "length" and cut != arguments and arguments.startswith(cut)
    forced = {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}}
    answer = served.message(**forced, max_tokens=limit - 12)[1]
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"] == [{"type": "text", "text": ""}]


def test_a_schema_of_the_answer_beside_functions(served, runtime):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    quote, opening = (str(runtime.tokenizer.encode(sign, add_bos=False)[0]) for sign in '"<')
    both = {"tools": TOOLS, "response_format": form, "max_tokens": 100}
    plain, call = (
        served.choice(**both, parallel_tool_calls=False, logit_bias={one: 100})
        for one in (quote, opening)
    )
    assert json.loads(plain["message"]["content"]) in ("yes", "no")
    assert plain["finish_reason"] == "stop"
    assert called(call) and call["finish_reason"] == "tool_calls"
    assert is_weather(called(served.choice(**both, tool_choice=NAMED))["arguments"])
    wishes = {"tools": TOOLS, "tool_choice": "none"}, {}, {"tools": TOOLS}
    answers = [served.chat(**wish, max_tokens=4)[1] for wish in wishes]
    counts = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert counts[0] == counts[1] < counts[2]


def test_openai_client_calls_and_answers(openai_client):
    completions = openai_client.chat.completions
    options = {**GREEDY, "messages": USER, "max_tokens": 200, "tools": TOOLS, "tool_choice": NAMED}
    answer = completions.create(**options, logprobs=True)
    (call,) = answer.choices[0].message.tool_calls
    assert is_weather(call.function.arguments)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    with completions.stream(**options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.arguments == call.function.arguments
    rain = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "It rains."}
    history = {"messages": [*USER, answer.choices[0].message, rain], "tool_choice": "auto"}
    said = completions.create(**{**options, **history, "max_tokens": 4})
    assert said.choices[0].message.content
    assert said.usage.prompt_tokens > answer.usage.prompt_tokens
    with pytest.raises(openai.NotFoundError):
        completions.create(**{**options, "model": "other"})
    assert [model.id for model in openai_client.models.list()] == ["sample"]


def test_anthropic_client_calls_and_answers(anthropic_client):
    messages = anthropic_client.messages
    options = {"model": "sample", "messages": USER, "max_tokens": 200, "tools": [ANTHROPIC_TOOL]}
    options["extra_body"] = {"temperature": 0}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = messages.create(**options, tool_choice=choice)
    (block,) = answer.content
    assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert is_weather(block.input)
    with messages.stream(**options, tool_choice={"type": "tool", "name": "weather"}) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input == block.input
    assert final.stop_reason == "tool_use"
    rain = {"type": "tool_result", "tool_use_id": block.id, "is_error": False}
    rain["content"] = [{"type": "text", "text": "It rains."}]
    history = [*USER, {"role": "assistant", "content": answer.content}]
    history.append({"role": "user", "content": [rain]})
    said = messages.create(**{**options, "messages": history, "max_tokens": 4})
    read = said.usage.input_tokens + said.usage.cache_read_input_tokens
    assert said.content[0].type == "text" and read > answer.usage.input_tokens


def test_log_probabilities_of_a_prompt(served, runtime):
    text = "It is a truth universally acknowledged, that a single café " * 12
    ids = runtime.tokenizer.encode(text)
    served.idle()
    logits_TV = runtime.logits(ids)[:, : runtime.tokenizer.size].log_softmax(dim=-1)
    expected = logits_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    plain = served.complete(text, max_tokens=4, logprobs=1)["choices"][0]
    only = served.complete(text, max_tokens=0, echo=True, logprobs=1)
    (found,) = only["choices"]
    told = found["logprobs"]
    assert (found["text"], found["finish_reason"]) == (text, "length")
    assert only["usage"]["completion_tokens"] == 0 < 128 < len(ids)
    own, top = told["token_logprobs"], told["top_logprobs"]
    assert own[0] is None is top[0] and own[1:] == pytest.approx(expected, abs=1e-5)
    assert all(max(one.values()) >= score for one, score in zip(top[1:], own[1:], strict=True))
    assert len(told["tokens"]) == len(ids) == len(told["text_offset"])
    for at, token in zip(told["text_offset"], told["tokens"], strict=True):
        assert token.startswith("bytes:") or text[at:].startswith(token)
    both = served.complete(text, max_tokens=4, echo=True, logprobs=1)["choices"][0]
    assert both["text"] == text + plain["text"]
    assert both["logprobs"]["token_logprobs"][: len(ids)] == own
    made = both["logprobs"]["token_logprobs"][len(ids) :]
    assert made == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
    body = {**GREEDY, "prompt": ids, "max_tokens": 4, "echo": True, "logprobs": 1}
    pieces = [event["choices"][0] for event in served.events("/v1/completions", body)]
    assert "".join(one["text"] for one in pieces) == both["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for one in pieces for value in one["logprobs"][key]]
        assert streamed == both["logprobs"][key], key


def test_scores_that_cannot_be_told(served, monkeypatch):
    body = {**GREEDY, "prompt": "Call me Ishmael", "max_tokens": 0, "echo": True, "logprobs": 1}
    monkeypatch.setattr(serve_answers, "MAX_SCORES", 10)
    status, answer = served.post("/v1/completions", **body)
    assert status == 400 and answer["error"]["param"] == "logprobs"
    monkeypatch.undo()
    real, broken = Passes.each, float("nan")
    monkeypatch.setattr(Passes, "each", lambda *given: (x * broken for x in real(*given)))
    status, answer = served.post("/v1/completions", **body)
    assert status == 500 and "weights are broken" in answer["error"]["message"]
