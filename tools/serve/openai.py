"""OpenAI's chat and text completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from slotmoe.model.generate import Delta, Token
from slotmoe.tools.serve import responses
from slotmoe.tools.serve.answers import Answers, EventStream, Serving, chat_answers, event
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.function_calling import ContentDelta, collect
from slotmoe.tools.serve.requests import MAX_ANSWERS, ChatRequest, CompletionRequest, OpenAIRequest

router = APIRouter()
_POST = responses.post_responses(responses.OpenAIError)
_MISSING = responses.refusals(responses.OpenAIError, 404)
Json = dict[str, Any]


@router.get("/v1/models", response_model=responses.ModelList)
async def models(service: Serving) -> Response:
    return JSONResponse({"object": "list", "data": [service.described()]})


@router.get("/v1/models/{name:path}", response_model=responses.Model, responses=_MISSING)
async def model(name: str, service: Serving) -> Response:
    service.check_model(name)
    return JSONResponse(service.described())


@router.post("/v1/chat/completions", response_model=responses.ChatCompletion, responses=_POST)
async def chat_completions(body: ChatRequest, request: Request, service: Serving) -> Response:
    answers = await chat_answers(service, body, request.state.owner)
    return await _respond(request, body, answers, ChatChoices(answers, bool(body.logprobs)))


@router.post("/v1/completions", response_model=responses.TextCompletion, responses=_POST)
async def completions(body: CompletionRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options, given = body.options(service.tokenizer.size), body.prompts()
    if len(given) * options.choices > MAX_ANSWERS:
        problem = f"prompts times n is more than {MAX_ANSWERS} answers in one request"
        raise RefusedError(problem, "n")
    tokenizer, has_logprobs = service.tokenizer, body.logprobs is not None
    prompts, echoes = list[list[int]](), list[str]()
    for prompt in given:
        ids: Any = prompt
        if isinstance(prompt, str):
            gap = () if body.suffix is None else (body.suffix,)
            encode = tokenizer.encode_gap if gap else tokenizer.encode
            ids = await asyncio.to_thread(encode, prompt, *gap)
        prompts.append(ids)
        if body.echo:
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            echoes += [text] * options.choices
    scored = bool(body.echo) and has_logprobs
    answers = Answers(service, request.state.owner, prompts, options, scored=scored)
    return await _respond(request, body, answers, TextChoices(answers, has_logprobs, echoes))


async def _respond(
    request: Request, body: OpenAIRequest, answers: Answers, choices: ChatChoices | TextChoices
) -> Response:
    about: Json = {"id": f"{choices.prefix}-{uuid.uuid4().hex}", "model": body.model}
    about["created"] = int(time.time())

    async def events() -> AsyncIterator[str]:
        chunk = {**about, "object": choices.chunk_kind}
        for choice in choices.first:
            yield event({**chunk, "choices": [choice]})
        async for index, piece in answers.pieces():
            for choice in choices.chunks(index, piece):
                yield event({**chunk, "choices": [choice]})
        if body.wants_usage:
            yield event({**chunk, "choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"

    if body.stream:
        return EventStream(request, events(), answers)
    whole = enumerate(await answers.whole(request))
    content = {**about, "object": choices.kind}
    content["choices"] = [choices.whole(index, pieces) for index, pieces in whole]
    return JSONResponse({**content, "usage": answers.usage()})


class ChatChoices:
    """Messages, whole or as their deltas; a stream begins with ``first``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answers: Answers, has_logprobs: bool):
        self._answers, self._has_logprobs = answers, has_logprobs
        begin = {"role": "assistant", "content": ""}
        self.first = [self._chunk(index, begin) for index in range(len(answers.jobs))]

    def chunks(self, index: int, piece: Delta) -> Iterator[Json]:
        deltas = [_delta(d) for d in self._answers.content(index, piece) if not d.complete]
        if piece.tokens and not deltas and self._has_logprobs:
            deltas = [{"content": ""}]
        tokens = list(piece.tokens)
        for delta in deltas:
            yield self._chunk(index, delta, tokens)
            tokens = []
        if piece.finish is not None:
            yield self._chunk(index, {}, finish=self._answers.finish_reason(index, piece))

    def whole(self, index: int, pieces: list[Delta]) -> Json:
        text, calls = collect(self._answers.content(index, *pieces))
        content = text if text or not calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(name, arguments) for name, arguments, _ in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(_tokens(pieces)),
            "finish_reason": self._answers.finish_reason(index, pieces[-1]),
        }

    def _chunk(
        self, index: int, delta: Json, tokens: list[Token] | None = None, finish: str | None = None
    ) -> Json:
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = []
        for token in tokens:
            top = [self._logprob(*alternative) for alternative in token.likeliest]
            content.append({**self._logprob(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprob(self, id_: int, logprob: float | None) -> Json:
        text = self._answers.service.tokenizer.decode([id_])
        # Part of a character is no text, and its bytes are not known here.
        content = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": logprob, "bytes": content}


def _delta(delta: ContentDelta) -> Json:
    """What ``delta`` adds to OpenAI's message."""
    if delta.call is None:
        return {"content": delta.text}
    arguments: Json = {"function": {"arguments": delta.text}}
    added = arguments if delta.name is None else _call(delta.name, "")
    return {"tool_calls": [{"index": delta.call, **added}]}


def _call(name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


class TextChoices:
    """Texts; ``echoes`` are the prompts that come before them, if any."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, answers: Answers, has_logprobs: bool, echoes: list[str]):
        self._answers, self._has_logprobs = answers, has_logprobs
        self._echoes = dict(enumerate(echoes))  # that were not sent yet
        self._offsets = [0] * len(answers.jobs)  # characters of the tokens so far
        self.first: list[Json] = []

    def chunks(self, index: int, piece: Delta) -> Iterator[Json]:
        if index in self._echoes:
            scored = self._answers.jobs[index].answer.read
            yield self._choice(index, self._echoes.pop(index), scored, None)
        finish = self._answers.finish_reason(index, piece)
        yield self._choice(index, piece.text, list(piece.tokens), finish)

    def whole(self, index: int, pieces: list[Delta]) -> Json:
        text = self._echoes.get(index, "") + "".join(piece.text for piece in pieces)
        tokens = self._answers.jobs[index].answer.read + _tokens(pieces)
        return self._choice(index, text, tokens, self._answers.finish_reason(index, pieces[-1]))

    def _choice(self, index: int, text: str, tokens: list[Token], finish: str | None) -> Json:
        logprobs = self._logprobs(index, tokens) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: list[Token]) -> Json:
        decode = self._answers.service.tokenizer.decode
        offsets, likeliest = list[int](), list[dict[str, float] | None]()
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
            top = {decode([id_]): logprob for id_, logprob in token.likeliest}
            likeliest.append(None if token.logprob is None else top)
        return {
            "tokens": [decode([token.id]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }


def _tokens(pieces: list[Delta]) -> list[Token]:
    return [token for piece in pieces for token in piece.tokens]
