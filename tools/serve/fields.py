"""Kinds of fields that a request may have beside those that are honoured: accepted without effect,
or refused with a reason; and the bounds of all lists."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BeforeValidator, Discriminator

MAX_ITEMS = 4096  # of a list that has no other bound


@dataclass(frozen=True)
class Ignored:
    """Marks a field that is checked and has no effect, because of ``reason``."""

    reason: str


def refused(reason: str) -> BeforeValidator:
    """Marks a field that may only be null."""

    def check(value: Any) -> None:
        if value is not None:
            raise ValueError(f"is not supported by this server: {reason}")

    return BeforeValidator(check)


def at_most(count: int, what: str) -> BeforeValidator:
    """Of an object with any keys: pydantic counts them only when it has checked all."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"has {len(value)} {what}, more than {count}")
        return value

    return BeforeValidator(check)


def by_kind(kind: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Tells the members of a union apart, so that an error names what is wrong in the one that was
    meant; without a member, it says what was ``expected``."""
    message = f"is neither {expected}" if " nor " in expected else f"is not {expected}"
    return Discriminator(kind, custom_error_type="kind", custom_error_message=message)


def text_or_list(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else None


def bound_lists(schema: Any) -> None:
    """Have every list in pydantic's ``schema`` end at its first error and at a bound."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
            schema.setdefault("max_length", MAX_ITEMS)
        for value in schema.values():
            bound_lists(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            bound_lists(value)
