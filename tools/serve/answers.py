"""The answers to a request, whole or as a stream of events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from fastapi import Request
from starlette.responses import StreamingResponse

from slotmoe.jsonfile import Json
from slotmoe.model.generate import Answer, Delta, Grammar, Stops, Token
from slotmoe.model.reasoning import Splitter
from slotmoe.offload.engine.requests import Request as Job
from slotmoe.tools.serve.errors import RefusedError, error_body
from slotmoe.tools.serve.formats import text_arguments
from slotmoe.tools.serve.grammar import Compiled, Longer
from slotmoe.tools.serve.reader import ContentDelta, Reader
from slotmoe.tools.serve.requests import AnswerOptions, ChatRequest
from slotmoe.tools.serve.service import Service

MAX_SCORES = 100_000  # log-probabilities of prompts' tokens and their alternatives in one request
PING_SECONDS = 3.0  # after which a stream on which nothing moves says that it is alive
_SHORTEN = "Shorten it, or start the server with --context"
# Finishes of a job that end the whole request.  Nobody reads a 499.
_FAILURES = {"error": 500, "refused": 400, "cancelled": 499}


@dataclass
class Update:
    """What is new in the answer ``index``.  ``finish`` is the reason in OpenAI's words, None while
    the answer goes on; ``stopped_by`` is the stop string that ended it, if one did."""

    index: int
    content: list[ContentDelta] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    stopped_by: str | None = None

    @property
    def text(self) -> str:
        """Without reasoning and tool calls."""
        return "".join(d.text for d in self.content if d.call is None and not d.reasoning)

    def add(self, later: "Update") -> None:
        self.content += later.content
        self.tokens += later.tokens
        self.finish, self.stopped_by = later.finish, later.stopped_by


class Answers:
    """The answers to ``prompts``, in the engine until they end or ``cancel`` is called.

    They follow ``grammar``; ``reader`` makes the parser of an answer's text, in which the special
    tokens of ``shown`` appear and tool calls begin with ``calls``.  ``echoes`` are texts that go
    before the answers, with the log-probabilities of the prompts' own tokens where
    log-probabilities are wanted.  Made inside the event loop.  Raises ``RefusedError``: 400 where a
    prompt does not fit, 429 where the queue is full.
    """

    def __init__(
        self,
        request: Request,
        prompts: list[list[int]],
        options: AnswerOptions,
        *,
        grammar: Compiled | None = None,
        reader: Callable[[], Reader] = lambda: Reader(None),
        shown: Mapping[int, str] | None = None,
        calls: str = "",
        echoes: Sequence[str] = (),
    ):
        service: Service = request.app.state.service
        self.request, self.options = request, options
        self.token_bytes = service.tokenizer.token_bytes
        self._observe, self._loop = service.observe, asyncio.get_running_loop()
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._echoes = dict(enumerate(echoes))  # that were not sent yet
        self.jobs: list[Job] = []
        self._answers: list[Answer] = []  # of the jobs
        self.finishes: list[str] = []  # of the answers that have ended
        self._sent = 0  # tokens that updates have brought; stop strings may cut off later ones
        self._prompt_tokens = sum(map(len, prompts))
        self.reasoning_tokens = None if service.tokenizer.reasoning is None else 0
        sampling, scored = options.sampling, bool(echoes) and options.logprobs is not None
        scores = self._prompt_tokens * options.choices * (1 + (options.logprobs or 0))
        if scored and scores > MAX_SCORES:
            problem = f"{scores} log-probabilities, more than {MAX_SCORES} in one request"
            raise RefusedError(f"echo with logprobs would give {problem}", "logprobs")
        ends = () if options.goes_on else service.runtime.eos_token_ids
        for prompt in prompts:
            limit = _limit(service, prompt, options.limit, scored)
            for choice in range(options.choices):
                seed = None if sampling.seed is None else (sampling.seed + choice) % (1 << 63)
                mask: Grammar | None = grammar.mask() if grammar is not None else None
                if options.least:
                    mask = Longer(mask, options.least, ends, service.tokenizer.size)
                model = prompt, service.tokenizer, ends
                how = replace(sampling, seed=seed), limit, Stops(options.stop, calls)
                answer = Answer(*model, *how, options.logprobs, mask, shown)
                emit = partial(self._emit, len(self.jobs))
                self._answers.append(answer)
                self.jobs.append(Job(prompt, answer, emit, request.state.owner, scored))
        self._readers = [reader() for _ in self.jobs]
        service.submit(self.jobs)
        request.state.answers = self  # for the log

    def _emit(self, index: int, delta: Delta) -> None:
        if delta.finish is not None:
            self._observe(self.jobs[index])
        try:
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))
        except RuntimeError:  # the loop has ended, so nothing reads this any more
            self.cancel()

    def cancel(self) -> None:
        """Nobody wants these answers any more; the engine ends them within one layer."""
        for job in self.jobs:
            job.cancel()

    async def updates(self) -> AsyncIterator[Update]:
        """What is new in each answer, as it comes.  Raises ``RefusedError`` if one fails."""
        running = len(self.jobs)
        while running:
            index, delta = await self._deltas.get()
            finish, reader = delta.finish, self._readers[index]
            if failure := _FAILURES.get(finish or ""):
                self.cancel()
                raise RefusedError(delta.error, status=failure)
            if index in self._echoes:
                echo = ContentDelta(self._echoes.pop(index))
                yield Update(index, [echo], [*self._answers[index].read])
            content = reader.feed(delta.text)
            if reader.is_thinking and self.reasoning_tokens is not None:
                self.reasoning_tokens += len(delta.tokens)
            self._sent += len(delta.tokens)
            if finish is not None:
                running -= 1
                self.finishes.append(finish)
                content += reader.end()
            if finish == "stop" and reader.calls:
                finish = "tool_calls"
            elif finish == "shutdown":
                finish = "length"
            yield Update(index, content, [*delta.tokens], finish, delta.stopped_by)

    async def whole(self) -> list[Update]:
        """Each answer as one update; if the client leaves before, the answers end."""

        async def watch() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        wholes, watching = [Update(i) for i in range(len(self.jobs))], asyncio.create_task(watch())
        try:
            async for update in self.updates():
                wholes[update.index].add(update)
        finally:
            self.cancel()
            watching.cancel()
        return wholes

    def scores(self, tokens: Sequence[Token]) -> list[Json]:
        """Log-probabilities of ``tokens`` in OpenAI's form; none where they are not wanted."""
        if self.options.logprobs is None:
            return []
        return [
            {
                **self._score(token.id, token.logprob),
                "top_logprobs": [self._score(*alternative) for alternative in token.likeliest],
            }
            for token in tokens
        ]

    def _score(self, id_: int, logprob: float | None) -> Json:
        content = self.token_bytes(id_)
        return {"token": spelled(content), "logprob": logprob, "bytes": list(content)}

    def usage(self) -> Json:
        """Counts of tokens in OpenAI's form."""
        return self._usage(sum(len(answer.ids) for answer in self._answers))

    def usage_so_far(self) -> Json:
        """The same for what was sent: the model may be ahead of it."""
        return self._usage(self._sent)

    def _usage(self, answer_tokens: int) -> Json:
        cached = min(sum(job.reused for job in self.jobs), self._prompt_tokens)
        usage: Json = {"prompt_tokens": self._prompt_tokens}
        usage["completion_tokens"] = answer_tokens
        usage["total_tokens"] = self._prompt_tokens + answer_tokens
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


