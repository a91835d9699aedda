"""docs/many-machines/ray_serve.py without Ray: a replica answers, says how it is, and keeps its
sessions where the others do.  ``python -m campaigns many-machines`` runs it with Ray."""

import asyncio
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.support.forkserver import ROOT


def decorator(*given, **options):
    return lambda decorated: decorated


@pytest.fixture
def ray_serve(monkeypatch):
    """The file, whose decorators do nothing, with what it has given to them."""
    modules = {name: ModuleType(name) for name in ("ray", "ray.serve", "ray.serve.config")}
    modules["ray"].serve = modules["ray.serve"]
    modules["ray.serve"].deployment = modules["ray.serve"].ingress = decorator
    modules["ray.serve.config"].AutoscalingConfig = SimpleNamespace
    modules["ray.serve.config"].RequestRouterConfig = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = ROOT / "docs" / "many-machines" / "ray_serve.py"
    spec = importlib.util.spec_from_file_location("ray_serve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def status(app, asked, key):
    """Of an answer to what is asked as Ray's proxy would ask."""
    body, sent = json.dumps(asked).encode(), []
    headers = {"host": "llm.example.org:8000", "content-type": "application/json"}
    headers |= {"authorization": f"Bearer {key}", "content-length": str(len(body))}
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    bodies = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"]


def test_a_replica_of_ray_answers(ray_serve, heavy, sample_export, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOTMOE_API_KEY", "secret")
    ray_serve.Replica.bind = ray_serve.Replica
    given = {"model": sample_export, "sessions": tmp_path / "sessions", "ram": "4GiB"}
    replica = ray_serve.app({**given, "hosts": "llm.example.org"})
    asked = {"model": "slotmoe", "prompt": "The people of the United States" * 4, "max_tokens": 1}

    app = replica.__serve_build_asgi_app__()
    refused, answered = (asyncio.run(status(app, asked, key)) for key in ("wrong", "secret"))
    assert (refused, answered) == (401, 200)
    assert [*(tmp_path / "sessions" / "blocks").glob("??/*")]
    replica.check_health()
    replica.__del__()
    with pytest.raises(RuntimeError, match="the model has failed"):
        replica.check_health()
