"""What every response of the server has: an id, headers about the answer, a line in the log."""

import contextlib
import re
import sys
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slotmoe.tools.serve.requests import ignored

if TYPE_CHECKING:
    from slotmoe.tools.serve.answers import Answers

_CLIENTS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_POLLED = ("/health", "/metrics", "/stats")  # asked for every few seconds, mostly by programs
_MAX_HEADER = 1000  # characters
_MAX_NAMES = 100  # of ignored fields that are told, so that strangers don't fill the log


class Log:
    """ASGI middleware around all others.

    Each response has ``x-request-id`` (the request's own, if that has a usable one), and where
    keywords of schemas were left out ``x-slotmoe-relaxed``.  HEAD is answered wherever GET is.  If
    ``is_written``, each request is a line on stderr; nothing of its content or its key is in it.
    So is each name of a field that no request has, the first time that it is ignored.
    """

    def __init__(self, app: ASGIApp, is_written: bool):
        self._app, self._is_written = app, is_written
        self._ignored = set[str]()

    def ignore(self, names: Iterable[str]) -> None:
        """Fields of these names are unknown."""
        for name in names:
            short = ascii(name[:64])
            if short not in self._ignored and len(self._ignored) < _MAX_NAMES:
                self._ignored.add(short)
                is_last = len(self._ignored) == _MAX_NAMES
                more = "; further ones are not named" if is_last else ""
                self._write(f"the field {short} is unknown here and ignored{more}")

    def _write(self, line: str) -> None:
        if self._is_written:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        ignored.set(self.ignore)
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if _CLIENTS_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = id_
                if state.get("relaxed"):
                    text = ascii("; ".join(state["relaxed"]))[1:-1]  # fields have any names
                    short = f"{text[: _MAX_HEADER - 3]}..."
                    headers["x-slotmoe-relaxed"] = text if len(text) <= _MAX_HEADER else short
            await send(message)

        # The server itself drops the body of an answer to HEAD.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_with_headers)
        finally:
            if not (scope["path"] in _POLLED and status == 200):
                line = _line(scope, status, time.monotonic() - began, state.get("answers"))
                self._write(f"{line}, {id_}")


def _line(scope: Scope, status: int, seconds: float, answers: "Answers | None") -> str:
    """``POST /api/chat 200 in 3 s, 12 + 3 tokens, first after 0.8 s, stop``"""
    path = ascii(scope["path"][:100])[1:-1]
    line = f"{scope['method']} {path} {status or 'no answer'}"
    line += f" in {seconds:.1f} s"
    if answers is None:
        return line
    usage = answers.usage()
    line += f", {usage.prompt} + {usage.answer} tokens"
    first = [job.first_token - job.submitted for job in answers.jobs if job.first_token]
    line += f", first after {min(first):.2f} s" if first else ", none before it ended"
    return f"{line}, {' '.join(answers.finishes) or 'client left'}"
