"""What ``/openapi.json`` says beyond the forms' own fields: which fields exclude each other,
answers, and every refusal.

FastAPI derives the description of a field from its type; what several fields decide together, or
the open model, stands here.
"""

from __future__ import annotations

from typing import Any

from slotmoe.errors import ConfigError
from slotmoe.tools.serve.answers import Service
from slotmoe.tools.serve.forms import MAX_CHOICES

_REASONS = {
    "400": "The request is not understood, not supported, or does not fit the context",
    "401": "The API key is missing or wrong",
    "403": "The host name is not allowed, or the request comes from a page of another origin",
    "404": "Not here",
    "408": "The body did not arrive in time",
    "413": "The body is larger than the server takes",
    "415": "The body is not JSON",
    "429": "Too many answers are waiting",
    "500": "The model failed",
    "503": "The model has failed",
}
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_USAGE = {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _choice(**content: Any) -> dict[str, Any]:
    return _object({"index": _COUNT, **content, "finish_reason": {"type": "string"}})


def _completion(kind: str, **content: Any) -> dict[str, Any]:
    about = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    return _object({**about, "choices": _list(_choice(**content)), "usage": _object(_USAGE)})


_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": _COUNT,
    }
)
_ANSWERS = {
    "/health": _object({"status": _TEXT}),
    "/stats": _object(
        {
            "model": _TEXT,
            "context": _COUNT,
            "running": _COUNT,
            "queued": _COUNT,
            "memory": {"type": "object"},
        }
    ),
    "/v1/models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "/v1/models/{name}": _MODEL,
    "/v1/chat/completions": _completion(
        "chat.completion", message=_object({"role": {"const": "assistant"}})
    ),
    "/v1/completions": _completion("text_completion", text=_TEXT),
    "/v1/messages": _object(
        {
            "id": _TEXT,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "content": _list(_object({"type": _TEXT})),
            "stop_reason": _TEXT,
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT}),
        }
    ),
}
_ECHOED = {"required": ["echo"], "properties": {"echo": {"const": True}}}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": _TEXT, "event": _TEXT},
}  # each of the stream
_NOTHING = {"type": ["string", "null"]}
_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _NOTHING, "code": _NOTHING})}
)
_ANTHROPIC_ERROR = _object(
    {"type": {"const": "error"}, "error": _object({"type": _TEXT, "message": _TEXT})}
)


def describe(found: dict[str, Any], service: Service, keyed: bool) -> None:
    """Complete ``found``, FastAPI's description of the routes, for the model that is open;
    ``keyed`` servers ask for a key."""
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            operation["responses"] = _responses(path, method)
            if keyed and path != "/health":
                operation["security"] = [{"bearer": []}, {"header": []}]
    parts = found["components"]
    if keyed:
        header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        parts["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": header,
        }
    schemas = parts["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        del schemas[name]
    for form in ("Chat", "Completion", "Messages"):
        schemas[form]["properties"]["model"] = {"const": service.name}
    _limit(schemas, service)
    streamed = {
        "if": _given("stream_options"),
        "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
    }
    likeliest = {
        "if": _given("top_logprobs"),
        "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
    }
    schemas["Chat"]["allOf"] = [streamed, likeliest, _never("max_tokens", "max_completion_tokens")]
    schemas["Completion"]["allOf"] = [
        streamed,
        {
            "if": {"required": ["max_tokens"], "properties": {"max_tokens": {"const": 0}}},
            "then": _ECHOED,
        },
        {"if": _given("suffix"), "then": {"properties": {"prompt": _TEXT}, "not": _ECHOED}},
        *(_many_prompts(count) for count in range(2, MAX_CHOICES + 1)),
    ]


def _responses(path: str, method: str) -> dict[str, Any]:
    """All that an operation may answer."""
    if path == "/metrics":
        answers: dict[str, Any] = {"text/plain": {"schema": _TEXT}}
    else:
        answers = {"application/json": {"schema": _ANSWERS[path]}}
    if method == "post":
        answers["text/event-stream"] = {"schema": _EVENT}
    refusals = ["403"]
    if path != "/health":
        refusals += ["401", "500"]
    if path == "/health":
        refusals += ["503"]
    if path == "/v1/models/{name}":
        refusals += ["404"]
    if method == "post":
        refusals += ["400", "404", "408", "413", "415", "429", "503"]
    error = _ANTHROPIC_ERROR if path == "/v1/messages" else _ERROR
    found: dict[str, Any] = {"200": {"description": "The answer", "content": answers}}
    for status in sorted(refusals):
        schema = _ANSWERS[path] if (path, status) == ("/health", "503") else error
        found[status] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": schema}},
        }
    return found


def _limit(schemas: dict[str, Any], service: Service) -> None:
    """Token ids below the vocabulary, prompts of ids that fit, a suffix only where the tokenizer
    can fill a gap."""
    for form in ("Chat", "Completion"):
        fields = schemas[form]["properties"]
        fields["logit_bias"]["anyOf"][0]["propertyNames"] = {
            "pattern": _below(service.tokenizer.size)
        }
        fields["seed"]["anyOf"][0] |= {
            "minimum": -(1 << 63),
            "exclusiveMaximum": 1 << 63,
        }  # FastAPI's are rounded
    completion = schemas["Completion"]["properties"]
    _, ids, _, lists = completion["prompt"]["anyOf"]
    for one in (ids, lists["items"]):
        one["items"]["exclusiveMaximum"] = service.runtime.config.vocab_size
        one["maxItems"] = service.runtime.context - 1
    try:
        service.tokenizer.encode_gap("", "")
    except ConfigError:
        completion["suffix"] = {"type": "null"}


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _never(*names: str) -> dict[str, Any]:
    return {"not": {"allOf": [_given(name) for name in names]}}


def _many_prompts(count: int) -> dict[str, Any]:
    """``count`` prompts leave so many answers for each."""
    prompts = {
        "type": "array",
        "minItems": count,
        "maxItems": count,
        "items": {"type": ["string", "array"]},
    }
    n = {"n": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": MAX_CHOICES // count}]}}
    return {
        "if": {"required": ["prompt"], "properties": {"prompt": prompts}},
        "then": {"properties": n},
    }


def _below(limit: int) -> str:
    """A pattern for the decimal numbers from 0 to ``limit`` - 1."""
    last, found = str(limit - 1), []
    for place, digit in enumerate(last):
        if digit != "0":
            lower = f"[0-{int(digit) - 1}]" if digit != "1" else "0"
            found.append(f"{last[:place]}{lower}[0-9]{{{len(last) - place - 1}}}")
    return f"^({'|'.join([f'[0-9]{{1,{len(last) - 1}}}', *found, last])})$"
