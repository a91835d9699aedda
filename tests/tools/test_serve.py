"""``slotmoe serve`` over loopback: its answers, its parameters, its door, and what it does when
things go wrong."""

import http.client
import json
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from llguidance import LLTokenizer

from slotmoe import __version__
from slotmoe.model.tokenizer import FIM_TOKENS, Tokenizer
from slotmoe.offload.runtime import Sequence
from slotmoe.tools.cli import cli
from tests.support.served import GREEDY, PROMPTS, USER, Served, start, until
from tests.support.tiny import SAMPLE


@pytest.fixture(scope="module")
def alone(runtime):
    """What ``slotmoe run`` answers."""
    return {
        prompt: "".join(token.text for token in runtime.generate(prompt, 20)) for prompt in PROMPTS
    }


@pytest.fixture(scope="module")
def served(runtime, alone):
    with Served(runtime) as served:
        yield served


@pytest.mark.usefixtures("network")
def test_greedy_answers_are_those_of_run_alone_and_with_eight_clients(served, alone):
    def ask(prompt):
        return served.complete(prompt, max_tokens=20)["choices"][0]["text"]

    assert ask(PROMPTS[0]) == alone[PROMPTS[0]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == [alone[prompt] for prompt in PROMPTS]


@pytest.mark.usefixtures("processes")
def test_streams_add_up_to_the_whole_answer(served):
    whole = served.chat(n=2)[1]
    events = served.events(
        "/v1/chat/completions",
        {
            **GREEDY,
            "messages": USER,
            "max_tokens": 8,
            "n": 2,
            "stream_options": {"include_usage": True},
        },
    )
    for index in (0, 1):
        choices = [
            choice for event in events for choice in event["choices"] if choice["index"] == index
        ]
        assert (
            "".join(one["delta"].get("content", "") for one in choices)
            == whole["choices"][index]["message"]["content"]
        )
        assert [one["finish_reason"] for one in choices][-2:] == [None, "length"]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 16
    assert {one["system_fingerprint"] for one in (whole, *events)} == {f"slotmoe_{__version__}"}
    plain = served.events("/v1/completions", {**GREEDY, "prompt": "Call me", "echo": True})
    assert "usage" not in plain[-1]
    text = "".join(event["choices"][0]["text"] for event in plain)
    assert text == served.complete("Call me", echo=True)["choices"][0]["text"] and text.startswith(
        "Call me"
    )


def test_parameters_are_honoured(served, runtime):
    text = served.complete("Call me", max_tokens=30)["choices"][0]["text"]
    stopped = served.complete("Call me", max_tokens=30, stop=[text[10:16]])["choices"][0]
    assert stopped == {
        "index": 0,
        "text": text[: text.index(text[10:16])],
        "logprobs": None,
        "finish_reason": "stop",
    }
    biased = served.complete("Call me", max_tokens=5, logit_bias={"300": 100})["choices"][0]["text"]
    assert biased == runtime.tokenizer.decode([300] * 5)
    punished = served.complete(
        "Call me", max_tokens=5, logit_bias={"300": 50}, frequency_penalty=2, presence_penalty=2
    )
    assert punished["choices"][0]["text"] == biased  # 12 points are fewer than 50
    texts = [served.complete("a a a a a a", max_tokens=30)["choices"][0]["text"]]
    for penalty in ({"repetition_penalty": 9}, {"frequency_penalty": 2}, {"presence_penalty": 2}):
        texts.append(served.complete("a a a a a a", max_tokens=30, **penalty)["choices"][0]["text"])
    assert texts[0] not in texts[1:]
    hot = {"temperature": 2, "seed": 5, "n": 2}
    drawn = [choice["text"] for choice in served.complete("Call me", **hot)["choices"]]
    assert (
        drawn == [choice["text"] for choice in served.complete("Call me", **hot)["choices"]]
        and drawn[0] != drawn[1]
    )
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert (
            served.complete("Call me", max_tokens=30, temperature=2, **narrow)["choices"][0]["text"]
            == text
        ), narrow
    ids = runtime.tokenizer.encode("Call me")
    most = served.complete(ids, max_tokens=10**20)  # an upper bound; the context ends before
    assert (most["choices"][0]["finish_reason"], most["usage"]["total_tokens"]) == ("length", 512)
    assert [
        one["text"] for one in served.complete(["Call me", "Call me"], max_tokens=30)["choices"]
    ] == [text, text]
    assert (
        served.complete(ids, max_tokens=30)["choices"][0]["text"]
        == served.complete([ids], max_tokens=30)["choices"][0]["text"]
        == text
    )


def test_log_probabilities(served, runtime):
    found = served.complete("Call me", max_tokens=4, logprobs=2)["choices"][0]
    expected = [token.logprob for token in runtime_tokens(served, runtime)]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert "".join(found["logprobs"]["tokens"]) == found["text"]
    assert [max(one.values()) for one in found["logprobs"]["top_logprobs"]] == found["logprobs"][
        "token_logprobs"
    ]
    status, chat, _ = served.chat(logprobs=True, top_logprobs=3)
    content = chat["choices"][0]["logprobs"]["content"]
    assert (
        status == 200
        and len(content) == 8
        and all(len(one["top_logprobs"]) == 3 for one in content)
    )


def test_the_chosen_token_is_always_among_the_likeliest(served):
    for count in (0, 2):
        options = {"logprobs": count, "max_tokens": 12, "temperature": 2, "seed": 1}
        told = served.complete("Call me", **options)["choices"][0]["logprobs"]
        rows = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
        for token, score, top in rows:
            assert top[token] == score and len(top) in (max(count, 1), count + 1)
        assert max(len(top) for top in told["top_logprobs"]) == count + 1
    (only,) = served.complete("Call me", logprobs=0, max_tokens=1)["choices"]
    assert len(only["logprobs"]["top_logprobs"][0]) == 1


def test_parts_of_characters_are_told_as_bytes(served, runtime):
    text = "\U0001f600"
    ids = runtime.tokenizer.encode(text, add_bos=False)
    parts = [runtime.tokenizer.token_bytes(id_) for id_ in ids]
    assert len(ids) > 1 and b"".join(parts) == text.encode()
    for id_, part in zip(ids, parts, strict=True):
        options = {"logit_bias": {str(id_): 100}, "max_tokens": 1}
        spelled = "".join(f"\\x{byte:02x}" for byte in part)
        status, answer, _ = served.chat(**options, logprobs=True, top_logprobs=1)
        (token,) = answer["choices"][0]["logprobs"]["content"]
        assert (status, token["token"], token["bytes"]) == (200, spelled, [*part])
        told = served.complete("Call me", **options, logprobs=0)["choices"][0]["logprobs"]
        assert told["tokens"] == [f"bytes:{spelled}"] == [*told["top_logprobs"][0]]


def test_bytes_of_every_token_are_those_of_its_text(runtime):
    tokenizer = runtime.tokenizer
    for id_ in range(tokenizer.size):
        text = tokenizer.decode([id_])
        assert tokenizer.token_bytes(id_).decode(errors="replace") == text
    source = LLTokenizer(tokenizer.to_json())
    special = {id_ for id_ in range(tokenizer.size) if source.is_special_token(id_)}
    assert all(
        tokenizer.token_bytes(id_) == source.decode_bytes([id_])
        for id_ in range(tokenizer.size)
        if id_ not in special
    )


def runtime_tokens(served, runtime):
    served.idle()
    return list(runtime.generate("Call me", 4))


@pytest.mark.usefixtures("processes")
def test_gap_is_filled_with_a_coder_models_tokens(runtime, tmp_path):
    source = json.loads((SAMPLE / "tokenizer.json").read_text())
    for number, token in enumerate(FIM_TOKENS):
        about = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        source["added_tokens"].append({"id": 4096 + number, "content": token, **about})
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    plain, coder = runtime.tokenizer, Tokenizer(tmp_path, 0)
    before, after = plain.encode("def f(", add_bos=False), plain.encode("return x", add_bos=False)
    assert coder.encode_gap("def f(", "return x") == [0, 4096, *before, 4097, *after, 4098]


def test_answers_follow_a_json_schema_and_a_bad_one_leaves_no_trace(served):
    schema = {
        "type": "object",
        "properties": {
            "king": {"enum": ["Lear", "Henry"]},
            "years": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["king", "years"],
        "additionalProperties": False,
    }

    def ask(schema, **options):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return served.chat(
            response_format=form, **{"max_tokens": 60, "temperature": 1, "seed": 3, **options}
        )

    for bad in (
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/nowhere"},
        {"enum": ["x" * 70_000]},
    ):
        statuses = [ask(schema)[0], ask(bad)[0], ask(schema)[0]]
        assert statuses == [200, 413 if "enum" in bad else 400, 200], bad
    for choice in ask(schema, n=4)[1]["choices"]:
        found = json.loads(choice["message"]["content"])
        assert (
            choice["finish_reason"] == "stop"
            and found["king"] in ("Lear", "Henry")
            and 1 <= found["years"] <= 99
        )
    status, answer, _ = served.chat(response_format={"type": "json_object"}, max_tokens=5)
    assert status == 200 and answer["choices"][0]["message"]["content"].startswith("{")
    status, answer, _ = served.chat(response_format={"type": "text"}, max_tokens=5)
    assert status == 200 and not answer["choices"][0]["message"]["content"].startswith("{")


REFUSED = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"max_completion_tokens": 2}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///"}}],
                }
            ]
        },
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, None),
]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_honoured_is_refused(served, fields, param):
    status, answer, _ = served.chat(**fields)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (
        400,
        "invalid_request_error",
        param,
    )
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (b'{"model": "sample", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "sample", "prompt": "x", "temperature": 1e999}', 400),
        (b'{"model": "sample", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "sample", "prompt": [4096]}', 400),
        (b'{"model": "sample", "prompt": []}', 400),
        (b'{"model": "sample", "prompt": "x", "max_tokens": 0}', 400),
        (b'{"model": "sample", "prompt": "x", "suffix": "y"}', 400),
        (b'{"model": "other", "prompt": "x"}', 404),
        (b" " * (1 << 17), 413),
    ],
    ids=range(14),
)
def test_bodies_that_are_no_request(served, body, status):
    found, answer, _ = served.ask("POST", "/v1/completions", body)
    assert found == status and answer["error"]["message"]
    assert served.complete("Call me", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_routes_and_kinds_of_content(served):
    assert served.ask("GET", "/nowhere")[0] == 404
    status, _, headers = served.ask("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST")
    assert served.ask("POST", "/health")[0] == 405
    assert served.ask("GET", "/v1/models/other")[0] == 404
    model = served.ask("GET", "/v1/models/sample")[1]
    assert (model["id"], model["max_model_len"]) == ("sample", 512)
    assert served.ask("POST", "/v1/completions", {}, Content_Type="text/plain")[0] == 415
    assert "/v1/chat/completions" in served.ask("GET", "/openapi.json")[1]["paths"]


@pytest.mark.usefixtures("processes")
def test_tokens_of_a_text_and_of_a_conversation(served, runtime):
    def ask(**body):
        status, answer, _ = served.ask("POST", "/tokenize", body)
        return status, answer

    text = "Call me Ishmael, café."
    ids = runtime.tokenizer.encode(text)
    expected = {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert ask(prompt=text) == ask(prompt=text, model="sample") == (200, expected)
    assert ask(prompt=text, add_special_tokens=False)[1]["tokens"] == ids[1:]
    assert ask(prompt="", add_special_tokens=False)[1]["tokens"] == []
    tools = [{"type": "function", "function": {"name": "f"}}]
    for fields in ({}, {"tools": tools}):
        count = served.chat(max_tokens=1, **fields)[1]["usage"]["prompt_tokens"]
        assert ask(messages=USER, **fields)[1]["count"] == count
    assert ask(prompt="x", model="other")[0] == 404
    for wrong in ({}, {"prompt": "x", "messages": USER}, {"prompt": 5}, {"content": "x"}):
        assert ask(**wrong)[0] == 400


@pytest.mark.usefixtures("network")
def test_door_asks_for_the_key_everywhere_but_at_health(runtime):
    with Served(runtime, keys=("first", "second")) as served:
        paths = [
            "/",
            "/stats",
            "/metrics",
            "/v1/models",
            "/openapi.json",
            "/health/",
            "//health",
            "/%68ealth",
            "/health?x",
            "/nowhere",
        ]
        assert {path: served.ask("GET", path)[0] for path in paths} == {
            **dict.fromkeys(paths, 401),
            "/health?x": 200,
        }
        assert "Basic" in served.ask("GET", "/")[2]["www-authenticate"]  # a browser asks its user
        for right in (
            {"Authorization": "Bearer second"},
            {"x_api_key": "first"},
            {"Authorization": "Basic eDpmaXJzdA=="},
        ):
            assert served.ask("GET", "/v1/models", **right)[0] == 200
        for wrong in (
            {"Authorization": "Bearer firs"},
            {"x_api_key": "x"},
            {"Authorization": "Basic ?"},
            {"Authorization": "Bearer "},
        ):
            assert served.ask("GET", "/v1/models", **wrong)[0] == 401

        def cached(key):
            body = {**GREEDY, "prompt": "The canary sings in the mine of the king"}
            return served.ask("POST", "/v1/completions", body, x_api_key=key)[1]["usage"][
                "prompt_tokens_details"
            ]["cached_tokens"]

        assert [cached("first") > 5, cached("second"), cached("first") > 5] == [False, 0, True]


def test_rebound_names_and_pages_of_other_origins_are_refused(served):
    for host in ("localhost:80", "127.0.0.1", "[::1]:9", "box.local:1", "10.0.0.9"):
        assert served.ask("GET", "/stats", Host=host)[0] == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
        assert served.ask("GET", "/health", Host=host)[0] == 403, host
    assert served.ask("GET", "/stats", Origin="http://evil.example")[0] == 403
    assert served.ask("GET", "/stats", Origin="null")[0] == 403
    assert served.ask("GET", "/stats", Host="localhost:1", Origin="ftp://localhost:1")[0] == 403
    assert served.ask("GET", "/stats", Host="localhost:1", Origin="http://localhost:1")[0] == 200


@pytest.mark.usefixtures("network")
def test_beyond_the_queue_clients_are_told_when_to_come_back(runtime):
    with Served(runtime, waiting=0) as served, ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(served.complete, "Call me", max_tokens=400) for _ in range(8)]
        until(lambda: served.batch.running + served.batch.queued == 8)
        status, answer, headers = served.chat()
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error") and int(
            headers["retry-after"]
        ) >= 1
        assert served.ask("GET", "/metrics")[1].count("slotmoe_refused_total 1.0") == 1
        assert [one.result()["usage"]["completion_tokens"] for one in whole] == [400] * 8


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_place(served, stream):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    body = json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 500, "stream": stream})
    made = served.batch.totals.answer_tokens
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    until(lambda: served.batch.totals.answer_tokens >= made + 5)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    served.idle()
    assert served.batch.totals.answer_tokens < made + 400
    assert served.batch.totals.finished["cancelled"] >= 1


