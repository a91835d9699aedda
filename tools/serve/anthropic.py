"""Anthropic's messages.  A request becomes a conversation in OpenAI's roles.

What a request adds to the one before it comes last in the text that the model reads, so that all
before it stays cached: the system's messages stay where they are, and tools may be offered late.
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Annotated, Literal
from xml.sax.saxutils import quoteattr

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, model_validator
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event
from slotmoe.tools.serve.errors import ANTHROPIC_PATH, RefusedError
from slotmoe.tools.serve.formats import ContentDelta, described, joined, parse_arguments
from slotmoe.tools.serve.requests import Call, FunctionName, Message, Text, TextOr
from slotmoe.tools.serve.service import Serving

router = APIRouter()
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # in OpenAI's words
_SIGNATURE = "slotmoe"  # of thinking: clients send it back, nothing here verifies it
_BILLING = "x-anthropic-billing-header:"  # Claude Code's, another one in each conversation
_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
_QUOTES = ("text", "document", "search_result")
# The types of blocks that a message of each role, and a result, may hold.
_BLOCKS = {
    "user": (*_QUOTES, "tool_result"),
    "assistant": (*_QUOTES, "tool_use", "thinking", "redacted_thinking"),
    "system": ("text", "tool_addition", "tool_removal"),
    "result": (*_QUOTES, "tool_reference"),
}


class AnthropicTool(requests.Function):
    type: Literal["custom"] | None = None
    parameters: Annotated[Json, Field(alias="input_schema")]
    defer_loading: bool | None = Field(None, description="offered where a message names it")


class Offer:
    """The tools of a request.  The model reads of a deferred one where it is first offered."""

    def __init__(self, tools: list[AnthropicTool]):
        self._tools = tools
        self._unread = {tool.name: tool for tool in tools if tool.defer_loading}
        self._known = {tool.name for tool in tools}
        self._names = self._known - self._unread.keys()

    def change(self, name: str, added: bool) -> str:
        """What the model reads.  Raises ``RefusedError``."""
        if name not in self._known:
            raise RefusedError(f"messages: {name!r:.80} is none of the tools", "messages")
        (self._names.add if added else self._names.discard)(name)
        tool = self._unread.pop(name, None) if added else None
        text = name if tool is None else json.dumps(described(tool), ensure_ascii=False)
        return f"This function {'can' if added else 'cannot'} be called now: {text}\n"

    def policy(self, choice: object, parallel: bool | None) -> requests.ToolPolicy | None:
        """After all messages.  Raises ``RefusedError``."""
        offered = [tool for tool in self._tools if tool.name in self._names]
        policy = requests.tool_policy(offered, choice, parallel)
        return policy and replace(policy, functions=[t for t in self._tools if not t.defer_loading])


class DocumentSource(requests.Fields):
    """Of a document: ``data`` is plain text, ``content`` has blocks."""

    type: Literal["text", "content"]
    data: Text | None = None
    content: "Content | None" = None


class Block(requests.Fields):
    """A part of a message or of a tool's result.  Which fields it needs depends on its type."""

    type: requests.Label
    text: Text | None = None
    source: Text | DocumentSource | None = None
    title: Text | None = None
    context: Text | None = None
    content: "Result | None" = None
    tool_name: requests.Name | None = None
    tool: FunctionName | None = None
    id: requests.CallId | None = None
    name: requests.Name | None = None
    input: Json | None = None
    tool_use_id: requests.CallId | None = None
    is_error: bool | None = None
    thinking: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, block: object) -> object:
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and not any(kind in kinds for kinds in _BLOCKS.values()):
            raise ValueError(f"a block of type {kind[:40]!r} can't be read: the model reads text")
        return block

    def read(self, offer: Offer) -> str:
        """What the model reads; nothing of a call, of its result, and of thoughts.  Raises
        ``RefusedError``."""
        match self:
            case Block(type="text", text=str(text)):
                return text
            case Block(type="document", source=DocumentSource() as source):
                text = read(source.data if source.type == "text" else source.content, offer)
                about = f"title={quoteattr(self.title or '')}"
                about += f" context={quoteattr(self.context or '')}"
                return f"\n<document {about}>\n{text}\n</document>\n"
            case Block(type="search_result", source=str(source), title=str(title)):
                about = f"source={quoteattr(source)} title={quoteattr(title)}"
                text = read(self.content, offer)
                return f"\n<search_result {about}>\n{text}\n</search_result>\n"
            case Block(type="tool_reference", tool_name=str(name)):
                return offer.change(name, True)
            case Block(type="tool_addition" | "tool_removal", tool=FunctionName(name=name)):
                return offer.change(name, self.type == "tool_addition")
            case Block(type="tool_use", id=str(), name=str(), input=dict()):
                return ""
            case Block(type="tool_result", tool_use_id=str()):
                return ""
            case Block(type="thinking", thinking=str()) | Block(type="redacted_thinking"):
                return ""
        problem = f"a block of type {self.type!r:.40} lacks a field that it needs"
        raise RefusedError(f"messages: {problem}", "messages")


