"""Checks of a raw request before any route sees it, and the end of silent connections.

What pages of other origins may do is asked and told as the Fetch standard has it:
https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from slotmoe.tools.serve.bodies import check
from slotmoe.tools.serve.errors import OLLAMA_PATH, RefusedError, error_body, shutting_down

BODY_SECONDS = 30.0  # in which a request's body has to arrive
IDLE_SECONDS = 10.0  # after twice this time a connection on which nothing moves is closed
DISCARD_SECONDS = 2.0  # for the body of a request that is refused by its headers
_UNREAD = 16  # times the largest body are read and dropped of a body that is larger
_QUICK_BYTES = 1 << 16  # of a body that takes a millisecond to check
SILENT_SECONDS = 1.0  # after which a connection that waits for its client is a silent one
PEER_CONNECTIONS = 128  # of one address that may be silent
_PREFLIGHT = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-max-age": "600"}
_ONCE = ("host", "origin", "authorization", "x-api-key", "content-type")
_LENGTHS = ("content-length", "transfer-encoding")  # a proxy may believe the other one
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)]|([^\[\]:@/\s]+))(?::[0-9]*)?")
# A browser then asks its user.
_ASK = {"www-authenticate": 'Basic realm="slotmoe: any name, the API key as password"'}


class Guard:
    """ASGI middleware.  Refused are: hosts outside the allow-list (a rebound name), pages of other
    origins than ``origins`` (``*`` is any), every path but ``/health`` without one of ``keys`` (if
    there are any), bodies that are not JSON, too slow or too large to be checked.

    A digest of the key becomes ``scope["state"]["owner"]``: requests with one key never reuse what
    those with another left in the cache, or on disk.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        hosts: Iterable[str],
        max_body: int,
        origins: Iterable[str] = (),
    ):
        self._app, self._max_body = app, max_body
        self._origins = frozenset(origin.lower() for origin in origins)
        self._keys = [key.encode() for key in keys]
        self._owners = [hashlib.sha256(key).hexdigest() for key in self._keys]
        self._hosts = {"localhost", *map(_name, hosts)} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers, is_read = MutableHeaders(scope=scope), False
        is_health = scope.get("raw_path", b"") == b"/health"
        origin = headers.get("origin", "")
        shares = bool(origin) and not self._origins.isdisjoint((origin.lower(), "*"))
        if shares:
            send = _shared(send, origin)
        try:
            if not (is_health and scope["http_version"] == "1.0" and "host" not in headers):
                self._check_names(headers, shares)
            if shares and scope["method"] == "OPTIONS":  # a browser asks, without the key
                allowed = headers.get("access-control-request-headers", "")
                fields = {**_PREFLIGHT, "access-control-allow-headers": allowed}
                return await Response(None, 204, fields)(scope, receive, send)
            owner = self._owner(headers)
            if owner is None and not is_health:
                problem = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                ask = _ASK if scope["path"] == "/" else None
                raise RefusedError(problem, None, 401, "invalid_api_key", ask)
            scope.setdefault("state", {})["owner"] = owner or ""
            has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
            if not origin and scope["path"].startswith(f"{OLLAMA_PATH}/"):  # so no page's
                headers["content-type"] = "application/json"  # as Ollama
            if scope["method"] == "POST" and has_body:
                body = await self._body(headers, receive)
                receive, is_read = _replay(body, receive), True
                if len(body) > _QUICK_BYTES:  # not in the event loop
                    await asyncio.to_thread(check, body)
                else:
                    check(body)
        except RefusedError as problem:
            if not is_read and problem.status not in (408, 413, 503):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._read(receive), DISCARD_SECONDS)
            fields = {} if is_read else {"connection": "close", **(problem.headers or {})}
            response = JSONResponse(error_body(scope["path"], problem), problem.status, fields)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_names(self, headers: Headers, shares: bool) -> None:
        """Raises ``RefusedError`` for a host that isn't known, for an origin that is another unless
        the server ``shares`` with it, and for names that are given twice."""
        for name in _ONCE:
            if len(headers.getlist(name)) > 1:  # a proxy may have looked at the other one
                raise RefusedError(f"the header {name} is given more than once")
        if all(name in headers for name in _LENGTHS):
            raise RefusedError(f"the headers {' and '.join(_LENGTHS)} can't be given together")
        host, origin = headers.get("host", ""), headers.get("origin", "")
        name = _name(host)
        try:
            ipaddress.ip_address(name)  # which can't be rebound
        except ValueError:
            if name not in self._hosts:
                problem = f"the name {host[:80]!r} is not allowed here"
                advice = "start with --allow-host to allow it"
                raise RefusedError(f"{problem}; {advice}", status=403) from None
        ours = (f"http://{host.lower()}", f"https://{host.lower()}")  # the latter by a proxy
        if origin and not shares and origin.lower() not in ours:
            problem = f"requests from pages of the origin {origin[:80]!r} are refused"
            raise RefusedError(f"{problem}; start with --cors-origin to allow it", status=403)

    def _owner(self, headers: Headers) -> str | None:
        """The digest of the client's key; empty where none is needed, None where it is wrong."""
        if not self._keys:
            return ""
        kind, _, rest = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key", "").encode("latin-1")
        if kind.lower() == "bearer":
            given = rest.strip().encode("latin-1")
        elif kind.lower() == "basic":  # a browser that opened the page
            try:
                given = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return None
        # All are compared, whichever is right, so that the time says nothing.
        same = [hmac.compare_digest(given, key) for key in self._keys]
        return self._owners[same.index(True)] if any(same) else None

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.  Raises ``RefusedError`` if it is not JSON, too large or too slow."""
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            problem = "the body must be JSON, with Content-Type: application/json"
            raise RefusedError(problem, status=415)
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            problem = f"the body did not arrive within {BODY_SECONDS:.0f} seconds"
            raise RefusedError(problem, status=408) from None
        except asyncio.CancelledError:
            raise shutting_down() from None
        if len(body) > self._max_body:
            problem = f"the body is larger than {self._max_body} bytes; see --max-body"
            raise RefusedError(problem, status=413)
        return body

    async def _read(self, receive: Receive) -> bytes:
        """The body, or if it is too large a beginning that is too.  The rest is read all the same,
        within reason: unread bytes reset the connection, and the client may never see why."""
        body, size, more = bytearray(), 0, True
        while more and size <= _UNREAD * self._max_body:
            message = await receive()
            size += len(message.get("body", b""))
            if len(body) <= self._max_body:
                body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
        return bytes(body)


def _name(host: str) -> str:
    """Of ``host``, without its port; empty where it is not a host and a port."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


