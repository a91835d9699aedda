"""The application of ``slotmoe serve``: all routes, and their description."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import generate_latest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from slotmoe import __version__
from slotmoe.errors import ConfigError
from slotmoe.tools.serve import anthropic, openai
from slotmoe.tools.serve.answers import Serving
from slotmoe.tools.serve.errors import EXCEPTION_HANDLERS
from slotmoe.tools.serve.responses import Health, OpenAIError, Stats, refusals
from slotmoe.tools.serve.service import Service

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_HEALTH_RESPONSES = {**refusals(OpenAIError, 403), **refusals(Health, 503)}
_KEYS = (HTTPBearer(auto_error=False), APIKeyHeader(name="x-api-key", auto_error=False))

public, figures = APIRouter(), APIRouter()


@public.get("/", include_in_schema=False)
async def page() -> Response:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return HTMLResponse(text, headers=headers)


@public.get("/health", response_model=Health, responses=_HEALTH_RESPONSES)
async def health(service: Serving) -> Response:
    if service.batch.alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the model has failed"}, 503)


@figures.get("/stats", response_model=Stats)
def stats(service: Serving) -> Response:
    return JSONResponse(service.stats())


@figures.get("/metrics")
def metrics(service: Serving) -> Response:
    return PlainTextResponse(generate_latest(service.registry), media_type=_PROMETHEUS)


def make_app(service: Service, has_keys: bool) -> FastAPI:
    """The application; where it ``has_keys``, ``Guard`` in front of it asks for them."""
    about: Any = {"title": "slotmoe", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, exception_handlers=EXCEPTION_HANDLERS)
    app.state.service = service
    app.include_router(public)
    security = [Security(key) for key in _KEYS] if has_keys else []  # for the description
    errors = refusals(OpenAIError, 401, 403, 500)
    for router in (figures, openai.router, anthropic.router):
        app.include_router(router, dependencies=security, responses=errors)
    _describe(app.openapi(), service)
    return app


def _describe(description: dict[str, Any], service: Service) -> None:
    """Add the limits of the open model to FastAPI's description of the routes."""
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # invalid requests are 400
    metrics = description["paths"]["/metrics"]["get"]["responses"]["200"]
    metrics["content"] = {"text/plain": {"schema": {"type": "string"}}}
    schemas = description["components"]["schemas"]
    del schemas["HTTPValidationError"], schemas["ValidationError"]
    for name in ("ChatRequest", "CompletionRequest", "MessagesRequest"):
        schemas[name]["properties"]["model"] = {"const": service.name}
    for name in ("ChatRequest", "CompletionRequest"):
        fields = schemas[name]["properties"]
        ids = {"pattern": _below(service.tokenizer.size)}
        fields["logit_bias"]["anyOf"][0]["propertyNames"] = ids
        # FastAPI rounds these.
        fields["seed"]["anyOf"][0] |= {"minimum": -(1 << 63), "exclusiveMaximum": 1 << 63}
    fields = schemas["CompletionRequest"]["properties"]
    _, prompt, _, prompts = fields["prompt"]["anyOf"]
    for ids in (prompt, prompts["items"]):
        ids["items"]["exclusiveMaximum"] = service.runtime.config.vocab_size
        ids["maxItems"] = service.runtime.context - 1
    try:
        service.tokenizer.encode_gap("", "")
    except ConfigError:  # the tokenizer has no tokens for a gap
        fields["suffix"] = {"type": "null"}


def _below(limit: int) -> str:
    """A pattern for the decimal numbers from 0 to ``limit`` - 1."""
    last = str(limit - 1)
    patterns = [f"[0-9]{{1,{len(last) - 1}}}"]
    for position, digit in enumerate(last):
        if digit != "0":
            lower = f"[0-{int(digit) - 1}]"
            patterns.append(f"{last[:position]}{lower}[0-9]{{{len(last) - position - 1}}}")
    return f"^({'|'.join([*patterns, last])})$"
