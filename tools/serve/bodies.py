"""The bodies of requests before their fields are checked: JSON, with a bounded number of values."""

import json

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slotmoe.tools.serve.errors import RefusedError, error_body

MAX_VALUES = 1 << 18  # in one body; the longest prompt of DeepSeek-V2 has 163,840 token ids
MAX_KEYS = 1 << 16  # of all objects in one body
_NOT_JSON = "the body is not JSON"


class Bodies:
    """ASGI middleware behind ``Guard``, which hands over each body whole: refuses those that are
    not JSON, or that hold so many values that checking each would stop the server."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        waiting = [await receive()]
        try:
            check(waiting[0].get("body", b""))
        except RefusedError as problem:
            response = JSONResponse(error_body(scope["path"], problem), problem.status)
            return await response(scope, receive, send)

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, again, send)


def check(body: bytes) -> None:
    """Raises ``RefusedError`` unless ``body`` is a JSON object, or empty."""
    check_counts(body)
    try:
        value = json.loads(body.decode("utf-8-sig")) if body else {}
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise RefusedError(f"{_NOT_JSON}: {problem.msg} at {where}") from None
    except UnicodeDecodeError as problem:
        raise RefusedError(f"{_NOT_JSON}: byte {problem.start} is not UTF-8") from None
    except RecursionError:
        raise RefusedError(f"{_NOT_JSON} that this server reads: it is nested too deeply") from None
    except ValueError:  # Python's bound on digits
        raise RefusedError(f"{_NOT_JSON} that this server reads: a number is too long") from None
    if not isinstance(value, dict):
        raise RefusedError(f"the body is a {type(value).__name__}, expected a JSON object")


def check_counts(body: bytes) -> None:
    """Raises ``RefusedError`` if a JSON text holds too many values or keys, in time and memory of a
    few copies of it.  What stands in its strings doesn't count."""
    if not _has_too_many(body):  # in its strings neither
        return
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside = bare
    if bare.count(b'"') <= 4 * MAX_VALUES:  # as many as all keys and values may have
        outside = b"".join(bare.split(b'"')[::2])
    if problem := _has_too_many(outside):
        raise RefusedError(f"the body holds more than {problem}", status=413)


def _has_too_many(text: bytes) -> str:
    if sum(text.count(mark) for mark in b"[{,") > MAX_VALUES:
        return f"{MAX_VALUES} values"
    return f"{MAX_KEYS} keys" if text.count(b":") > MAX_KEYS else ""