def test_figures(served):
    served.complete("Call me", max_tokens=3)
    text = served.ask("GET", "/metrics")[1]
    assert all(
        re.fullmatch(r'#.*|[a-z_]+(\{[a-z]+="[^"]*"\})? [-+0-9.einfNa]+', line)
        for line in text.splitlines()
    )
    names = "tokens_total first_token_seconds_bucket queued expert_hit_rate read_bytes_total"
    names += " decode_total drive_failed memory_bytes memory_budget_bytes"
    for name in names.split():
        assert f"slotmoe_{name}" in text
    stats = served.ask("GET", "/stats")[1]
    ram = stats["memory"]["ram"]
    assert 1 << 20 < ram["used"] < ram["budget"] and stats["answer_tokens"] >= 3


def test_openai_client(served):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0
    ) as client:
        assert [model.id for model in client.models.list()] == ["sample"]
        options = {**GREEDY, "messages": USER, "max_tokens": 8}
        answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        parts = [
            *client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        ]
        text = answer.choices[0].message.content
        assert (
            text
            and "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
            == text
        )
        assert (
            parts[-1].usage.completion_tokens
            == answer.usage.completion_tokens
            == len(answer.choices[0].logprobs.content)
            == 8
        )
        assert (
            client.completions.create(**GREEDY, prompt="Call me", max_tokens=3)
            .choices[0]
            .finish_reason
            == "length"
        )
        with pytest.raises(openai.BadRequestError, match="supported"):
            client.chat.completions.create(**options, functions=[{"name": "x"}])
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**options, "model": "other"})


