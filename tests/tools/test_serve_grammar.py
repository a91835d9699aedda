"""``slotmoe serve``: answers that follow a JSON schema, a regular expression, a grammar or a
choice, and what of a schema no mask can hold an answer to."""

import json
import re

import pytest

from slotmoe.tools.serve.requests import Rule
from tests.support.served import passed

OBJECT = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
ARRAY = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
TEXT = {"type": "string", "maxLength": 4}
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
    ({"grammar": 'start: "x" %json {"multipleOf": 3, "type": "integer", "maximum": 9}'}, r"x-?\d+"),
    ({"structured_outputs": {"json": OBJECT}}, AS_OBJECT),
    ({"structured_outputs": {"json": json.dumps(OBJECT)}}, AS_OBJECT),
    ({"json_schema": OBJECT}, AS_OBJECT),
    ({"response_format": {"type": "json_object", "schema": OBJECT}}, AS_OBJECT),
    ({"response_format": {"type": "json_object"}}, r"\{.*"),
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


COSTLY = 'start: %json {"allOf":[{"type":"integer","multipleOf":9973},{"multipleOf":97}]}'
REFUSED = [
    ({"structured_outputs": {}}, "has 0 of json, json_object, regex, grammar and choice"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "has 2 of"),
    ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "look-around"),
    ({"structured_outputs": {"grammar": "start: b"}}, "unknown name"),
    ({"grammar": "root ::= foo"}, "grammar: the grammar can't be followed (Failed to convert"),
    ({"grammar": "root ::= " + "(" * 5000}, "grammar: the grammar can't be followed"),
    ({"grammar": COSTLY}, "grammar: a multipleOf that does not divide 9000"),
    ({"grammar": COSTLY.replace("multipleOf", r"multiple\u004ff")}, "a multipleOf that does not"),
    ({"grammar": 'start: %json {"const":-9223372036854775808}'}, "the grammar has an integer so"),
    ({"structured_outputs": {"choice": []}}, "has fewer than 1 items"),
    ({"structured_outputs": {"choice": ["x" * 70_000]}}, "more than 65536 characters"),
    ({"structured_outputs": {"json": "[" * 9000}}, "structured_outputs.json is no JSON"),
    ({"structured_outputs": {"json": "1"}}, "structured_outputs.json is no JSON object"),
    ({"grammar": GBNF, "json_schema": OBJECT}, "give json_schema or grammar, not both"),
]


@pytest.mark.parametrize(("rule", "problem"), REFUSED)
def test_other_rules_are_refused(served, rule, problem):
    status, answer, _ = served.chat(**rule)
    assert status in (400, 413) and problem in answer["error"]["message"], answer
    assert answer["error"]["param"] in rule


@pytest.fixture(scope="module")
def ask(served):
    def ask(schema, as_tool=False, **about):
        options = {"temperature": 1, "seed": 5, "max_tokens": 60}
        if not as_tool:
            about |= {"name": "x", "schema": schema}
            form = {"type": "json_schema", "json_schema": about}
            return served.chat(**options, response_format=form)
        tool = {"type": "function", "function": {"name": "odd", "parameters": schema, **about}}
        choice = {"type": "function", "function": {"name": "odd"}}
        return served.chat(**options, tools=[tool], tool_choice=choice)

    return ask


def written(answer):
    message = answer["choices"][0]["message"]
    calls = message.get("tool_calls")
    return json.loads(calls[0]["function"]["arguments"] if calls else message["content"])


