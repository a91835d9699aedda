"""The answers to a request, whole or as a stream of events."""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import ClassVar, NamedTuple

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slotmoe.jsonfile import Json
from slotmoe.model.generate import Answer, Delta, Stops, Token
from slotmoe.model.reasoning import splitter_of
from slotmoe.offload.engine.requests import Request as Job
from slotmoe.tools.serve.errors import RefusedError, error_body
from slotmoe.tools.serve.formats import ContentDelta, Reader, text_arguments
from slotmoe.tools.serve.grammar import Mask
from slotmoe.tools.serve.requests import AnswerOptions, Conversation
from slotmoe.tools.serve.service import Service

MAX_SCORES = 100_000  # log-probabilities of prompts' tokens and their alternatives in one request
compact = json.JSONEncoder(separators=(",", ":"), default=list).encode  # ``Scores`` are lists
_TOGETHER = 64  # of a prompt's tokens in an update
PING_SECONDS = 3.0  # after which a stream on which nothing moves says that it is alive
# Finishes of a job that end the whole request.  Nobody reads a 499.
_FAILURES = {"error": 500, "refused": 400, "cancelled": 499}


class Scores:
    """What ``make`` gives of each of ``tokens``, not before it is sent: as JSON, log-probabilities
    take fifty times the memory."""

    def __init__(self, make: Callable[[Token], object], tokens: Sequence[Token]):
        self._make, self._tokens = make, tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[object]:
        return map(self._make, self._tokens)


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


_NO_CHAT = Conversation([])