class Connection(H11Protocol):
    """HTTP/1.1 that ends a connection on which the client had to act, by sending or by reading, and
    nothing moved between two looks, ``IDLE_SECONDS`` apart; uvicorn itself would wait forever.

    A new connection always finds room: what waits longest for its client gives way, of the same
    address where too many of that are silent, of all where the server is full.
    """

    _seen: tuple[object, int] | None = None
    turn = 0.0  # when it began to wait for the client, in the loop's time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol.  Else a body waits until the
        # client acknowledges its headers, 40 ms as a rule.
        of_client: socket.socket = transport.get_extra_info("socket")
        of_client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.turn = self.loop.time()
        self._make_room()
        self._look()

    def on_response_complete(self) -> None:
        self.turn = self.loop.time()
        super().on_response_complete()

    @property
    def address(self) -> str:
        return self.client[0] if self.client is not None else ""

    @property
    def is_waiting(self) -> bool:
        """Whether the server waits for the client's request, or for its reading of the answer."""
        cycle = self.cycle
        is_asked = cycle is not None and not (cycle.response_complete or cycle.more_body)
        return not is_asked or self.flow.write_paused

    def _make_room(self) -> None:
        opened = [c for c in self.connections if not c.transport.is_closing()]
        waiting = [c for c in opened if isinstance(c, Connection) and c.is_waiting]
        silent = self.loop.time() - SILENT_SECONDS
        ours = [c for c in waiting if c.turn <= silent and c.address == self.address]
        is_full = self.limit_concurrency is not None and len(opened) >= self.limit_concurrency
        if len(ours) > PEER_CONNECTIONS:
            waiting = ours
        elif not is_full:
            return
        # Who has sent a whole request, and only doesn't read, comes last.
        min(waiting, key=lambda c: (c.flow.write_paused, c.turn)).transport.abort()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        clients_turn = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        now = (self.cycle, self.transport.get_write_buffer_size()) if clients_turn else None
        if now is not None and now == self._seen:
            return self.transport.abort()
        self._seen = now
        self.loop.call_later(IDLE_SECONDS, self._look)


def _shared(send: Send, origin: str) -> Send:
    """Lets pages of ``origin`` read the response.  Keys are in headers that a page has to set, so
    nothing is allowed to a browser's own credentials."""

    async def shared(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = "*"
            headers.add_vary_header("origin")
        await send(message)

    return shared


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body first, then what comes after it: that the client left."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