Content = TextOr[Text, list[Block]]
Result = TextOr[Text, list[Annotated[Block, BeforeValidator(requests.readable)]]]


def read(content: str | Iterable[Block] | None, offer: Offer, kinds: str = "") -> str:
    """What the model reads of blocks, whose types are to be those of ``kinds``, of plain text if
    there are none.  Raises ``RefusedError``."""
    if isinstance(content, str):
        return content
    texts = list[str]()
    for block in content or ():
        if block.type not in _BLOCKS.get(kinds, ("text",)):
            problem = f"messages: a block of type {block.type!r} can't be read there"
            raise RefusedError(problem, "messages")
        texts.append(block.read(offer))
    return "".join(texts)


class Turn(requests.Fields):
    role: Literal["user", "assistant", "system"]
    content: Content

    def messages(self, offer: Offer) -> list[Message]:
        """Each result of a call, then the text and the calls.  Raises ``RefusedError``."""
        blocks, messages = self.content if isinstance(self.content, list) else [], list[Message]()
        for block in blocks:
            if block.type == "tool_result":
                result = Message("tool", read(block.content, offer, "result"))
                result.call_id, result.failed = block.tool_use_id or "", bool(block.is_error)
                messages.append(result)
        said = Message(self.role, read(self.content, offer, self.role))
        said.inserted = self.role == "system"
        said.thoughts = "".join(b.thinking or "" for b in blocks if b.type == "thinking")
        try:
            for block in blocks:
                if block.type == "tool_use":
                    arguments = json.dumps(block.input, ensure_ascii=False)
                    said.calls.append(Call(block.id or "", block.name or "", arguments))
        except RecursionError:
            raise RefusedError("messages: an input is nested too deeply", "messages") from None
        is_needed = said.text or said.calls or not (messages or said.inserted)
        return [*messages, said] if is_needed else messages


class OutputConfig(requests.Fields):
    effort: requests.Label | None = Field(None, description="with `thinking.type` `enabled`")
    format: requests.ResponseFormat | None = None


class CountRequest(requests.Fields):
    """``/v1/messages/count_tokens``, and what it shares with ``/v1/messages``."""

    model: requests.Label | None = Field(None, description="the open one if null")
    messages: Annotated[list[Turn], requests.SOME]
    system: Content | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=requests.MAX_TOOLS)] | None = None
    tool_choice: Json | None = None
    thinking: requests.Thinking | None = Field(None, description="its `type` switches reasoning")
    output_config: OutputConfig | None = Field(None, description="its `format` is a JSON schema")

    def chat(self) -> requests.Conversation:
        """A last message of the assistant's begins the answer.  Raises ``RefusedError``."""
        chosen = self.tool_choice
        choice = chosen and _CHOICES.get(str(chosen.get("type")), chosen)
        is_single = chosen is not None and chosen.get("disable_parallel_tool_use") is True
        offer = Offer(self.tools or [])
        messages = [message for turn in self.messages for message in turn.messages(offer)]
        blocks = self.system if isinstance(self.system, list) else []
        system = [read([block], offer) for block in blocks] or [read(self.system, offer)]
        told = "".join(text for text in system if not text.startswith(_BILLING))
        continues = self.messages[-1].role == "assistant"
        output = self.output_config or OutputConfig.model_construct()
        wanted = requests.rule_of(output.format)
        effort = self.thinking.effort(output.effort) if self.thinking is not None else None
        if continues and wanted is not None:
            problem = "the answer can't follow a schema where a last message of the assistant's"
            raise RefusedError(f"messages: {problem} has begun it", "messages")
        policy = offer.policy(choice, False if self.tools and is_single else None)
        messages = requests.with_system([told], messages)
        return requests.Conversation(messages, policy, wanted, effort, continues)


class MessagesRequest(CountRequest, requests.GenerationRequest):
    """``/v1/messages``."""

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0), requests.Whole]
    stop_sequences: requests.Stops | None = None
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
