"""``slotmoe serve``: JSON schemas with keywords that no mask can hold an answer to."""

import json

import pytest

from slotmoe.tools.serve.schemas import relaxed

ARRAY = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
OBJECT = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
OBJECT["additionalProperties"] = False
TEXT = {"type": "string", "maxLength": 4}
OPEN = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}}
OPEN["additionalProperties"] = False
NOT_A = {"type": "object", "patternProperties": {"^(?!a)": {}}}
UNHELD = [
    ({**ARRAY, "uniqueItems": True}, ["uniqueItems"]),
    ({"type": "object", "propertyNames": {"pattern": "^(?!a)"}}, ["propertyNames"]),
    ({**NOT_A, "additionalProperties": False}, ["patternProperties.^(?!a)"]),
    ({**ARRAY, "contains": {"const": 1}, "maxContains": 1}, ["contains", "maxContains"]),
    ({**OBJECT, "not": {"properties": {"a": {"const": 1}}}}, ["not"]),
    ({**OBJECT, "if": {"required": ["b"]}, "then": {"required": ["a"]}}, ["if", "then"]),
    ({**OBJECT, "dependentRequired": {"b": ["a"]}}, ["dependentRequired"]),
    ({**OBJECT, "dependentSchemas": {"b": {"required": ["a"]}}}, ["dependentSchemas"]),
    ({"type": "object", "unevaluatedProperties": {"const": 1}}, ["unevaluatedProperties"]),
    ({**OPEN, "minProperties": 1}, ["minProperties"]),
    ({**TEXT, "pattern": "^(?=a)b"}, ["pattern"]),
    ({"type": "string", "maxLength": 4, "format": "regex"}, ["format"]),
    ({"type": "string", "pattern": r"^(a)\1$", "maxLength": 4}, ["pattern"]),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, ["oneOf"]),
    ({**OBJECT, "properties": {"a": {**ARRAY, "uniqueItems": True}}}, ["properties.a.uniqueItems"]),
]
COSTLY = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 1048578}}}
UNHELD.append(({**COSTLY, "required": ["a"]}, ["properties.a.multipleOf"]))
SILENT = [
    {**ARRAY, "uniqueItems": False},
    {**ARRAY, "contains": {"const": 1}, "minContains": 0},
    {**OBJECT, "propertyNames": {"type": "string"}},
    {**OBJECT, "then": {"required": ["b"]}},
    {**OBJECT, "not": False},
    {**OBJECT, "unevaluatedProperties": {"type": "string"}},
    {**TEXT, "format": "binary"},
    {"type": "integer", "minimum": 0, "maximum": 9, "format": "int32"},
]
REWRITTEN = [
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"const": 1}}, ["a", "b"]),
    ({"properties": {"a": {"const": 1}}, "unevaluatedProperties": False}, ["a"]),
]


@pytest.fixture(scope="module")
def ask(served):
    def ask(schema, as_tool, **about):
        options = {"temperature": 1, "seed": 5, "max_tokens": 60}
        if not as_tool:
            about |= {"name": "x", "schema": schema}
            form = {"type": "json_schema", "json_schema": about}
            return served.chat(**options, response_format=form)
        function = {"name": "odd", "parameters": schema, **about}
        tool = {"type": "function", "function": function}
        choice = {"type": "function", "function": {"name": "odd"}}
        return served.chat(**options, tools=[tool], tool_choice=choice)

    return ask


def written(answer):
    message = answer["choices"][0]["message"]
    calls = message.get("tool_calls")
    return json.loads(calls[0]["function"]["arguments"] if calls else message["content"])


