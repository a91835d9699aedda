"""The door of ``slotmoe serve``: who may ask what, decided on the raw request before any route sees it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_SECONDS = 30.0  # in which a request's body has to arrive
_PATIENCE_SECONDS = 10.0  # after twice this time a connection on which nothing moves is closed
_ASK = [(b"www-authenticate", b'Basic realm="slotmoe: any name, the API key as password"')]


class Guard:
    """ASGI middleware.  Refused are: hosts outside the allow-list (a rebound name), pages of other origins, every path but
    ``/health`` without one of ``keys`` (if there are any), bodies that are not JSON, too large or too slow.

    The key's number becomes ``scope["state"]["owner"]``, so that what one key's requests leave behind serves no other.
    """

    def __init__(self, app: App, keys: tuple[str, ...], hosts: tuple[str, ...], max_body: int):
        self._app, self._max_body = app, max_body
        self._keys = [key.encode() for key in keys]
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_known(host):
            return await refuse(send, 403, f"the name {host[:80]!r} is not allowed here; start with --allow-host to allow it")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            return await refuse(send, 403, "requests from pages of other origins are refused")
        owner = self._owner(headers)
        if owner is None and scope.get("raw_path", b"") != b"/health":
            extra = [(b"www-authenticate", b'Basic realm="slotmoe: any name, the API key as password"')] if scope["path"] == "/" else []
            return await refuse(
                send, 401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", "invalid_api_key", extra
            )
        scope.setdefault("state", {})["owner"] = owner or ""
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            return await refuse(send, 415, "the body must be JSON, with Content-Type: application/json")
        try:
            body = await asyncio.wait_for(self._body(headers, receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            return await refuse(send, 408, f"the body did not arrive within {_BODY_SECONDS:.0f} seconds")
        if body is None:
            return await refuse(send, 413, f"the body is larger than {self._max_body} bytes; see --max-body")
        return await self._app(scope, _replay(body, receive), send)

    def _is_known(self, host: str) -> bool:
        """Names are on the list or refused; an address can't be rebound."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _owner(self, headers: dict[bytes, bytes]) -> str | None:
        """The number of the key that came along; empty where none is needed, None where none is right."""
        if not self._keys:
            return ""
        given, (kind, _, rest) = headers.get(b"x-api-key", b""), headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer":
            given = rest.strip()
        elif kind.lower() == b"basic":  # a browser that opened the page
            try:
                given = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return None
        same = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, whichever it is
        return str(same.index(True)) if any(same) else None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > self._max_body:
                return None
        return bytes(body)


class Connection(H11Protocol):
    """HTTP/1.1 with a client that may stop half-way: while it asks, where uvicorn waits forever for the rest of a header, or
    while it is answered, where it waits forever for room to write.

    Every ``_PATIENCE_SECONDS`` the connection is looked at.  While the client is to move, nothing else does: either no
    request is under way, or writing waits for it to read.  If then all is as it was the last time, the connection ends.
    """

    _timer: asyncio.TimerHandle | None = None
    _seen: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        clients_turn = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        now = (self.cycle, self.transport.get_write_buffer_size()) if clients_turn else None
        if now is not None and now == self._seen:
            return self.transport.abort()
        self._seen, self._timer = now, self.loop.call_later(_PATIENCE_SECONDS, self._look)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body first, then what comes after it: that the client left."""
    first = True

    async def replay() -> MutableMapping[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def refuse(send: Send, status: int, message: str, code: str | None = None, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Answer with an error in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
