"""What an answer has to follow, as requests of each API say it: a JSON schema or another rule."""

import json
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

from pydantic import Field

from slotmoe.jsonfile import Json
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import Model

Source = Annotated[str, Field(min_length=1, max_length=1 << 14)]  # of a grammar
_Kind: TypeAlias = Literal["regex", "grammar", "choice"]
_Choice = Annotated[str, Field(max_length=1 << 16)]


class Schema(Model):
    name: Annotated[str, Field(max_length=64)] = ""
    description: Annotated[str, Field(max_length=4096)] | None = None
    definition: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Model):
    type: Literal["text", "json_object"]
    definition: Annotated[Json | None, Field(alias="schema")] = None  # llama.cpp's


class SchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: Schema


class Rule(NamedTuple):
    """What an answer follows, if it is no JSON schema: a ``regex``, a ``grammar`` as Lark or
    llama.cpp write it, or a ``choice`` of texts."""

    kind: _Kind
    text: str | list[str]
    param: str


class StructuredOutputs(Model):
    """vLLM's form of what an answer follows."""

    definition: Json | Source | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: Source | None = None
    grammar: Source | None = None
    choice: Annotated[list[_Choice], Field(min_length=1)] | None = None

    def wanted(self, name: str) -> Schema | Rule:
        """By the field of this ``name``.  Raises ``RefusedError``."""
        given = {key: value for key, value in self if value is not None}
        if len(given) != 1:
            names = "json, json_object, regex, grammar and choice"
            raise RefusedError(f"{name} has {len(given)} of {names}, expected one", name)
        for kind in get_args(_Kind):
            if kind in given:
                return Rule(kind, given[kind], name)
        schema = {"type": "object"} if self.definition is None else self.definition
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            return Schema.model_validate({"schema": schema})
        except (ValueError, RecursionError):
            raise RefusedError(f"{name}.json is no JSON object", name) from None


def schema_of(wanted: TextFormat | SchemaFormat | Schema | None) -> Schema | None:
    """What an answer has to follow; None for plain text."""
    if isinstance(wanted, TextFormat):
        any_object = {"type": "object"} if wanted.type == "json_object" else None
        definition = any_object if wanted.definition is None else wanted.definition
        return None if definition is None else Schema.model_construct(definition=definition)
    return wanted.json_schema if isinstance(wanted, SchemaFormat) else wanted