@pytest.mark.parametrize(("schema", "keywords"), UNHELD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_held_is_left_out_and_named(ask, schema, keywords):
    for as_tool in {False, schema.get("type") == "object"}:
        where = "tool 'odd'" if as_tool else "response_format"
        status, answer, headers = ask(schema, as_tool)
        assert status == 200, answer
        names = [f"{where}: {keyword}" for keyword in keywords]
        assert headers["x-slotmoe-relaxed"] == "; ".join(names)
        if answer["choices"][0]["finish_reason"] != "length":
            written(answer)
        status, answer, headers = ask(schema, as_tool, strict=True)
        assert status == 400 and "x-slotmoe-relaxed" not in headers
        message = answer["error"]["message"]
        assert message.startswith(f"{where}: ") and repr(keywords[0]) in message
        assert "strict" in message


def test_what_says_nothing_is_dropped_even_if_strict(ask):
    for schema in SILENT:
        status, answer, headers = ask(schema, False, strict=True)
        assert (status, headers["x-slotmoe-relaxed"]) == (200, None), answer
        written(answer)


def test_what_other_keywords_can_say_is_held(ask):
    for schema, names in REWRITTEN:
        for as_tool in (False, True):
            status, answer, headers = ask({"type": "object", **schema}, as_tool, strict=True)
            assert (status, headers["x-slotmoe-relaxed"]) == (200, None), answer
            assert set(written(answer)) <= set(names) and set(written(answer).values()) <= {1}


def test_what_is_relaxed_is_never_narrower():
    """Names that only a dropped pattern allows stay possible."""
    pattern = {"patternProperties": {"^(?!a)": {}, "^b": {"const": 1}}}
    kept, dropped = relaxed({**pattern, "additionalProperties": False})
    assert kept == {"patternProperties": {"^b": {"const": 1}}} and len(dropped) == 1
    names = {"propertyNames": {"pattern": "^a"}, "additionalProperties": {"const": 1}}
    held = {"patternProperties": {"^a": {"const": 1}}, "additionalProperties": False}
    assert relaxed(names) == (held, [])


def test_names_of_properties_are_no_keywords():
    names = ["not", "if", "uniqueItems", "format", "pattern"]
    odd = {name: {"type": "string"} for name in names}
    schema = {"type": "object", "properties": odd, "required": [*odd]}
    assert relaxed(schema) == (schema, [])
    assert relaxed({"enum": [{"not": 1}], "default": {"uniqueItems": True}})[1] == []


def test_header_holds_whatever_a_property_is_called(ask):
    name = "a\r\nset-cookie: x\x1b[31m\u2028é"
    schema = {"type": "object", "properties": {name: {"uniqueItems": True, "const": []}}}
    status, _, headers = ask(schema | {"additionalProperties": False}, False)
    assert (status, headers["set-cookie"]) == (200, None)
    assert r"a\r\nset-cookie: x\x1b[31m\u2028\xe9.uniqueItems" in headers["x-slotmoe-relaxed"]
    many = {f"{'n' * 40}{i}": {"uniqueItems": True, "const": []} for i in range(200)}
    schema = {"type": "object", "properties": many, "additionalProperties": False}
    status, _, headers = ask(schema, False)
    assert status == 200 and len(headers["x-slotmoe-relaxed"]) == 1000


LISTED = {"type": "object", "properties": {"a": {}}}
CLOSED = [LISTED, {"anyOf": [LISTED, {"type": "null"}]}]
OPENED = [
    {**LISTED, "additionalProperties": True},
    {**LISTED, "required": ["b"]},
    {**LISTED, "patternProperties": {"^b": {}}},
    {**LISTED, "unevaluatedProperties": True},
    {**LISTED, "anyOf": [{"properties": {"b": {}}}]},
    {"allOf": [LISTED, {"properties": {"b": {}}}]},
    {"type": "object"},
]


def test_an_object_has_the_properties_that_it_lists():
    """Unless the schema speaks of others, or several schemas list those of one object."""
    for schema in CLOSED + OPENED:
        outer = {"type": "object", "properties": {"properties": schema}}
        kept = relaxed(outer)[0]["properties"]["properties"]
        for found in (relaxed(schema)[0], kept):
            is_closed = '"additionalProperties": false' in json.dumps(found)
            assert is_closed == (schema in CLOSED), schema
