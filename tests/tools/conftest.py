"""Fixtures of the server's tests."""

import time
from threading import Event

import pytest

from slotmoe.offload.runtime import Runtime
from tests.support.served import Served


@pytest.fixture(scope="module")
def context():
    """Of ``runtime``; a file may override it, and ``keys``."""
    return 512


@pytest.fixture(scope="module")
def keys():
    return ()


@pytest.fixture(scope="module")
def runtime(sample_export, context):
    with Runtime.open(sample_export, ram="2GiB", context=context, sequences=8) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def served(network, processes, runtime, keys):
    with Served(runtime, keys) as served:
        yield served


@pytest.fixture(scope="module")
def openai_client(served):
    import openai

    address = f"{served.address}/v1"
    with openai.OpenAI(base_url=address, api_key=served.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(served):
    import anthropic

    with anthropic.Anthropic(base_url=served.address, api_key=served.key, max_retries=0) as client:
        yield client


@pytest.fixture
def texts(served, monkeypatch):
    """What the model reads of each request."""
    texts, encode = [], served.service.encode
    monkeypatch.setattr(served.service, "encode", lambda text: texts.append(text) or encode(text))
    return texts


@pytest.fixture
def steps(runtime, monkeypatch):
    """Let each step of ``runtime`` that decodes be preceded by a call."""
    passes = runtime.engine.batch.passes
    run = passes.run

    def precede(call):
        def later(rows):
            if not all(row.is_prompt for row in rows):
                call()
            return run(rows)

        monkeypatch.setattr(passes, "run", later)

    return precede


@pytest.fixture
def slow(steps):
    """Every step takes 10 ms and more."""
    steps(lambda: time.sleep(0.01))


@pytest.fixture
def gate(steps):
    """Every step waits until this event is set."""
    gate = Event()
    steps(lambda: gate.wait(60))
    yield gate
    gate.set()