@pytest.mark.usefixtures("processes")
def test_anthropic_client(served):
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    with anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{served.port}", api_key="none", max_retries=0
    ) as client:
        options = {
            "model": "sample",
            "messages": USER,
            "max_tokens": 8,
            "system": "Be brief.",
            "extra_body": {"temperature": 0},
        }
        answer = client.messages.create(**options)
        assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 8
        with client.messages.stream(**options) as stream:
            assert "".join(stream.text_stream) == answer.content[0].text
            assert stream.get_final_message().usage.output_tokens == 8
        cut = client.messages.create(**options, stop_sequences=[answer.content[0].text[3:6]])
        assert (cut.stop_reason, cut.content[0].text) == (
            "stop_sequence",
            answer.content[0].text[:3],
        )
        with pytest.raises(anthropic.BadRequestError, match="supported"):
            client.messages.create(**options, container="x")


@pytest.mark.usefixtures("network")
def test_failed_model_ends_the_server(runtime, monkeypatch):
    with Served(runtime) as served:
        served.complete("Call me", max_tokens=1)
        server = served.server
        monkeypatch.setattr(
            type(server), "should_exit", property(lambda _: False, lambda *_: None), raising=False
        )  # to see /health
        monkeypatch.setattr(Sequence, "append", lambda *_: 1 / 0)
        assert served.chat()[0] == 500
        until(lambda: not served.batch.alive)
        assert served.ask("GET", "/health")[0] == 503
        assert served.chat()[0] == 503
        monkeypatch.undo()
        served.server.should_exit = False
    assert not served.thread.is_alive()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_ends_running_answers_with_a_reason(sample_export, number, code):
    child, port = start(sample_export)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({**GREEDY, "prompt": "Call me", "max_tokens": 500, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    child.send_signal(number)
    rest = response.read().decode()
    connection.close()
    assert child.wait(10) == code
    assert '"finish_reason":"length"' in rest and rest.endswith("data: [DONE]\n\n")
    assert rest.count("data: ") < 450  # it was cut off, and has not come to its own end
    *said, last = filter(None, child.stderr.read().splitlines())
    if number == signal.SIGINT:
        assert last == "slotmoe: interrupted"
        last = said[-1]
    assert "POST /v1/completions 200 in " in last
    child.stderr.close()


@pytest.mark.usefixtures("network")
def test_wrong_use_is_told_before_anything_is_loaded(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli, ["serve", "sample", *arguments])

    assert "give --api-key" in str(run("--host", "0.0.0.0").exception)
    (tmp_path / "keys").write_text("\n")
    assert "holds no API key" in str(run("--api-key-file", str(tmp_path / "keys")).exception)
    assert "an API key" in str(run("--api-key", "with space").exception)
    assert "any page" in str(run("--cors-origin", "*").exception)
    for origin in ("localhost:3000", "http://localhost:3000/", "null", "http://a b", "http://"):
        assert "is no origin" in str(run("--cors-origin", origin).exception), origin
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can't listen" in str(run("--port", str(taken.getsockname()[1])).exception)