NOT_A = {"type": "object", "patternProperties": {"^(?!a)": {}, "^b": SMALL}}
UNHELD = [  # a schema, and what of it no mask can hold
    ({**ARRAY, "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "properties": {"a": ARRAY}, "propertyNames": TEXT}, "propertyNames"),
    ({**ARRAY, "contains": {"const": 1}, "maxContains": 1}, "contains"),
    ({**OBJECT, "not": {"properties": {"a": {"const": 1}}}}, "not"),
    ({**OBJECT, "if": {"required": ["b"]}, "then": {"required": ["a"]}}, "if"),
    ({**OBJECT, "dependentRequired": {"b": ["a"]}}, "dependentRequired"),
    ({**NOT_A, "additionalProperties": False}, "patternProperties.^(?!a)"),
    ({**TEXT, "pattern": "^(?=a)b"}, "pattern"),
    ({**TEXT, "pattern": r"^(a)\1$"}, "pattern"),
    ({**TEXT, "pattern": r"\ba"}, "pattern"),
    ({**TEXT, "format": "regex"}, "format: regex"),
    ({"oneOf": [SMALL, {"type": "integer", "maximum": 5, "minimum": 0}]}, "oneOf"),
    ({**OBJECT, "properties": {"a": {**ARRAY, "uniqueItems": True}}}, "uniqueItems"),
    ({**OBJECT, "properties": {"a": {**SMALL, "multipleOf": 1048578}}}, "multipleOf"),
    ({"allOf": [SMALL, {"multipleOf": 18000}]}, "multipleOf"),
    ({"allOf": [SMALL, {"multipleOf": -(1 << 31)}]}, "multipleOf"),
]


def test_an_integer_that_ends_the_library_is_refused(ask):
    status, answer, _ = ask({"enum": [-9223372036854775300]}, False)
    assert status == 400 and "has an integer so near" in answer["error"]["message"]


@pytest.mark.parametrize(("schema", "keyword"), UNHELD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_held_is_left_out_and_named(ask, schema, keyword):
    for as_tool in {False, schema.get("type") == "object"}:
        where = "tool 'odd': " if as_tool else "response_format: "
        status, answer, headers = ask(schema, as_tool)
        assert status == 200, answer
        assert headers["x-slotmoe-relaxed"].startswith(where)
        assert keyword in headers["x-slotmoe-relaxed"]
        if answer["choices"][0]["finish_reason"] != "length":
            written(answer)
        status, answer, headers = ask(schema, as_tool, strict=True)
        assert status == 400 and "x-slotmoe-relaxed" not in headers
        message = answer["error"]["message"]
        assert message.startswith(where) and keyword in message


HELD = [{**SMALL, "multipleOf": 3}, {"type": "number", "multipleOf": 0.01, "minimum": 0}]
HELD += [{"type": "object", "properties": {"multipleOf": SMALL, "pattern": SMALL, "if": SMALL}}]
HELD += [{"enum": [{"not": 1, "multipleOf": 9973, "pattern": "(?=a)"}]}]
HELD += [{**OBJECT, "title": "A", "default": {"uniqueItems": True}, "examples": [{"if": 1}]}]


@pytest.mark.parametrize("schema", HELD)
def test_what_can_be_held_is_even_if_strict(ask, schema):
    status, answer, headers = ask(schema, strict=True)
    assert (status, headers["x-slotmoe-relaxed"]) == (200, None), answer


BAD = [
    ({"type": "nonsense"}, 400),
    ({"$ref": "#/nowhere"}, 400),
    ({"properties": {"a": {"pattern": "(", "type": "string"}}}, 400),
    ({"x-guidance": {"lenient": True}}, 400),
    ({"type": "object", "properties": {f"p{i}": {} for i in range(501)}}, 400),
    ({"enum": ["x" * 70_000]}, 413),
]


@pytest.mark.parametrize(("schema", "expected"), BAD)
def test_a_bad_schema_is_refused_and_leaves_no_trace(ask, schema, expected):
    before, (status, answer, _), after = ask(OBJECT), ask(schema), ask(OBJECT)
    assert (status, before[1]["choices"]) == (expected, after[1]["choices"]), answer
    assert answer["error"]["param"] == "response_format"
    assert ask(schema, True)[0] == expected


LISTED = {"type": "object", "properties": {"a": SMALL}, "required": ["a"]}
CLOSED = [LISTED, {"anyOf": [LISTED, {"type": "null"}]}, {**LISTED, "unevaluatedProperties": False}]
OPENED = [
    {**LISTED, "additionalProperties": True},
    {**LISTED, "required": ["b"]},
    {**LISTED, "patternProperties": {"^b": {}}},
    {**LISTED, "unevaluatedProperties": True},
    {**LISTED, "anyOf": [{"properties": {"b": {}}}]},
    {"allOf": [LISTED, {"properties": {"b": {}}}]},
]


@pytest.mark.parametrize("schema", CLOSED + OPENED)
@pytest.mark.parametrize("inner", [False, True])
def test_an_object_has_the_properties_that_it_lists(runtime, schema, inner):
    """Unless the schema speaks of others, or several schemas list those of one object."""
    text, is_open = '{"a": 1, "b": 2}', schema in OPENED
    if inner:
        properties = {"type": "object", "properties": {"properties": schema}}
        schema, text = {**properties, "required": ["properties"]}, f'{{"properties": {text}}}'
    found, may_end = passed(runtime.tokenizer, text, wanted=Rule("json", schema))
    assert (found == text) is may_end is is_open


def test_header_holds_whatever_a_property_is_called(ask):
    name = "a\r\nset-cookie: x\x1b[31m\u2028é"
    schema = {"type": "object", "patternProperties": {f"(?=a){name}": {}}}
    status, _, headers = ask(schema)
    assert (status, headers["set-cookie"]) == (200, None)
    assert r"a\r\nset-cookie: x\x1b[31m\u2028\xe9" in headers["x-slotmoe-relaxed"]
    many = {f"(?=a){'n' * 40}{i}": {} for i in range(200)}
    status, _, headers = ask({"type": "object", "patternProperties": many})
    assert status == 200 and len(headers["x-slotmoe-relaxed"]) == 1000
