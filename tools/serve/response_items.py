"""Requests of OpenAI's ``/v1/responses``, checked field by field.  Their items become messages of
its chat, which decides the rest.

A field is honoured, or it can't change an answer of this server: a label, or a setting of what the
model doesn't do.  Tools that only OpenAI runs are not offered to the model.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import Refused, accepted, by_kind, text_or_list

Label: TypeAlias = requests.Label
_SYSTEM = ("system", "developer")
_REPLAYED = accepted("the model does not see it")
_NAMESPACE = Refused("functions have no namespaces here")


class Part(requests.Model):
    type: Literal["input_text", "output_text"]
    text: requests.Text
    annotations: Annotated[list[Json] | None, _REPLAYED] = None
    logprobs: Annotated[list[Json] | None, _REPLAYED] = None


Parts: TypeAlias = Annotated[
    Annotated[requests.Text, Tag("text")] | Annotated[list[Part], Tag("list")],
    by_kind(text_or_list, "text nor a list of parts"),
]


def _text(content: Parts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputMessage(requests.Model):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: Label | None = None
    status: Annotated[Label | None, _REPLAYED] = None
    phase: Annotated[Label | None, _REPLAYED] = None


class FunctionCall(requests.Model):
    type: Literal["function_call"]
    call_id: requests.CallId
    name: requests.Name
    arguments: requests.Text
    id: Label | None = None
    status: Annotated[Label | None, _REPLAYED] = None
    caller: Annotated[Json | None, _REPLAYED] = None
    namespace: Annotated[None, _NAMESPACE] = None


class FunctionOutput(requests.Model):
    type: Literal["function_call_output"]
    call_id: requests.CallId
    output: Parts
    id: Label | None = None
    status: Annotated[Label | None, _REPLAYED] = None
    name: requests.Name | None = None
    caller: Annotated[Json | None, _REPLAYED] = None
    namespace: Annotated[None, _NAMESPACE] = None


class ReasoningPart(requests.Model):
    type: Literal["reasoning_text"]
    text: requests.Text


class Reasoning(requests.Model):
    """What a model thought before the message that follows."""

    type: Literal["reasoning"]
    id: Label | None = None
    summary: Annotated[list[Json] | None, _REPLAYED] = None
    content: list[ReasoningPart] | None = None
    encrypted_content: Annotated[requests.Text | None, _REPLAYED] = None
    status: Annotated[Label | None, _REPLAYED] = None


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


_TOOLS = accepted("a tool is described at once, by its schema")


class FunctionTool(requests.Function):
    type: Literal["function"]
    defer_loading: Annotated[bool | None, _TOOLS] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, _TOOLS] = None
    output_schema: Annotated[Json | None, _TOOLS] = None


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

    def choice(self) -> requests.FunctionChoice:
        """The same in the chat's words."""
        return requests.FunctionChoice(type="function", function=self)


class AllowedChoice(requests.Model):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=requests.MAX_TOOLS)]

    def choice(self) -> requests.AllowedChoice:
        """The same in the chat's words."""
        tools = [tool.choice() for tool in self.tools]
        allowed = requests.AllowedTools(mode=self.mode, tools=tools)
        return requests.AllowedChoice(type="allowed_tools", allowed_tools=allowed)


class SchemaFormat(requests.Schema):
    type: Literal["json_schema"]


class TextConfig(requests.Model):
    format: Annotated[requests.TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Label | None, accepted("the model has no such setting")] = None

    def response_format(self) -> requests.TextFormat | requests.SchemaFormat | None:
        if not isinstance(self.format, SchemaFormat):
            return self.format
        return requests.SchemaFormat.model_construct(json_schema=self.format)


_SHOWN = accepted("reasoning is shown whole")


class ReasoningConfig(requests.Model):
    effort: Label | None = Field(None, description="`none` switches reasoning off")
    summary: Annotated[Label | None, _SHOWN] = None
    generate_summary: Annotated[Label | None, _SHOWN] = None
    context: Annotated[Label | None, _SHOWN] = None
    mode: Annotated[Label | None, _SHOWN] = None


