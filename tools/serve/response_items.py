"""Requests of OpenAI's ``/v1/responses``, checked field by field.  Their items become messages of
its chat, which decides the rest.

A field is honoured, or it can't change an answer of this server: a label, or a setting of what the
model doesn't do.  Tools that only OpenAI runs are not offered to the model.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from slotmoe.tools.serve import requests
from slotmoe.tools.serve.errors import RefusedError

Json = dict[str, Any]
Label: TypeAlias = requests.Label
_MAX_PARTS = 4096  # of one message
_SYSTEM = ("system", "developer")


_Unused = Annotated[list[Json], Field(max_length=_MAX_PARTS)]  # parts that the model never sees


class Part(requests.Model):
    type: Literal["input_text", "output_text"]
    text: requests.Text
    annotations: _Unused | None = None
    logprobs: _Unused | None = None


Parts: TypeAlias = requests.Text | Annotated[list[Part], Field(max_length=_MAX_PARTS)]


def _text(content: Parts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputMessage(requests.Model):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: Label | None = None
    status: Label | None = None
    phase: Label | None = None


class FunctionCall(requests.Model):
    type: Literal["function_call"]
    call_id: requests.CallId
    name: requests.Name
    arguments: requests.Text
    id: Label | None = None
    status: Label | None = None
    caller: Json | None = None
    namespace: None = None


class FunctionOutput(requests.Model):
    type: Literal["function_call_output"]
    call_id: requests.CallId
    output: Parts
    id: Label | None = None
    status: Label | None = None
    name: requests.Name | None = None
    caller: Json | None = None
    namespace: None = None


class Reasoning(requests.Model):
    """What a model thought, which says nothing to another one."""

    type: Literal["reasoning"]
    id: Label | None = None
    summary: _Unused | None = None
    content: _Unused | None = None
    encrypted_content: requests.Text | None = None
    status: Label | None = None


class ItemReference(requests.Model):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: Label


def _type_of(item: Any) -> str:
    """An item without a type is a message."""
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(given or "message")


Item: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_type_of),
]
Items = Annotated[list[Item], Field(min_length=1, max_length=requests.MAX_MESSAGES)]


class FunctionTool(requests.Function):
    type: Literal["function"]
    defer_loading: bool | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None
    output_schema: Json | None = None


class OtherTool(BaseModel):
    """A tool that OpenAI runs, or that its models alone were taught to use."""

    model_config = ConfigDict(extra="ignore")
    type: Literal[
        "apply_patch",
        "code_interpreter",
        "computer",
        "computer_use_preview",
        "custom",
        "file_search",
        "image_generation",
        "local_shell",
        "mcp",
        "namespace",
        "programmatic_tool_calling",
        "shell",
        "tool_search",
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
    ]


Tool: TypeAlias = Annotated[FunctionTool | OtherTool, Field(discriminator="type")]


class FunctionChoice(requests.FunctionName):
    type: Literal["function"]


class SchemaFormat(requests.Schema):
    type: Literal["json_schema"]


class TextConfig(requests.Model):
    format: Annotated[requests.TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Label | None = None

    def response_format(self) -> requests.TextFormat | requests.SchemaFormat | None:
        if not isinstance(self.format, SchemaFormat):
            return self.format
        return requests.SchemaFormat.model_construct(json_schema=self.format)


class ReasoningConfig(requests.Model):
    effort: Label | None = None
    summary: Label | None = None
    generate_summary: Label | None = None
    context: Label | None = None
    mode: Label | None = None


class StreamOptions(requests.Model):
    include_obfuscation: bool | None = None


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]
Included = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(requests.GenerationRequest):
    """``/v1/responses``."""

    input: requests.Text | Items
    instructions: requests.Text | None = None
    max_output_tokens: requests.Count | None = None
    previous_response_id: Label | None = None
    store: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=requests.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    metadata: Metadata | None = None
    # These change nothing here.
    background: Literal[False] | None = None
    client_metadata: Json | None = None
    include: Annotated[list[Included], Field(max_length=16)] | None = None
    max_tool_calls: requests.Count | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    reasoning: ReasoningConfig | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    user: Label | None = None

    def functions(self) -> list[FunctionTool]:
        """The tools that the model may use."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]

    def items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [InputMessage.model_construct(role="user", content=self.input)]
        return self.input

    def chat(self, items: Sequence[Item]) -> requests.ChatRequest:
        """The conversation of ``items`` as a request of OpenAI's chat.  Raises
        ``RefusedError``."""
        tools = self.functions()
        choice: requests.FunctionChoice | Literal["none", "auto", "required"] | None = None
        if isinstance(self.tool_choice, FunctionChoice):
            choice = requests.FunctionChoice(type="function", function=self.tool_choice)
        elif tools or self.tool_choice == "required":  # clients give the others in any case
            choice = self.tool_choice
        return requests.ChatRequest.model_construct(
            **self.model_dump(include=set(requests.GenerationRequest.model_fields)),
            messages=_with_instructions(self.instructions, messages_of(items)),
            max_tokens=self.max_output_tokens,
            tools=[requests.FunctionTool.model_construct(function=tool) for tool in tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls if tools else None,
            response_format=None if self.text is None else self.text.response_format(),
        )


def messages_of(items: Iterable[Item]) -> list[requests.ChatMessage]:
    """A call belongs to the message of the assistant's before it.  Raises ``RefusedError`` where
    there is none left to answer."""
    messages: list[Any] = []
    assistant, plain, result = (
        requests.AssistantMessage.model_construct,
        requests.PlainMessage.model_construct,
        requests.ToolMessage.model_construct,
    )
    for item in items:
        if isinstance(item, FunctionCall):
            if not (messages and messages[-1].role == "assistant"):
                messages.append(assistant(role="assistant", tool_calls=[]))
            about: Json = {"name": item.name, "arguments": item.arguments}
            function = requests.CalledFunction.model_construct(**about)
            call = requests.ToolCall.model_construct(id=item.call_id, function=function)
            messages[-1].tool_calls.append(call)
        elif isinstance(item, FunctionOutput):
            about = {"tool_call_id": item.call_id, "content": _text(item.output)}
            messages.append(result(role="tool", name=item.name, **about))
        elif isinstance(item, InputMessage) and item.role == "assistant":
            messages.append(assistant(role="assistant", content=_text(item.content), tool_calls=[]))
        elif isinstance(item, InputMessage):
            role = "system" if item.role in _SYSTEM else item.role
            messages.append(plain(role=role, content=_text(item.content)))
    if not messages:
        raise RefusedError("input: holds no message", "input")
    return messages


def _with_instructions(
    instructions: str | None, messages: list[requests.ChatMessage]
) -> list[requests.ChatMessage]:
    """``messages`` with one message of the system's at most before the first other one: some
    templates use only one."""
    count = next(
        (i for i, message in enumerate(messages) if message.role != "system"), len(messages)
    )
    texts = [text for text in (instructions, *(m.text for m in messages[:count])) if text]
    system = requests.PlainMessage.model_construct(role="system", content="\n\n".join(texts))
    return [*([system] if texts else []), *messages[count:]]
