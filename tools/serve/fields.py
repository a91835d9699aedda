"""The base of all requests, with bounds on what a wrong one costs; and kinds of fields beside those
that are honoured: accepted without effect, or refused with a reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator

MAX_ITEMS = 4096  # of a list that has no other bound
BY_TYPE = Field(discriminator="type")  # the members of a union


def accepted(reason: str) -> object:
    """Marks a field that is checked and has no effect."""
    return Field(description=f"accepted: {reason}")


@dataclass(frozen=True)
class Refused:
    """Marks a field that may only be null, or an empty list, because of ``reason``."""

    reason: str

    def _check(self, value: object) -> None:
        if value not in (None, []):
            raise ValueError(f"is not supported by this server: {self.reason}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return BeforeValidator(self._check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {**handler(schema), "description": f"refused: {self.reason}"}


def at_most(count: int, what: str) -> BeforeValidator:
    """Of an object with any keys: pydantic counts them only when it has checked all."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"has {len(value)} {what}, more than {count}")
        return value

    return BeforeValidator(check)


def by_kind(kind: Callable[[object], str | None], expected: str) -> Discriminator:
    """Tells the members of a union apart, so that an error names what is wrong in the one that was
    meant; without a member, it says what was ``expected``."""
    message = f"is neither {expected}"
    return Discriminator(kind, custom_error_type="kind", custom_error_message=message)


def _bound_lists(schema: object) -> None:
    """Have every list in pydantic's ``schema`` end at its first error and at a bound."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
            schema.setdefault("max_length", MAX_ITEMS)
        schema = [*schema.values()]
    for value in schema if isinstance(schema, list | tuple) else ():
        _bound_lists(value)


class Model(BaseModel):
    """Base of all requests and their parts: no unknown fields, no silent conversion, no NaN.

    What an error costs is bounded: every list has a bound and is checked to its first error, and no
    object reports more than one unknown field.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        _bound_lists(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        more = {*[name for name in data if name not in known][1:]}
        return {name: value for name, value in data.items() if name not in more}