class StreamOptions(requests.Model):
    include_obfuscation: Annotated[bool | None, accepted("nothing is padded")] = None


Included = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(requests.GenerationRequest):
    """``/v1/responses``."""

    model: Label = Field("", description="the open model if not given")
    input: Annotated[
        Annotated[requests.Text, Tag("text")] | Annotated[Items, Tag("list")],
        by_kind(text_or_list, "text nor a list of items"),
    ]
    instructions: requests.Text | None = None
    max_output_tokens: requests.Count | None = None
    previous_response_id: Label | None = Field(None, description="continues this response")
    store: bool | None = Field(None, description="true if not given")
    tools: Annotated[list[Tool], Field(max_length=requests.MAX_TOOLS)] | None = Field(
        None, description="the model is offered functions only"
    )
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[FunctionChoice | AllowedChoice, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = Field(None, description="its `format` is that of `response_format`")
    metadata: Annotated[requests.Labels | None, requests.LABEL] = None
    background: Annotated[Literal[False] | None, accepted("answers come at once")] = None
    background_options: Annotated[None, Refused("answers come at once")] = None
    access_programs: Annotated[None, Refused("the server has no programs")] = None
    client_metadata: Annotated[Json | None, requests.LABEL] = None
    context_management: Annotated[None, Refused("a conversation is read whole")] = None
    conversation: Annotated[None, Refused("use previous_response_id")] = None
    image: Annotated[None, Refused("answers are text")] = None
    include: list[Included] | None = Field(
        None, description="only `message.output_text.logprobs` works"
    )
    max_tool_calls: Annotated[
        requests.Count | None, accepted("it bounds tools that OpenAI runs")
    ] = None
    moderation: Annotated[None, Refused("the server does not moderate")] = None
    prompt: Annotated[None, Refused("no prompts are stored here; send its text")] = None
    prompt_cache_key: Annotated[Label | None, requests.CACHED] = None
    prompt_cache_options: Annotated[Json | None, requests.CACHED] = None
    prompt_cache_retention: Annotated[Label | None, requests.CACHED] = None
    reasoning: ReasoningConfig | None = None
    safety_identifier: Annotated[Label | None, requests.LABEL] = None
    service_tier: Annotated[Label | None, accepted("there is one tier")] = None
    stream_options: StreamOptions | None = None
    top_logprobs: requests.TopLogprobs | None = None
    truncation: Literal["disabled"] | None = Field(None, description="nothing is dropped silently")
    user: Annotated[Label | None, requests.LABEL] = None

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
        tools, choice = self.functions(), self.tool_choice
        is_scored = "message.output_text.logprobs" in (self.include or ())
        chosen = choice.choice() if isinstance(choice, FunctionChoice | AllowedChoice) else choice
        if not tools and choice in ("none", "auto"):
            chosen = None  # clients give it in any case
        return requests.ChatRequest.model_construct(
            **self.model_dump(include=set(requests.GenerationRequest.model_fields)),
            messages=_with_instructions(self.instructions, messages_of(items)),
            max_tokens=self.max_output_tokens,
            logprobs=is_scored or self.top_logprobs is not None,
            top_logprobs=self.top_logprobs,
            tools=[requests.FunctionTool.model_construct(function=tool) for tool in tools],
            tool_choice=chosen,
            parallel_tool_calls=self.parallel_tool_calls if tools else None,
            response_format=None if self.text is None else self.text.response_format(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
        )


def messages_of(items: Iterable[Item]) -> list[requests.ChatMessage]:
    """A call belongs to the message of the assistant's before it.  Raises ``RefusedError`` where
    there is none left to answer."""
    messages, thoughts = list[Any](), ""
    assistant, plain, result = (
        requests.AssistantMessage.model_construct,
        requests.PlainMessage.model_construct,
        requests.ToolMessage.model_construct,
    )
    for item in items:
        if isinstance(item, Reasoning):
            thoughts = "".join(part.text for part in item.content or ())
            continue
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
        if thoughts and messages and messages[-1].role == "assistant":
            messages[-1].reasoning_content, thoughts = thoughts, ""
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
