"""The answers to a request, whole or as a stream of events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import StreamingResponse

from slotmoe.model.generate import Answer, Delta
from slotmoe.offload.scheduler import Job, QueueFullError
from slotmoe.tools.serve.errors import RefusedError, error_body
from slotmoe.tools.serve.function_calling import ContentDelta, Reader
from slotmoe.tools.serve.grammar import Mask
from slotmoe.tools.serve.requests import AnswerOptions, ChatRequest
from slotmoe.tools.serve.service import Service

MAX_SCORES = 100_000  # log-probabilities of prompts' tokens and their alternatives in one request


async def _service(request: Request) -> Any:
    return request.app.state.service


Serving = Annotated[Service, Depends(_service)]


class Answers:
    """The answers to ``prompts``, in the batch until they end or ``cancel`` is called.

    ``grammar`` makes the mask of an answer, ``reader`` the parser of its text, in which the special
    tokens of ``shown`` appear.  Where ``scored``, the prompts' own tokens and their
    log-probabilities are in ``jobs[i].answer.read`` from the first piece on.  Made inside the event
    loop.  Raises ``RefusedError``: 400 where a prompt does not fit, 429 where the queue is full.
    """

    def __init__(
        self,
        service: Service,
        owner: str,
        prompts: list[list[int]],
        options: AnswerOptions,
        *,
        grammar: Callable[[], Mask] | None = None,
        reader: Callable[[], Reader] = lambda: Reader(None),
        shown: Mapping[int, str] | None = None,
        scored: bool = False,
    ):
        self.service, self._loop = service, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.jobs: list[Job] = []
        if scored:
            _check_scores(service, prompts, options)
        sampling = options.sampling
        for prompt in prompts:
            limit = _limit(service, prompt, options.limit)
            for choice in range(options.choices):
                seed = None if sampling.seed is None else (sampling.seed + choice) % (1 << 63)
                mask = grammar() if grammar is not None else None
                model = prompt, service.tokenizer, service.runtime.eos_token_ids
                ends = replace(sampling, seed=seed), limit, options.stop
                answer = Answer(*model, *ends, options.logprobs, mask, shown)
                emit = partial(self._emit, len(self.jobs))
                self.jobs.append(Job(prompt, answer, emit, owner, scored))
        self._readers = [reader() for _ in self.jobs]
        self._prompt_tokens = sum(map(len, prompts))
        try:
            service.batch.submit(self.jobs)
        except QueueFullError:
            if not service.batch.alive:
                problem = "the model has failed; the server is ending"
                raise RefusedError(problem, status=503) from None
            service.refused += 1
            problem = "too many answers are waiting; try again later"
            refusal = RefusedError(problem, None, 429, "rate_limit_exceeded")
            refusal.headers = {"retry-after": str(service.batch.retry_after)}
            raise refusal from None

    def _emit(self, index: int, piece: Delta) -> None:
        if piece.finish is not None:
            self.service.observe(self.jobs[index])
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
        except RuntimeError:  # the loop has ended, so nothing reads this any more
            self.cancel()

    def cancel(self) -> None:
        """Nobody wants these answers any more; the batch ends them within one step."""
        for job in self.jobs:
            job.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the answer, piece) as they come.  Raises ``RefusedError`` if it fails."""
        running = len(self.jobs)
        while running:
            index, piece = await self._pieces.get()
            if piece.finish in ("error", "refused"):
                self.cancel()
                raise RefusedError(piece.error, status=500 if piece.finish == "error" else 400)
            running -= piece.finish is not None
            yield index, piece

    async def whole(self, request: Request) -> list[list[Delta]]:
        """All pieces of each answer; if the client leaves before, the answers end."""

        async def collect() -> list[list[Delta]]:
            pieces: list[list[Delta]] = [[] for _ in self.jobs]
            async for index, piece in self.pieces():
                pieces[index].append(piece)
            return pieces

        async def disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        whole, watch = asyncio.create_task(collect()), asyncio.create_task(disconnect())
        try:
            await asyncio.wait({whole, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise RefusedError("the client left", status=499)
            return whole.result()
        finally:
            self.cancel()
            watch.cancel()
            whole.cancel()

    def content(self, index: int, *pieces: Delta) -> list[ContentDelta]:
        """The text and tool calls that ``pieces`` add to an answer."""
        reader = self._readers[index]
        deltas = [delta for piece in pieces for delta in reader.feed(piece.text)]
        return deltas + (reader.end() if pieces[-1].finish is not None else [])

    def finish_reason(self, index: int, piece: Delta) -> str | None:
        """In OpenAI's words; None where the answer goes on."""
        if piece.finish == "stop" and self._readers[index].calls:
            return "tool_calls"
        return "length" if piece.finish == "shutdown" else piece.finish

    def usage(self) -> dict[str, Any]:
        """Counts of tokens in OpenAI's form."""
        answer_tokens = sum(len(job.answer.ids) for job in self.jobs)
        cached = min(sum(job.reused for job in self.jobs), self._prompt_tokens)
        usage = {"prompt_tokens": self._prompt_tokens, "completion_tokens": answer_tokens}
        usage["total_tokens"] = self._prompt_tokens + answer_tokens
        return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


async def chat_answers(service: Service, body: ChatRequest, owner: str) -> Answers:
    """The answers to a conversation.  Raises ``RefusedError`` and ``ConfigError``."""
    service.check_model(body.model)
    options, policy = body.options(service.tokenizer.size), body.tool_policy()
    schema, dialect = body.schema_wanted, service.dialect

    def prepare() -> tuple[Callable[[], Mask] | None, list[int]]:
        grammar = service.grammars.compile(schema, policy)
        return grammar, service.tokenizer.encode(dialect.prompt(body.messages, policy))

    # In a thread: the template runs in a child process.
    grammar, prompt = await asyncio.to_thread(prepare)
    return Answers(
        service,
        owner,
        [prompt],
        options,
        grammar=grammar,
        reader=lambda: Reader(dialect.format if policy else None, either=schema is not None),
        shown=dialect.shown if policy else None,
    )


class EventStream(StreamingResponse):
    """Server-sent events; if they fail, the error is the last.  However the response ends, its
    answers are cancelled."""

    def __init__(self, request: Request, events: AsyncIterator[str], answers: Answers):
        headers = {"cache-control": "no-cache"}
        content = _with_error(request.url.path, events)
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


def event(data: Mapping[str, Any], kind: str | None = None) -> str:
    """One server-sent event."""
    text = f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
    return text if kind is None else f"event: {kind}\n{text}"


async def _with_error(path: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for text in events:
            yield text
    except RefusedError as problem:
        body = error_body(path, problem)
        yield event(body, "error" if "type" in body else None)


def _limit(service: Service, prompt: list[int], limit: int | None) -> int:
    """The most tokens of an answer to ``prompt``."""
    context, vocabulary = service.runtime.context, service.runtime.config.vocab_size
    if not prompt:
        raise RefusedError("the prompt is empty", "prompt")
    if max(prompt) >= vocabulary:
        problem = f"outside 0 to {vocabulary - 1}, the model's vocabulary"
        raise RefusedError(f"a token id of the prompt is {problem}", "prompt")
    room = context - len(prompt)
    if room < (0 if limit == 0 else 1):
        problem = f"the context holds {context} tokens, the prompt has {len(prompt)}"
        advice = "Shorten it, or start the server with --context"
        raise RefusedError(f"{problem}. {advice}", code="context_length_exceeded")
    return room if limit is None else min(limit, room)


def _check_scores(service: Service, prompts: list[list[int]], options: AnswerOptions) -> None:
    """Raises ``RefusedError`` unless the prompts' log-probabilities can be given."""
    tokens = sum(len(prompt) for prompt in prompts)
    count = tokens * options.choices * (1 + (options.logprobs or 0))
    if count > MAX_SCORES:
        problem = f"{count} log-probabilities, more than {MAX_SCORES} in one request"
        raise RefusedError(f"echo with logprobs would give {problem}", "logprobs")
    if any(id_ >= service.tokenizer.size for prompt in prompts for id_ in prompt):
        problem = f"outside 0 to {service.tokenizer.size - 1}, those that are text"
        raise RefusedError(f"a token id of the prompt is {problem}", "prompt")
