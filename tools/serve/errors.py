"""Refusals, in the error envelope of the API that was called."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slotmoe.errors import ConfigError, PlanError, PromptError
from slotmoe.jsonfile import Json

ANTHROPIC_PATH, OLLAMA_PATH = "/v1/messages", "/api"
_ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error"}
_ANTHROPIC_TYPES |= {404: "not_found_error", 413: "request_too_large"}


@dataclass(eq=False)
class RefusedError(Exception):
    """A request whose answer is an error of HTTP ``status``, OpenAI's ``param`` and ``code``."""

    message: str
    param: str | None = None
    status: int = 400
    code: str | None = None
    headers: Mapping[str, str] | None = None
    details: Json | None = None  # of an error in Anthropic's form

    def __str__(self) -> str:
        return self.message


def shutting_down() -> RefusedError:
    """Of a request that can't be answered any more; soon there may be a server again."""
    return RefusedError("the server is shutting down", status=503, headers={"retry-after": "5"})


def error_body(path: str, problem: RefusedError) -> Json:
    """``problem`` in the envelope of the API that ``path`` belongs to."""
    is_anthropic, status = f"{path}/".startswith(f"{ANTHROPIC_PATH}/"), problem.status
    if f"{path}/".startswith(f"{OLLAMA_PATH}/"):
        return {"error": problem.message}
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    if status >= 500:
        kind = "api_error" if is_anthropic else "server_error"
    if is_anthropic:
        error: Json = {"type": _ANTHROPIC_TYPES.get(status, kind), "message": problem.message}
        error |= {"details": problem.details} if problem.details else {}
        return {"type": "error", "error": error}
    about = {"param": problem.param, "code": problem.code}
    return {"error": {"message": problem.message, "type": kind, **about}}


# By pydantic's names of errors, words about fields.  By patterns of a path, the sentence by which
# its clients know that they have to shorten a conversation, and why it is not served.  By a
# request's class, the fields that are refused, and why.
TEXTS: Json = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
_MAX_PLACE = 300  # characters of a field's place that are repeated


async def error_response(request: Request, problem: Exception) -> JSONResponse:
    if isinstance(problem, RefusedError):
        refusal = problem
    elif isinstance(problem, RequestValidationError):
        refusal = _invalid(problem)
    elif isinstance(problem, ConfigError):
        refusal = RefusedError(str(problem))
    elif isinstance(problem, PlanError):
        told = _too_long(request, problem) if isinstance(problem, PromptError) else str(problem)
        refusal = RefusedError(told, code="context_length_exceeded")
    elif isinstance(problem, HTTPException):  # its headers say which methods are allowed
        status, headers, told = problem.status_code, problem.headers, str(problem.detail)
        if status == 404:
            why = _text_of("unserved", request) or "/openapi.json lists what is"
            told = f"{request.url.path[:100]!r} is not served here: {why}"
        refusal = RefusedError(told, status=status, headers=headers)
    else:
        refusal = RefusedError("the server failed; its log says how", status=500)
    return JSONResponse(error_body(request.url.path, refusal), refusal.status, refusal.headers)


HANDLED = (Exception, RefusedError, RequestValidationError, ConfigError, PlanError, HTTPException)


def _too_long(request: Request, problem: PromptError) -> str:
    """In the words of the API, with what the model has where that is more."""
    runtime = request.app.state.service.runtime
    context, limit = int(runtime.context), int(runtime.config.max_position_embeddings)
    more = f" (start with a larger --context, the model has {limit})" * (context < limit)
    told = _text_of("too_long", request)
    return told.format(tokens=problem.tokens, context=context) + more if told else str(problem)


def _text_of(kind: str, request: Request) -> str:
    """What is to be said of a request's path, if anything."""
    texts, path = TEXTS[kind].items(), request.url.path
    return next((text for pattern, text in texts if re.search(pattern, path)), "")


def _invalid(problem: RequestValidationError) -> RefusedError:
    """What is wrong with a request's fields, in words, without repeating its content."""
    errors = problem.errors()[:3]
    places = [_place(error, problem.body) for error in errors]
    reasons = [_reason(error, place) for error, place in zip(errors, places, strict=True)]
    param = str(places[0][0])[:_MAX_PLACE] if places[0] else None
    return RefusedError("; ".join(reasons), param)


def _place(error: Json, value: Json) -> list[str | int]:
    """The way through a body to what is wrong.  pydantic's way also names members of unions."""
    place, (*steps, last) = list[str | int](), error["loc"]
    for step in steps[1:]:
        if _holds(value, step):
            place.append(step)
            value = value[step]
    is_named = error["type"] == "missing" or _holds(value, last)
    return [*place, last] if steps and is_named else place


def _holds(value: object, step: str | int) -> bool:
    if isinstance(value, list):
        return step in range(len(value))
    return isinstance(value, dict) and step in value


def _reason(error: Json, place: list[str | int]) -> str:
    where = ".".join(map(str, place))
    if len(where) > _MAX_PLACE:
        where = f"{where[:_MAX_PLACE]}\u2026"
    context = {name: str(value)[:_MAX_PLACE] for name, value in error.get("ctx", {}).items()}
    words = TEXTS["words"].get(error["type"])
    if words is not None:
        return f"{where or 'the body'} {words.format_map(context)}"
    reason = str(error["msg"]).removeprefix("Value error, ").replace("False", "false")
    glue = " " if reason.startswith(("is ", "has ")) else ": "
    return f"{where}{glue}{reason}" if where else reason
