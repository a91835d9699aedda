"""What a request may cost outside its passes (docs/serving.md): each field that a client can set,
at its limits.  Calls are counted, so nothing depends on the load; CPU time is compared at night,
with bounds far from what is usual."""

import asyncio
import json
import sys
import time
import tracemalloc
from asyncio.events import Handle
from concurrent.futures import ThreadPoolExecutor

import pytest

from slotmoe.tools.serve import anthropic, app, bounded, make_server, ollama, openai, responses
from slotmoe.tools.serve.service import Service
from tests.support.limits import Limits, routes
from tests.support.served import GREEDY

pytestmark = pytest.mark.usefixtures("heavy", "processes")

SECONDS, BYTES = 2.0, 128 << 20
TURN = 0.2  # seconds of the event loop: 50 ms, and room for a machine that is shared
GO_ON = {"messages": [{"role": "user", "content": "Go on"}]}
CHAT = {**GREEDY, **GO_ON, "max_tokens": 2}
OLLAMA = {"model": "sample", "stream": False, "options": {"num_predict": 2}}
BASES = {
    **{"/tokenize": {"prompt": "Hi"}, "/detokenize": {"tokens": [5]}, "/apply-template": GO_ON},
    **{"/v1/chat/completions": CHAT, "/v1/messages": CHAT, "/api/show": {"model": "sample"}},
    **{"/v1/completions": {**GREEDY, "prompt": "Hi", "max_tokens": 2}},
    **{"/v1/responses": {**GREEDY, "input": "Hi", "max_output_tokens": 2}},
    **{"/v1/responses/input_tokens": {"model": "sample", "input": "Hi"}},
    **{"/v1/messages/count_tokens": {"model": "sample", **GO_ON}},
    **{"/api/chat": {**OLLAMA, **GO_ON}, "/api/generate": {**OLLAMA, "prompt": "Hi"}},
}
ROUTERS = [app.routes, *(module.router for module in (openai, responses, anthropic, ollama))]
MODELS = dict(routes(*ROUTERS))


@pytest.fixture(scope="module")
def context():
    return 512


@pytest.fixture
def server(runtime, monkeypatch):
    """The application as uvicorn calls it.  Answers end before their first pass."""

    def submit(self, jobs):
        for job in jobs:
            job.emit(job.end("length"))

    monkeypatch.setattr(Service, "submit", submit)
    server, _ = make_server(runtime, ("sample",), 8, 16)
    return server.config.app


async def ask(server, path, body):
    """The status of the answer to ``body``."""
    data, said = body if isinstance(body, bytes) else json.dumps(body).encode(), []
    messages = [{"type": "http.request", "body": data, "more_body": False}]
    fields = {"host": "localhost", "content-type": "application/json"}
    fields["content-length"] = str(len(data))
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        said.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    await server({**scope, "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return said[0]["status"]


def at_limits(most):
    """Each route, field and body."""
    limits = Limits(most)
    for path, model in MODELS.items():
        for name, part in limits.of(model):
            yield f"{path} {name}", path, {**BASES[path], **part}


def test_every_route_with_a_body_is_asked():
    assert MODELS.keys() == BASES.keys()


def test_a_new_field_is_among_them():
    class Request(openai.ChatRequest):
        fresh: list[openai.Stop] | None = None

    added = dict(Limits(1 << 12).of(Request)).keys() - dict(Limits(1 << 12).of(openai.ChatRequest))
    assert {name.partition(":")[0] for name in added} == {"fresh", "fresh[]"}


def test_calls(server):
    """Of Python and C, for bodies of 8 and 16 KiB: what grows with the square is above."""
    counted = Counted()
    small, large = (asyncio.run(calls(server, counted, 1 << size)) for size in (13, 14))
    for name in small.keys() & large.keys():
        assert large[name] < 20_000 + 2.5 * small[name], name
        assert large[name] < 200_000, name


class Counted:
    """Calls of functions and methods, in this thread and in new ones."""

    def __init__(self):
        self.calls = 0

    def start(self):
        sys.setprofile(self._hear)

    def _hear(self, frame, event, argument):
        self.calls += event in ("call", "c_call")


async def calls(server, counted, most):
    """How many each field costs, whatever is at its limit: the first kind of value of each."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "", counted.start))
    for path, body in BASES.items():
        assert await ask(server, path, body) == 200
    found = {}
    for name, path, body in at_limits(most):
        if (field := name.rpartition(":")[0]) not in found or name.endswith(":many"):
            counted.calls = 0
            counted.start()
            status = await ask(server, path, body)
            sys.setprofile(None)
            found[field] = max(counted.calls, found.get(field, 0))
            assert status < 500, name
    return found


@pytest.mark.usefixtures("nightly")
def test_seconds_and_bytes(server, monkeypatch):
    """Of bodies as large as the server takes: of CPU in all, in one turn of the event loop, and of
    memory."""
    turns, run = [], Handle._run

    def timed(handle):
        before = time.thread_time()
        run(handle)
        turns.append(time.thread_time() - before)

    monkeypatch.setattr(Handle, "_run", timed)
    with bounded():
        wrong = asyncio.run(beyond_the_budget(server, turns))
    assert not wrong


async def beyond_the_budget(server, turns):
    wrong, most = [], (1 << 22) - (1 << 13)
    for path, body in BASES.items():
        assert await ask(server, path, body) == 200
    for name, path, body in at_limits(most):
        data = json.dumps(body).encode()
        await asyncio.sleep(0)  # what made the body is no turn of the server's
        turns.clear()
        before, peak = time.process_time(), 0
        status = await ask(server, path, data)
        seconds, longest = time.process_time() - before, max(turns, default=0)
        if name.endswith((":most", ":widest", ":many")):
            tracemalloc.start()
            await ask(server, path, data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if seconds > SECONDS or peak > BYTES or longest > TURN or status >= 500:
            wrong.append((name, status, seconds, longest, peak))
    return wrong
