"""``slotmoe serve`` under strangers: clients that stop half-way, keys that must not see each other,
a model that dies."""

import json
import random
import resource
import socket
import threading
import time
from contextlib import ExitStack

import psutil
import pytest

from slotmoe.offload.runtime import Sequence
from slotmoe.tools.serve import allow_descriptors
from slotmoe.tools.serve import guard as serve_guard
from tests.support.served import FAILING, GREEDY, HALVES, USER, Served, start, until


@pytest.fixture(scope="module")
def keyed(runtime):
    with Served(runtime, keys=("first", "second")) as served:
        yield served


def connect(port, data=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


def request(body, **headers):
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        **headers,
    }
    return (
        "".join(
            [
                "POST /v1/completions HTTP/1.1\r\n",
                *(f"{k}: {v}\r\n" for k, v in fields.items()),
                "\r\n",
            ]
        ).encode()
        + body
    )


LONG = request(
    json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 400}).encode(), Connection="close"
)
HALF_A_BODY = request(b"{}")[:-1]


def ended(connection):
    """Whether the server ends ``connection`` within the socket's timeout, whatever it says
    before."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.usefixtures("processes")
def test_only_this_machine_can_connect_unless_asked(sample_export):
    child, port = start(sample_export)
    listening = [
        one
        for one in psutil.Process(child.pid).net_connections()
        if one.status == psutil.CONN_LISTEN
    ]
    child.terminate()
    child.wait(10)
    child.stderr.close()
    assert [tuple(one.laddr) for one in listening] == [("127.0.0.1", port)]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("half", HALVES)
def test_half_a_request_does_not_hold_a_connection(served, monkeypatch, half):
    monkeypatch.setattr(serve_guard, "IDLE_SECONDS", 0.3)
    with connect(served.port, half) as connection:
        began = time.monotonic()
        for _ in range(3):  # a byte now and then is no progress
            time.sleep(0.05)
            connection.sendall(b"" if half in (b"", HALVES[3]) else b"x")
        received = b"400" if half == HALVES[3] else b""
        assert received in connection.recv(100)
        assert ended(connection) and time.monotonic() - began < 2
    with connect(served.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")  # which ends uvicorn's own wait for the next request
        began = time.monotonic()
        assert ended(connection) and time.monotonic() - began < 2


LIMIT = 8 + 4 + 256  # connections


def test_flood_of_silent_connections_locks_nobody_out_and_passes(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "IDLE_SECONDS", 1.5)
    monkeypatch.setattr(serve_guard, "PEER_CONNECTIONS", LIMIT)
    connections = served.server.server_state.connections
    with ExitStack() as stack:
        kept = stack.enter_context(connect(served.port, LONG))
        until(lambda: served.batch.running)
        silent = [stack.enter_context(connect(served.port)) for _ in range(LIMIT + 150)]
        until(lambda: len(connections) == LIMIT - 1)
        assert served.complete("Call me", max_tokens=1)
        assert ended(silent[0]) and ended(silent[100])  # those that are silent for longest
        assert b'"completion_tokens":400' in kept.makefile("rb").read()  # but none that asked
        until(lambda: not connections)


def test_silent_connections_of_one_address_are_bounded(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(serve_guard, "PEER_CONNECTIONS", 5)
    until(lambda: not served.server.server_state.connections)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(served.port, half)) for half in 2 * HALVES[:3]]
        silent += [stack.enter_context(connect(served.port, HALF_A_BODY))]
        time.sleep(0.2)
        for expected in (silent[0], silent[1]):
            stack.enter_context(connect(served.port))
            assert ended(expected)
        stack.enter_context(connect(served.port))
        time.sleep(0.05)  # and those that just came are not among them
        assert len(served.server.server_state.connections) == 8


def test_files_for_a_long_queue_are_allowed(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for count in (548, 2000, 9000):
        allow_descriptors(count)
    assert asked == [(2000, 4096), (4096, 4096)]


def test_who_asks_slowly_enough_and_waits_for_a_long_answer_is_served(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "IDLE_SECONDS", 0.1)
    body = json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 400}).encode()
    with connect(served.port) as connection:
        data = request(body, Connection="close")
        time.sleep(0.05)
        connection.sendall(data[:-5])  # all but the end of the body
        time.sleep(0.5)
        connection.sendall(data[-5:])
        assert b'"completion_tokens":400' in connection.makefile("rb").read()


def test_body_that_does_not_arrive_is_given_up(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "BODY_SECONDS", 0.5)
    with connect(served.port, request(b"{}")[:-1]) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert ended(connection)
    chunks = (
        b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\nHost: localhost\r\n\r\n"
    )
    with connect(served.port, b"POST /v1/completions HTTP/1.1\r\n" + chunks) as connection:
        began = time.monotonic()
        while time.monotonic() < began + 0.3:  # a byte now and then gains no time
            time.sleep(0.1)
            connection.sendall(b"1\r\n \r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408") and time.monotonic() < began + 0.8


def test_who_does_not_read_the_answer_loses_the_connection(served, monkeypatch):
    monkeypatch.setattr(serve_guard, "IDLE_SECONDS", 0.3)
    body = json.dumps(
        {**GREEDY, "prompt": "Call me", "max_tokens": 490, "logprobs": 20, "n": 8, "stream": True}
    ).encode()
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", served.port))
    with deaf:
        deaf.sendall(request(body))
        until(lambda: served.batch.running)
        served.idle(20)
        until(lambda: not served.server.server_state.connections)


@pytest.mark.parametrize(
    "headers",
    [{"X-Long": "x" * 200_000}, {f"X-{i}": "y" * 100 for i in range(2000)}],
    ids=["long", "many"],
)
def test_headers_are_bounded(served, headers):
    with connect(served.port) as connection:
        try:
            connection.sendall(
                request(b"", **headers).replace(b"POST /v1/completions", b"GET /health")
            )
            answer = connection.recv(4096)
        except ConnectionError:  # it did not even read them all
            answer = b""
        assert answer[:12] in (b"HTTP/1.1 400", b"")
    assert served.complete("Call me", max_tokens=1)


@pytest.mark.usefixtures("network")
def test_refused_bodies_are_read_so_that_the_refusal_arrives(runtime):
    """More than the sockets' buffers hold, to a server that would otherwise close while the client
    still writes."""
    body = b" " * (12 << 20)
    with Served(runtime, keys=("first",), max_body=1 << 20) as served:
        assert served.ask("POST", "/v1/completions", body, x_api_key="first")[0] == 413
        assert served.ask("POST", "/v1/completions", body)[0] == 401
        assert (
            served.ask(
                "POST", "/v1/completions", body, x_api_key="first", Content_Type="text/plain"
            )[0]
            == 415
        )
        assert served.ask("POST", "/v1/messages", body, x_api_key="first")[1]["type"] == "error"


@pytest.mark.usefixtures("network")
def test_every_operation_asks_for_a_key_however_its_path_is_written(keyed):
    paths = keyed.ask("GET", "/openapi.json", x_api_key="first")[1]["paths"]
    operations = {
        (method.upper(), path.replace("{name}", "sample").replace("{id}", "x"))
        for path, methods in paths.items()
        for method in methods
    }
    assert len(operations) == 14
    for method, path in operations:
        body = {**GREEDY, "prompt": "Call me"} if method == "POST" else None
        assert keyed.ask(method, path, body)[0] == (200 if path == "/health" else 401), path
    for path in (
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "//v1/models",
        "/v1/models?/health",
        "http://localhost/health",
    ):
        assert keyed.ask("GET", path)[0] == 401, path
    for method in ("OPTIONS", "HEAD", "PUT", "TRACE"):
        connection, response = keyed.open(method, "/v1/models")
        connection.close()
        assert response.status == 401, method


def test_keys_are_compared_in_constant_time(keyed, monkeypatch):
    compared = []
    monkeypatch.setattr(
        serve_guard.hmac,
        "compare_digest",
        lambda given, key: compared.append((given, key)) or given == key,
    )
    statuses = [
        keyed.ask("GET", "/stats", x_api_key=given)[0] for given in ("first", "second", "f")
    ]
    assert statuses == [200, 200, 401]
    assert compared == [
        (given, key) for given in (b"first", b"second", b"f") for key in (b"first", b"second")
    ]


ORIGINS = ("http://localhost:3000", "app://obsidian.md", "tauri://localhost")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("origins", [ORIGINS, ("*",)], ids=["named", "any"])
def test_pages_of_allowed_origins_can_read_answers(runtime, origins):
    with Served(runtime, keys=("first",), origins=origins) as served:
        for origin in ORIGINS:
            wanted = {"Access_Control_Request_Method": "POST"}
            wanted["Access_Control_Request_Headers"] = "authorization,content-type,x-api-key"
            status, _, found = served.ask("OPTIONS", "/v1/responses", Origin=origin, **wanted)
            assert (status, found["access-control-allow-origin"]) == (204, origin)
            assert found["access-control-allow-headers"] == "authorization,content-type,x-api-key"
            assert "POST" in found["access-control-allow-methods"] and found["vary"] == "origin"
            assert "access-control-allow-credentials" not in found
            body = {**GREEDY, "prompt": "Call me", "max_tokens": 1}
            for headers, expected in (({"x_api_key": "first"}, 200), ({}, 401)):
                answer = served.ask("POST", "/v1/completions", body, Origin=origin, **headers)
                assert (answer[0], answer[2]["access-control-allow-origin"]) == (expected, origin)
        other = served.ask("GET", "/health", Origin="http://evil.example")
        assert other[0] == (200 if origins == ("*",) else 403)
        assert ("access-control-allow-origin" in other[2]) == (origins == ("*",))
        assert served.ask("OPTIONS", "/health", Host="evil.example", Origin=ORIGINS[0])[0] == 403
        plain = served.ask("GET", "/health")
        assert plain[0] == 200 and "access-control-allow-origin" not in plain[2]


def test_no_page_elsewhere_can_read_an_answer(served):
    here = f"http://127.0.0.1:{served.port}"
    for method, origin, expected in (
        ("OPTIONS", "http://evil.example", 403),
        ("OPTIONS", here.replace("http", "ftp"), 403),
        ("OPTIONS", here.removeprefix("http://"), 403),
        ("OPTIONS", here, 405),
        ("GET", here, 405),
    ):
        asked = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        status, _, found = served.ask(method, "/v1/chat/completions", **asked)
        assert status == expected
        assert not [name for name in found if name.lower().startswith("access-control")]


@pytest.mark.parametrize("name", ["Origin", "Content-Type", "X-API-Key", "Authorization"])
def test_a_header_that_is_given_twice_is_refused(served, name):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        twice = f"{name}: x\r\n" * 2
        request = f"GET /health HTTP/1.1\r\nHost: localhost\r\n{twice}Connection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400") and b"more than once" in answer


BEYOND = [
    {"stop": "x" * 257},
    {"logprobs": 21},
    {"logprobs": -1},
    {"prompt": ["x"] * 17},
    {"prompt": ["x"] * 9, "n": 2},
    {"prompt": [-1]},
    {"prompt": [4096.5]},
    {"prompt": [5] * 512},
    {"max_tokens": -(10**30)},
    {"repetition_penalty": 5e-324},
    {"seed": 1 << 63},
    {"logit_bias": {str(i): 1 for i in range(1025)}},
    {"top_k": 1 << 31},
    {"user": "x" * 513},
    {"best_of": 2},
]


@pytest.mark.parametrize("fields", BEYOND, ids=lambda fields: "-".join(fields))
def test_counts_and_sizes_are_capped(served, fields):
    status, answer, _ = served.ask("POST", "/v1/completions", {**GREEDY, "prompt": "x", **fields})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.usefixtures("network")
def test_schema_and_prompt_are_capped_where_the_body_is_not(runtime):
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": ["x" * 70_000]}},
    }
    with Served(runtime, max_body=4 << 20) as served:
        status, answer, _ = served.chat(response_format=schema)
        assert (status, answer["error"]["param"]) == (413, "response_format")
        status, answer, _ = served.ask(
            "POST", "/v1/completions", {**GREEDY, "prompt": "word " * 200_000}
        )
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_pictures_and_templates_of_others_are_refused(served):
    picture = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
    body = {
        "model": "sample",
        "max_tokens": 3,
        "messages": [{"role": "user", "content": [picture]}],
    }
    assert served.ask("POST", "/v1/messages", body)[0] == 400
    for name in ("chat_template", "chat_template_kwargs", "prompt_template"):
        assert (
            served.ask("POST", "/v1/messages", {**body, "messages": USER, name: "{{ 1 }}"})[0]
            == 400
        )
        assert served.complete("x", max_tokens=1) and served.chat(**{name: "{{ 1 }}"})[0] == 400


CANARY = (
    "The canary's word is plum. "
    "The people of the United States have a government of laws and not of men. "
) * 8


def test_abort_in_the_middle_of_a_prompt_leaves_nothing_for_another_key(
    keyed, runtime, monkeypatch
):
    """One answer runs, so prompts come in pieces; after the first one the client is gone, and its
    latents stay in their place."""
    keyed.idle()
    alone = "".join(token.text for token in runtime.generate(CANARY, 8))
    append, append_each, reached, left = (
        Sequence.append,
        runtime.append_each,
        threading.Event(),
        threading.Event(),
    )

    def paused(sequence, ids):
        logits = append(sequence, ids)
        if len(ids) == 64:
            reached.set()
            left.wait(60)
        return logits

    def slow(*arguments):  # so that the first answer lasts until the other prompt is there
        time.sleep(0.005)
        return append_each(*arguments)

    monkeypatch.setattr(Sequence, "append", paused)
    monkeypatch.setattr(runtime, "append_each", slow)
    asked, before = (
        json.dumps({**GREEDY, "prompt": CANARY, "max_tokens": 8}).encode(),
        keyed.batch.totals.prompt_tokens,
    )
    with connect(
        keyed.port,
        request(
            json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 500}).encode(),
            **{"x-api-key": "second"},
        ),
    ):
        until(lambda: keyed.batch.totals.answer_tokens and keyed.batch.running)
        with connect(keyed.port, request(asked, **{"x-api-key": "first"})):
            assert reached.wait(60)
        time.sleep(0.3)  # the server has seen that the client left
        left.set()
    keyed.idle()
    monkeypatch.undo()
    assert (
        64 < keyed.batch.totals.prompt_tokens - before < 150 < len(runtime.tokenizer.encode(CANARY))
    )

    def ask(key):
        answer = keyed.ask("POST", "/v1/completions", json.loads(asked), x_api_key=key)[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0][
            "text"
        ]

    assert ask("second") == (1, alone)  # the beginning-of-sentence token of its own answer
    cached, text = ask("first")
    assert (cached >= 64, text) == (True, alone)


def test_storm_of_aborts_under_two_keys_changes_no_answer(keyed, runtime):
    """Prompts that begin alike, left at any moment: each key reuses its own, and every answer is
    that of a fresh start."""
    keyed.idle()
    prompts = {
        key: [f"{CANARY[: 60 * i]} The word of {key} is {word}." for i in range(4)]
        for key, word in (("first", "plum"), ("second", "fig"))
    }
    alone = {
        p: "".join(token.text for token in runtime.generate(p, 8))
        for ones in prompts.values()
        for p in ones
    }
    source = random.Random(5)
    for _ in range(60):
        key = source.choice(["first", "second"])
        body = json.dumps(
            {
                **GREEDY,
                "prompt": source.choice(prompts[key]),
                "max_tokens": 30,
                "stream": source.random() < 0.5,
            }
        ).encode()
        connection = connect(keyed.port, request(body, **{"x-api-key": key}))
        time.sleep(source.random() * 0.03)
        connection.close()
    keyed.idle()
    for key, ones in prompts.items():
        for prompt in ones:
            answer = keyed.ask(
                "POST",
                "/v1/completions",
                {**GREEDY, "prompt": prompt, "max_tokens": 8},
                x_api_key=key,
            )[1]
            assert answer["choices"][0]["text"] == alone[prompt]


@pytest.mark.usefixtures("processes")
def test_failed_model_ends_the_process_whoever_is_connected(sample_export):
    """With a client that has sent half a header, one half a body, and one that waits for its
    answer."""
    child, port = start(sample_export, script=FAILING)
    body = json.dumps({**GREEDY, "prompt": "x"}).encode()
    with (
        connect(port, b"GET /hea") as idle,
        connect(port, request(body)[:-3]) as half,
        connect(port, request(body)) as asks,
    ):
        began = time.monotonic()
        assert asks.recv(4096).startswith(b"HTTP/1.1 500")
        assert child.wait(5) == 1 and time.monotonic() - began < 5
        assert ended(idle) and ended(half)
    assert "ZeroDivisionError" in child.stderr.read()
    child.stderr.close()
