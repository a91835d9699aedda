"""Ollama's API: requests become OpenAI's conversations and texts, answers are lines of JSON."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.model.tokenizer import FIM_TOKENS
from slotmoe.offload.model_cache import timestamp
from slotmoe.tools.serve import openai, requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, compact
from slotmoe.tools.serve.errors import OLLAMA_PATH
from slotmoe.tools.serve.formats import ContentDelta, joined, parse_arguments
from slotmoe.tools.serve.requests import Call, CallId, Label, Message, Name, Text, Whole
from slotmoe.tools.serve.service import Service, Serving

router = APIRouter(prefix=OLLAMA_PATH)
_VERSION = "0.13.0"  # of Ollama, whose API this is: clients ask for a least one


class OllamaOptions(openai.OpenAIRequest):
    """Most say how to load a model, and are ignored."""

    n: Annotated[Literal[1] | None, Whole] = None
    repetition_penalty: openai.Repetition | None = Field(None, alias="repeat_penalty")
    num_predict: Annotated[int, Field(ge=-2), Whole] | None = None


class OllamaFunction(requests.FunctionName):
    arguments: Json


class OllamaCall(requests.Fields):
    id: CallId | None = None
    function: OllamaFunction


class OllamaMessage(requests.Fields):
    inside = "messages"
    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=requests.MAX_TOOLS)] | None = None
    tool_name: Name | None = None
    tool_call_id: CallId | None = None


class OllamaRequest(requests.Fields):
    model: Label
    stream: bool | None = Field(None, description="true if not given")
    options: OllamaOptions | None = None
    format: Literal["", "json"] | Json | None = None
    think: bool | Label | None = None
    logprobs: bool | None = None
    top_logprobs: requests.TopLogprobs | None = None
    keep_alive: float | Label | None = None

    def answer_options(self, service: Service) -> requests.AnswerOptions:
        """Raises ``RefusedError``, also for another model than the server's."""
        service.check_model(self.model)
        options, logprobs = self.options or OllamaOptions.model_construct(), self.top_logprobs
        limit = max(options.num_predict or -1, -1)
        logprobs = (logprobs or 0) if self.logprobs else None
        return options.options_with(service.vocabulary, limit, logprobs)

    def conversation(
        self, messages: list[Message], policy: requests.ToolPolicy | None = None
    ) -> requests.Conversation:
        """A last message of the assistant's is the beginning of the answer."""
        effort = self.think
        if isinstance(effort, bool):
            effort = "high" if effort else "none"
        continues = messages[-1].role == "assistant" and not messages[-1].calls
        return requests.Conversation(messages, policy, self.wanted, effort, continues)

    @property
    def wanted(self) -> requests.Rule | None:
        schema = {"type": "object"} if self.format == "json" else self.format
        return requests.Rule("json", schema) if schema else None


class OllamaChatRequest(OllamaRequest):
    messages: list[OllamaMessage] | None = None
    tools: requests.Tools | None = None

    def chat(self) -> requests.Conversation:
        """A result without an id is of the first call left, by name if given."""
        told, calls = list[Message](), list[Call]()
        for message in self.messages or ():
            said = Message(message.role, message.content or "", thoughts=message.thinking or "")
            if message.role == "tool":
                same = [call for call in calls if call.id == message.tool_call_id]
                same += [call for call in calls if message.tool_name in (None, call.name)]
                calls = [call for call in calls if call not in same[:1]]
                said.call_id = same[0].id if same else "none"
            elif message.role == "assistant":
                calls = said.calls = [
                    Call(made.id or f"{len(told)}-{n}", f.name, json.dumps(f.arguments))
                    for n, made in enumerate(message.tool_calls or ())
                    for f in [made.function]
                ]
            told.append(said)
        policy = requests.tool_policy([tool.function for tool in self.tools or ()], None)
        return self.conversation(told, policy)


class GenerateRequest(OllamaRequest):
    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    raw: bool | None = None
    template: Literal[""] | None = None


class Lines(EventStream):
    """The same as a JSON object a line."""

    media_type = "application/x-ndjson"
    responses: ClassVar[dict[int | str, Json]] = {200: {"content": {media_type: {}}}}

    @staticmethod
    def spell(data: Json) -> str:
        return f"{compact(data)}\n"


@router.post("/chat", responses=Lines.responses)
async def chat(body: OllamaChatRequest, request: Request, service: Serving) -> Response:
    options = body.answer_options(service)
    if not body.messages:
        return _loaded(body, {"message": {"role": "assistant", "content": ""}})
    return await _respond(body, await chat_answers(service, request, body.chat(), options))


@router.post("/generate", responses=Lines.responses)
async def generate(body: GenerateRequest, request: Request, service: Serving) -> Response:
    prompt, suffix, options = body.prompt or "", body.suffix or "", body.answer_options(service)
    if not prompt and not suffix:
        return _loaded(body, {"response": ""})
    if not (body.raw or suffix) and service.tokenizer.template is not None:
        said = (("system", body.system), ("user", prompt))
        told = [Message(role, text) for role, text in said if text]
        answers = await chat_answers(service, request, body.conversation(told), options)
        return await _respond(body, answers)
    ids = await service.prepare(service.encode, prompt, True, suffix or None)
    grammar = await service.grammar(body.wanted)
    return await _respond(body, Answers(service, request, [ids], options, grammar=grammar))