class Answers:
    """The answers to ``prompts``, in the engine until they end or ``cancel`` is called.

    Those to a ``chat`` follow its ``grammar``, and begin with reasoning where the prompt has begun
    it (``is_thinking``; None where they have none).  ``echoes`` are texts that go before the
    answers, with the log-probabilities of the prompts' own tokens where log-probabilities are
    wanted.  Made inside the event loop.  Raises as ``Runtime.fit`` does, and ``RefusedError``, also
    where the queue is full.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        prompts: list[list[int]],
        options: AnswerOptions,
        echoes: Sequence[str] = (),
        chat: Conversation = _NO_CHAT,
        grammar: Mask | None = None,
        is_thinking: bool | None = None,
    ):
        self.request, self.options, self.service = request, options, service
        self._loop = asyncio.get_running_loop()
        self._deltas, self._arrived = deque[tuple[int, Delta]](), asyncio.Event()
        self._waits = True  # for deltas, where none is there
        self._echoes = dict(enumerate(echoes))  # that were not sent yet
        self.jobs: list[Job] = []
        self._answers: list[Answer] = []  # of the jobs
        self.finishes: list[str] = []  # of the answers that have ended
        self._sent = 0  # tokens that updates have brought; stop strings may cut off later ones
        self._prompt_tokens = sum(map(len, prompts))
        tokenizer, dialect = service.tokenizer, service.dialect
        self._reasoning_tokens = None if tokenizer.reasoning is None else 0
        sampling = replace(service.sampling, **options.sampling)
        counts = options.logprobs, options.prompt_logprobs
        logprobs = max((count for count in counts if count is not None), default=None)
        scored = options.prompt_logprobs is not None or (bool(echoes) and logprobs is not None)
        scores = self._prompt_tokens * options.choices * (1 + (logprobs or 0))
        if scored and scores > MAX_SCORES:
            problem = f"{scores} log-probabilities, more than {MAX_SCORES} in one request"
            raise RefusedError(f"logprobs of the prompt would be {problem}", "logprobs")
        ends = (*(() if options.goes_on else service.runtime.eos_token_ids), *options.ends)
        policy, form, shown, calls, texts = chat.policy, None, None, "", dict[str, frozenset[str]]()
        if policy is not None:
            form, shown, calls = dialect.format, dialect.shown, dialect.format.opening
            texts = {function.name: text_arguments(function) for function in policy.allowed}
        for prompt in prompts:
            limit = service.runtime.fit(prompt, options.limit, scored)[1]
            for choice in range(options.choices):
                seed = None if sampling.seed is None else (sampling.seed + choice) % (1 << 63)
                mask = None
                if grammar is not None or options.least:
                    mask = (grammar or Mask(None, tokenizer.size)).mask(options.least, ends)
                model = prompt, tokenizer, ends
                how = replace(sampling, seed=seed), limit, Stops(options.stop, calls)
                answer = Answer(*model, *how, logprobs, mask, shown)
                emit = partial(self._emit, len(self.jobs))
                self._answers.append(answer)
                self.jobs.append(Job(prompt, answer, emit, request.state.owner, scored))
        how_read = form, chat.wanted is not None, policy is not None and policy.required
        thoughts = tokenizer.reasoning, is_thinking
        self._readers = [Reader(*how_read, splitter_of(*thoughts), texts) for _ in self.jobs]
        service.submit(self.jobs)
        request.state.answers = self  # for the log

    def _emit(self, index: int, delta: Delta) -> None:
        if delta.finish is not None:
            self.service.observe(self.jobs[index])
        self._deltas.append((index, delta))
        if self._waits:
            self._waits = False
            try:
                self._loop.call_soon_threadsafe(self._arrived.set)
            except RuntimeError:  # the loop has ended, so nothing reads this any more
                self.cancel()

    async def _next(self) -> tuple[int, Delta]:
        if not self._deltas:
            await asyncio.sleep(self.jobs[0].together)
        while not self._deltas:
            self._arrived.clear()
            self._waits = True
            if not self._deltas:  # which came before the engine's thread saw that
                await self._arrived.wait()
        return self._deltas.popleft()

    def cancel(self) -> None:
        """Nobody wants these answers any more; the engine ends them within one layer."""
        for job in self.jobs:
            job.cancel()

    async def updates(self) -> AsyncIterator[Update]:
        """What is new in each answer, as it comes.  Raises ``RefusedError`` if one fails."""
        running = len(self.jobs)
        while running:
            index, delta = await self._next()
            finish, reader = delta.finish, self._readers[index]
            if failure := _FAILURES.get(finish or ""):
                self.cancel()
                raise RefusedError(delta.error, status=failure)
            if index in self._echoes:
                yield Update(index, [ContentDelta(self._echoes.pop(index))])
                read = self._answers[index].read
                for first in range(0, len(read), _TOGETHER):  # each has log-probabilities
                    yield Update(index, [], read[first : first + _TOGETHER])
                    await asyncio.sleep(0)
            content = reader.feed(delta.text)
            if reader.splitter.is_thinking and self._reasoning_tokens is not None:
                self._reasoning_tokens += len(delta.tokens)
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

    def scores(
        self, tokens: Sequence[Token], make: Callable[[Token], object] | None = None
    ) -> Scores:
        """Log-probabilities of ``tokens`` as ``make`` gives them, or in OpenAI's form; none where
        they are not wanted."""
        return Scores(make or self._scored, () if self.options.logprobs is None else tokens)

    def _scored(self, token: Token) -> Json:
        top = [self._score(*other) for other in token.likeliest[: self.options.logprobs]]
        return {**self._score(token.id, token.logprob), "top_logprobs": top}

    @staticmethod
    def respond(content: Json) -> Response:
        """``content`` as JSON, of which ``Scores`` are made and sent some at a time."""
        later, mark = list[Scores](), uuid.uuid4().hex

        def put_off(scores: Scores) -> str:
            later.append(scores)
            return mark

        about: Json = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
        first, *rest = json.JSONEncoder(**about, default=put_off).encode(content).split(f'"{mark}"')
        encode = json.JSONEncoder(**about).encode

        def pieces() -> Iterator[str]:
            yield first
            for scores, text in zip(later, rest, strict=True):
                glue, made = "[", iter(scores)
                while some := [*islice(made, _TOGETHER)]:
                    yield glue + encode(some)[1:-1]
                    glue = ","
                yield ("" if len(scores) else "[") + "]" + text

        respond = partial(StreamingResponse, pieces()) if rest else partial(Response, first)
        return respond(media_type="application/json")

    def prompt_scores(self, index: int) -> list[Json | None] | None:
        """Log-probabilities of the prompt of whole answer ``index`` by id, in vLLM's form; None
        where they are not wanted.  A token beyond the likeliest has no rank."""
        if (count := self.options.prompt_logprobs) is None:
            return None
        rows = list[Json | None]()
        for token in self._answers[index].read:
            row, likeliest = Json(), token.likeliest[:count]
            ranks = {id_: rank for rank, (id_, _) in enumerate(token.likeliest, 1)}
            for id_, logprob in ((token.id, token.logprob), *likeliest):
                text = spelled(self.service.tokenizer.token_bytes(id_))
                row[str(id_)] = {"logprob": logprob, "rank": ranks.get(id_), "decoded_token": text}
            rows.append(None if token.logprob is None else row)
        return rows

    def _score(self, id_: int, logprob: float | None) -> Json:
        content = self.service.tokenizer.token_bytes(id_)
        return {"token": spelled(content), "logprob": logprob, "bytes": list(content)}

    def usage(self, so_far: bool = False) -> "Usage":
        """Of whole answers, or of what was sent ``so_far``: the model may be ahead of it."""
        made = self._sent if so_far else sum(len(answer.ids) for answer in self._answers)
        cached = min(sum(job.reused for job in self.jobs), self._prompt_tokens)
        return Usage(self._prompt_tokens, cached, made, self._reasoning_tokens)


class Usage(NamedTuple):
    """Counts of tokens: of prompts and what was ``cached`` of them, of answers and what was
    ``reasoning`` in them (None for a model that doesn't reason)."""

    prompt: int
    cached: int
    answer: int
    reasoning: int | None


async def chat_answers(
    service: Service,
    request: Request,
    chat: Conversation,
    options: AnswerOptions,
    can_call: bool = True,
) -> Answers:
    """The answers to a conversation, which call no function unless they ``can_call``.  Raises
    ``RefusedError`` and ``ConfigError``."""
    text, reasoning = await service.chat_text(chat), service.tokenizer.reasoning
    chat = chat if can_call else replace(chat, policy=None)
    is_thinking = None if reasoning is None else reasoning.is_begun(text)
    grammar = await service.grammar(chat.wanted, chat.policy, is_thinking)
    prompt = await service.prepare(service.encode, text)
    request.state.relaxed = grammar.relaxed if grammar is not None else []  # for a header
    return Answers(service, request, [prompt], options, (), chat, grammar, is_thinking)


def event(data: Json) -> str:
    """One server-sent event, named after the type of ``data`` if it has one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {compact(data)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events, and ``ping`` where nothing else moves; an error is the last.  However it
    ends, its answers are cancelled.  ``responses`` describes a route that may answer so."""

    media_type = "text/event-stream"
    responses: ClassVar[dict[int | str, Json]] = {200: {"content": {media_type: {}}}}
    spell = staticmethod(event)

    def __init__(self, events: AsyncIterator[str], answers: Answers, ping: str = ": ping\n\n"):
        content = _with_pings(events, answers, ping, self.spell)
        super().__init__(content, headers={"cache-control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


def spelled(content: bytes) -> str:
    """A token's bytes as text; where they are part of a character, as OpenAI writes them."""
    return content.decode(errors="backslashreplace")


async def _with_pings(
    events: AsyncIterator[str], answers: Answers, ping: str, spell: Callable[[Json], str]
) -> AsyncIterator[str]:
    """``events``, with ``ping`` wherever ``PING_SECONDS`` have passed without one, and the error
    that ends them."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait((coming,), timeout=PING_SECONDS)
            yield coming.result() if done else ping
            if done:
                coming = asyncio.ensure_future(anext(events))
    except StopAsyncIteration:
        pass
    except RefusedError as problem:
        yield spell(error_body(answers.request.url.path, problem))
    finally:
        coming.cancel()
