"""Anthropic's messages.  A request becomes one of OpenAI's chat, which decides the rest.

Some fields mean nothing to this server and are accepted: a prompt is cached whether or not
``cache_control`` asks for it, and a budget of thinking bounds nothing.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from fastapi import APIRouter, Request, Response
from pydantic import Field, Tag
from starlette.responses import JSONResponse

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import (
    Answers,
    EventStream,
    Update,
    chat_answers,
    chat_prompt,
    event,
)
from slotmoe.tools.serve.errors import ANTHROPIC_PATH, RefusedError
from slotmoe.tools.serve.fields import accepted, by_kind, text_or_list
from slotmoe.tools.serve.reader import ContentDelta, joined, parse_arguments
from slotmoe.tools.serve.service import Service

router = APIRouter()
_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_EFFORTS = {"disabled": "none", "enabled": "high", "adaptive": None}  # in OpenAI's words
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # in OpenAI's words
_THINKING = accepted("nothing bounds reasoning")
_SIGNATURE = "slotmoe"  # of thinking: clients send it back, nothing here verifies it
_TOOLS = accepted("a tool is described at once, by its schema")
_REPLAYED = accepted("the model does not see it")


class Cacheable(requests.Model):
    cache_control: Annotated[requests.AnyObject | None, requests.CACHED] = None


class TextBlock(requests.TextPart):
    citations: Annotated[list[Json] | None, _REPLAYED] = None


Text: TypeAlias = Annotated[
    Annotated[requests.Text, Tag("text")] | Annotated[list[TextBlock], Tag("list")],
    by_kind(text_or_list, "text nor a list of blocks"),
]


class ToolUse(Cacheable):
    type: Literal["tool_use"]
    id: requests.CallId
    name: requests.Name
    input: Json
    caller: Annotated[Json | None, _REPLAYED] = None
    toolset_name: Annotated[None, _REPLAYED] = None

    def call(self) -> requests.ToolCall:
        try:
            arguments = json.dumps(self.input, ensure_ascii=False)
        except RecursionError:
            raise RefusedError("messages: an input is nested too deeply", "messages") from None
        function = requests.CalledFunction.model_construct(name=self.name, arguments=arguments)
        return requests.ToolCall.model_construct(id=self.id, function=function)


class ToolResult(Cacheable):
    type: Literal["tool_result"]
    tool_use_id: requests.CallId
    content: Text | None = None
    is_error: bool | None = None
    toolset_name: Annotated[None, _REPLAYED] = None

    def message(self) -> requests.ToolMessage:
        kind = requests.FailedToolMessage if self.is_error else requests.ToolMessage
        about: Json = {"tool_call_id": self.tool_use_id, "content": self.content or ""}
        return kind.model_construct(role="tool", **about)


class Thinking(requests.Model):
    type: Literal["thinking"]
    thinking: requests.Text
    signature: requests.Text | None = None


class RedactedThinking(requests.Model):
    type: Literal["redacted_thinking"]
    data: Annotated[requests.Text, _REPLAYED]


Block: TypeAlias = Annotated[
    TextBlock | ToolUse | ToolResult | Thinking | RedactedThinking, Field(discriminator="type")
]


class AnthropicMessage(requests.Model):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[requests.Text, Tag("text")] | Annotated[list[Block], Tag("list")],
        by_kind(text_or_list, "text nor a list of blocks"),
    ]

    def messages(self) -> list[requests.ChatMessage]:
        """Each result of a call, then the text and the calls.  Raises ``RefusedError``."""
        blocks: list[Any] = [requests.TextPart.model_construct(text=self.content)]
        if isinstance(self.content, list):
            blocks = self.content
        thoughts = [block.thinking for block in blocks if isinstance(block, Thinking)]
        texts = [block for block in blocks if isinstance(block, requests.TextPart)]
        calls = [block.call() for block in blocks if isinstance(block, ToolUse)]
        results = [block.message() for block in blocks if isinstance(block, ToolResult)]
        if (calls and self.role == "user") or (results and self.role == "assistant"):
            raise RefusedError(f"a message of the {self.role} can't hold such a block", "messages")
        kind = requests.AssistantMessage if self.role == "assistant" else requests.PlainMessage
        message = kind.model_construct(role=self.role, content=texts, tool_calls=calls)
        if isinstance(message, requests.AssistantMessage) and thoughts:
            message.reasoning_content = "".join(thoughts)
        return [*results, message] if message.text or calls or not results else [*results]


class Tool(Cacheable):
    type: Literal["custom"] | None = None
    name: requests.Name
    description: requests.Description | None = None
    input_schema: Json
    strict: bool | None = None
    eager_input_streaming: Annotated[bool | None, _TOOLS] = None
    defer_loading: Annotated[bool | None, _TOOLS] = None
    input_examples: Annotated[list[Json] | None, _TOOLS] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, _TOOLS] = None

    def tool(self) -> requests.FunctionTool:
        about: Json = {"name": self.name, "description": self.description, "strict": self.strict}
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


class ThinkingConfig(requests.Model):
    type: Literal["disabled", "enabled", "adaptive"]
    budget_tokens: Annotated[requests.Count | None, _THINKING] = None
    display: Annotated[Literal["summarized", "omitted"] | None, _THINKING] = None


class OutputFormat(requests.Model):
    type: Literal["json_schema"]
    definition: Annotated[Json, Field(alias="schema")]

    def response_format(self) -> requests.SchemaFormat:
        schema = requests.Schema.model_construct(name="format", definition=self.definition)
        return requests.SchemaFormat.model_construct(json_schema=schema)


class OutputConfig(requests.Model):
    effort: Annotated[requests.Label | None, _THINKING] = None
    format: OutputFormat | None = None
    task_budget: Annotated[Json | None, _THINKING] = None


class ContinuedRequest(requests.ChatRequest):
    """A conversation whose answer goes on with the last message."""

    continues: ClassVar[bool] = True


class Conversation(Cacheable):
    """``/v1/messages/count_tokens``, and what it shares with ``/v1/messages``."""

    model: requests.Label
    messages: Annotated[
        list[AnthropicMessage], Field(min_length=1, max_length=requests.MAX_MESSAGES)
    ]
    system: Text | None = None
    tools: Annotated[list[Tool], Field(max_length=requests.MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = Field(None, description="its `type` switches reasoning")
    output_config: OutputConfig | None = Field(None, description="its `format` is a JSON schema")
    context_management: Annotated[Json | None, accepted("nothing is edited")] = None

    def chat(self, **options: Any) -> requests.ChatRequest:
        """The same in OpenAI's form, with these fields of it.  A last message of the assistant's is
        the beginning of the answer.  Raises ``RefusedError``."""
        choice = None if self.tool_choice is None else self.tool_choice.choice()
        messages = [message for given in self.messages for message in given.messages()]
        if self.system is not None:
            system = requests.PlainMessage.model_construct(role="system", content=self.system)
            messages.insert(0, system)
        single = self.tools and self.tool_choice and self.tool_choice.disable_parallel_tool_use
        continues = self.messages[-1].role == "assistant"
        form = self.output_config.format if self.output_config is not None else None
        if continues and form is not None:
            problem = "the answer can't follow a schema where a last message of the assistant's"
            raise RefusedError(f"messages: {problem} has begun it", "messages")
        kind = ContinuedRequest if continues else requests.ChatRequest
        return kind.model_construct(
            model=self.model,
            messages=messages,
            tools=[tool.tool() for tool in self.tools or ()],
            tool_choice=choice,
            parallel_tool_calls=False if single else None,
            response_format=None if form is None else form.response_format(),
            reasoning_effort=_EFFORTS[self.thinking.type] if self.thinking else None,
            **options,
        )


class MessagesRequest(Conversation, requests.GenerationRequest):
    """``/v1/messages``."""

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: requests.Count
    stop_sequences: requests.Stops | None = None
    metadata: Annotated[Metadata | None, requests.LABEL] = None
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None, accepted("there is one tier")
    ] = None
    thread: Any = Field(None, description="refused: `thread_unsupported_request`")

    def options(self) -> Json:
        """How the answer is made, in OpenAI's words.  Raises ``RefusedError``."""
        if self.thread is not None:  # a client that tries it then sends the whole conversation
            problem = "thread: this server keeps no threads; send the whole conversation"
            details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            raise RefusedError(problem, "thread", details=details)
        sampling = self.model_dump(include={"temperature", "top_p", "top_k", "stream"})
        return {**sampling, "max_tokens": self.max_tokens, "stop": self.stop_sequences or None}


