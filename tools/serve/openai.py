"""OpenAI's chat and text completions."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, Field, Tag
from starlette.responses import JSONResponse

from slotmoe import __version__
from slotmoe.jsonfile import Json
from slotmoe.model.generate import Token
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event, spelled
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import ContentDelta, joined
from slotmoe.tools.serve.requests import Id, Stop, Stops, Text, TextOr, TopLogprobs, Whole
from slotmoe.tools.serve.service import Serving

router = APIRouter()
MAX_IDS = 1 << 18  # of a prompt; DeepSeek-V2's longest context has 163,840
Limit = Annotated[int, Field(ge=-1), Whole]  # of tokens; -1 is as many as the context holds
Ids = Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), Whole, AfterValidator(lambda s: s % 2**63)]
_Bias = dict[str, Annotated[float, Field(ge=-100, le=100)]]
Option = Annotated[str, Field(max_length=1 << 16)]
Bias = Annotated[_Bias, Field(max_length=1024), requests.at_most(1024, "token ids")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=0.01, le=10)]  # less would overflow logits


class StreamOptions(requests.Fields):
    include_usage: bool = Field(default=False, description="in each chunk, null until the last")
    continuous_usage_stats: bool = Field(default=False, description="`usage` of the tokens so far")


class StructuredOutputs(requests.Fields):
    """vLLM's form of what an answer follows."""

    definition: Json | requests.Source | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: requests.Source | None = None
    grammar: requests.Source | None = None
    choice: Annotated[list[Option], Field(min_length=1)] | None = None

    def wanted(self, name: str) -> requests.Rule:
        """By the field of this ``name``.  Raises ``RefusedError``."""
        given = {key: value for key, value in self if value is not None}
        if len(given) != 1:
            names = "json, json_object, regex, grammar and choice"
            raise RefusedError(f"{name} has {len(given)} of {names}, expected one", name)
        ((kind, rule),) = given.items()
        match kind:
            case "regex" | "grammar" | "choice":
                return requests.Rule(kind, rule, name)
        schema = {"type": "object"} if kind == "json_object" else rule
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise RefusedError(f"{name}.json is no JSON object", name)
        return requests.Rule("json", schema)


