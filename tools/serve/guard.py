"""What a request passes before any route sees it: the log, then checks of its host, origin, key and
body.

What pages of other origins may do is asked and told as the Fetch standard has it:
https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from mmap import mmap

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slotmoe.errors import informs
from slotmoe.jsonfile import Json
from slotmoe.offload.devices.pages import give_back_memory
from slotmoe.tools.serve.answers import Answers
from slotmoe.tools.serve.errors import OLLAMA_PATH, RefusedError, error_body, shutting_down
from slotmoe.tools.serve.requests import ignored

MAX_VALUES = 1 << 18  # in one body; the longest prompt of DeepSeek-V2 has 163,840 token ids
MAX_KEYS = 1 << 16  # of all objects in one body
READING_SECONDS = 1.0, 10.0  # until the log tells of a prompt that is read, and tells again
BODY_SECONDS = 30.0  # in which a request's body has to arrive
DISCARD_SECONDS = 2.0  # for the body of a request that is refused by its headers
_UNREAD = 16  # times the largest body are read and dropped of a body that is larger
_QUICK_BYTES = 1 << 16  # of a body that takes a millisecond to check
_SHARED = 8  # times the largest body is room for what all hold beyond so many bytes
_ONCE = ("host", "origin", "authorization", "x-api-key", "content-type")
_LENGTHS = ("content-length", "transfer-encoding")  # a proxy may believe the other one
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)]|([^\[\]:@/\s]+))(?::[0-9]*)?")
# A browser then asks its user.
_ASK = {"www-authenticate": 'Basic realm="slotmoe: any name, the API key as password"'}
_NOT_JSON = "the body is not JSON"
_CLIENTS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_POLLED = ("/health", "/metrics", "/stats")  # asked for every few seconds, mostly by programs
_MAX_HEADER = 1000  # characters
_MAX_NAMES = 100  # of ignored fields that are told, so that strangers don't fill the log


class Log:
    """ASGI middleware around all others.

    Each response has ``x-request-id`` (the request's own, if that has a usable one), and where
    keywords of schemas were left out ``x-slotmoe-relaxed``.  HEAD is answered wherever GET is.  If
    ``is_written``, each request is a line on stderr, and one more every few seconds while its
    prompt is read; nothing of its content or its key is in it.
    So is each name of a field that no request has, the first time that it is ignored.
    """

    def __init__(self, app: ASGIApp, is_written: bool):
        self._app, self._is_written = app, is_written
        self._ignored = set[str]()

    def ignore(self, names: Iterable[str]) -> None:
        """Fields of these names are unknown."""
        for short in (ascii(name[:64]) for name in names):
            if short not in self._ignored and len(self._ignored) < _MAX_NAMES:
                self._ignored.add(short)
                more = "; further ones are not named" * (len(self._ignored) == _MAX_NAMES)
                told = f"the field {short} is unknown here and ignored{more}"
                self._write(partial(str, told))

    @informs
    def _write(self, line: Callable[[], str]) -> None:
        if self._is_written:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{now} {line()}", file=sys.stderr, flush=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        ignored.set(self.ignore)
        loop, told = asyncio.get_running_loop(), list[asyncio.TimerHandle]()

        def tell() -> None:
            if line := _reading(scope, id_):
                self._write(partial(str, line))
            told[:] = [loop.call_later(READING_SECONDS[1], tell)]

        told.append(loop.call_later(READING_SECONDS[0], tell))
        given = Headers(scope=scope).get("x-request-id", "")
        id_ = given if _CLIENTS_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = id_
                if relaxed := _relaxed(state):
                    headers["x-slotmoe-relaxed"] = relaxed
            await send(message)

        # The server itself drops the body of an answer to HEAD.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_with_headers)
        finally:
            told[0].cancel()
            if not (scope["path"] in _POLLED and status == 200):
                self._write(partial(_line, scope, status, time.monotonic() - began, id_))


def _relaxed(state: Json) -> str:
    """What schemas ask for that the answer does not follow; they have any names."""
    text = ascii("; ".join(state.get("relaxed", ())))[1:-1]
    return text if len(text) <= _MAX_HEADER else f"{text[: _MAX_HEADER - 3]}..."


def _reading(scope: Scope, id_: str) -> str:
    """``POST /api/chat reads, 2048 of 29000 tokens so far, req_7``; empty where nothing is read."""
    answers: Answers | None = scope["state"].get("answers")
    jobs = [job for job in answers.jobs if not job.first_token] if answers is not None else []
    if not jobs:
        return ""
    state = "reads" if any(job.started for job in jobs) else "waits"
    read, tokens = sum(job.read for job in jobs), sum(len(job.prompt) for job in jobs)
    return f"{_asked(scope)} {state}, {read} of {tokens} tokens so far, {id_}"


def _asked(scope: Scope) -> str:
    return f"{scope['method']} {ascii(scope['path'][:100])[1:-1]}"


def _line(scope: Scope, status: int, seconds: float, id_: str) -> str:
    """``POST /api/chat 200 in 3 s, 12 + 3 tokens, first after 0.8 s, stop, req_7``"""
    state = scope["state"]
    line = f"{_asked(scope)} {status or 'no answer'} in {seconds:.1f} s"
    answers: Answers | None = state.get("answers")
    if answers is not None:
        usage = answers.usage()
        line += f", {usage.prompt} + {usage.answer} tokens"
        first = [job.first_token - job.submitted for job in answers.jobs if job.first_token]
        line += f", first after {min(first):.2f} s" if first else ", none before it ended"
        line += f", {' '.join(answers.finishes) or 'client left'}"
    relaxed = f", relaxed: {_relaxed(state)}" if state.get("relaxed") else ""
    return f"{line}{relaxed}, {id_}"


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
        self._held = self._most = 0  # bytes of that room in use, now and since it was given back
        self._origins = frozenset(origin.lower() for origin in origins)
        self._keys = [key.encode() for key in keys]
        self._owners = [hashlib.sha256(key).hexdigest() for key in self._keys]
        self._hosts = {"localhost", *map(_name, hosts)} - {""}
        # Keys are in headers that a page has to set: nothing is allowed to a browser's credentials.
        self._named = CORSMiddleware(
            self._with_key,
            allow_origins=[*self._origins],
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("*",),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        is_named = "host" in headers or scope["http_version"] != "1.0"
        try:
            if is_named or not _is_health(scope):  # as load balancers ask
                self._check_names(headers)
        except RefusedError as problem:
            await self._refuse(problem, False, scope, receive, send)
        else:
            await self._named(scope, receive, send)

    async def _with_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of a known host and origin."""
        headers, body, held = MutableHeaders(scope=scope), None, [0]
        try:
            owner = self._owner(headers)
            if owner is None and not _is_health(scope):
                problem = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                ask = _ASK if scope["path"] == "/" else None
                raise RefusedError(problem, None, 401, "invalid_api_key", ask)
            scope.setdefault("state", {})["owner"] = owner or ""
            has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
            if "origin" not in headers and scope["path"].startswith(f"{OLLAMA_PATH}/"):
                headers["content-type"] = "application/json"  # as Ollama, of no page
            if scope["method"] == "POST" and has_body:
                body = await self._body(headers, receive, held)
                if len(body) > _QUICK_BYTES:  # not in the event loop
                    await asyncio.to_thread(check, body)
                else:
                    check(body)
        except RefusedError as problem:
            self._hold(held, 0)
            await self._refuse(problem, body is not None, scope, receive, send)
        else:
            receive = receive if body is None else _replay(body, receive)
            body = None  # the request has it now
            await self._app(scope, receive, send)
        finally:
            self._hold(held, 0)

    def _check_names(self, headers: Headers) -> None:
        """Raises ``RefusedError`` for a host or an origin that isn't known, and for names that are
        given twice."""
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
        if origin and self._origins.isdisjoint((origin, "*")) and origin.lower() not in ours:
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

    async def _body(self, headers: Headers, receive: Receive, held: list[int]) -> bytes:
        """The whole body, ``held``.  Raises ``RefusedError`` if it is not JSON, too large or too
        slow, or where others hold too much."""
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            problem = "the body must be JSON, with Content-Type: application/json"
            raise RefusedError(problem, status=415)
        try:
            body = await asyncio.wait_for(self._read(receive, self._max_body, held), BODY_SECONDS)
        except asyncio.TimeoutError:
            problem = f"the body did not arrive within {BODY_SECONDS:.0f} seconds"
            raise RefusedError(problem, status=408) from None
        except asyncio.CancelledError:
            raise shutting_down() from None
        if len(body) > self._max_body:
            problem = f"the body is larger than {self._max_body} bytes; see --max-body"
            raise RefusedError(problem, status=413)
        return body

    async def _read(self, receive: Receive, most: int, held: list[int]) -> bytes:
        """The body, ``held``, or if it has more than ``most`` bytes a beginning that has too.  The
        rest is read all the same, within reason: unread bytes reset the connection, and the client
        may never see why."""
        size, more = 0, True
        with mmap(-1, max(1, most + 1)) as room:  # pages come as they are written, and go at once
            while more and size <= _UNREAD * self._max_body:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError("the client left before its body's end", status=499)
                data = message.get("body", b"")
                size += len(data)
                self._hold(held, min(size, most + 1))
                room.write(data[: most + 1 - room.tell()])
                more = message.get("more_body", False)
            return room[: room.tell()]

    def _hold(self, held: list[int], now: int) -> None:
        """So many bytes are ``held`` of a body.  Raises ``RefusedError`` where all hold too much;
        when none is held any more, the memory of many goes back to the system."""
        total = self._held + max(0, now - _QUICK_BYTES) - max(0, held[0] - _QUICK_BYTES)
        if now > held[0] and total > _SHARED * self._max_body:
            problem = "too many large bodies are under way; try again later"
            raise RefusedError(problem, None, 429, "rate_limit_exceeded", {"retry-after": "1"})
        self._held, self._most, held[0] = total, max(total, self._most), now
        if not total and self._most > 4 * self._max_body:
            self._most = 0
            asyncio.get_running_loop().run_in_executor(None, give_back_memory)

    async def _refuse(
        self, problem: RefusedError, is_read: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """``is_read``: nothing of the body is left."""
        if not is_read and problem.status not in (408, 413, 499, 503):
            with contextlib.suppress(asyncio.TimeoutError, RefusedError):
                await asyncio.wait_for(self._read(receive, -1, [0]), DISCARD_SECONDS)
        fields = {} if is_read else {"connection": "close", **(problem.headers or {})}
        response = JSONResponse(error_body(scope["path"], problem), problem.status, fields)
        await response(scope, receive, send)


def _is_health(scope: Scope) -> bool:
    return bool(scope.get("raw_path", b"") == b"/health")


def _name(host: str) -> str:
    """Of ``host``, without its port; empty where it is not a host and a port."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body first, then what comes after it: that the client left."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def check(body: bytes) -> None:
    """Raises ``RefusedError`` unless ``body`` is empty or JSON; also where it holds too many values
    or keys, in time and memory of a few copies of it."""
    if _excess(body):  # perhaps in its strings, which do not count
        outside = body.replace(rb"\\", b"").replace(rb"\"", b"")
        if outside.count(b'"') <= 4 * MAX_VALUES:  # as many as all keys and values may have
            outside = b"".join(outside.split(b'"')[::2])
        if excess := _excess(outside):
            raise RefusedError(f"the body holds more than {excess}", status=413)
    try:
        json.loads(body.decode("utf-8-sig") if body else "null")
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise RefusedError(f"{_NOT_JSON}: {problem.msg} at {where}") from None
    except UnicodeDecodeError as problem:
        raise RefusedError(f"{_NOT_JSON}: byte {problem.start} is not UTF-8") from None
    except RecursionError:
        raise RefusedError(f"{_NOT_JSON} that this server reads: it is nested too deeply") from None
    except ValueError:  # Python's bound on digits
        raise RefusedError(f"{_NOT_JSON} that this server reads: a number is too long") from None


def _excess(text: bytes) -> str:
    if sum(text.count(mark) for mark in b"[{,") > MAX_VALUES:
        return f"{MAX_VALUES} values"
    return f"{MAX_KEYS} keys" if text.count(b":") > MAX_KEYS else ""