@router.post(f"{ANTHROPIC_PATH}/count_tokens")
async def count_tokens(body: Conversation, request: Request) -> Response:
    service: Service = request.app.state.service
    service.check_model(body.model)
    prompt = await asyncio.to_thread(chat_prompt, service, body.chat())
    return JSONResponse({"input_tokens": len(prompt)})


@router.post(ANTHROPIC_PATH, responses=EventStream.responses)
async def messages(body: MessagesRequest, request: Request) -> Response:
    answers = await chat_answers(request, body.chat(**body.options()))
    about: Json = {"id": f"msg_{uuid.uuid4().hex}", "type": "message"}
    about |= {"role": "assistant", "model": body.model}
    if body.stream:
        return EventStream(_events(about, answers), answers, ping=_event("ping"))
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
        if part.reasoning:
            blocks.append({"type": "thinking", "thinking": part.text, "signature": _SIGNATURE})
        elif part.name is None:
            blocks.append({"type": "text", "text": part.text})
        elif part.complete and (given := parse_arguments(part.text)) is not None:
            blocks.append(_tool_use(part.name, given))
    return blocks or [{"type": "text", "text": ""}]


def _tool_use(name: str, given: Json) -> Json:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": name, "input": given}


async def _events(about: Json, answers: Answers) -> AsyncIterator[str]:
    begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None}
    yield _event("message_start", message={**about, **begun, "usage": _usage(answers)})
    index, is_thinking = -1, False  # of the content block that is open
    async for update in answers.updates():
        if update.finish is not None and index < 0 and not update.content:
            update.content = [ContentDelta()]  # an empty answer has an empty block
        for delta in update.content:
            if delta.name is not None or index < 0 or delta.reasoning != is_thinking:
                if index >= 0:
                    for text in _block_end(index, is_thinking):
                        yield text
                index, is_thinking = index + 1, delta.reasoning
                block: Json = {"type": "text", "text": ""}
                if delta.name is not None:
                    block = _tool_use(delta.name, {})
                elif is_thinking:
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                yield _event("content_block_start", index=index, content_block=block)
            if delta.text:
                added: Json = {"type": "text_delta", "text": delta.text}
                if delta.call is not None:
                    added = {"type": "input_json_delta", "partial_json": delta.text}
                elif is_thinking:
                    added = {"type": "thinking_delta", "thinking": delta.text}
                yield _event("content_block_delta", index=index, delta=added)
    for text in _block_end(index, is_thinking):
        yield text
    yield _event("message_delta", delta=_stop(update), usage=_usage(answers))
    yield _event("message_stop")


def _block_end(index: int, is_thinking: bool) -> Iterator[str]:
    if is_thinking:
        delta = {"type": "signature_delta", "signature": _SIGNATURE}
        yield _event("content_block_delta", index=index, delta=delta)
    yield _event("content_block_stop", index=index)


def _event(kind: str, **content: Any) -> str:
    return event({"type": kind, **content})
