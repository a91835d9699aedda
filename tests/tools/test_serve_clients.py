"""Several requests of one client, and a model whose files go."""

import http.client
import json
import shutil
import socket
from contextlib import ExitStack

import pytest

from slotmoe.offload.runtime import Runtime
from tests.support.served import GREEDY, Served


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
