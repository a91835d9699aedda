"""The application of ``slotmoe serve``: all routes, and their description.

``answers.json`` has the shape of each answer, and by the beginning of a path of each error: an
object's names, of which one with ``?`` may be missing or null, an array of some shapes, ``=`` and
the words that a text may be, a type, or a shape's name.
"""

import json
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Response, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from slotmoe import __version__
from slotmoe.jsonfile import Json
from slotmoe.tools.serve import anthropic, ollama, openai, requests, responses
from slotmoe.tools.serve.errors import HANDLED, RefusedError, error_response
from slotmoe.tools.serve.openai import MAX_IDS
from slotmoe.tools.serve.service import Service, Serving

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)
# Of all routes, in the description.
_REFUSALS: dict[int | str, Json] = {"5XX": {"description": "The model failed"}}
_REFUSALS["4XX"] = {"description": "Refused, with the reason in the error envelope of the API"}
_KEYS = (HTTPBearer(auto_error=False), APIKeyHeader(name="x-api-key", auto_error=False))

public, routes = APIRouter(), APIRouter()  # without a key, and with one


@public.get("/", include_in_schema=False)
async def page() -> Response:
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return HTMLResponse(text, headers=headers)


@public.get("/health")
async def health(service: Serving) -> Response:
    if service.engine.alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the model has failed"}, 503)


@routes.get("/stats")
def stats(service: Serving) -> Response:
    return JSONResponse(service.stats())


@routes.get("/metrics", response_class=PlainTextResponse)
def metrics(service: Serving) -> Response:
    return PlainTextResponse(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


class TokenizeRequest(openai.Templated):
    """In vLLM's form: of ``prompt``, or of ``messages`` as the model reads them."""

    prompt: requests.Text | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


@routes.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: Serving) -> Response:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError("give either prompt or messages", "prompt")
    if body.messages is not None:
        ids = await service.chat_ids(body.conversation())
    else:
        add_bos = body.add_special_tokens is not False
        ids = await service.prepare(service.encode, body.prompt or "", add_bos)
    about = {"count": len(ids), "max_model_len": service.runtime.context}
    spellings = [*map(service.tokenizer.spelling, ids)] if body.return_token_strs else None
    return JSONResponse({**about, "tokens": ids, "token_strs": spellings})


class DetokenizeRequest(requests.Fields):
    model: requests.Label | None = None
    tokens: Annotated[list[requests.Id], Field(max_length=MAX_IDS)]


@routes.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: Serving) -> Response:
    """The text is ``prompt`` in vLLM's form, ``content`` in llama.cpp's."""
    service.check_model(body.model)
    if max(body.tokens, default=0) >= service.tokenizer.size:
        problem = f"outside 0 to {service.tokenizer.size - 1}"
        raise RefusedError(f"tokens: a token id is {problem}", "tokens")
    text = await service.prepare(service.tokenizer.decode, body.tokens, True)
    return JSONResponse({"prompt": text, "content": text})


class TemplateRequest(openai.Templated):
    messages: requests.Messages


@routes.post("/apply-template")
async def apply_template(body: TemplateRequest, service: Serving) -> Response:
    """The text that the model would read, in llama.cpp's form."""
    service.check_model(body.model)
    text = await service.chat_text(body.conversation())
    return JSONResponse({"prompt": text})


class Application(FastAPI):
    def openapi(self) -> Json:
        if self.openapi_schema is not None:
            return self.openapi_schema
        known = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
        described: Json = super().openapi()  # which keeps it
        shapes = {name: _schema(shape) for name, shape in known["shapes"].items()}
        described["components"]["schemas"] |= shapes
        for path, methods in described["paths"].items():
            error = next(name for at, name in known["errors"].items() if path.startswith(at))
            for method, route in methods.items():
                names = {"200": known["routes"].get(f"{method} {path}"), "4XX": error, "5XX": error}
                for status, name in names.items():
                    if name is not None:
                        content = route["responses"][status].setdefault("content", {})
                        content["application/json"] = {"schema": _schema(name)}
        return described


def _schema(shape: object) -> Json:
    if isinstance(shape, str):
        if shape.startswith("="):
            return {"enum": shape[1:].split("|")}
        return {"$ref": f"#/components/schemas/{shape}"} if shape[0].isupper() else {"type": shape}
    if isinstance(shape, list):
        return {"type": "array", "items": {"anyOf": [_schema(item) for item in shape]}}
    assert isinstance(shape, dict)
    schema: Json = {"type": "object", "required": [n for n in shape if not n.endswith("?")]}
    properties = {name.rstrip("?"): _schema(value) for name, value in shape.items()}
    for name in properties.keys() - schema["required"]:
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    return {**schema, "properties": properties}


def make_app(service: Service, has_keys: bool) -> FastAPI:
    """The application; where it ``has_keys``, ``Guard`` in front of it asks for them."""
    about: Json = {"title": "slotmoe", "version": __version__, "responses": _REFUSALS}
    about["exception_handlers"] = dict.fromkeys(HANDLED, error_response)
    app = Application(**about, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(public)
    security = [Security(key) for key in _KEYS] if has_keys else []  # for the description
    for router in (routes, openai.router, responses.router, anthropic.router, ollama.router):
        app.include_router(router, dependencies=security)
    return app
