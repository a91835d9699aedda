"""The routes of ``slotmoe serve``: OpenAI's and Anthropic's APIs, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from slotmoe import __version__
from slotmoe.errors import ConfigError
from slotmoe.model.answer import Made, Piece
from slotmoe.tools.serve.answers import Answers, Service
from slotmoe.tools.serve.description import describe
from slotmoe.tools.serve.forms import Chat, Completion, Messages, RefusedError
from slotmoe.tools.serve.tool_calls import Part, Reader, arguments_of, collected

_FINISH = {"stop": "stop", "length": "length", "shutdown": "length"}
_ANTHROPIC_FINISH = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_ANTHROPIC_ERRORS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends the response, the answers' places come free."""

    def __init__(self, events: AsyncIterator[str], answers: Answers):
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.leave()


def make_app(service: Service, keyed: bool) -> FastAPI:
    """The application; the door in front of it, ``slotmoe.tools.serve.guard.Guard``, asks for a key
    if ``keyed``."""
    app = FastAPI(title="slotmoe", version=__version__, docs_url=None, redoc_url=None)
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return HTMLResponse(
            page, headers={"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        )

    @app.get("/health")
    def health() -> Response:
        alive = service.batch.alive
        return JSONResponse(
            {"status": "ok" if alive else "the model has failed"}, 200 if alive else 503
        )

    @app.get("/stats")
    def stats() -> Response:
        return JSONResponse(service.stats())

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(
            generate_latest(service.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def described() -> dict[str, Any]:
        about = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "slotmoe",
        }
        return {**about, "max_model_len": service.runtime.context}

    @app.get("/v1/models")
    def models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> Response:
        service.known(name)
        return JSONResponse(described())

    @app.post("/v1/chat/completions")
    async def chat(form: Chat, request: Request) -> Response:
        return await _chat(service, form, request)

    @app.post("/v1/completions")
    async def completions(form: Completion, request: Request) -> Response:
        return await _completion(service, form, request)

    @app.post("/v1/messages")
    async def messages(form: Messages, request: Request) -> Response:
        return await _messages(service, form, request)

    _answer_errors(app, service)
    describe(app.openapi(), service, keyed)
    return app


def _answer_errors(app: FastAPI, service: Service) -> None:
    """Every error leaves in the form of the API that was called."""

    def error(request: Request, problem: RefusedError) -> Response:
        headers = {"retry-after": str(service.batch.retry_after)} if problem.status == 429 else None
        return JSONResponse(error_body(request.url.path, problem), problem.status, headers)

    async def refused(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RefusedError)
        return error(request, problem)

    async def invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        return error(request, _described(problem))

    async def unfit(request: Request, problem: Exception) -> Response:
        return error(request, RefusedError(str(problem)))

    async def other(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        body = error_body(request.url.path, RefusedError(str(problem.detail), problem.status_code))
        return JSONResponse(body, problem.status_code, problem.headers)  # which methods are allowed

    async def unforeseen(request: Request, problem: Exception) -> Response:
        return error(request, RefusedError("the server failed; its log says how", 500))

    app.add_exception_handler(Exception, unforeseen)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ConfigError, unfit)
    app.add_exception_handler(HTTPException, other)


def error_body(path: str, problem: RefusedError) -> dict[str, Any]:
    """``problem`` in the form of the API that ``path`` belongs to."""
    if path == "/v1/messages":
        kind = _ANTHROPIC_ERRORS.get(
            problem.status, "invalid_request_error" if problem.status < 500 else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": str(problem)}}
    kind = {429: "rate_limit_error"}.get(
        problem.status, "invalid_request_error" if problem.status < 500 else "server_error"
    )
    return {
        "error": {
            "message": str(problem),
            "type": kind,
            "param": problem.param,
            "code": problem.code,
        }
    }


def _described(problem: RequestValidationError) -> RefusedError:
    """What is wrong with a request's fields, in words, without repeating its content."""
    found = []
    for one in problem.errors()[:3]:
        where = ".".join(str(part) for part in one["loc"][1:])[:80]
        if one["type"] == "extra_forbidden":
            found.append(f"{where!r} is not supported by this server")
        else:
            message = str(one["msg"]).removeprefix("Value error, ")
            found.append(f"{where}: {message}" if where else message)
    first = problem.errors()[0]["loc"]
    return RefusedError(
        "; ".join(found),
        param=str(first[1])[:80] if len(first) > 1 and isinstance(first[1], str) else None,
    )


async def _finished(request: Request, answers: Answers) -> list[list[Piece]]:
    """All pieces of all answers; the client may leave before, which ends them."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, watch = asyncio.create_task(answers.whole()), asyncio.create_task(gone())
    try:
        await asyncio.wait({whole, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise RefusedError("the client left", 499)
        return whole.result()
    finally:
        answers.leave()
        watch.cancel()
        whole.cancel()


async def _events(path: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """``events``, and where they fail the error as the last one."""
    try:
        async for event in events:
            yield event
    except RefusedError as problem:
        body = json.dumps(error_body(path, problem))
        yield f"event: error\ndata: {body}\n\n" if path == "/v1/messages" else f"data: {body}\n\n"


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _chat(service: Service, form: Chat, request: Request) -> Response:
    service.known(form.model)
    sampling, limit, logprobs = (
        form.sampling(service.tokenizer.size),
        form.limit(),
        form.likeliest(),
    )
    schema, calling, n = form.schema_wanted(), form.calling(), form.n or 1
    grammar = await asyncio.to_thread(service.grammars.compile, schema, calling)
    prompt = await asyncio.to_thread(service.chat, form.turns(), calling)
    shown = service.dialect.shown if calling is not None else None
    answers = Answers(
        service,
        request.state.owner,
        [prompt],
        sampling,
        limit,
        n,
        form.stops,
        logprobs,
        grammar,
        shown,
    )
    readers = [service.dialect.reader(calling, schema) for _ in answers.jobs]
    about = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.name,
    }

    def details(tokens: list[Made]) -> dict[str, Any] | None:
        return (
            None
            if logprobs is None
            else {"content": [_chat_logprob(service, one) for one in tokens], "refusal": None}
        )

    async def stream() -> AsyncIterator[str]:
        def chunk(
            index: int, delta: dict[str, Any], finish: str | None = None, tokens: Any = None
        ) -> str:
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": details(list(tokens)) if tokens else None,
                "finish_reason": finish,
            }
            return _data({**about, "object": "chat.completion.chunk", "choices": [choice]})

        for index in range(len(answers.jobs)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in answers.pieces():
            deltas = [_delta(part) for part in _parts(readers[index], piece) if not part.complete]
            if piece.tokens and not deltas and logprobs is not None:
                deltas = [{"content": ""}]
            for number, delta in enumerate(deltas):
                yield chunk(index, delta, tokens=piece.tokens if number == 0 else None)
            if piece.finish is not None:
                yield chunk(index, {}, _chat_finish(readers[index], piece))
        if form.usage_wanted:
            yield _data(
                {
                    **about,
                    "object": "chat.completion.chunk",
                    "choices": [],
                    "usage": answers.usage(),
                }
            )
        yield "data: [DONE]\n\n"

    if form.stream:
        return _Stream(_events("", stream()), answers)
    choices = []
    for index, pieces in enumerate(await _finished(request, answers)):
        message = _message([part for piece in pieces for part in _parts(readers[index], piece)])
        finish = _chat_finish(readers[index], pieces[-1])
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": details(_tokens(pieces)),
                "finish_reason": finish,
            }
        )
    return JSONResponse(
        {**about, "object": "chat.completion", "choices": choices, "usage": answers.usage()}
    )


def _parts(reader: Reader, piece: Piece) -> list[Part]:
    return reader.feed(piece.text) + (reader.end() if piece.finish is not None else [])


def _delta(part: Part) -> dict[str, Any]:
    """What a part of an answer adds to OpenAI's message."""
    if part.call is None:
        return {"content": part.text}
    if part.name is None:
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    return {"tool_calls": [{"index": part.call, **_called(part.name, "")}]}


def _called(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _message(parts: list[Part]) -> dict[str, Any]:
    text, calls = collected(parts)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
    }
    return (
        {**message, "tool_calls": [_called(name, arguments) for name, arguments, _ in calls]}
        if calls
        else message
    )


def _chat_finish(reader: Reader, piece: Piece) -> str:
    assert piece.finish is not None
    return "tool_calls" if reader.calls and piece.finish == "stop" else _FINISH[piece.finish]


def _text(pieces: Sequence[Piece | Made]) -> str:
    return "".join(piece.text for piece in pieces)


def _tokens(pieces: list[Piece]) -> list[Made]:
    return [token for piece in pieces for token in piece.tokens]


def _chat_logprob(service: Service, made: Made) -> dict[str, Any]:
    def told(one: int, logprob: float | None) -> dict[str, Any]:
        text = service.tokenizer.decode([one])
        # Part of a character is no text, and its bytes are not known here.
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }

    return {**told(made.id, made.logprob), "top_logprobs": [told(*one) for one in made.likeliest]}


async def _completion(service: Service, form: Completion, request: Request) -> Response:
    service.known(form.model)
    sampling, given, n = form.sampling(service.tokenizer.size), form.prompts(), form.n or 1
    prompts = [await asyncio.to_thread(_encode, service, one, form.suffix) for one in given]
    if len(prompts) * n > 16:
        raise RefusedError("prompts times n is more than 16 answers in one request", param="n")
    limit, scored = (
        16 if form.max_tokens is None else form.max_tokens,
        bool(form.echo) and form.logprobs is not None,
    )
    answers = Answers(
        service,
        request.state.owner,
        prompts,
        sampling,
        limit,
        n,
        form.stops,
        form.logprobs,
        scored=scored,
    )
    about = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.name,
    }

    def echoed(index: int) -> str:
        one = given[index // n]
        return (
            "" if not form.echo else one if isinstance(one, str) else service.tokenizer.decode(one)
        )

    def choice(
        index: int, text: str, tokens: list[Made], finish: str | None, offset: int
    ) -> dict[str, Any]:
        logprobs = None if form.logprobs is None else _completion_logprobs(service, tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    async def stream() -> AsyncIterator[str]:
        offsets: list[int | None] = [None if form.echo else 0 for _ in answers.jobs]
        async for index, piece in answers.pieces():
            offset = offsets[index]
            if offset is None:
                read = answers.jobs[index].answer.read
                yield _data({**about, "choices": [choice(index, echoed(index), read, None, 0)]})
                offset = len(_text(read)) if scored else len(echoed(index))
            finish = _FINISH[piece.finish] if piece.finish is not None else None
            yield _data(
                {
                    **about,
                    "choices": [choice(index, piece.text, list(piece.tokens), finish, offset)],
                }
            )
            offsets[index] = offset + len(piece.text)
        if form.usage_wanted:
            yield _data({**about, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"

    if form.stream:
        return _Stream(_events("", stream()), answers)
    choices = []
    for index, pieces in enumerate(await _finished(request, answers)):
        finish = _FINISH[pieces[-1].finish or "stop"]
        tokens = answers.jobs[index].answer.read + _tokens(pieces)
        choices.append(choice(index, echoed(index) + _text(pieces), tokens, finish, 0))
    return JSONResponse({**about, "choices": choices, "usage": answers.usage()})


def _encode(service: Service, prompt: str | list[int], suffix: str | None) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    return (
        service.tokenizer.encode(prompt)
        if suffix is None
        else service.tokenizer.encode_gap(prompt, suffix)
    )


def _completion_logprobs(service: Service, tokens: list[Made], offset: int) -> dict[str, Any]:
    offsets = []
    for one in tokens:
        offsets.append(offset)
        offset += len(one.text)
    decode: Callable[[list[int]], str] = service.tokenizer.decode
    return {
        "tokens": [decode([one.id]) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [
            None if one.logprob is None else {decode([id_]): value for id_, value in one.likeliest}
            for one in tokens
        ],
        "text_offset": offsets,
    }


async def _messages(service: Service, form: Messages, request: Request) -> Response:
    service.known(form.model)
    calling = form.calling()
    grammar = await asyncio.to_thread(service.grammars.compile, None, calling)
    prompt = await asyncio.to_thread(service.chat, form.turns(), calling)
    shown, stops = (
        service.dialect.shown if calling is not None else None,
        tuple(form.stop_sequences or ()),
    )
    answers = Answers(
        service,
        request.state.owner,
        [prompt],
        form.sampling(),
        form.max_tokens,
        stop=stops,
        grammar=grammar,
        shown=shown,
    )
    reader = service.dialect.reader(calling)
    about: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": service.name,
    }

    def usage() -> dict[str, int]:
        counts = answers.usage()
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        fresh = {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
        }
        return {
            **fresh,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
        }

    def ending(piece: Piece) -> dict[str, Any]:
        reason = (
            "stop_sequence"
            if piece.stopped_by is not None
            else _ANTHROPIC_FINISH[_chat_finish(reader, piece)]
        )
        return {"stop_reason": reason, "stop_sequence": piece.stopped_by}

    async def stream() -> AsyncIterator[str]:
        def event(kind: str, **content: Any) -> str:
            return f"event: {kind}\n" + _data({"type": kind, **content})

        open_ends: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(),
        }
        yield event("message_start", message={**about, **open_ends})
        blocks = _Blocks()
        async for _, piece in answers.pieces():
            for part in _parts(reader, piece):
                for kind, content in blocks.add(part):
                    yield event(kind, **content)
            if piece.finish is not None:
                for kind, content in blocks.end():
                    yield event(kind, **content)
                yield event("message_delta", delta=ending(piece), usage=usage())
        yield event("message_stop")

    if form.stream:
        return _Stream(_events("/v1/messages", stream()), answers)
    pieces = (await _finished(request, answers))[0]
    content = _content([part for piece in pieces for part in _parts(reader, piece)])
    return JSONResponse({**about, "content": content, **ending(pieces[-1]), "usage": usage()})


def _content(parts: list[Part]) -> list[dict[str, Any]]:
    """Anthropic's blocks of a whole answer.  A call that was cut off has no arguments that could be
    told, and is left out."""
    text, calls = collected(parts)
    used = [(name, arguments_of(arguments)) for name, arguments, complete in calls if complete]
    blocks = [
        {"type": "tool_use", "id": _use_id(), "name": name, "input": given}
        for name, given in used
        if given is not None
    ]
    return [{"type": "text", "text": text}, *blocks] if text or not blocks else blocks


def _use_id() -> str:
    return f"toolu_{uuid.uuid4().hex}"


class _Blocks:
    """The events of Anthropic's content blocks, one after the other, as an answer's parts
    arrive."""

    def __init__(self) -> None:
        self._index, self._open = -1, False

    def add(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        if part.name is not None:
            yield from self._begin(
                {"type": "tool_use", "id": _use_id(), "name": part.name, "input": {}}
            )
        elif part.call is None and not self._open:
            yield from self._begin({"type": "text", "text": ""})
        if part.text:
            is_text = part.call is None
            delta = (
                {"type": "text_delta", "text": part.text}
                if is_text
                else {"type": "input_json_delta", "partial_json": part.text}
            )
            yield "content_block_delta", {"index": self._index, "delta": delta}
        if part.complete:
            yield from self._close()

    def end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._index < 0:
            yield from self._begin({"type": "text", "text": ""})
        yield from self._close()

    def _begin(self, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._close()
        self._index, self._open = self._index + 1, True
        yield "content_block_start", {"index": self._index, "content_block": block}

    def _close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open:
            self._open = False
            yield "content_block_stop", {"index": self._index}
