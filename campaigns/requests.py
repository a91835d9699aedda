"""Good requests to the server, and how it parses them, for the fuzzer."""

import json

from pydantic import ValidationError

from slotmoe.errors import ConfigError
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve import anthropic, app, openai, responses
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.guard import check
from slotmoe.tools.serve.requests import Rule
from tests.support.tiny import SAMPLE

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
SHARED = {"model": "x", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stream": True}
CHAT = {
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
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
}
RESPONSES = {
    **SHARED,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "B"}]},
        {"role": "user", "content": "Hello"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "H"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "5"},
    ],
    "instructions": "Be brief.",
    "max_output_tokens": 5,
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "5"}
MESSAGES = {
    **SHARED,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [RESULT]},
    ],
    "max_tokens": 5,
    "stop_sequences": ["x"],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "disabled"},
}
COMPLETIONS = {
    **{**SHARED, "prompt": [[1, 2], [3]], "max_tokens": 5, "logprobs": 2, "echo": True},
    **{"stop": ["x"], "logit_bias": {"5": -100}, "seed": 3, "n": 2, "min_tokens": 1},
}
TOKENIZE = {"prompt": "Hello", "messages": CHAT["messages"], "tools": CHAT["tools"]}
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


# A good body, its class, and what is done with it: it becomes options and a conversation.
REQUESTS = {
    "chat": (CHAT, openai.ChatRequest, lambda body: (body.options(4096), body.chat())),
    "responses": (
        RESPONSES,
        responses.ResponsesRequest,
        lambda body: (body.options(), body.chat()),
    ),
    "messages": (MESSAGES, anthropic.MessagesRequest, lambda body: (body.options(), body.chat())),
    "completions": (
        COMPLETIONS,
        openai.CompletionRequest,
        lambda body: (body.options(4096), body.prompts()),
    ),
    "tokenize": (TOKENIZE, app.TokenizeRequest, lambda body: body),
}


def request(name):
    good, kind, use = REQUESTS[name]

    def parse(data):
        try:
            check(data)
            use(kind.model_validate(json.loads(data.decode("utf-8-sig") or "{}")))
        except (RefusedError, ConfigError, ValidationError):
            return False
        return True

    return [good], parse


def schemas(folder):
    grammars = Grammars(Tokenizer(SAMPLE, 0), (0,), None)

    def parse(data):
        try:
            check(data)
            grammars.compile(Rule("json", json.loads(data)), None)
        except (RefusedError, ValidationError, ValueError):
            return False
        return True

    return [SCHEMA], parse
