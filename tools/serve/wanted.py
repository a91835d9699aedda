"""What an answer has to follow, as requests of each API say it: a JSON schema or another rule."""

import json
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from slotmoe.jsonfile import Json
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import Model

Source = Annotated[str, Field(min_length=1, max_length=1 << 14)]  # of a grammar
_Choice = Annotated[str, Field(max_length=1 << 16)]


class Schema(Model):
    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    definition: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


_ANY_OBJECT = Schema.model_construct(definition={"type": "object"})


class TextFormat(Model):
    type: Literal["text", "json_object"]
    definition: Annotated[Json | None, Field(alias="schema")] = None  # llama.cpp's


class SchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: Schema


class Rule(NamedTuple):
    """What an answer follows, if it is no JSON schema: a ``regex``, a ``grammar`` as Lark or
    llama.cpp write it, or a ``choice`` of texts."""

    kind: Literal["regex", "grammar", "choice"]
    text: str | list[str]
    param: str


class StructuredOutputs(Model):
    """vLLM's form of what an answer follows."""

    definition: Json | Source | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: Source | None = None
    grammar: Source | None = None
    choice: Annotated[list[_Choice], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        if (count := len(self.model_dump(exclude_none=True))) != 1:
            names = "json, json_object, regex, grammar and choice"
            raise ValueError(f"has {count} of {names}, expected one")
        return self

    @property
    def wanted(self) -> "Schema | Rule":
        """Raises ``RefusedError``."""
        name = "structured_outputs"
        if rule := self.regex or self.grammar or self.choice:
            return Rule(
                "regex" if self.regex else "grammar" if self.grammar else "choice", rule, name
            )
        definition = self.definition
        if isinstance(definition, str):
            try:
                definition = json.loads(definition)
            except (ValueError, RecursionError):
                raise RefusedError(f"{name}.json is no JSON", name) from None
            if not isinstance(definition, dict):
                raise RefusedError(f"{name}.json is no JSON object", name)
        return _ANY_OBJECT if definition is None else Schema.model_construct(definition=definition)


def schema_of(wanted: TextFormat | SchemaFormat | Schema | None) -> Schema | None:
    """What an answer has to follow; None for plain text."""
    if isinstance(wanted, TextFormat):
        if wanted.definition is not None:
            return Schema.model_construct(definition=wanted.definition)
        return _ANY_OBJECT if wanted.type == "json_object" else None
    return wanted.json_schema if isinstance(wanted, SchemaFormat) else wanted
