"""Anthropic's messages.  A request becomes one of OpenAI's chat, which decides the rest.

Some fields mean nothing to this server and are accepted: a prompt is cached whether or not
``cache_control`` asks for it, and a budget of thinking bounds nothing.
"""

import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import anthropic_messages as given
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event
from slotmoe.tools.serve.errors import ANTHROPIC_PATH, RefusedError
from slotmoe.tools.serve.fields import BY_TYPE, Refused, accepted
from slotmoe.tools.serve.reader import ContentDelta, joined, parse_arguments
from slotmoe.tools.serve.rules import Schema
from slotmoe.tools.serve.service import Serving

router = APIRouter()
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # in OpenAI's words
_THINKING = accepted("nothing bounds reasoning")
_SIGNATURE = "slotmoe"  # of thinking: clients send it back, nothing here verifies it
_BILLING = "x-anthropic-billing-header:"  # Claude Code's, another one in each conversation
_MAX_TOOLS = 1024
_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


class ToolChoice(requests.Model):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(requests.FunctionName):
    type: Literal["tool"]
    disable_parallel_tool_use: bool | None = None


class Metadata(requests.Model):
    user_id: requests.Label | None = None


class ThinkingConfig(requests.Model):
    type: Literal["disabled", "enabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[requests.Count | None, _THINKING] = None
    display: Annotated[Literal["summarized", "omitted"] | None, _THINKING] = None


class OutputFormat(requests.Model):
    type: Literal["json_schema"]
    definition: Annotated[Json, Field(alias="schema")]


class OutputConfig(requests.Model):
    effort: requests.Label | None = Field(None, description="with `thinking.type` `enabled`")
    format: OutputFormat | None = None
    task_budget: Annotated[Json | None, _THINKING] = None


class CountRequest(given.Cacheable):
    """``/v1/messages/count_tokens``, and what it shares with ``/v1/messages``."""

    model: requests.Label
    messages: Annotated[list[given.AnthropicMessage], requests.SOME]
    system: given.Text | None = None
    tools: Annotated[list[given.Tool], Field(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolChoice | NamedChoice, BY_TYPE] | None = None
    thinking: ThinkingConfig | None = Field(None, description="its `type` switches reasoning")
    output_config: OutputConfig | None = Field(None, description="its `format` is a JSON schema")
    context_management: Annotated[Json | None, accepted("nothing is edited")] = None
    speed: Annotated[Literal["standard", "fast"] | None, accepted("there is one speed")] = None
    user_profile_id: Annotated[requests.Label | None, requests.LABEL] = None
    workspace_id: Annotated[requests.Label | None, requests.LABEL] = None
    billing_policy: Annotated[None, Refused("nothing is billed")] = None
    compaction: Annotated[None, Refused("a conversation is read whole")] = None
    mcp_servers: Annotated[list[None] | None, Refused("the server calls no others")] = None

    def chat(self) -> requests.Conversation:
        """A last message of the assistant's begins the answer.  Raises ``RefusedError``."""
        choice = self.tool_choice and _CHOICES.get(self.tool_choice.type, self.tool_choice)
        is_single = self.tools and self.tool_choice and self.tool_choice.disable_parallel_tool_use
        offer = given.Offer(self.tools or [])
        messages = [message for turn in self.messages for message in turn.messages(offer)]
        system = self.system or ()
        texts = [system] if isinstance(system, str) else [block.text for block in system]
        system = "".join(text for text in texts if not text.startswith(_BILLING))
        continues = self.messages[-1].role == "assistant"
        output = self.output_config or OutputConfig.model_construct()
        efforts, form = {"disabled": "none", "enabled": output.effort or "high"}, output.format
        effort = efforts.get(self.thinking.type) if self.thinking is not None else None
        if continues and form is not None:
            problem = "the answer can't follow a schema where a last message of the assistant's"
            raise RefusedError(f"messages: {problem} has begun it", "messages")
        policy = offer.policy(choice, False if is_single else None)
        wanted = None if form is None else Schema.model_construct(definition=form.definition)
        messages = requests.with_system([system], messages)
        return requests.Conversation(messages, policy, wanted, effort, continues)


class MessagesRequest(CountRequest, requests.GenerationRequest):
    """``/v1/messages``."""

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0), requests.Whole]
    stop_sequences: requests.Stops | None = None
    metadata: Annotated[Metadata | None, requests.LABEL] = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, requests.TIER] = None
    container: Annotated[None, Refused("the server runs no code")] = None
    diagnostics: Annotated[Json | None, accepted("nothing is diagnosed")] = None
    fallback_credit_token: Annotated[None, Refused("nothing is billed")] = None
    fallbacks: Annotated[None, Refused("the server has one model")] = None
    inference_geo: Annotated[requests.Label | None, accepted("the server is one machine")] = None
    thread: object = Field(None, description="refused: `thread_unsupported_request`")

    def options(self) -> requests.AnswerOptions:
        """Raises ``RefusedError``."""
        if self.thread is not None:  # a client that tries it then sends the whole conversation
            problem = "thread: this server keeps no threads; send the whole conversation"
            raise RefusedError(problem, "thread", details=_NO_THREADS)
        stop = tuple(self.stop_sequences or ())
        return requests.AnswerOptions(self.sampling(), self.max_tokens, stop)


