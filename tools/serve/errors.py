"""Refusals, in the error envelope of the API that was called."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slotmoe.errors import ConfigError

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
}


@dataclass(eq=False)
class RefusedError(Exception):
    """A request that is answered with an error of HTTP ``status``, and OpenAI's ``param`` and
    ``code``."""

    message: str
    param: str | None = None
    status: int = 400
    code: str | None = None
    headers: Mapping[str, str] | None = None
    details: Mapping[str, Any] | None = None  # of an error in Anthropic's form

    def __str__(self) -> str:
        return self.message


def error_body(path: str, problem: RefusedError) -> dict[str, Any]:
    """``problem`` in the envelope of the API that ``path`` belongs to."""
    is_anthropic, kind = f"{path}/".startswith(f"{ANTHROPIC_PATH}/"), "invalid_request_error"
    if problem.status >= 500:
        kind = "api_error" if is_anthropic else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    if is_anthropic:
        error = {"type": _ANTHROPIC_TYPES.get(problem.status, kind), "message": problem.message}
        details = {} if problem.details is None else {"details": dict(problem.details)}
        return {"type": "error", "error": {**error, **details}}
    about = {"param": problem.param, "code": problem.code}
    return {"error": {"message": problem.message, "type": kind, **about}}


async def error_response(request: Request, problem: Exception) -> JSONResponse:
    """The answer to a request that ended in ``problem``."""
    if isinstance(problem, RefusedError):
        refusal = problem
    elif isinstance(problem, RequestValidationError):
        refusal = _invalid(problem)
    elif isinstance(problem, ConfigError):
        refusal = RefusedError(str(problem))
    elif isinstance(problem, HTTPException):  # its headers say which methods are allowed
        status, headers = problem.status_code, problem.headers
        refusal = RefusedError(str(problem.detail), status=status, headers=headers)
    else:
        refusal = RefusedError("the server failed; its log says how", status=500)
    return JSONResponse(error_body(request.url.path, refusal), refusal.status, refusal.headers)


EXCEPTION_HANDLERS: dict[Any, Any] = dict.fromkeys(
    (Exception, RefusedError, RequestValidationError, ConfigError, HTTPException), error_response
)


def _invalid(problem: RequestValidationError) -> RefusedError:
    """What is wrong with a request's fields, in words, without repeating its content."""
    errors, reasons = problem.errors(), []
    for error in errors[:3]:
        where = ".".join(str(step) for step in error["loc"][1:])[:80]
        if error["type"] == "extra_forbidden":
            reasons.append(f"{where!r} is not supported by this server")
        else:
            reason = str(error["msg"]).removeprefix("Value error, ")
            reasons.append(f"{where}: {reason}" if where else reason)
    path = errors[0]["loc"]
    is_field = len(path) > 1 and isinstance(path[1], str)
    return RefusedError("; ".join(reasons), str(path[1])[:80] if is_field else None)
