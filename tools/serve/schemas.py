"""JSON schemas of strangers, without what llguidance can't hold an answer to.

Libraries write keywords that say nothing, and keywords that no mask of tokens can hold: whether an
array has equal items is known at its end.  The former are dropped; of the latter ``relaxed`` says
where they stood, so that the caller can refuse them or go on without.

An object that lists its properties gets no others unless the schema speaks of them.  A model that
may invent names goes on inventing, and programs rarely take them; other servers' masks hold objects
to their lists as well.
"""

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from itertools import groupby
from typing import Any

from slotmoe.jsonfile import Json

# Each keyword that llguidance lacks, and whether a value of it in a schema says nothing.
_UNHELD: Mapping[str, Callable[[Any, Json], bool]] = {
    "contains": lambda _, schema: schema.get("minContains") == 0,
    "minContains": lambda value, schema: "contains" not in schema or value == 0,
    "maxContains": lambda _, schema: "contains" not in schema,
    "uniqueItems": lambda value, _: value is False,
    "unevaluatedItems": lambda value, schema: value is True or "items" in schema,
    "propertyNames": lambda value, _: value is True or _only(value, type="string"),
    "dependentRequired": lambda value, _: not any(value.values()),
    "dependentSchemas": lambda value, _: not any(v is not True and v for v in value.values()),
    "dependencies": lambda value, _: not any(v is not True and v for v in value.values()),
    "if": lambda _, schema: "then" not in schema and "else" not in schema,
    "then": lambda value, schema: "if" not in schema or value is True or value == {},
    "else": lambda value, schema: "if" not in schema or value is True or value == {},
    "not": lambda value, _: value is False,
    "unevaluatedProperties": lambda value, schema: (
        value is True or value == {} or "additionalProperties" in schema
    ),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), lambda *_: False),
}
_KNOWN_FORMATS = "date-time time date duration email hostname ipv4 ipv6 uuid uri".split()
# Those of OpenAPI that tell how a program keeps a value.
_SILENT_FORMATS = "binary byte password int32 int64 float double".split()
# What regular languages don't have: look-around, word boundaries, references to groups.
_IRREGULAR = re.compile(r"\(\?<?[=!]|(?<!\\)(?:\\\\)*\\[bB1-9]")
# Schemas of one object that may stand in several places.
_SHARED = {"allOf", "if", "dependentSchemas", "dependencies"}
_OF_OTHERS = {"patternProperties", "propertyNames", "unevaluatedProperties"}
# llguidance counts remainders, of multiples that are combined those of their least common multiple:
# 1,048,578 take 15 seconds and 630 MB.  Of divisors of this that is never more than this.
_MULTIPLES = 9000
# Beyond so many llguidance follows no answer, which it finds out in time that grows by the square.
_MOST_OPTIONAL = 500
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties"}
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NOTES = ("title", "description", "$comment", "default", "examples", "deprecated")


def relaxed(schema: Json) -> tuple[Json, list[str]]:
    """``schema`` without the keywords that can't be held, and where each of those stood that said
    something, as ``properties.tags.uniqueItems``.  Raises ``RecursionError``, ``ValueError``."""
    dropped = list[str]()
    return _held(schema, "", dropped, closes=not _shares(schema)), dropped


def _shares(value: object) -> bool:
    """Whether several schemas may list an object's properties."""
    if isinstance(value, list):
        return any(map(_shares, value))
    if not isinstance(value, dict):
        return False
    others = _SHARED | ({"$ref", "anyOf", "oneOf"} if "properties" in value else set())
    return bool(others & set(value)) or any(map(_shares, value.values()))


def _lists_all(schema: Json) -> bool:
    """Whether its properties may be all that an object has."""
    listed, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(listed, dict) or not isinstance(required, list):
        return False
    is_whole = all(isinstance(key, str) and key in listed for key in required)
    return is_whole and not _OF_OTHERS & set(schema)


