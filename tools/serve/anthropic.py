"""Anthropic's messages.  A request becomes one of OpenAI's chat, which decides the rest."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import Answers, EventStream, Update, chat_answers, event
from slotmoe.tools.serve.errors import ANTHROPIC_PATH, RefusedError
from slotmoe.tools.serve.function_calling import ContentDelta, joined, parse_arguments

router = APIRouter()
Json = dict[str, Any]
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # in OpenAI's words


class ToolUse(requests.Model):
    type: Literal["tool_use"]
    id: requests.CallId
    name: requests.Name
    input: Json

    def call(self) -> requests.ToolCall:
        try:
            arguments = json.dumps(self.input, ensure_ascii=False)
        except RecursionError:
            raise RefusedError("messages: an input is nested too deeply", "messages") from None
        function = requests.CalledFunction.model_construct(name=self.name, arguments=arguments)
        return requests.ToolCall.model_construct(id=self.id, function=function)


class ToolResult(requests.Model):
    type: Literal["tool_result"]
    tool_use_id: requests.CallId
    content: requests.Content | None = None
    is_error: bool | None = None

    def message(self) -> requests.ToolMessage:
        kind = requests.FailedToolMessage if self.is_error else requests.ToolMessage
        return kind(role="tool", tool_call_id=self.tool_use_id, content=self.content or "")


Block: TypeAlias = Annotated[requests.TextPart | ToolUse | ToolResult, Field(discriminator="type")]


class AnthropicMessage(requests.Model):
    role: Literal["user", "assistant"]
    content: requests.Text | list[Block]

    def messages(self) -> list[requests.ChatMessage]:
        """Each result of a call, then the text and the calls.  Raises ``RefusedError``."""
        blocks: list[Any] = [requests.TextPart.model_construct(text=self.content)]
        if isinstance(self.content, list):
            blocks = self.content
        texts = [block for block in blocks if isinstance(block, requests.TextPart)]
        calls = [block.call() for block in blocks if isinstance(block, ToolUse)]
        results = [block.message() for block in blocks if isinstance(block, ToolResult)]
        if (calls and self.role == "user") or (results and self.role == "assistant"):
            raise RefusedError(f"a message of the {self.role} can't hold such a block", "messages")
        kind = requests.AssistantMessage if self.role == "assistant" else requests.PlainMessage
        message = kind.model_construct(role=self.role, content=texts, tool_calls=calls)
        return [*results, message] if message.text or calls or not results else [*results]


class Tool(requests.Model):
    type: Literal["custom"] | None = None
    name: requests.Name
    description: requests.Description | None = None
    input_schema: Json

    def tool(self) -> requests.FunctionTool:
        about: Json = {"name": self.name, "description": self.description}
        function = requests.Function.model_construct(**about, parameters=self.input_schema)
        return requests.FunctionTool.model_construct(function=function)


class ToolChoice(requests.Model):
    type: Literal["auto", "any", "none", "tool"]
    name: requests.Name | None = None
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> str | requests.FunctionChoice:
        """The same in OpenAI's words.  Raises ``RefusedError``."""
        if (self.type == "tool") != (self.name is not None):
            problem = "a name has to be given with the type 'tool', and only with it"
            raise RefusedError(f"tool_choice: {problem}", "tool_choice")
        if self.name is None:
            return _CHOICES[self.type]
        function = requests.FunctionName(name=self.name)
        return requests.FunctionChoice(type="function", function=function)


class Metadata(requests.Model):
    user_id: requests.Label | None = None


class MessagesRequest(requests.GenerationRequest):
    """``/v1/messages``.  ``metadata``, a label, is ignored."""

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    messages: Annotated[
        list[AnthropicMessage], Field(min_length=1, max_length=requests.MAX_MESSAGES)
    ]
    max_tokens: requests.Count
    system: requests.Content | None = None
    stop_sequences: requests.Stops | None = None
    metadata: Metadata | None = None
    tools: Annotated[list[Tool], Field(max_length=requests.MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None

    def chat(self) -> requests.ChatRequest:
        """The same in OpenAI's form.  Raises ``RefusedError``."""
        choice = None if self.tool_choice is None else self.tool_choice.choice()
        messages = [message for given in self.messages for message in given.messages()]
        if self.system is not None:
            messages.insert(0, requests.PlainMessage(role="system", content=self.system))
        single = self.tools and self.tool_choice and self.tool_choice.disable_parallel_tool_use
        return requests.ChatRequest.model_construct(
            **self.model_dump(include=set(requests.GenerationRequest.model_fields)),
            messages=messages,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or None,
            tools=[tool.tool() for tool in self.tools or ()],
            tool_choice=choice,
            parallel_tool_calls=False if single else None,
        )


@router.post(ANTHROPIC_PATH, responses=EventStream.responses)
async def messages(body: MessagesRequest, request: Request) -> Response:
    answers = await chat_answers(request, body.chat())
    about: Json = {"id": f"msg_{uuid.uuid4().hex}", "type": "message"}
    about |= {"role": "assistant", "model": body.model}
    if body.stream:
        return EventStream(_events(about, answers), answers)
    (update,) = await answers.whole()
    content = {"content": _blocks(update.content), "usage": _usage(answers)}
    return JSONResponse({**about, **content, **_stop(update)})


def _usage(answers: Answers) -> dict[str, int]:
    usage = answers.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def _stop(update: Update) -> Json:
    reason = _STOP_REASONS[update.finish or "stop"]
    if update.stopped_by is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": update.stopped_by}


def _blocks(deltas: list[ContentDelta]) -> list[Json]:
    """Of a whole answer, without tool calls that were cut off."""
    blocks = list[Json]()
    for part in joined(deltas):
        if part.name is None:
            blocks.append({"type": "text", "text": part.text})
        elif part.complete and (given := parse_arguments(part.text)) is not None:
            blocks.append(_tool_use(part.name, given))
    return blocks or [{"type": "text", "text": ""}]


def _tool_use(name: str, given: Json) -> Json:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": given}


async def _events(about: Json, answers: Answers) -> AsyncIterator[str]:
    begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
    yield _event("message_start", message={**about, **begun, "usage": _usage(answers)})
    index = -1  # of the content block
    async for update in answers.updates():
        if update.finish is not None and index < 0 and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty block
        for delta in update.content:
            if delta.name is not None or index < 0:
                if index >= 0:
                    yield _event("content_block_stop", index=index)
                index += 1
                block: Json = {"type": "text", "text": ""}
                if delta.name is not None:
                    block = _tool_use(delta.name, {})
                yield _event("content_block_start", index=index, content_block=block)
            if delta.text:
                added: Json = {"type": "text_delta", "text": delta.text}
                if delta.call is not None:
                    added = {"type": "input_json_delta", "partial_json": delta.text}
                yield _event("content_block_delta", index=index, delta=added)
    yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta=_stop(update), usage=_usage(answers))
    yield _event("message_stop")


def _event(kind: str, **content: Any) -> str:
    return event({"type": kind, **content})
