"""``slotmoe serve``: which requests are refused and in which words, which fields are ignored, what
the largest requests cost, and the rules that answers follow."""

import json
import re
import tracemalloc
from threading import Event

import pytest

from slotmoe.errors import ConfigError
from slotmoe.model.child import COMPILER
from slotmoe.model.generate import Answer
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve import errors as serve_errors
from slotmoe.tools.serve import grammar
from slotmoe.tools.serve.guard import MAX_KEYS, MAX_VALUES
from slotmoe.tools.serve.requests import Rule
from tests.support.apis import ASKED, CHAT, MESSAGES, OLLAMA, RESPONSES
from tests.support.served import (
    GREEDY,
    USER,
    Served,
    connect,
    passed,
    request,
    tokenizer_with,
    until,
)

TEXT = "/v1/completions"
BASES = {**ASKED, TEXT: {**GREEDY, "prompt": "x"}}
PART = {"type": "image_url", "image_url": {"url": "x"}}
LONG = "x" * 400
NAMES = "a b", "x" * 129, ""
NAME = "String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"


def function(name):
    return {"type": "function", "function": {"name": name}}


FUNCTION, OTHER = function("f"), function("other")


def user(*content):
    return {"messages": [{"role": "user", "content": content[0] if len(content) == 1 else content}]}


def item(**about):
    return {"input": [about]}


