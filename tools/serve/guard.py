"""The door of ``slotmoe serve``: who may ask what, decided on the raw request before any route sees
it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from slotmoe.tools.serve.app import error_body
from slotmoe.tools.serve.forms import RefusedError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_SECONDS = 30.0  # in which a request's body has to arrive
_PATIENCE_SECONDS = 10.0  # after twice this time a connection on which nothing moves is closed
_DISCARD_SECONDS = 2.0  # for the body of a request that is refused by its headers
_UNREAD = 16  # times the largest body are read, and forgotten, of one that is larger
_ASK = (
    b"www-authenticate",
    b'Basic realm="slotmoe: any name, the API key as password"',
)  # a browser then asks its user


class Guard:
    """ASGI middleware.  Refused are: hosts outside the allow-list (a rebound name), pages of other
    origins, every path but ``/health`` without one of ``keys`` (if there are any), bodies that are
    not JSON, too large or too slow.

    The key's number becomes ``scope["state"]["owner"]``, so that what one key's requests leave
    behind serves no other.
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
        try:
            scope.setdefault("state", {})["owner"] = self._admit(scope, headers)
            if scope["method"] == "POST" and (
                b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
            ):
                receive = _replay(await self._body(headers, receive), receive)
        except RefusedError as problem:
            if problem.status not in (408, 413):  # then its body is unread
                await self._discard(receive)
            return await _refuse(scope, send, problem)
        return await self._app(scope, receive, send)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose request it is: the number of a key.  Raises ``RefusedError``."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_known(host):
            raise RefusedError(
                f"the name {host[:80]!r} is not allowed here; start with --allow-host to allow it",
                403,
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            raise RefusedError("requests from pages of other origins are refused", 403)
        owner = self._owner(headers)
        if owner is None and scope.get("raw_path", b"") != b"/health":
            raise RefusedError(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                401,
                code="invalid_api_key",
            )
        return owner or ""

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
        """The number of the key that came along; empty where none is needed, None where none is
        right."""
        if not self._keys:
            return ""
        given, (kind, _, rest) = (
            headers.get(b"x-api-key", b""),
            headers.get(b"authorization", b"").partition(b" "),
        )
        if kind.lower() == b"bearer":
            given = rest.strip()
        elif kind.lower() == b"basic":  # a browser that opened the page
            try:
                given = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return None
        same = [
            hmac.compare_digest(given, key) for key in self._keys
        ]  # all of them, whichever it is
        return str(same.index(True)) if any(same) else None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body.  Raises ``RefusedError`` if it is not JSON, too large or too slow."""
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise RefusedError("the body must be JSON, with Content-Type: application/json", 415)
        try:
            body = await asyncio.wait_for(self._read(receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise RefusedError(
                f"the body did not arrive within {_BODY_SECONDS:.0f} seconds", 408
            ) from None
        if len(body) > self._max_body:
            raise RefusedError(
                f"the body is larger than {self._max_body} bytes; see --max-body", 413
            )
        return body

    async def _read(self, receive: Receive) -> bytes:
        """The body, or if it is too large a beginning that is too.

        The rest is read all the same, within reason: who closes on unread bytes resets the
        connection, and the client may never see why.
        """
        body, size, more = bytearray(), 0, True
        while more and size <= _UNREAD * self._max_body:
            message = await receive()
            size += len(message.get("body", b""))
            if len(body) <= self._max_body:
                body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
        return bytes(body)

    async def _discard(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._read(receive), _DISCARD_SECONDS)


class Connection(H11Protocol):
    """HTTP/1.1 with a client that may stop half-way: while it asks, where uvicorn waits forever for
    the rest of a header, or while it is answered, where it waits forever for room to write.

    Every ``_PATIENCE_SECONDS`` the connection is looked at.  While the client is to move, nothing
    else does: either no request is under way, or writing waits for it to read.  If then all is as
    it was the last time, the connection ends.
    """

    _timer: asyncio.TimerHandle | None = None
    _seen: tuple[object, int] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            # uvicorn itself only refuses requests, so that silent clients could take all
            # descriptors
            return transport.abort()
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


async def _refuse(scope: Scope, send: Send, problem: RefusedError) -> None:
    body = json.dumps(error_body(scope["path"], problem)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if problem.status == 401 and scope["path"] == "/":
        headers.append(_ASK)
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
