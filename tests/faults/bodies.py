"""The parsers of requests to the server, for the fuzzer."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Parser = tuple[list[Any], Callable[[bytes], object]]
BODY = {
    "model": "x",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
    ],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["x", "yy"],
    "logit_bias": {"5": -100},
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
}


ITEMS = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Brief."}]},
    {"role": "user", "content": "Hello"},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": "5"},
]
SHARED = {"model": "x", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stream": True}
REQUESTS: dict[str, Any] = {
    "chat": BODY,
    "responses": {
        **SHARED,
        "input": ITEMS,
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "messages": {
        **SHARED,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "5"}],
            },
        ],
        "max_tokens": 5,
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
    },
    "completions": {
        **{**SHARED, "prompt": [[1, 2], [3]], "max_tokens": 5, "logprobs": 2, "echo": True},
        **{"stop": ["x"], "logit_bias": {"5": -100}, "seed": 3, "n": 2, "min_tokens": 1},
    },
    "tokenize": {"prompt": "Hello", "messages": BODY["messages"], "tools": BODY["tools"]},
}


def _used(name: str) -> Callable[[Any], object]:
    """A body from its values on: its fields are checked, and become options and a conversation."""
    from slotmoe.tools.serve import anthropic, completions, requests, response_items, tokens

    def chat(body: Any) -> object:
        return body.options(4096), body.tool_policy()

    uses: dict[str, tuple[Any, Callable[[Any], object]]] = {
        "chat": (requests.ChatRequest, chat),
        "responses": (response_items.ResponsesRequest, lambda body: chat(body.chat(body.items()))),
        "messages": (anthropic.MessagesRequest, lambda body: chat(body.chat(**body.options()))),
        "completions": (
            completions.CompletionRequest,
            lambda body: (body.options(4096), body.prompts()),
        ),
        "tokenize": (tokens.TokenizeRequest, lambda body: body),
    }
    kind, use = uses[name]
    return lambda values: use(kind.model_validate(values))


@contextmanager
def request(name: str) -> Iterator[Parser]:
    from pydantic import ValidationError

    from slotmoe.errors import ConfigError
    from slotmoe.tools.serve.bodies import check
    from slotmoe.tools.serve.errors import RefusedError

    use = _used(name)

    def parse(data: bytes) -> bool:
        try:
            check(data)
            use(json.loads(data.decode("utf-8-sig") or "{}"))
        except (RefusedError, ConfigError, ValidationError):
            return False
        return True

    yield [REQUESTS[name]], parse


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,9}$", "maxLength": 9},
        "kind": {"enum": ["a", 1, None]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 3},
        "either": {"anyOf": [{"type": "number", "minimum": 0}, {"const": True}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "multipleOf": 2}},
}


@contextmanager
def schemas(folder: Path) -> Iterator[Parser]:
    from pydantic import ValidationError

    from slotmoe.model.tokenizer import Tokenizer
    from slotmoe.tools.serve.bodies import check
    from slotmoe.tools.serve.errors import RefusedError
    from slotmoe.tools.serve.grammar import Grammars
    from slotmoe.tools.serve.requests import Schema
    from tests.support.tiny import SAMPLE

    grammars = Grammars(Tokenizer(SAMPLE, 0), (0,), None)  # type: ignore[arg-type]

    def parse(data: bytes) -> bool:
        try:
            check(data)
            made = Schema.model_validate({"name": "x", "schema": json.loads(data)})
            grammars.compile(made, None)
        except (RefusedError, ValidationError, ValueError):
            return False
        return True

    yield [SCHEMA], parse
