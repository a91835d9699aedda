"""One range of a file over HTTP with the standard library's client, which reads straight into our
buffer: three times as fast as the hub's.  And what to do about bad connections."""

from __future__ import annotations

import base64
import hashlib
import http.client
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

from slotmoe.errors import DownloadError

BUFFER_BYTES = 256 << 10
_ENOUGH_BYTES = 1 << 20  # after so many bytes failures are counted from zero again
_REDIRECTS = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to bear with a bad connection: ``stall`` seconds for each buffer, ``attempts``
    failures in a row, between them ``pause`` seconds, doubled each time up to a minute."""

    stall: float = 30.0
    attempts: int = 8
    pause: float = 1.0


class Expected(NamedTuple):
    """The hub's facts of a file: bytes, and its SHA-256 or, if it is small, its git blob id."""

    size: int
    checksum: str

    def digest(self) -> Any:
        """An empty hash of the right kind."""
        if len(self.checksum) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class Remote:
    """Where a file's bytes are.  ``ask()`` gives its URL and raises ``PassingError`` or, for good,
    ``SlotmoeError``; ``headers(url)`` is what to send there."""

    def __init__(
        self,
        name: str,
        expected: Expected,
        ask: Callable[[], str],
        headers: Callable[[str], dict[str, str]],
        patience: Patience | None = None,
    ):
        self.name, self.expected, self.headers = name, expected, headers
        self.patience = patience or Patience()
        self._ask, self._lock, self._url = ask, threading.Lock(), ""

    def locate(self) -> str:
        with self._lock:
            self._url = self._url or self._ask()
            return self._url

    def forget(self) -> None:
        """The URL does not work any more; the next ``locate`` asks again."""
        with self._lock:
            self._url = ""


class PassingError(Exception):
    """A failure that may not happen again; ``after``: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class Stopped(Exception):
    """The work was given up because the program ends or another thread failed."""


class StopEvent(threading.Event):
    """An event that also cuts the watched connections when it is set, whatever they wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def watch(self, connection: socket.socket) -> None:
        self._sockets.add(connection)
        if self.is_set():
            raise Stopped

    def set(self) -> None:
        super().set()
        for connection in list(self._sockets):
            cut(connection)


def cut(connection: socket.socket) -> None:
    """Wake the thread that waits for the connection's bytes: no more will come."""
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def patiently(
    action: Callable[[], T],
    what: str,
    patience: Patience,
    stop: threading.Event,
    received: Callable[[], int] = lambda: 0,
) -> T:
    """What ``action`` returns, after as many attempts as ``patience`` allows; ``received`` counts
    the bytes that they fetched.  Raises ``DownloadError`` and ``Stopped``."""
    failures, before = 0, received()
    while True:
        try:
            return action()
        except PassingError as problem:
            if received() - before >= _ENOUGH_BYTES:
                failures, before = 0, received()
            failures += 1
            if failures >= patience.attempts:
                advice = f"gave up after {failures} attempts, run the same command again to resume"
                raise DownloadError(f"{what}: {problem}; {advice}") from None
            pause = min(patience.pause * 2 ** (failures - 1), 60) * random.uniform(0.75, 1.25)
            if stop.wait(pause if problem.after is None else min(max(pause, problem.after), 300)):
                raise Stopped from None


def status_error(status: int, headers: Any) -> PassingError:
    """The failure that a status is, with the whole seconds to wait, if the server asks."""
    after = str(headers.get("Retry-After") or "")
    return PassingError(f"the server answers {status}", float(after) if after.isdecimal() else None)


def read_range(remote: Remote, start: int, end: int, stop: StopEvent) -> bytes:
    """Bytes ``start`` to ``end`` of a file.  Raises like ``patiently`` and ``remote.locate``."""

    def attempt() -> bytes:
        with opened(remote, start, end, stop.watch) as response:
            with network_errors():
                data = response.read(end - start)
            if len(data) < end - start:
                raise PassingError("the connection ended early")
            return data

    return patiently(attempt, remote.name, remote.patience, stop)


@contextmanager
def opened(
    remote: Remote, start: int, end: int, watch: Callable[[socket.socket], None]
) -> Iterator[http.client.HTTPResponse]:
    """The response whose body begins with byte ``start`` of the file; ``watch`` gets each socket on
    which something is awaited."""
    url = remote.locate()
    for _ in range(_REDIRECTS):
        connection, target, headers = connect(url, remote.patience.stall)
        headers |= {"Connection": "close", **remote.headers(url)}
        if end > start:
            headers["Range"] = f"bytes={start}-{end - 1}"
        with closing(connection):
            with network_errors():
                connection.connect()
                watch(connection.sock)
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
            with response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status not in (200, 206):
                    remote.forget()
                    raise status_error(response.status, response.headers)
                _check_span(remote, response, start)
                yield response
                return
    raise PassingError(f"more than {_REDIRECTS} redirects")


def _check_span(remote: Remote, response: http.client.HTTPResponse, start: int) -> None:
    """Refuse an answer that is not about the file that the hub described; skip what comes before
    ``start`` from a server that knows no ranges."""
    size = remote.expected.size
    if response.status == 206:
        span = response.headers.get("Content-Range", "")
        first, total = span.removeprefix("bytes ").split("-")[0], span.split("/")[-1]
    else:
        first, total = "0", response.headers.get("Content-Length", str(size))
    if total not in (str(size), "*"):
        sizes = f"the server's file has {total[:40]!r} bytes, the hub promises {size}"
        raise DownloadError(f"{remote.name}: {sizes}; try again later")
    if response.status == 206 and first != str(start):
        raise PassingError(f"the server sends bytes from {first[:40]!r} on instead of {start}")
    while response.status == 200 and start:
        with network_errors():
            data = response.read(min(start, BUFFER_BYTES))
        if not data:
            raise PassingError("the connection ended early")
        start -= len(data)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def connect(url: str, timeout: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection for ``url``, not open yet, perhaps through a proxy; its target and headers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PassingError(f"{url[:80]!r} is no address to download from")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    proxy = None if proxy_bypass(parts.hostname) else getproxies().get(parts.scheme)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else parts
    assert through.hostname is not None
    headers = {}
    if proxy and through.username:
        account = f"{unquote(through.username)}:{unquote(through.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(account.encode()).decode()
    host, port = through.hostname, through.port
    if parts.scheme == "http":
        headers["Host"] = parts.netloc.rpartition("@")[2]
        plain = http.client.HTTPConnection(host, port, timeout=timeout)
        return plain, url if proxy else target, headers
    secure = http.client.HTTPSConnection(host, port, timeout=timeout, context=_tls())
    if proxy:
        secure.set_tunnel(parts.hostname, parts.port, headers)
    return secure, target, {}


@contextmanager
def network_errors() -> Iterator[None]:
    """What goes wrong on the way becomes ``PassingError``."""
    try:
        yield
    except ssl.SSLCertVerificationError as problem:
        refused = f"the server's certificate is refused ({problem.verify_message})"
        raise DownloadError(f"{refused}; SSL_CERT_FILE names others to trust") from None
    except TimeoutError:
        raise PassingError("the connection stalled") from None
    except (OSError, http.client.HTTPException) as problem:
        reason = str(problem)[:120] or type(problem).__name__
        raise PassingError(f"the connection failed ({reason})") from None