class OpenAIRequest(requests.GenerationRequest):
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = Field(None, description="with `n`, answer i has seed + i")
    stop: TextOr[Stop, Stops] | None = None
    n: Annotated[int, Field(ge=1, le=requests.MAX_ANSWERS), Whole] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Bias | None = Field(None, description="by token id")
    stream_options: StreamOptions | None = Field(None, description="needs `stream`")
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    prompt_logprobs: TopLogprobs | None = Field(None, description="not with `stream`")
    response_format: requests.ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    grammar: requests.Source | None = Field(None, description="as in `structured_outputs`")
    json_schema: Json | None = Field(None, description="`json` of `structured_outputs`")
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None

    def options_with(
        self, vocabulary: int, limit: int | None, logprobs: int | None
    ) -> requests.AnswerOptions:
        """For ``vocabulary`` ids; a ``limit`` of -1 is None.  Raises ``RefusedError``."""
        limit, least = None if limit == -1 else limit, self.min_tokens or 0
        if limit is not None and limit < least:
            raise RefusedError("min_tokens is more than the limit of tokens", "min_tokens")
        if self.stream_options is not None and not self.stream:
            raise RefusedError("stream_options needs stream: true", "stream_options")
        bias = []
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
                problem = f"{key[:40]!r} is not a token id from 0 to {vocabulary - 1}"
                raise RefusedError(f"logit_bias: {problem}", "logit_bias")
            bias.append((int(key), value))
        if self.prompt_logprobs is not None and self.stream:
            raise RefusedError("prompt_logprobs can't be given with stream", "prompt_logprobs")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        about = self.sampling(*bias), limit, stop, self.n or 1, logprobs, least
        ends = bool(self.ignore_eos), tuple(self.stop_token_ids or ())
        return requests.AnswerOptions(*about, *ends, self.prompt_logprobs)

    @property
    def wanted(self) -> requests.Rule | None:
        """What answers follow.  Raises ``RefusedError``."""
        rule = requests.rule_of(self.response_format)
        given = [] if rule is None else ["response_format"]
        names = ("structured_outputs", "json_schema", "grammar")
        given += [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise RefusedError(f"give {given[0]} or {given[1]}, not both", given[1])
        if rule is not None or not given:
            return rule
        make = StructuredOutputs.model_construct
        outputs = self.structured_outputs or make(definition=self.json_schema, grammar=self.grammar)
        return outputs.wanted(given[0])


class Templated(requests.Fields):
    """A conversation, and how the chat template writes it."""

    model: requests.Label | None = None
    messages: requests.Messages | None = None
    tools: requests.Tools | None = None
    add_generation_prompt: bool | None = Field(None, description="if false, no answer is begun")
    continue_final_message: bool | None = Field(None, description="the answer goes on with it")
    chat_template_kwargs: Json | None = Field(None, description="variables of the template")
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: requests.Label | None = Field(None, description=requests.EFFORT)
    thinking: requests.Thinking | None = Field(None, description="its `type` switches reasoning")

    def conversation(self, wanted: requests.Rule | None = None) -> requests.Conversation:
        """Raises ``RefusedError``."""
        functions = [tool.function for tool in self.tools or ()]
        policy = requests.tool_policy(functions, self.tool_choice, self.parallel_tool_calls)
        messages, extra = self.messages or [], dict(self.chat_template_kwargs or {})
        name = "continue_final_message" if self.continue_final_message else "prefix"
        continues = bool(self.continue_final_message or (messages and messages[-1].prefix))
        if continues and self.add_generation_prompt:
            raise RefusedError(f"give add_generation_prompt or {name}, not both", name)
        told = [message.message for message in messages]
        if continues and (told[-1].role != "assistant" or told[-1].calls):
            raise RefusedError(f"{name}: the last message is no text of the assistant", name)
        if self.add_generation_prompt is False and not continues:
            extra["add_generation_prompt"] = False
        effort = self.reasoning_effort
        effort = effort if self.thinking is None else self.thinking.effort(effort) or effort
        return requests.Conversation(told, policy, wanted, effort, continues, extra)


class ChatRequest(OpenAIRequest, Templated):
    """``/v1/chat/completions``."""

    messages: requests.Messages
    max_tokens: Limit | None = Field(None, description="-1 is as many as the context holds")
    max_completion_tokens: Limit | None = Field(None, description="`max_tokens` by another name")
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = Field(None, description="needs `logprobs`")
    modalities: list[Literal["text"]] | None = None

    def options(self, vocabulary: int) -> requests.AnswerOptions:
        """For a tokenizer of ``vocabulary`` ids.  Raises ``RefusedError``."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedError("give max_tokens or max_completion_tokens, not both", "max_tokens")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        if (limit := getattr(self, name)) == 0:
            raise RefusedError(f"{name} is 0, expected a positive count or -1", name)
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedError("top_logprobs needs logprobs: true", "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.options_with(vocabulary, limit, logprobs)


def _prompt_kind(value: object) -> str | None:
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


_SOME_PROMPTS = Field(min_length=1, max_length=requests.MAX_ANSWERS)


class CompletionRequest(OpenAIRequest):
    """``/v1/completions``."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Text], _SOME_PROMPTS, Tag("texts")]
        | Annotated[list[Ids], _SOME_PROMPTS, Tag("lists")],
        requests.by_kind(_prompt_kind, "text, token ids nor a list of either"),
    ] = Field(description="text, token ids, or up to 16 of either")
    max_tokens: Limit | None = Field(
        None, description="16 if not given; 0 needs `echo` or `prompt_logprobs`"
    )
    logprobs: TopLogprobs | None = Field(None, description="the likeliest tokens in each place")
    echo: bool | None = Field(None, description="the prompt comes first")
    suffix: Text | None = Field(None, description="if the tokenizer has tokens for it")
    best_of: Annotated[Literal[1], Whole] | None = None

    def options(self, vocabulary: int) -> requests.AnswerOptions:
        """For a tokenizer of ``vocabulary`` ids.  Raises ``RefusedError``."""
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RefusedError("max_tokens: 0 needs echo: true or prompt_logprobs", "max_tokens")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise RefusedError("suffix can only be given with one prompt, as text", "suffix")
        if self.suffix is not None and self.echo:
            raise RefusedError("suffix and echo can't be given together", "echo")
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self.options_with(vocabulary, limit, self.logprobs)

    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