USE = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
USED = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
PICTURE = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
DOCUMENT = {"type": "document", "source": {"type": "url"}}
MANY_IDS = {str(i): 1 for i in range(1025)}
STATELESS = "nothing is stored here; send the whole conversation as input"
WRONG = {  # in both of OpenAI's older APIs
    "temperature": [-1, "0"],
    "top_p": [-0.1],
    "top_k": [-2, 1 << 31],
    "min_p": [2],
    "n": [0, 17],
    "max_tokens": [True, -(10**30)],
    "seed": [1.5, 1 << 63],
    "stop": ["x" * 257, ["a", ""], ["a"] * 17, 5],
    "logit_bias": [{"4096": 1}, {"x": 1}, {LONG: 1}, {"1": 101}, MANY_IDS],
    "frequency_penalty": [3],
    "repetition_penalty": [0, 5e-324],
    "stream_options": [{"include_usage": True}],
}
# Path, fields, and how the message begins, which is with the parameter if no other is given.
REFUSED = [
    *((path, {name: v}, name) for name, vs in WRONG.items() for v in vs for path in (CHAT, TEXT)),
    (CHAT, user([PART]), "messages.0.content.0: a part of type 'image_url' can't be read"),
    (CHAT, user(None), "messages.0: a message of the user has no content"),
    (CHAT, {"messages": [{"role": "wizard"}]}, "messages.0.role: Input should be 'system'"),
    (CHAT, {"messages": USER * 4097}, "messages has more than 4096 items"),
    (CHAT, {"messages": [{"role": "assistant", "audio": {}}]}, "messages: audio is not supported"),
    (CHAT, user("\ud800"), "messages.0.content: Input should be a valid string"),
    (CHAT, {"response_format": {"type": "yaml"}}, "response_format.type: Input should be 'text'"),
    (CHAT, {"tools": [FUNCTION] * 1025}, "tools has more than 1024 items"),
    *((CHAT, {"tools": [function(name)]}, f"tools.0.function.name: {NAME}") for name in NAMES),
    (CHAT, {"tools": [FUNCTION], "tool_choice": OTHER}, "tool_choice: 'other' is none of the"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions is not supported by this server: use tools"),
    (CHAT, user("word " * 600), "This model's maximum context length is 512 tokens. However", None),
    (TEXT, {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
    (TEXT, {"prompt": ["x"] * 9, "n": 2}, "prompts times n is more than 16 answers", "n"),
    (TEXT, {"prompt": [4096]}, "a token id of the prompt is outside 0 to 4095", None),
    (TEXT, {"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
    (RESPONSES, item(type="computer_call", id="x"), "input: an item of the unknown type 'comp"),
    (RESPONSES, item(type="item_reference", id="x"), f"input: item_reference: {STATELESS}"),
    (RESPONSES, item(role="user", content=[{"type": "input_image"}]), "input.0.content.0: a part"),
    (RESPONSES, {"previous_response_id": "x"}, "previous_response_id is not supported by this se"),
    (RESPONSES, {"background": True}, "background: Input should be false"),
    (RESPONSES, {"tools": [{"type": "nonsense"}]}, "tools.0 has the unknown 'type' 'nonsense'"),
    (MESSAGES, {"thinking": {"type": "hard"}}, "thinking.type: Input should be"),
    (MESSAGES, user({"type": "thinking"}, USE), "messages: a block of type 'thinking' can't be"),
    (MESSAGES, user(PICTURE, USE), "messages.0.content.0: a block of type 'image' can't be re"),
    (MESSAGES, {"messages": [USED]}, "messages: a result answers no call"),
    (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": [USE]}]}, "messages: call"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools.0.input_schema"),
    (MESSAGES, {"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported by this server"),
    (OLLAMA, {"messages": [{**USER[0], "images": ["aGk="]}]}, "messages: images is not supported"),
    ("/api/generate", {"context": [1]}, "context is not supported by this server: send messages"),
    ("/api/generate", {"suffix": "x"}, "this model can't fill in the middle"),
    *(("/detokenize", wrong, "tokens") for wrong in ({"tokens": [4096]}, {"tokens": [-1]}, {})),
]  # fmt: skip
BODIES = [
    (b'{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
    (b"\xff\xfe", "is not JSON: byte 0 is not UTF-8"),
    (b"[" * 50_000, "it is nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number is too long"),
    (b"[]", "is not a JSON object"),
    (b'{"model": "sample", "prompt": "x", "temperature": NaN}', ""),
    (b'{"model": "sample", "prompt": "x", "temperature": 1e999}', ""),
    ('{"model": "sample"}'.encode("utf-16"), "is not UTF-8"),
]


def test_refusals_say_the_reason(roomy):
    for path, fields, reason, *param in REFUSED:
        status, answer = roomy.post(path, **{**BASES.get(path, {}), **fields})
        error = answer["error"]
        message = error if isinstance(error, str) else error["message"]
        assert status == 400 and message.startswith(reason) and message, (fields, answer)
        if path in (CHAT, TEXT, RESPONSES) and LONG not in str(fields):
            assert error["param"] == (param or [re.match(r"\w+", reason)[0]])[0], answer
            assert error["type"] == "invalid_request_error"
    for body, reason in BODIES:
        for path in (CHAT, TEXT, MESSAGES, RESPONSES):
            status, answer, _ = roomy.ask("POST", path, body)
            assert status == 400 and reason in answer["error"]["message"], answer
    assert roomy.post(TEXT, model="other", prompt="x")[0] == 404
    assert roomy.ask("POST", TEXT, b" " * (5 << 20))[0] == 413
    assert roomy.complete("Call me", max_tokens=1)["usage"]["completion_tokens"] == 1


ODD = {"odd": {"x": [1]}}
UNKNOWN = [  # at any depth, in every API
    (CHAT, {"enable_thinking": False, "stream_options": None}),
    (CHAT, {"messages": [{**USER[0], **ODD}], "tools": [{**FUNCTION, **ODD}]}),
    (TEXT, {"prompt": "x", "use_beam_search": False}),
    (MESSAGES, user({"type": "text", "text": "x", "cache_control": {}}, {**DOCUMENT, "source":
        {"type": "text", "data": "x", **ODD}})),
    (MESSAGES, {"mcp_servers": [], "container": None, "speed": "fast", "context_management": {}}),
    (RESPONSES, item(role="user", content="x", status="completed")),
    (OLLAMA, {"messages": [{**USER[0], **ODD}], "options": {"num_ctx": 8, "num_predict": 1}}),
]  # fmt: skip


@pytest.mark.usefixtures("network")
def test_unknown_fields_are_ignored_and_named_once(runtime, capfd):
    with Served(runtime, is_logged=True) as served:
        for path, fields in UNKNOWN * 2:
            status, answer = served.post(path, **{**BASES[path], **fields})
            assert status == 200, answer
        for number in range(40):
            names = {f"n{number}-{i}-{'x' * 99}\n": 1 for i in range(10)}
            assert served.post(TEXT, **GREEDY, prompt="x", max_tokens=1, **names)[0] == 200
    lines = [line for line in capfd.readouterr().err.splitlines() if "unknown here" in line]
    told = [line.partition("the field ")[2].partition(" is")[0] for line in lines]
    wanted = "enable_thinking odd use_beam_search cache_control speed context_management status"
    assert {f"'{name}'" for name in (*wanted.split(), "num_ctx")} <= set(told)
    assert len(told) == len(set(told)) == 100 and max(map(len, told)) < 70
    assert lines[-1].endswith("further ones are not named")


def filled(head, item, tail, count=None):
    """``item`` so often, or as often as 4 MB hold."""
    count = count or ((4 << 20) - len(head) - len(tail)) // (len(item) + 1)
    return (head + ",".join([item] * count) + tail).encode()


KEYS = ",".join(f'"a{i}":1' for i in range(MAX_KEYS - 20))
HEAD = '{"model":"sample","max_tokens":3,'
CONTENT = HEAD + '"messages":[{"role":"user","content":['
HALF = MAX_VALUES // 2 - 50
WORDS = HEAD + '"messages":[{"role":"user","content":"' + "word " * 838_000 + '"}]}'
LARGE = {  # with the routes that read such
    "parts": (filled(CONTENT, "{}", "]}]}"), (CHAT, MESSAGES)),
    "good messages": (
        filled(HEAD + '"messages":[', '{"role":"user","content":""}', "]}", 32_000),
        (CHAT, MESSAGES),
    ),
    "tools": (filled(HEAD + '"messages":[],"tools":[', "{}", "]}", HALF), (MESSAGES, RESPONSES)),
    "unknown fields": ((HEAD + KEYS + "}").encode(), (TEXT, RESPONSES)),
    "text": (WORDS.encode(), (CHAT, TEXT)),
}


@pytest.fixture(scope="module")
def roomy(network, processes, runtime):
    with Served(runtime, max_body=4 << 20) as served:
        yield served


@pytest.mark.parametrize("shape", LARGE)
def test_largest_requests_cost_little(roomy, shape, monkeypatch):
    """They are refused, and few errors are made of them: these take time."""
    counts, told = [0], serve_errors._invalid

    def counted(problem):
        counts.append(len(problem.errors()))
        return told(problem)

    monkeypatch.setattr(serve_errors, "_invalid", counted)
    tracemalloc.start()
    body, paths = LARGE[shape]
    for path in paths:
        assert roomy.ask("POST", path, body)[0] in (400, 413)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(counts) < 8 and peak < 128 << 20


@pytest.mark.usefixtures("network", "processes")
def test_tokenizer_with_more_ids_than_the_model_has_rows(runtime, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tokenizer_with(tmp_path, ["<more>"], 4096), 0)
    monkeypatch.setattr(runtime, "tokenizer", tokenizer)
    with Served(runtime) as wider:
        answer = wider.choice(response_format={"type": "json_object"}, max_tokens=5)
        assert answer["message"]["content"].startswith("{")
        assert wider.chat(min_tokens=3, logprobs=True, top_logprobs=3)[0] == 200
        assert wider.chat(logit_bias={"4096": 1})[0] == 400
        for prompt in ([4096], "a<more>"):
            assert wider.post(TEXT, **GREEDY, prompt=prompt, echo=True, logprobs=1)[0] == 400
        assert wider.text(echo=True, logprobs=1) and wider.service.engine.alive


def test_exception_of_one_answer_ends_that_answer_alone(served, monkeypatch, capfd):
    alone, score = served.text(max_tokens=30), Answer.score

    def work(answer, *given):
        if 300 in answer._penalties._prompt:
            raise IndexError("nobody foresaw this")
        return score(answer, *given)

    monkeypatch.setattr(Answer, "score", work)
    status, answer = served.post(TEXT, **GREEDY, prompt=[0, 300], echo=True, logprobs=0)
    assert status == 500 and "server's log" in answer["error"]["message"]
    assert served.text(max_tokens=30) == alone
    assert "nobody foresaw this" in capfd.readouterr().err
    served.idle()
    assert served.service.engine.alive


# Rules that answers follow

OBJECT = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
ARRAY = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
SHORT = {"type": "string", "maxLength": 4}
SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
GBNF = 'root ::= "<" part ("-" part)? ">"\npart ::= [0-9]{2} | "none"'
LARK = 'start: "<" PART ("-" PART)? ">"\nPART: /[0-9]{2}/ | "none"'
AS_GRAMMAR = r"<([0-9]{2}|none)(-([0-9]{2}|none))?>"
AS_OBJECT = r'\{"a": ?[12]\}'
RULES = [
    ({"structured_outputs": {"choice": ["Rome \U0001f600", 'a "quoted" / one']}}, None),
    ({"structured_outputs": {"regex": r"\d{3}/[a-c]+\.\n"}}, r"\d{3}/[a-c]+\.\n"),
    ({"structured_outputs": {"grammar": GBNF}}, AS_GRAMMAR),
    ({"structured_outputs": {"grammar": LARK}}, AS_GRAMMAR),
    ({"grammar": GBNF}, AS_GRAMMAR),
    ({"grammar": f'start: "x" ("{"ab" * 4000}"){{20000}}'}, "x[ab]+"),
    ({"grammar": 'start: "x" %json {"multipleOf": 3, "type": "integer", "maximum": 9}'}, r"x-?\d+"),
    ({"json_schema": OBJECT}, AS_OBJECT),
    ({"response_format": {"type": "json_object", "schema": OBJECT}}, AS_OBJECT),
]


@pytest.mark.parametrize(("rule", "pattern"), RULES)
def test_answers_follow_a_rule(served, rule, pattern):
    options = {"temperature": 1, "max_tokens": 60, "logit_bias": {"300": 20}, **rule}
    texts = [c["message"]["content"] for c in served.chat(**options, seed=0, n=2)[1]["choices"]]
    for text in (*texts, served.text(**options, seed=1)):
        if pattern is None:
            assert text in rule["structured_outputs"]["choice"]
        else:
            assert re.fullmatch(pattern, text) or text.startswith(tuple("0123456789")), text


SLOW = 'start: %json {"allOf":[{"type":"integer","multipleOf":9973},{"multipleOf":97}]}'
UNFOLLOWED = [
    ({"structured_outputs": {}}, "has 0 of json, json_object, regex, grammar and choice"),
    ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "look-around"),
    ({"grammar": "root ::= " + "(" * 5000}, "grammar: the grammar can't be followed"),
    ({"grammar": "start: x\nx: x x | /[a-z ]/"}, "takes too much work to follow"),
    ({"structured_outputs": {"choice": ["x" * 9000]}}, "takes too much work to follow"),
    ({"structured_outputs": {"regex": "x?y{60000}"}}, "takes too much work to follow"),
    ({"grammar": 'start: %json {"const":-9223372036854775808}'}, "crashed the library"),
    ({"grammar": SLOW}, "grammar: can't be followed (its compiler: did not finish in 0.1 seconds"),
    ({"structured_outputs": {"choice": ["x" * 70_000]}}, "more than 65536 characters"),
    ({"structured_outputs": {"json": "1"}}, "structured_outputs.json is no JSON object"),
    ({"grammar": GBNF, "json_schema": OBJECT}, "give json_schema or grammar, not both"),
]


@pytest.mark.parametrize(("rule", "problem"), UNFOLLOWED)
def test_other_rules_are_refused(served, rule, problem, monkeypatch):
    monkeypatch.setattr(COMPILER, "_seconds", 0.1)  # of one that a row before has ended
    status, answer, _ = served.chat(**rule, max_tokens=150)
    assert status in (400, 413) and problem in answer["error"]["message"], answer
    assert answer["error"]["param"] in (None, *rule)
    assert served.text(max_tokens=9) and served.service.engine.alive


FORCED = f"^[ab]({'ab' * 4000}){{9973}}$"
FORCING = [
    ("a", Rule("regex", FORCED)),
    ('"a', Rule("json", {"type": "string", "pattern": FORCED})),
]


@pytest.mark.parametrize(("begun", "rule"), FORCING)
def test_a_mask_looks_ahead_within_bounds(served, begun, rule):
    """At what has no choice; of a schema it looked at 500,000 bytes, for a second."""
    mask = served.service.grammars.compile(rule)().mask()
    for character in begun:
        mask.consume(*served.service.encode(character, add_bos=False))
    with pytest.raises(ConfigError, match="takes too much work to follow"):
        mask.allowed()
    assert len(mask._matcher.compute_ff_bytes()) < 70_000


def test_nothing_is_compiled_for_a_client_that_has_left(served, monkeypatch):
    run, came, gate = COMPILER.run, [], Event()
    made, make = [], grammar.LLMatcher
    monkeypatch.setattr(grammar, "LLMatcher", lambda *a, **k: made.append(a) or make(*a, **k))

    def gated(*given):
        came.append(given)
        return run(*given) if len(came) > 1 else gate.wait(60) and run(*given)

    monkeypatch.setattr(COMPILER, "run", gated)
    turn, clients, body = served.service._compiling, [], {**BASES[TEXT], "grammar": GBNF}
    for number in range(3):
        clients.append(connect(served.port, request(json.dumps(body).encode())))
        until(lambda waiting=number: turn.locked() and len(turn._waiters or ()) == waiting)
    for client in clients:
        client.close()
    assert served.chat(grammar=GBNF)[0] == 200
    gate.set()
    assert served.chat(grammar=GBNF)[0] == 200  # the child has answered the first one too
    assert (len(came), len(made)) == (3, 2)


def ask(served, schema, as_tool=False, **about):
    options = {"temperature": 1, "seed": 5, "max_tokens": 60}
    if not as_tool:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **about}}
        return served.chat(**options, response_format=form)
    tool = {"type": "function", "function": {"name": "odd", "parameters": schema, **about}}
    return served.chat(**options, tools=[tool], tool_choice=function("odd"))


NOT_A = {"type": "object", "patternProperties": {"^(?!a)": {}, "^b": SMALL}}
NAMED = "a\r\nset-cookie: x\x1b[31m\u2028"  # told in a header
UNHELD = [  # a schema, and what of it no mask can hold, if any
    ({**ARRAY, "uniqueItems": True}, "uniqueItems"),
    ({**OBJECT, "not": {"properties": {"a": {"const": 1}}}}, "not"),
    ({**OBJECT, "if": {"required": ["b"]}, "then": {"required": ["a"]}}, "if"),
    ({**NOT_A, "additionalProperties": False}, "patternProperties.^(?!a)"),
    ({**SHORT, "pattern": "^(?=a)b"}, "pattern"),
    ({**SHORT, "pattern": r"^(a)\1$"}, "pattern"),
    ({**SHORT, "format": "regex"}, "format: regex"),
    ({"oneOf": [SMALL, {"type": "integer", "maximum": 5, "minimum": 0}]}, "oneOf"),
    ({**OBJECT, "properties": {"a": {**ARRAY, "uniqueItems": True}}}, "uniqueItems"),
    ({"allOf": [SMALL, {"multipleOf": 18000}]}, "multipleOf"),
    ({"allOf": [SMALL, {"multipleOf": -(1 << 31)}]}, "multipleOf"),
    ({"type": "object", "patternProperties": {"(?=a)" + NAMED: {}}}, ascii(NAMED)[1:-1]),
    ({**SMALL, "multipleOf": 3}, None),
    ({"type": "object", "properties": {"multipleOf": SMALL, "pattern": SMALL, "if": SMALL}}, None),
    ({"enum": [{"not": 1, "multipleOf": 9973, "pattern": "(?=a)"}]}, None),
    ({**OBJECT, "title": "A", "default": {"uniqueItems": True}, "examples": [{"if": 1}]}, None),
]


@pytest.mark.parametrize(("schema", "keyword"), UNHELD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_held_is_left_out_and_named(served, schema, keyword):
    for as_tool in {False, schema.get("type") == "object"}:
        where = "tool 'odd': " if as_tool else "response_format: "
        status, answer, headers = ask(served, schema, as_tool)
        strict, refusal, without = ask(served, schema, as_tool, strict=True)
        assert status == 200 and "x-slotmoe-relaxed" not in without, answer
        assert headers["set-cookie"] is None
        if keyword is None:
            assert strict == 200 and "x-slotmoe-relaxed" not in headers
            continue
        assert strict == 400
        for told in (headers["x-slotmoe-relaxed"], refusal["error"]["message"]):
            assert told.startswith(where) and keyword in told


BAD = [
    ({"type": "nonsense"}, 400),
    ({"$ref": "#/nowhere"}, 400),
    ({"properties": {"a": {"pattern": "(", "type": "string"}}}, 400),
    ({"x-guidance": {"lenient": True}}, 400),
    ({"enum": [-9223372036854775300]}, 400),  # near an integer that ends the library
    ({"type": "object", "properties": {f"p{i}": {} for i in range(501)}}, 400),
    ({"enum": ["x" * 70_000]}, 413),
]


@pytest.mark.parametrize(("schema", "expected"), BAD)
def test_a_bad_schema_is_refused_and_leaves_no_trace(served, schema, expected):
    asked = OBJECT, schema, OBJECT
    before, (status, answer, _), after = (ask(served, each) for each in asked)
    assert (status, before[1]["choices"]) == (expected, after[1]["choices"]), answer
    assert answer["error"]["param"] == "response_format"
    assert ask(served, schema, True)[0] == expected


LISTED = {"type": "object", "properties": {"a": SMALL}, "required": ["a"]}
OPENED = [
    {**LISTED, "additionalProperties": True},
    {**LISTED, "required": ["b"]},
    {**LISTED, "patternProperties": {"^b": {}}},
    {**LISTED, "unevaluatedProperties": True},
    {"allOf": [LISTED, {"properties": {"b": {}}}]},
]


def test_an_object_has_the_properties_that_it_lists(runtime):
    """Unless the schema speaks of others, or several schemas list those of one object."""
    text = '{"a": 1, "b": 2}'
    for schema in (LISTED, {"anyOf": [LISTED, {"type": "null"}]}, *OPENED):
        found, may_end = passed(runtime.tokenizer, text, wanted=Rule("json", schema))
        assert (found == text) is may_end is (schema in OPENED), schema