def _held(schema: Json, place: str, dropped: list[str], closes: bool) -> Json:
    """What ``relaxed`` keeps; adds to ``dropped``.  If it ``closes``, objects list all keys."""
    kept = Json()
    schema = _rewritten(schema)
    if closes and _lists_all(schema):
        schema.setdefault("additionalProperties", False)

    def child(value: object, place: str) -> object:
        return _held(value, place, dropped, closes) if isinstance(value, dict) else value

    for name, value in schema.items():
        here = f"{place}.{name}" if place else name
        if (says_nothing := _fate(name, value, schema)) is not None:
            dropped += [] if says_nothing else [here]
        elif name in _OF_NAMES and isinstance(value, dict):
            kept[name] = {}
            if name == "properties" and _run(value, schema.get("required")) > _MOST_OPTIONAL:
                raise ValueError(f"has more than {_MOST_OPTIONAL} optional properties in a row")
            for key, schema_of_key in value.items():
                if name == "patternProperties" and _IRREGULAR.search(key):
                    dropped.append(f"{here}.{key}")
                else:
                    kept[name][key] = child(schema_of_key, f"{here}.{key}")
        elif name in _LISTS and isinstance(value, list):
            kept[name] = [child(item, f"{here}.{i}") for i, item in enumerate(value)]
        elif name in ("items", "additionalItems", "additionalProperties"):
            kept[name] = child(value, here)
        else:
            kept[name] = value
    return kept


def _run(properties: Json, required: object) -> int:
    """The most optional ones between two that are required."""
    needed = {*map(str, required)} if isinstance(required, list) else ()
    runs = groupby(properties, lambda key: key in needed)
    return max((len([*keys]) for is_needed, keys in runs if not is_needed), default=0)


def _fate(name: str, value: Any, schema: Json) -> bool | None:
    """None for a keyword that can be held; else whether it says nothing."""
    if name in _UNHELD:
        try:
            return _UNHELD[name](value, schema)
        except AttributeError:  # not the object that it has to be
            return False
    if name == "format" and isinstance(value, str):
        return None if value in _KNOWN_FORMATS else value in _SILENT_FORMATS
    if name == "pattern" and isinstance(value, str) and _IRREGULAR.search(value):
        return False
    if name == "multipleOf" and type(value) in (int, float) and 0 < value < math.inf:
        digits = int("".join(map(str, Decimal(str(value)).normalize().as_tuple().digits)))
        is_small = type(value) is float or value <= _MULTIPLES
        return None if is_small and _MULTIPLES % digits == 0 else False
    if name in ("minProperties", "maxProperties"):
        required = schema.get("required", [])
        listed = schema.get("properties", {})
        if isinstance(listed, dict) and isinstance(required, list):
            is_held = all(key in required for key in listed)
            return None if is_held else (name == "minProperties" and value == 0)
    return None


def _rewritten(schema: Json) -> Json:
    """The same in keywords that can be held, where no other speaks of the same properties."""
    schema, rest = dict(schema), schema.get("additionalProperties", {})
    patterns, names = schema.get("patternProperties"), schema.get("propertyNames")
    if isinstance(patterns, dict) and any(map(_IRREGULAR.search, patterns)):
        schema.pop("additionalProperties", None)  # so that names of that pattern stay possible
    if schema.get("unevaluatedProperties") is False and not _COMBINED & set(schema):
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)
    if not isinstance(names, dict) or {"properties", *_COMBINED} & set(schema):
        return schema
    keys = [names["const"]] if "const" in names else names.get("enum")
    pattern = names.get("pattern")
    if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
        form: Json = {"properties": dict.fromkeys(keys, rest)}
    elif isinstance(pattern, str) and not _IRREGULAR.search(pattern):
        form = {"patternProperties": {pattern: rest}}
    else:
        return schema
    word = "const" if "const" in names else "enum" if "enum" in names else "pattern"
    if not _only({name: value for name, value in names.items() if name != word}, type="string"):
        return schema
    del schema["propertyNames"]
    return {**schema, **form, "additionalProperties": False}


def _only(schema: object, **keywords: str) -> bool:
    """Whether ``schema`` has no other keywords, beside notes."""
    if not isinstance(schema, dict):
        return False
    return {k: v for k, v in schema.items() if k not in _NOTES}.items() <= keywords.items()
