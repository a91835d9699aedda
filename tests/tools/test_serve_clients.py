"""A few clients for a minute; a hundred for half an hour by ``python -m tests.faults.clients``.
Several requests of one, and a model whose files go."""

import http.client
import json
import shutil
import socket
from contextlib import ExitStack

import pytest

from slotmoe.offload.runtime import Runtime
from tests.faults import clients
from tests.support.served import GREEDY, Served


@pytest.mark.usefixtures("nightly")
def test_some_clients(sample_export):
    found = clients.attacked(sample_export, 12, 60)
    print(json.dumps(found))
    assert found["wrong"] == [] and found["requests"] > 200


@pytest.mark.usefixtures("network")
def test_a_wrong_answer_is_noticed(served, runtime):
    """An answer and a stream, of which the wanted text has another letter or another token, and a
    missing answer."""
    body = {**clients.GREEDY, "prompt": "Call me", "max_tokens": 3, "n": 2}
    right = [token.text for token in runtime.generate("Call me", 4)]
    other, longer = [f"~{right[0]}", *right[1:]], ["".join(right[:2]), *right[2:]]
    for wanted, problems in ((right, 0), (other, 4), (longer, 4)):
        found = clients.Clients(served.port, {"Call me": wanted})
        assert found.answer(None, body) == found.stream(None, body) == 200
        assert len(found.wrong) == problems, found.wrong
    found.check({**body, "n": 3}, ["x"] * 2)
    assert "2 answers" in found.wrong[-1]


def test_requests_that_come_all_at_once_are_answered_in_turn(served):
    lengths = (1, 3, 2)
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        bodies = [{**GREEDY, "prompt": "Call me", "max_tokens": length} for length in lengths]
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        for body in map(json.dumps, bodies):
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        found, answers = connection.makefile("rb"), []
        for _ in lengths:
            headers = http.client.parse_headers(found) if b" 200 " in found.readline() else {}
            answers.append(json.loads(found.read(int(headers["Content-Length"]))))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [*lengths]


@pytest.mark.usefixtures("network")
def test_a_model_whose_files_are_removed_goes_on(sample_export, tmp_path):
    """Its experts are read where they were."""
    export = shutil.copytree(sample_export, tmp_path / "export")
    with ExitStack() as stack:
        options = {"slots": 40, "context": 128}
        runtime = stack.enter_context(Runtime.open(export, ram="2GiB", **options))
        served, texts = stack.enter_context(Served(runtime, sequences=1)), []
        for _ in "ab":
            before = runtime.stats()["io"]["disk"]["bytes"]
            texts.append(served.complete("Call me", max_tokens=20)["choices"][0]["text"])
            assert runtime.stats()["io"]["disk"]["bytes"] > before
            shutil.rmtree(export, ignore_errors=True)
    assert texts[0] == texts[1] != ""