@router.post(f"{ANTHROPIC_PATH}/count_tokens")
async def count_tokens(body: CountRequest, service: Serving) -> Response:
    service.check_model(body.model)
    return JSONResponse({"input_tokens": len(await service.chat_ids(body.chat()))})


@router.post(ANTHROPIC_PATH, responses=EventStream.responses)
async def messages(body: MessagesRequest, request: Request, service: Serving) -> Response:
    service.check_model(body.model)
    options = body.options()
    answers = await chat_answers(service, request, body.chat(), options)
    about: Json = {"id": f"msg_{uuid.uuid4().hex}", "type": "message"}
    about |= {"role": "assistant", "model": service.name}
    if body.stream:
        return EventStream(_events(about, answers), answers, ping=_event("ping"))
    (update,) = await answers.whole()
    content = {"content": _blocks(update.content), "usage": _usage(answers)}
    return JSONResponse({**about, **content, **_stop(update)})


def _usage(answers: Answers) -> dict[str, int]:
    usage = answers.usage()
    counts = {"input_tokens": usage.prompt - usage.cached, "output_tokens": usage.answer}
    return {**counts, "cache_read_input_tokens": usage.cached, "cache_creation_input_tokens": 0}


def _stop(update: Update) -> Json:
    is_cut = update.stopped_by is not None
    reason = "stop_sequence" if is_cut else _STOP_REASONS[update.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": update.stopped_by}


def _blocks(deltas: list[ContentDelta]) -> list[Json]:
    """Of a whole answer, without tool calls that were cut off."""
    blocks = list[Json]()
    for part in joined(deltas):
        block = _block(part.kind, part.name, part.text, _SIGNATURE)
        if part.name is None:
            blocks.append(block)
        elif part.complete and (given := parse_arguments(part.text)) is not None:
            blocks.append({**block, "input": given})
    return blocks or [_block("text", None)]


def _block(kind: str, name: str | None, text: str = "", signature: str = "") -> Json:
    """A call's has no input yet."""
    if kind == "call":
        return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": {}}
    if kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": signature}
    return {"type": "text", "text": text}


# The type of an event that adds to a block, and where its text is.
_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")}
_DELTAS["call"] = ("input_json_delta", "partial_json")


async def _events(about: Json, answers: Answers) -> AsyncIterator[str]:
    begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
    yield _event("message_start", message={**about, **begun, "usage": _usage(answers)})
    index, kind = -1, ""  # of the content block that is open
    async for update in answers.updates():
        if update.finish is not None and index < 0 and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty block
        for delta in update.content:
            if delta.name is not None or delta.kind != kind:
                yield _block_end(index, kind)
                index, kind = index + 1, delta.kind
                block = _block(kind, delta.name)
                yield _event("content_block_start", index=index, content_block=block)
            if delta.text:
                type_, name = _DELTAS[kind]
                added = {"type": type_, name: delta.text}
                yield _event("content_block_delta", index=index, delta=added)
    yield _block_end(index, kind)
    yield _event("message_delta", delta=_stop(update), usage=_usage(answers))
    yield _event("message_stop")


def _block_end(index: int, kind: str) -> str:
    """Nothing before the first block."""
    signed = {"type": "signature_delta", "signature": _SIGNATURE}
    signature = _event("content_block_delta", index=index, delta=signed)
    end = _event("content_block_stop", index=index) if kind else ""
    return signature * (kind == "reasoning") + end


def _event(kind: str, **content: object) -> str:
    return event({"type": kind, **content})
