"""What a ``Runtime`` continues, and its checks: text, token ids or a conversation."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json

Messages = Sequence[Mapping[str, Any]]


class TextOptions(TypedDict, total=False):
    """The keywords of ``Runtime.generate`` that several texts share."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    chat: bool
    tools: Sequence[Json] | None
    stop: str | Sequence[str]
    top_logprobs: int
    min_p: float | None
    repetition_penalty: float | None


def is_conversation(prompt: object) -> bool:
    """Whether these are messages, and no text or token ids."""
    return isinstance(prompt, Sequence) and isinstance(next(iter(prompt), None), Mapping)


def check_messages(messages: object, tools: object) -> None:
    """Raise ``ConfigError`` unless these are messages that a template can get, each with a ``role``
    and a ``content``, or with ``tool_calls``."""
    expected = "expected a list of messages, each with role and content, which are text"
    if not is_conversation(messages):
        raise ConfigError(f"messages is {messages!r:.60}, {expected}")
    for message in cast(Messages, messages):
        is_one = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_one or not (isinstance(message.get("content"), str) or message.get("tool_calls")):
            raise ConfigError(f"a message is {message!r:.60}, {expected}")
    try:
        json.dumps([messages, tools])
    except (TypeError, ValueError, RecursionError) as problem:
        reason = "hold what JSON can't, which is how a template gets them"
        raise ConfigError(f"messages or tools {reason} ({str(problem)[:80]})") from None


def ids_of(prompt: object) -> list[int]:
    """A prompt's token ids.  Raises ``ConfigError`` unless it is a sequence of integers."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
        expected = "expected a list of token ids, as encode(text) gives"
        raise ConfigError(f"the prompt is of the type {type(prompt).__name__}, {expected}")
    strange = [item for item in prompt if type(item) is not int]
    if strange:
        problem = f"the prompt holds a {type(strange[0]).__name__}"
        problem += ", expected text or token ids, which are integers"
        if isinstance(strange[0], Mapping):
            problem += "; give a conversation as messages="
        raise ConfigError(problem)
    return [*prompt]
