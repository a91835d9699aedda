"""The application of ``slotmoe serve``: all routes, and their description."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Response, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import generate_latest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from slotmoe import __version__
from slotmoe.jsonfile import Json
from slotmoe.tools.serve import anthropic, openai, responses, tokens
from slotmoe.tools.serve.errors import HANDLED, error_response
from slotmoe.tools.serve.service import Service, Serving

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
# Of all routes, in the description.
_REFUSALS: dict[int | str, Json] = {
    "4XX": {"description": "Refused, with the reason in the error envelope of the API"},
    "5XX": {"description": "The model failed"},
}
_KEYS = (HTTPBearer(auto_error=False), APIKeyHeader(name="x-api-key", auto_error=False))

public, figures = APIRouter(), APIRouter()


@public.get("/", include_in_schema=False)
async def page() -> Response:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return HTMLResponse(text, headers=headers)


@public.get("/health")
async def health(service: Serving) -> Response:
    if service.batch.alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the model has failed"}, 503)


@figures.get("/stats")
def stats(service: Serving) -> Response:
    return JSONResponse(service.stats())


@figures.get("/metrics", response_class=PlainTextResponse)
def metrics(service: Serving) -> Response:
    return PlainTextResponse(generate_latest(service.registry), media_type=_PROMETHEUS)


def make_app(service: Service, has_keys: bool) -> FastAPI:
    """The application; where it ``has_keys``, ``Guard`` in front of it asks for them."""
    app = FastAPI(
        title="slotmoe", version=__version__, docs_url=None, redoc_url=None, responses=_REFUSALS
    )
    app.state.service = service
    for kind in HANDLED:
        app.add_exception_handler(kind, error_response)
    app.include_router(public)
    security = [Security(key) for key in _KEYS] if has_keys else []  # for the description
    for router in (figures, openai.router, responses.router, anthropic.router, tokens.router):
        app.include_router(router, dependencies=security)
    return app