def chat_prompt(service: Service, body: ChatRequest) -> list[int]:
    """Token ids of a conversation.  Runs the template in a child process, so the event loop leaves
    it to a thread.  Raises ``RefusedError`` and ``ConfigError``."""
    return encode(service, _chat_text(service, body))


def _chat_text(service: Service, body: ChatRequest) -> str:
    check_length(service, sum(len(message.text) for message in body.messages))
    about = body.messages, body.tool_policy(), body.continues, body.thinking
    return service.dialect.prompt(*about)


async def chat_answers(request: Request, body: ChatRequest) -> Answers:
    """The answers to a conversation.  Raises ``RefusedError`` and ``ConfigError``."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    options, policy = body.options(vocabulary(service)), body.tool_policy()
    schema, dialect = body.schema_wanted, service.dialect

    def prepare() -> tuple[Compiled | None, list[int], bool]:
        text, reasoning = _chat_text(service, body), service.tokenizer.reasoning
        is_thinking = reasoning is not None and reasoning.is_begun(text)
        compiled = service.grammars.compile(schema, policy, is_thinking)
        return compiled, encode(service, text), is_thinking

    grammar, prompt, is_thinking = await asyncio.to_thread(prepare)
    request.state.relaxed = grammar.relaxed if grammar is not None else []  # for a header
    form = dialect.format if policy else None
    texts = {f.name: text_arguments(f) for f in policy.functions} if policy else None
    is_either, is_required = schema is not None, policy is not None and policy.required
    return Answers(
        request,
        [prompt],
        options,
        grammar=grammar,
        reader=lambda: Reader(
            form, is_either, is_required, Splitter(service.tokenizer.reasoning, is_thinking), texts
        ),
        shown=dialect.shown if policy else None,
        calls=form.opening if form else "",
    )


def encode(service: Service, text: str) -> list[int]:
    """Token ids of a prompt.  Raises ``RefusedError`` before it reads one that can't fit."""
    check_length(service, len(text))
    return service.tokenizer.encode(text)


