"""``slotmoe serve``: its answers and what they follow, its routes, figures and names, how it
begins and ends, and strangers: keys, hosts, origins and bodies, clients that stop half-way."""

import http.client
import json
import re
import socket
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest
import torch
from click.testing import CliRunner

from slotmoe import __version__
from slotmoe.tools.cli import cli
from slotmoe.tools.serve import guard as serve_guard
from tests.support.apis import CHAT, events
from tests.support.served import (
    FAILING,
    GREEDY,
    HALVES,
    PROMPTS,
    SLOW,
    USER,
    Served,
    connect,
    request,
    start,
    until,
)

TEXT = "/v1/completions"


def test_greedy_answers_are_those_of_run_alone_and_with_eight_clients(served, runtime):
    def ask(prompt):
        return served.text(prompt, max_tokens=20)

    alone = ["".join(token.text for token in runtime.generate(prompt, 20)) for prompt in PROMPTS]
    assert ask(PROMPTS[0]) == alone[0]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == alone


def test_streams_add_up_to_the_whole_answer(served):
    whole = served.chat(n=2)[1]
    found = events(served, CHAT, max_tokens=8, n=2, stream_options={"include_usage": True})
    choices = [choice for event in found for choice in event["choices"]]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        text = "".join(one["delta"].get("content", "") for one in own)
        assert text == whole["choices"][index]["message"]["content"]
        assert [one["finish_reason"] for one in own][-2:] == [None, "length"]
    assert found[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 16
    assert {one["system_fingerprint"] for one in (whole, *found)} == {f"slotmoe_{__version__}"}
    plain = events(served, TEXT, prompt="Call me", echo=True)
    assert "usage" not in plain[-1]
    text = "".join(event["choices"][0]["text"] for event in plain)
    assert text == served.text(echo=True) and text.startswith("Call me")


def test_what_a_request_leaves_open_is_as_the_model_or_the_server_says(served, runtime):
    """The sample says 0.7 and 0.95."""
    asked = {"prompt": "Call me", "model": "sample", "seed": 3, "max_tokens": 20}

    def text(served, **options):
        return served.post(TEXT, **asked, **options)[1]["choices"][0]["text"]

    own = text(served, temperature=0.7, top_p=0.95)
    assert text(served) == own != text(served, temperature=1, top_p=1)
    made = runtime.generate("Call me", 20, temperature=0.7, seed=3)
    assert "".join(token.text for token in made) == own
    with Served(runtime, sampling={"temperature": 0.0, "top_p": None}) as other:
        assert text(other) == text(served, temperature=0)
        assert other.ask("GET", "/stats")[1]["sampling"]["temperature"] == 0


def test_a_model_has_any_number_of_names(runtime, network):
    with Served(runtime, names=("one", "two", "*")) as any_, Served(runtime, names=("a",)) as few:
        for name, server, status in (
            *((name, any_, 200) for name in ("one", "two", "gpt-4o")),
            *(("a", few, 200), ("a:latest", few, 200), ("b", few, 404), ("*", few, 404)),
        ):
            for path in (CHAT, "/v1/messages"):
                got, answer = server.post(path, model=name, messages=USER, max_tokens=1)
                assert got == status, (name, answer)
                assert status != 200 or answer["model"] == server.service.name
            assert server.ask("GET", f"/v1/models/{name}")[0] == status
        listed = any_.ask("GET", "/v1/models")[1]["data"]
        assert [model["id"] for model in listed] == ["one", "two"]


def test_parameters_are_honoured(served, runtime):
    text = served.text(max_tokens=30)
    stopped = served.complete("Call me", max_tokens=30, stop=[text[10:16]])["choices"][0]
    wanted = {"index": 0, "text": text[: text.index(text[10:16])], "logprobs": None}
    assert stopped == {**wanted, "finish_reason": "stop"}
    biased = served.text(max_tokens=5, logit_bias={"300": 100})
    assert biased == runtime.tokenizer.decode([300] * 5)
    repeated = served.text("a a a a a a", max_tokens=30)
    for penalty in ({"repetition_penalty": 9}, {"frequency_penalty": 2}, {"presence_penalty": 2}):
        assert served.text("a a a a a a", max_tokens=30, **penalty) != repeated
    hot = {"temperature": 2, "seed": 5, "n": 2}
    drawn, again = (served.complete("Call me", **hot)["choices"] for _ in "ab")
    assert drawn == again and drawn[0]["text"] != drawn[1]["text"]
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert served.text(max_tokens=30, temperature=2, **narrow) == text, narrow
    ids = runtime.tokenizer.encode("Call me")
    most = served.complete(ids, max_tokens=10**20)  # an upper bound; the context ends before
    assert (most["choices"][0]["finish_reason"], most["usage"]["total_tokens"]) == ("length", 512)
    for prompt in (["Call me", "Call me"], ids, [ids]):
        choices = served.complete(prompt, max_tokens=30)["choices"]
        assert {choice["text"] for choice in choices} == {text}
    assert len(choices) == 1
    made = [token.id for token in runtime.generate("Call me", 9)]
    ended = served.text(max_tokens=30, stop_token_ids=[made[8]], ignore_eos=True)
    assert ended == runtime.tokenizer.decode(made[: made.index(made[8])])


def test_log_probabilities_of_an_answer(served, runtime):
    found = served.complete("Call me", max_tokens=4, logprobs=2)["choices"][0]
    served.idle()
    expected = [token.logprob for token in runtime.generate("Call me", 4)]
    told = found["logprobs"]
    assert told["token_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert "".join(told["tokens"]) == found["text"]
    options = {"logprobs": 2, "max_tokens": 12, "temperature": 2, "seed": 1}
    told = served.complete("Call me", **options)["choices"][0]["logprobs"]
    for token, score, top, _ in zip(*told.values(), strict=True):
        assert top[token] == score and len(top) in (2, 3)  # it need not be among the likeliest
    many = {"n": 8, "max_tokens": 60, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    tracemalloc.start()
    link, response = served.open("POST", CHAT, {**GREEDY, "messages": USER, **many})
    response.read()
    link.close()
    assert tracemalloc.get_traced_memory()[1] < 8 * 60 * 7000  # tuples take 8,000 each
    tracemalloc.stop()


def test_log_probabilities_of_a_prompt(served, runtime):
    text = "It is a truth universally acknowledged, that a single café " * 12
    ids = runtime.tokenizer.encode(text)
    served.idle()
    logits_TV = runtime.logits(ids)[:, : runtime.tokenizer.size].log_softmax(dim=-1)
    expected = logits_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    only = served.complete(text, max_tokens=0, echo=True, logprobs=1)
    (found,) = only["choices"]
    assert (found["text"], found["finish_reason"]) == (text, "length")
    assert only["usage"]["completion_tokens"] == 0 < 128 < len(ids)
    own, top = found["logprobs"]["token_logprobs"], found["logprobs"]["top_logprobs"]
    assert own[0] is None is top[0] and own[1:] == pytest.approx(expected, abs=1e-5)
    assert all(max(one.values()) >= score for one, score in zip(top[1:], own[1:], strict=True))
    options = {"max_tokens": 4, "echo": True, "logprobs": 1}
    both = served.complete(text, **options)["choices"][0]
    assert both["text"].startswith(text) and both["logprobs"]["token_logprobs"][: len(ids)] == own
    pieces = [event["choices"][0] for event in events(served, TEXT, prompt=ids, **options)]
    assert "".join(one["text"] for one in pieces) == both["text"]
    for key, whole in both["logprobs"].items():
        assert [value for one in pieces for value in one["logprobs"][key]] == whole, key
    plain = served.complete(text, max_tokens=1, prompt_logprobs=2)["choices"][0]
    ranked = [next(iter(row.values())) for row in plain["prompt_logprobs"][1:]]  # as vLLM has it
    assert [row["logprob"] for row in ranked] == pytest.approx(own[1:])
    assert all(row["rank"] in (1, 2, None) for row in ranked)


BEGUN = [*USER, {"role": "assistant", "content": "The king is"}]
CONTINUED = {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False}


def test_an_answer_goes_on_with_the_last_message(served):
    text = served.choice(**CONTINUED)["message"]["content"]
    prompt = served.post("/apply-template", **CONTINUED)[1]["prompt"]
    assert prompt.endswith("The king is")
    assert text == served.text(prompt, max_tokens=8)
    status, answer, _ = served.chat(**CONTINUED | {"messages": USER})
    assert status == 400 and "no text of the assistant" in answer["error"]["message"]


def test_templates_get_variables(served, runtime, monkeypatch):
    source = "{{ mood }}{{ reasoning_effort }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(runtime.tokenizer, "template", source)
    extra = {"messages": USER, "chat_template_kwargs": {"mood": "Sad: "}}
    assert served.choice(**extra, reasoning_effort="low")
    text = "Sad: Tell me of the king."
    assert served.post("/apply-template", **extra)[1] == {"prompt": text}
    assert served.choice(**extra)["message"]["content"] == served.text(text, max_tokens=8)
    assert served.chat(chat_template_kwargs={"messages": []})[0] == 400


def test_tokens_of_a_text_and_of_a_conversation(served, runtime):
    def ask(**body):
        return served.post("/tokenize", **body)[1]

    text = "Call me Ishmael, café."
    ids = runtime.tokenizer.encode(text)
    expected = {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    assert ask(prompt=text) == expected
    assert ask(prompt=text, add_special_tokens=False)["tokens"] == ids[1:]
    assert served.post("/detokenize", tokens=ids[1:])[1]["prompt"] == text
    for fields in ({}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        count = served.chat(max_tokens=1, **fields)[1]["usage"]["prompt_tokens"]
        assert ask(messages=USER, **fields)["count"] == count


def test_routes_and_kinds_of_content(served):
    status, _, headers = served.ask("GET", TEXT)
    assert (status, headers["allow"]) == (405, "POST")
    assert served.ask("POST", TEXT, {}, Content_Type="text/plain")[0] == 415
    assert CHAT in served.ask("GET", "/openapi.json")[1]["paths"]
    assert served.ask("GET", "/v1/models/sample")[1]["max_model_len"] == 512
    for method, path, body in (("GET", "/nowhere", None), ("POST", TEXT, b"{")):
        for given, told in (("run-7.a:1", "run-7.a:1"), ("a b\x1b[31m", "req_")):
            found = served.ask(method, path, body, x_request_id=given)[2]["x-request-id"]
            assert found.startswith(told)


@pytest.mark.usefixtures("network", "processes")
def test_beyond_the_queue_clients_are_told_when_to_come_back(runtime, gate):
    with Served(runtime, waiting=0) as served, ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(served.complete, "Call me", max_tokens=4) for _ in range(8)]
        until(lambda: served.service.running + served.service.queued == 8)
        status, answer, headers = served.chat()
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
        assert served.ask("GET", "/metrics")[1].count("slotmoe_refused_total 1.0") == 1
        gate.set()
        assert [one.result()["usage"]["completion_tokens"] for one in whole] == [4] * 8


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_place(served, slow, stream):
    made = served.service.engine.batch.totals.answer_tokens
    body = json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 500, "stream": stream})
    with connect(served.port, request(body.encode())) as connection:
        until(lambda: served.service.engine.batch.totals.answer_tokens >= made + 5)
        connection.shutdown(socket.SHUT_RDWR)
    served.idle()
    assert served.service.engine.batch.totals.answer_tokens < made + 400
    assert served.service.engine.batch.totals.finished["cancelled"] >= 1


def test_figures(served):
    served.complete("Call me", max_tokens=3)
    text = served.ask("GET", "/metrics")[1]
    for line in text.splitlines():
        assert re.fullmatch(r'#.*|[a-z_]+(\{[a-z]+="[^"]*"\})? [-+0-9.einfNa]+', line)
    assert "slotmoe_expert_hit_rate" in text and "slotmoe_first_token_seconds_bucket" in text
    stats = served.ask("GET", "/stats")[1]
    ram = stats["memory"]["ram"]
    assert 1 << 20 < ram["used"] < ram["budget"] and stats["answer_tokens"] >= 3


@pytest.mark.usefixtures("processes")
def test_a_signal_refuses_requests_that_are_being_prepared(sample_export, tmp_path):
    """Those in the threads that render and encode, and those that wait for one.  Running answers
    end as ever."""
    preparing = f"""
import os, sys, time
import slotmoe.tools.serve as serve
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.service import Service
serve._GRACE_SECONDS = 600
def prompt(*_):
    while not os.path.exists({str(tmp_path / "go")!r}):
        time.sleep(0.01)
Service.check_model, Dialect.prompt = lambda *_: print("came", file=sys.stderr), prompt
{SLOW}"""
    child, port = start(sample_export, program=preparing)

    def post(path, **body):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        data = json.dumps({**GREEDY, **body})
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        return closing(connection)

    with child, ExitStack() as stack:
        enter = stack.enter_context
        running = enter(post(TEXT, prompt="Call me", max_tokens=500, stream=True)).getresponse()
        running.readline()
        posted = [enter(post(CHAT, messages=USER)) for _ in range(40)]
        assert [child.stderr.readline() for _ in range(41)] == ["came\n"] * 41
        child.terminate()
        assert b'"finish_reason":"length"' in running.read()
        for response in [connection.getresponse() for connection in posted]:
            assert (response.status, response.headers["retry-after"]) == (503, "5")
            assert b"the server is shutting down" in response.read()
        (tmp_path / "go").touch()
        assert child.wait() == 143
        assert "Traceback" not in child.stderr.read()


@pytest.mark.usefixtures("network")
def test_wrong_use_is_told_before_anything_is_loaded(tmp_path):
    def run(*arguments):
        return str(CliRunner().invoke(cli, ["serve", "sample", *map(str, arguments)]).exception)

    assert "give --api-key" in run("--host", "0.0.0.0")
    (tmp_path / "keys").write_text("\n")
    assert "holds no API key" in run("--api-key-file", tmp_path / "keys")
    assert "an API key" in run("--api-key", "with space")
    assert "any page" in run("--cors-origin", "*")
    for origin in ("localhost:3000", "http://localhost:3000/", "null", "http://a b", "http://"):
        assert "is no origin" in run("--cors-origin", origin), origin
    for host in ("http://box.local", "box.local/", "*.local", "*", "a:b", ""):
        assert "is no name of a host" in run("--allow-host", host), host
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can't listen" in run("--port", taken.getsockname()[1])


# Strangers


@pytest.fixture(scope="module")
def keyed(network, runtime):
    with Served(runtime, keys=("first", "second")) as served:
        yield served


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
    count = lambda *both: compared.append(both) or equal(*both)  # noqa: E731
    monkeypatch.setattr(serve_guard.hmac, "compare_digest", count)
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
    with connect(served.port, request(b"{}")[:-1]) as connection:
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


def test_refused_bodies_are_read_so_that_the_refusal_arrives(keyed):
    """More than the sockets' buffers hold, to a server that would otherwise close while the client
    still writes."""
    body = b" " * (12 << 20)
    assert keyed.ask("POST", TEXT, body)[0] == 401
    assert keyed.ask("POST", TEXT, body, x_api_key="first")[0] == 413


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
