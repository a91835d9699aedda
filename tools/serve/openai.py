"""OpenAI's chat and text completions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from slotmoe import __version__
from slotmoe.jsonfile import Json
from slotmoe.model.generate import Token
from slotmoe.tools.serve.answers import (
    STREAMED,
    Answers,
    EventStream,
    Update,
    chat_answers,
    event,
    spelled,
)
from slotmoe.tools.serve.completions import CompletionRequest
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.reader import ContentDelta, joined
from slotmoe.tools.serve.requests import MAX_ANSWERS, ChatRequest, OpenAIRequest, StreamOptions
from slotmoe.tools.serve.service import Serving

router = APIRouter()


@router.get("/v1/models")
async def models(service: Serving) -> Response:
    return JSONResponse({"object": "list", "data": [service.described()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Serving) -> Response:
    service.check_model(name)
    return JSONResponse(service.described())


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options = body.options(service.vocabulary)
    answers = await chat_answers(service, request, body.chat(), options)
    return await _respond(body, answers, ChatChoices(answers))


@router.post("/v1/completions", responses=STREAMED)
async def completions(body: CompletionRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options, given = body.options(service.vocabulary), body.prompts()
    if len(given) * options.choices > MAX_ANSWERS:
        problem = f"prompts times n is more than {MAX_ANSWERS} answers in one request"
        raise RefusedError(problem, "n")
    tokenizer, prompts, echoes = service.tokenizer, list[list[int]](), list[str]()
    for prompt in given:
        if not isinstance(prompt, str):
            prompts.append(prompt)
        elif body.suffix is None:
            prompts.append(await asyncio.to_thread(service.encode, prompt))
        else:
            service.check_length(len(prompt) + len(body.suffix))
            prompts.append(await asyncio.to_thread(tokenizer.encode_gap, prompt, body.suffix))
        if body.echo:
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            echoes += [text] * options.choices
    answers = Answers(service, request, prompts, options, echoes)
    return await _respond(body, answers, TextChoices(answers))


async def _respond(
    body: OpenAIRequest, answers: Answers, choices: "ChatChoices | TextChoices"
) -> Response:
    about: Json = {"id": f"{choices.prefix}-{uuid.uuid4().hex}", "model": body.model}
    about |= {"created": int(time.time()), "system_fingerprint": f"slotmoe_{__version__}"}
    options = body.stream_options or StreamOptions()

    async def events() -> AsyncIterator[str]:
        chunk: Json = {**about, "object": choices.chunk_kind}

        def chunk_of(choice: Json) -> str:
            if options.include_usage:
                chunk["usage"] = _usage(answers, True) if options.continuous_usage_stats else None
            return event({**chunk, "choices": [choice]})

        for choice in choices.first:
            yield chunk_of(choice)
        async for update in answers.updates():
            for choice in choices.chunks(update):
                yield chunk_of(choice)
        if options.include_usage:
            yield event({**chunk, "choices": [], "usage": _usage(answers)})
        yield "data: [DONE]\n\n"

    if body.stream:
        return EventStream(events(), answers)
    wholes = [choices.whole(update) for update in await answers.whole()]
    content = {**about, "object": choices.kind, "choices": wholes}
    return JSONResponse({**content, "usage": _usage(answers)})


class ChatChoices:
    """Messages, whole or as their deltas; a stream begins with ``first``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answers: Answers):
        self._answers = answers
        begin = {"role": "assistant", "content": ""}
        self.first = [_choice(index, "delta", begin) for index in range(len(answers.jobs))]

    def chunks(self, update: Update) -> Iterator[Json]:
        deltas = [_delta(delta) for delta in update.content if not delta.complete]
        logprobs = self._logprobs(update.tokens) if update.tokens else None
        if logprobs is not None and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield _choice(update.index, "delta", delta, logprobs)
            logprobs = None
        if update.finish is not None:
            yield _choice(update.index, "delta", {}, None, update.finish)

    def whole(self, update: Update) -> Json:
        parts = joined(update.content)
        calls = [_call(part.name, part.text) for part in parts if part.name is not None]
        content = update.text if update.text or not calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        thoughts = [part.text for part in parts if part.reasoning]
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(update.tokens)
        return _choice(update.index, "message", message, logprobs, update.finish)

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        if self._answers.options.logprobs is None:
            return None
        return {"content": self._answers.scores(tokens), "refusal": None}


class TextChoices:
    """Texts."""

    prefix, kind, chunk_kind, first = "cmpl", "text_completion", "text_completion", list[Json]()

    def __init__(self, answers: Answers):
        self._answers = answers
        self._offsets = [0] * len(answers.jobs)  # characters of the tokens so far

    def chunks(self, update: Update) -> list[Json]:
        return [self.whole(update)]

    def whole(self, update: Update) -> Json:
        logprobs = None if self._answers.options.logprobs is None else self._logprobs(update)
        return _choice(update.index, "text", update.text, logprobs, update.finish)

    def _logprobs(self, update: Update) -> Json:
        offsets, likeliest = list[int](), list[dict[str, float] | None]()
        for token in update.tokens:
            offsets.append(self._offsets[update.index])
            self._offsets[update.index] += len(token.text)
            # That of the token itself is always there.
            top = [*token.likeliest, (token.id, token.logprob)]
            scores = {self._name(id_): logprob for id_, logprob in top if logprob is not None}
            likeliest.append(None if token.logprob is None else scores)
        return {
            "tokens": [self._name(token.id) for token in update.tokens],
            "token_logprobs": [token.logprob for token in update.tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _name(self, id_: int) -> str:
        """A token as this route writes it."""
        content = self._answers.service.tokenizer.token_bytes(id_)
        text = spelled(content)
        return text if text.encode() == content else f"bytes:{text}"


def _usage(answers: Answers, so_far: bool = False) -> Json:
    usage = answers.usage(so_far)
    counts: Json = {"prompt_tokens": usage.prompt, "completion_tokens": usage.answer}
    counts["total_tokens"] = usage.prompt + usage.answer
    if usage.reasoning is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return {**counts, "prompt_tokens_details": {"cached_tokens": usage.cached}}


def _choice(
    index: int, name: str, content: object, logprobs: Json | None = None, finish: str | None = None
) -> Json:
    return {"index": index, name: content, "logprobs": logprobs, "finish_reason": finish}


def _delta(delta: ContentDelta) -> Json:
    """What ``delta`` adds to OpenAI's message."""
    if delta.reasoning:
        return {"reasoning_content": delta.text}
    if delta.call is None:
        return {"content": delta.text}
    arguments: Json = {"function": {"arguments": delta.text}}
    added = arguments if delta.name is None else _call(delta.name, "")
    return {"tool_calls": [{"index": delta.call, **added}]}


def _call(name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