def _loaded(body: OllamaRequest, empty: Json) -> Response:
    """For clients that only want the model in memory, or out of it."""
    reason = "unload" if body.keep_alive in (0, "0") else "load"
    about = {"model": body.model, "created_at": timestamp(time.time()), **empty}
    return JSONResponse({**about, "done": True, "done_reason": reason})


async def _respond(body: OllamaRequest, answers: Answers) -> Response:
    is_chat, pending = isinstance(body, OllamaChatRequest), list[ContentDelta]()

    def chunk(update: Update) -> Json:
        """What is new, and the calls that are complete with it."""
        said: Json = {"content" if is_chat else "response": update.text}
        if thought := "".join(delta.text for delta in update.content if delta.reasoning):
            said["thinking"] = thought
        pending.extend(delta for delta in update.content if delta.call is not None)
        if any(delta.complete for delta in update.content):
            made = {part.call: _call(part) for part in joined(pending) if part.complete}
            said["tool_calls"] = [call for call in made.values() if call is not None]
            pending[:] = [delta for delta in pending if delta.call not in made]
        content: Json = {"message": {"role": "assistant", **said}} if is_chat else said
        if scores := answers.scores(update.tokens):
            content["logprobs"] = scores
        about = {"model": answers.service.name, "created_at": timestamp(time.time())}
        return {**about, **content, "done": False}

    async def events() -> AsyncIterator[str]:
        async for update in answers.updates():
            if update.content or update.tokens:
                yield Lines.spell(chunk(update))
        yield Lines.spell({**chunk(Update(0)), **_end(answers)})

    if body.stream is not False:
        return Lines(events(), answers, Lines.spell(chunk(Update(0))))
    (update,) = await answers.whole()
    return await asyncio.to_thread(answers.respond, {**chunk(update), **_end(answers)})


def _call(part: ContentDelta) -> Json | None:
    if (given := parse_arguments(part.text)) is None:
        return None
    function = {"index": part.call, "name": part.name, "arguments": given}
    return {"id": f"call_{uuid.uuid4().hex}", "function": function}


def _end(answers: Answers) -> Json:
    """Why an answer ended, its counts, and durations in nanoseconds."""
    usage, (job,), end = answers.usage(), answers.jobs, time.monotonic()
    times = pairwise((job.submitted, job.started, job.first_token or end, end))
    spans = zip(("load_duration", "prompt_eval_duration", "eval_duration"), times, strict=True)
    durations = {name: int(1e9 * (later - earlier)) for name, (earlier, later) in spans}
    durations["total_duration"] = sum(durations.values())
    counts = {"prompt_eval_count": usage.prompt, "eval_count": usage.answer}
    reason = "stop" if answers.finishes == ["stop"] else "length"
    return {"done": True, "done_reason": reason, **durations, **counts}


class ShowRequest(requests.Fields):
    model: Label | None = None
    name: Label | None = Field(None, description="`model` by its older name")


@router.post("/show")
async def show(body: ShowRequest, service: Serving) -> Response:
    service.check_model(body.model or body.name or "")
    about, tokenizer = _described(service, service.name), service.tokenizer
    family, own = about["details"]["family"], service.own_settings.items()
    capabilities = {"completion": True, "insert": None not in map(tokenizer.token_id, FIM_TOKENS)}
    capabilities |= {"tools": tokenizer.template is not None}
    capabilities |= {"thinking": tokenizer.reasoning is not None}
    context = {f"{family}.context_length": service.runtime.context}
    about["model_info"] = {"general.architecture": family, **context}
    about["capabilities"] = [name for name, is_there in capabilities.items() if is_there]
    about["parameters"] = "\n".join(f"{name} {value}" for name, value in own)
    return JSONResponse({**about, "modelfile": "", "template": tokenizer.template or ""})


@router.get("/version")
async def version() -> Response:
    return JSONResponse({"version": _VERSION})


@router.get("/tags")
@router.get("/ps")
async def models(service: Serving) -> Response:
    return JSONResponse({"models": [_described(service, name) for name in service.listed]})


def _described(service: Service, name: str) -> Json:
    """The open model under a name with a tag, as all of Ollama's are."""
    manifest, name = service.runtime.model.export.manifest, name + (":latest" * (":" not in name))
    family = service.runtime.config.family.architecture.removesuffix("ForCausalLM").lower()
    codes = "/".join(sorted({*manifest["quantization"]["experts"].values()}))
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return {
        **{"name": name, "model": name, "digest": manifest["checksum"], "size": size},
        **{"modified_at": timestamp(service.created), "context_length": service.runtime.context},
        "size_vram": service.runtime.plan.budget if service.runtime.plan.tier == "vram" else 0,
        "details": {"family": family, "families": [family], "quantization_level": codes},
    }
