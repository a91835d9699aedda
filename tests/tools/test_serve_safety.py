"""``slotmoe serve`` under strangers: keys, hosts, origins and bodies, clients that stop half-way,
keys that must not see each other, a model that dies."""

import json
import socket
from contextlib import ExitStack, suppress

import pytest

from slotmoe.tools.serve import guard as serve_guard
from tests.support.served import FAILING, GREEDY, HALVES, Served, start, until

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def keyed(network, runtime):
    with Served(runtime, keys=("first", "second")) as served:
        yield served


def connect(port, data=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def request(body, **headers):
    fields = {"Host": "localhost", "Content-Type": "application/json", **headers}
    if "Transfer-Encoding" not in fields:
        fields.setdefault("Content-Length", len(body))
    lines = [f"POST {TEXT} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


HALF_A_BODY = request(b"{}")[:-1]


def ended(connection):
    """Whether the server ends ``connection``, whatever it says before."""
    with suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


ODD_PATHS = ["/health/../v1/models", "/health/..%2fv1/models", "//v1/models", "/v1/models?/health"]
ODD_PATHS += ["http://localhost/health", "/health/", "//health", "/%68ealth", "/nowhere"]


def test_every_operation_asks_for_a_key_however_its_path_is_written(keyed):
    paths = keyed.ask("GET", "/openapi.json", x_api_key="first")[1]["paths"]
    operations = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(operations) >= 20
    for method, path in operations:
        path = path.replace("{name}", "sample").replace("{id}", "x")
        body = {**GREEDY, "prompt": "Call me"} if method == "post" else None
        assert keyed.ask(method.upper(), path, body)[0] == (200 if path == "/health" else 401), path
    for path in ODD_PATHS:
        assert keyed.ask("GET", path)[0] == 401, path
    for method in ("OPTIONS", "HEAD", "PUT", "TRACE"):
        connection, response = keyed.open(method, "/v1/models")
        connection.close()
        assert response.status == 401, method
    assert keyed.ask("GET", "/health?x")[0] == 200
    assert "Basic" in keyed.ask("GET", "/")[2]["www-authenticate"]  # a browser asks its user
    for given in ("Bearer second", "Basic eDpmaXJzdA=="):
        assert keyed.ask("GET", "/v1/models", Authorization=given)[0] == 200
    for given in ("Bearer firs", "Basic ?", "Bearer "):
        assert keyed.ask("GET", "/v1/models", Authorization=given)[0] == 401


def test_keys_are_compared_in_constant_time(keyed, monkeypatch):
    compared, equal = [], serve_guard.hmac.compare_digest
    monkeypatch.setattr(
        serve_guard.hmac, "compare_digest", lambda *both: compared.append(both) or equal(*both)
    )
    for key, status in (("first", 200), ("second", 200), ("f", 401)):
        assert keyed.ask("GET", "/stats", x_api_key=key)[0] == status
    assert len(compared) == 6  # each with both


HOSTILE = ["", ":80", "[::1]evil.com", "[::1", "::1", "[::1].evil.com:80", "[::1%evil.com]", "[]"]
HOSTILE += ["localhost:80.evil.com", "localhost:80:80", "evil.com@localhost", "localhost@evil.com"]
HOSTILE += ["localhost/evil.com", "localhost evil.com", "127.0.0.1:x", "[localhost]", "localhost,a"]
HOSTILE += ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"]


def test_rebound_names_and_pages_of_other_origins_are_refused(served):
    hosts = "localhost:80", "127.0.0.1", "[::1]:9", "box.local:1", "10.0.0.9", "other.local"
    for host in hosts:
        assert served.ask("GET", "/stats", Host=host)[0] == 200, host
    for host in HOSTILE:
        assert served.ask("GET", "/health", Host=host)[0] == 403, host
    for origin in ("http://evil.example", "null"):
        assert served.ask("GET", "/stats", Origin=origin)[0] == 403
    for origin, status in (("ftp://localhost:1", 403), ("http://localhost:1", 200)):
        assert served.ask("GET", "/stats", Host="localhost:1", Origin=origin)[0] == status
    for path, status in (("/health", b"200"), ("/stats", b"403")):  # as load balancers ask
        with connect(served.port, f"GET {path} HTTP/1.0\r\n\r\n".encode()) as link:
            assert link.makefile("rb").readline().split()[1] == status
    policy = served.ask("GET", "/")[2]["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy


ORIGINS = ("http://localhost:3000", "app://obsidian.md", "tauri://localhost")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("origins", [ORIGINS, ("*",)], ids=["named", "any"])
def test_pages_of_allowed_origins_can_read_answers(runtime, origins):
    allowed, is_any = "access-control-allow-origin", origins == ("*",)
    with Served(runtime, keys=("first",), origins=origins) as served:
        for origin in ORIGINS:
            wanted = {"Access_Control_Request_Method": "POST"}
            status, _, found = served.ask("OPTIONS", "/v1/responses", Origin=origin, **wanted)
            assert (status, found[allowed]) == (200, "*" if is_any else origin)
            assert "access-control-allow-credentials" not in found
            for headers, expected in (({"x_api_key": "first"}, 200), ({}, 401)):
                answer = served.ask("GET", "/stats", Origin=origin, **headers)
                assert (answer[0], answer[2][allowed]) == (expected, found[allowed])
        other = served.ask("GET", "/health", Origin="http://evil.example")
        assert other[0] == (200 if is_any else 403) and (allowed in other[2]) == is_any
        assert served.ask("OPTIONS", "/health", Host="evil.example", Origin=ORIGINS[0])[0] == 403


def test_a_header_that_is_given_twice_is_refused(served):
    for name in ("Origin", "Content-Type", "X-API-Key", "Authorization"):
        fields = ["GET /health HTTP/1.1", "Host: localhost", *[f"{name}: x"] * 2]
        data = "\r\n".join([*fields, "Connection: close", "", ""]).encode()
        with connect(served.port, data) as connection:
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 400") and b"more than once" in answer


AGAIN = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"
ONE = {"Transfer-Encoding": "chunked"}
BOTH = "can't be given together"
# What could make this server and a proxy take different bytes for a request, and what it says.
AMBIGUOUS = {
    "both lengths": (request(CHUNKED, **{"Content-Length": "2"}, **ONE), BOTH),
    "both, without a body": (b"GET /health HTTP/1.1\r\nContent-Length: 0\r\n", BOTH),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", "Invalid"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", "Invalid"),
    "a folded host": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n evil.com\r\n\r\n", "403"),
    "two lengths": (request(b"{}", **{"Content-Length": "2, 3"}), "Invalid"),
    "a signed length": (request(b"{}", **{"Content-Length": "+2"}), "Invalid"),
    "another coding": (request(b"{}", **{"Transfer-Encoding": "gzip, chunked"}), "Invalid"),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", "Invalid"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_two_readers_may_read_in_two_ways_is_refused_and_closed(served, name):
    data, words = AMBIGUOUS[name]
    if not data.endswith((b"\r\n\r\n", b"{}")):
        data += b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with connect(served.port, data + AGAIN) as connection:
        answer = connection.makefile("rb").read().decode()  # to the end of the connection
    assert answer.startswith("HTTP/1.1 4") and answer.count("HTTP/1.1 ") == 1
    assert words in answer


def test_body_that_does_not_arrive_is_given_up(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "BODY_SECONDS", 0.2)
    with connect(served.port, HALF_A_BODY) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert ended(connection)
    with connect(served.port, request(b"", **ONE)) as connection:
        connection.settimeout(0.02)
        for _ in range(1500):  # drops gain no time
            with suppress(TimeoutError):
                assert connection.recv(4096).startswith(b"HTTP/1.1 408")
                return
            connection.sendall(b"1\r\n \r\n")
        pytest.fail("it waits")


@pytest.mark.usefixtures("network")
def test_refused_bodies_are_read_so_that_the_refusal_arrives(runtime):
    """More than the sockets' buffers hold, to a server that would otherwise close while the client
    still writes."""
    body = b" " * (12 << 20)
    with Served(runtime, keys=("first",)) as served:
        assert served.ask("POST", TEXT, body)[0] == 401
        status, answer, _ = served.ask("POST", "/v1/messages", body, x_api_key="first")
        assert (status, answer["type"]) == (413, "error")


LIMIT = 8 + 16 + 256  # connections


def test_beyond_the_bound_of_connections_clients_are_told_and_later_served(served):
    connections = served.server.server_state.connections
    with ExitStack() as stack:
        for number in range(LIMIT):
            stack.enter_context(connect(served.port, HALVES[number % 3]))
        until(lambda: len(connections) >= LIMIT)
        with connect(served.port, AGAIN) as beyond:
            assert beyond.recv(4096).startswith(b"HTTP/1.1 503")
            assert ended(beyond)
    until(lambda: not connections)
    assert served.complete("Call me", max_tokens=1)


@pytest.mark.usefixtures("processes")
def test_failed_model_ends_the_process_whoever_is_connected(sample_export):
    """With a client that has sent half a header, one half a body, and one that waits for its
    answer."""
    child, port = start(sample_export, program=FAILING)
    body = json.dumps({**GREEDY, "prompt": "x"}).encode()
    with (
        child,
        connect(port, b"GET /hea") as idle,
        connect(port, request(body)[:-3]) as half,
        connect(port, request(body)) as asks,
    ):
        assert asks.recv(4096).startswith(b"HTTP/1.1 500")
        assert child.wait() == 1
        assert ended(idle) and ended(half)
        assert "ZeroDivisionError" in child.stderr.read()