@router.get("/v1/models")
async def models(service: Serving) -> Response:
    return JSONResponse({"object": "list", "data": [*map(service.described, service.listed)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Serving) -> Response:
    service.check_model(name)
    return JSONResponse(service.described(name))


@router.post("/v1/chat/completions", responses=EventStream.responses)
async def chat_completions(body: ChatRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options = body.options(service.vocabulary)
    answers = await chat_answers(service, request, body.conversation(body.wanted), options)
    return await _respond(body, answers, ChatChoices(answers))


@router.post("/v1/completions", responses=EventStream.responses)
async def completions(body: CompletionRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options, given = body.options(service.vocabulary), body.prompts()
    if len(given) * options.choices > requests.MAX_ANSWERS:
        problem = f"prompts times n is more than {requests.MAX_ANSWERS} answers in one request"
        raise RefusedError(problem, "n")
    prompts, echoes = list[list[int]](), list[str]()
    for prompt in given:
        work = service.encode, prompt, True, body.suffix
        prompts.append(await service.prepare(*work) if isinstance(prompt, str) else prompt)
        if body.echo:
            if not isinstance(prompt, str):
                prompt = await service.prepare(service.tokenizer.decode, prompt)
            echoes += [prompt] * options.choices
    grammar = await service.grammar(body.wanted)
    answers = Answers(service, request, prompts, options, echoes, grammar=grammar)
    return await _respond(body, answers, TextChoices(answers))


async def _respond(
    body: OpenAIRequest, answers: Answers, choices: "ChatChoices | TextChoices"
) -> Response:
    about: Json = {"id": f"{choices.prefix}-{uuid.uuid4().hex}", "model": answers.service.name}
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
    updates = await answers.whole()

    def respond() -> Response:
        content = {**about, "object": choices.kind, "choices": [*map(choices.whole, updates)]}
        return answers.respond({**content, **choices.about, "usage": _usage(answers)})

    return await asyncio.to_thread(respond)  # there may be many log-probabilities


class ChatChoices:
    """Messages, whole or as their deltas; a stream begins with ``first``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answers: Answers):
        self._answers = answers
        begin = {"role": "assistant", "content": ""}
        self.first = [_choice(index, "delta", begin) for index in range(len(answers.jobs))]

    @property
    def about(self) -> Json:
        """Fields of a whole response beside its choices."""
        scores = self._answers.prompt_scores(0)
        return {} if scores is None else {"prompt_logprobs": scores}

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
            message["reasoning_content"] = message["reasoning"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(update.tokens)
        return _choice(update.index, "message", message, logprobs, update.finish)

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        if self._answers.options.logprobs is None:
            return None
        return {"content": self._answers.scores(tokens), "refusal": None}


class TextChoices:
    prefix, kind, chunk_kind, first = "cmpl", "text_completion", "text_completion", list[Json]()
    about = Json()

    def __init__(self, answers: Answers):
        self._answers = answers
        self._offsets = [0] * len(answers.jobs)  # characters of the tokens so far

    def chunks(self, update: Update) -> list[Json]:
        return [self.whole(update)]

    def whole(self, update: Update) -> Json:
        logprobs = None if self._answers.options.logprobs is None else self._logprobs(update)
        choice = _choice(update.index, "text", update.text, logprobs, update.finish)
        scores = self._answers.prompt_scores(update.index)
        return choice if scores is None else {**choice, "prompt_logprobs": scores}

    def _logprobs(self, update: Update) -> Json:
        offsets = list[int]()
        for token in update.tokens:
            offsets.append(self._offsets[update.index])
            self._offsets[update.index] += len(token.text)

        def make(token: Token) -> dict[str, float] | None:
            # That of the token itself is always there.
            top = [*token.likeliest[: self._answers.options.logprobs], (token.id, token.logprob)]
            scores = {self._name(id_): logprob for id_, logprob in top if logprob is not None}
            return None if token.logprob is None else scores

        likeliest = self._answers.scores(update.tokens, make)
        names = [self._name(token.id) for token in update.tokens]
        scores_of = {"tokens": names, "token_logprobs": [t.logprob for t in update.tokens]}
        return {**scores_of, "top_logprobs": likeliest, "text_offset": offsets}

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
        return {"reasoning_content": delta.text, "reasoning": delta.text}
    if delta.call is None:
        return {"content": delta.text}
    arguments: Json = {"function": {"arguments": delta.text}}
    added = arguments if delta.name is None else _call(delta.name, delta.text)
    return {"tool_calls": [{"index": delta.call, **added}]}


def _call(name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
