"""``slotmoe serve`` under strangers: keys, hosts, origins and bodies, clients that stop half-way,
keys that must not see each other, a model that dies."""

import json
import socket
import threading
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
    fields.setdefault("Content-Length", len(body))
    lines = [f"POST {TEXT} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(**fields):
    return json.dumps({**GREEDY, "prompt": "Call me", **fields}).encode()


HALF_A_BODY = request(b"{}")[:-1]


def ended(connection):
    """Whether the server ends ``connection``, whatever it says before."""
    with suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


def dripped(connection, drop):
    """What the server says to a client that sends ``drop`` now and then."""
    connection.settimeout(0.02)
    for _ in range(1500):
        with suppress(TimeoutError):
            return connection.recv(4096)
        connection.sendall(drop)
    raise AssertionError("drops gain time")


ODD_PATHS = ["/health/../v1/models", "/health/..%2fv1/models", "//v1/models"]
ODD_PATHS += ["/v1/models?/health", "http://localhost/health", "/stats", "/health/", "//health"]
ODD_PATHS += ["/%68ealth", "/nowhere"]


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
    compared, given = [], ["first", "second", "f"]

    def equal(one, other):
        compared.append((one.decode(), other.decode()))
        return one == other

    monkeypatch.setattr(serve_guard.hmac, "compare_digest", equal)
    statuses = [keyed.ask("GET", "/stats", x_api_key=key)[0] for key in given]
    assert statuses == [200, 200, 401]
    assert compared == [(key, right) for key in given for right in ("first", "second")]


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
    allowed = "access-control-allow-origin"
    with Served(runtime, keys=("first",), origins=origins) as served:
        for origin in ORIGINS:
            wanted = {"Access_Control_Request_Method": "POST"}
            status, _, found = served.ask("OPTIONS", "/v1/responses", Origin=origin, **wanted)
            shown = origin if origins == ORIGINS else "*"
            assert (status, found[allowed]) == (200, shown)
            assert ("Origin" in found["vary"]) or origins == ("*",)
            assert "POST" in found["access-control-allow-methods"]
            assert "access-control-allow-credentials" not in found
            body = {**GREEDY, "prompt": "Call me", "max_tokens": 1}
            for headers, expected in (({"x_api_key": "first"}, 200), ({}, 401)):
                answer = served.ask("POST", TEXT, body, Origin=origin, **headers)
                assert (answer[0], answer[2][allowed]) == (expected, shown)
        other = served.ask("GET", "/health", Origin="http://evil.example")
        assert other[0] == (200 if origins == ("*",) else 403)
        assert (allowed in other[2]) == (origins == ("*",))
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
    "both lengths": (request(CHUNKED, **ONE), BOTH),
    "both, the chunked one last": (request(CHUNKED, **{"Content-Length": "2"}, **ONE), BOTH),
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


def test_an_absolute_target_names_nothing(served):
    """A browser that a proxy is to serve writes one."""
    for host in ("localhost", "evil.com"):
        data = f"GET http://{host}/stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with connect(served.port, data.encode()) as connection:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 404")


def test_body_that_does_not_arrive_is_given_up(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "BODY_SECONDS", 0.2)
    with connect(served.port, HALF_A_BODY) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert ended(connection)
    fields = f"POST {TEXT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"
    head = "\r\n".join([*fields, "Transfer-Encoding: chunked", "", ""]).encode()
    with connect(served.port, head) as connection:
        assert dripped(connection, b"1\r\n \r\n").startswith(b"HTTP/1.1 408")


def test_headers_are_bounded(served):
    for headers in ({"X-Long": "x" * 200_000}, {f"X-{i}": "y" * 100 for i in range(2000)}):
        answer = b""
        with (
            suppress(ConnectionError),  # it did not even read them all
            connect(served.port, request(b"", **headers)) as connection,
        ):
            answer = connection.recv(4096)
        assert answer[:12] in (b"HTTP/1.1 400", b"")
    assert served.complete("Call me", max_tokens=1)


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
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connections = served.server.server_state.connections
    with ExitStack() as stack:
        halves = (HALVES * (LIMIT // len(HALVES) + 1))[:LIMIT]
        halves = [b"GE" if half == HALVES[3] else half for half in halves]  # 3 is no HTTP
        for half in halves:
            stack.enter_context(connect(served.port, half))
        until(lambda: len(connections) >= LIMIT)
        with connect(served.port, asked) as beyond:
            assert beyond.recv(4096).startswith(b"HTTP/1.1 503")
            assert ended(beyond)
    until(lambda: not connections)
    assert served.complete("Call me", max_tokens=1)


def test_a_body_does_not_wait_until_its_headers_are_acknowledged(served):
    connections = served.server.server_state.connections
    until(lambda: not connections)
    with connect(served.port):
        until(lambda: connections)
        (there,) = connections
        of_client = there.transport.get_extra_info("socket")
        assert of_client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


CANARY = (
    "The canary's word is plum. "
    "The people of the United States have a government of laws and not of men. "
) * 8


def test_abort_in_the_middle_of_a_prompt_leaves_nothing_for_another_key(
    keyed, runtime, slow, monkeypatch
):
    """One answer runs, so prompts come in pieces; after the first one the client is gone, and its
    latents stay in their place."""
    keyed.idle()
    alone = "".join(token.text for token in runtime.generate(CANARY, 8))
    passes, totals = runtime.engine.batch.passes, runtime.engine.batch.totals
    run, reached, left = passes.run, threading.Event(), threading.Event()

    def paused(rows):
        run(rows)
        if any(len(row.ids) == 64 for row in rows):
            reached.set()
            left.wait(60)

    monkeypatch.setattr(passes, "run", paused)
    asked = completion(prompt=CANARY, max_tokens=8)
    before, made = totals.prompt_tokens, totals.answer_tokens
    first = request(completion(max_tokens=500), **{"x-api-key": "second"})
    with connect(keyed.port, first):
        until(lambda: totals.answer_tokens > made and keyed.service.running)
        with connect(keyed.port, request(asked, **{"x-api-key": "first"})):
            assert reached.wait(60)
        until(lambda: any(job.cancelled for job in keyed.service._open))
        left.set()
    keyed.idle()
    monkeypatch.undo()
    read = totals.prompt_tokens - before
    assert 64 < read < 150 < len(runtime.tokenizer.encode(CANARY))

    def ask(key):
        answer = keyed.ask("POST", TEXT, json.loads(asked), x_api_key=key)[1]
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached, answer["choices"][0]["text"]

    assert ask("second") == (1, alone)  # the beginning-of-sentence token of its own answer
    cached, text = ask("first")
    assert (cached >= 64, text) == (True, alone)


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