def check_length(service: Service, characters: int) -> None:
    """Raises ``RefusedError`` where no context can hold a text of so many ``characters``; to find
    out how many tokens a long text has takes seconds and memory."""
    context, longest = service.runtime.context, service.tokenizer.longest
    if characters > context * longest:
        held = f"the context holds {context} tokens of at most {longest} characters"
        problem = f"{held}, the prompt has {characters} characters"
        raise RefusedError(f"{problem}. {_SHORTEN}", code="context_length_exceeded")


def vocabulary(service: Service) -> int:
    """How many ids are text as well as rows of the model: either may have more than the other."""
    return min(service.tokenizer.size, service.runtime.config.vocab_size)


class EventStream(StreamingResponse):
    """Server-sent events, and ``ping`` where nothing else moves; if they fail, the error is the
    last.  However the response ends, its answers are cancelled.  ``responses`` describes a route
    that may answer so."""

    media_type = "text/event-stream"
    responses: ClassVar[dict[int | str, Any]] = {200: {"content": {media_type: {}}}}

    def __init__(self, events: AsyncIterator[str], answers: Answers, ping: str = ": ping\n\n"):
        content = _with_pings(_with_error(answers.request.url.path, events), ping)
        super().__init__(content, headers={"cache-control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


def spelled(content: bytes) -> str:
    """A token's bytes as text; where they are part of a character, as OpenAI writes them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event, named after the type of ``data`` if it has one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _with_error(path: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for text in events:
            yield text
    except RefusedError as problem:
        yield event(error_body(path, problem))


async def _with_pings(events: AsyncIterator[str], ping: str) -> AsyncIterator[str]:
    """``events``, with ``ping`` wherever ``PING_SECONDS`` have passed without one."""
    coming: asyncio.Future[str | None] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events, None))
            await asyncio.wait((coming,), timeout=PING_SECONDS)
            if not coming.done():
                yield ping
            elif (text := coming.result()) is None:
                return
            else:
                coming = None
                yield text
    finally:
        if coming is not None:
            coming.cancel()


def _limit(service: Service, prompt: list[int], limit: int | None, scored: bool) -> int:
    """The most tokens of an answer to ``prompt``."""
    context, size = service.runtime.context, service.runtime.config.vocab_size
    known = "the model's vocabulary"
    if scored:
        size, known = vocabulary(service), "those that are text"
    if not prompt:
        raise RefusedError("the prompt is empty", "prompt")
    if max(prompt) >= size:
        problem = f"outside 0 to {size - 1}, {known}"
        raise RefusedError(f"a token id of the prompt is {problem}", "prompt")
    room = context - len(prompt)
    if room < (0 if limit == 0 else 1):
        problem = f"the context holds {context} tokens, the prompt has {len(prompt)}"
        raise RefusedError(f"{problem}. {_SHORTEN}", code="context_length_exceeded")
    return room if limit is None else min(limit, room)
