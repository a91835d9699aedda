"""Requests of OpenAI's ``/v1/responses``, checked field by field.  Their items become messages of
its chat, which decides the rest.

A field is honoured, or it can't change an answer of this server: a label, or a setting of what the
model doesn't do.  Tools that only OpenAI runs are not offered to the model.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slotmoe.jsonfile import Json
from slotmoe.tools.serve import requests
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import BY_TYPE, Refused, accepted
from slotmoe.tools.serve.requests import DESCRIBED, REPLAYED, Count, Label, TextOr, Word, said
from slotmoe.tools.serve.rules import Schema, TextFormat, schema_of

_SHOWN = accepted("reasoning is shown whole")


class Part(requests.Model):
    type: Literal["input_text", "output_text"]
    text: requests.Text
    annotations: Annotated[list[Json] | None, REPLAYED] = None
    logprobs: Annotated[list[Json] | None, REPLAYED] = None


Parts: TypeAlias = TextOr[requests.Text, list[Part]]


class _Item(requests.Model):
    id: Label | None = None
    status: Annotated[Label | None, REPLAYED] = None


class _OfCall(_Item):
    call_id: requests.CallId
    caller: Annotated[Json | None, REPLAYED] = None
    namespace: Annotated[None, Refused("functions have no namespaces here")] = None


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer", "latest_reminder"]
    content: Parts
    phase: Annotated[Label | None, REPLAYED] = None


class FunctionCall(_OfCall):
    type: Literal["function_call"]
    name: requests.Name
    arguments: requests.Text


class FunctionOutput(_OfCall):
    type: Literal["function_call_output"]
    output: Parts
    name: requests.Name | None = None


class ReasoningPart(requests.Model):
    type: Literal["reasoning_text"]
    text: requests.Text


class Reasoning(_Item):
    """What a model thought before the message that follows."""

    type: Literal["reasoning"]
    summary: Annotated[list[Json] | None, REPLAYED] = None
    content: list[ReasoningPart] | None = None
    encrypted_content: Annotated[requests.Text | None, REPLAYED] = None


class ItemReference(requests.Model):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: Label


def _typed(item: object) -> object:
    """An item without a type is a message."""
    return {**item, "type": item.get("type") or "message"} if isinstance(item, dict) else item


Item: TypeAlias = Annotated[
    InputMessage | FunctionCall | FunctionOutput | Reasoning | ItemReference,
    BY_TYPE,
    BeforeValidator(_typed),
]
Items = Annotated[list[Item], requests.SOME]


class FunctionToolItem(requests.Function):
    type: Literal["function"]
    defer_loading: Annotated[bool | None, DESCRIBED] = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, DESCRIBED] = None
    output_schema: Annotated[Json | None, DESCRIBED] = None


class OtherTool(BaseModel):
    """A tool that OpenAI runs, or that its models alone were taught to use."""

    model_config = ConfigDict(extra="ignore")
    type: Literal[
        "apply_patch", "code_interpreter", "computer", "computer_use_preview", "custom",
        "file_search", "image_generation", "local_shell", "mcp", "namespace",
        "programmatic_tool_calling", "shell", "tool_search", "web_search", "web_search_2025_08_26",
        "web_search_preview", "web_search_preview_2025_03_11",
    ]  # fmt: skip


Tool: TypeAlias = Annotated[FunctionToolItem | OtherTool, BY_TYPE]
Tools = Annotated[list[Tool], Field(max_length=requests.MAX_TOOLS)]


class FunctionItem(requests.FunctionName):
    type: Literal["function"]


class AllowedItem(requests.Model):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionItem], Field(min_length=1, max_length=requests.MAX_TOOLS)]


class SchemaItem(Schema):
    type: Literal["json_schema"]


class TextConfig(requests.Model):
    format: Annotated[TextFormat | SchemaItem, BY_TYPE] | None = None
    verbosity: Annotated[Label | None, requests.NO_SETTING] = None


class ReasoningConfig(requests.Model):
    effort: Label | None = Field(None, description=requests.EFFORT)
    summary: Annotated[Label | None, _SHOWN] = None
    generate_summary: Annotated[Label | None, _SHOWN] = None
    context: Annotated[Label | None, _SHOWN] = None
    mode: Annotated[Label | None, _SHOWN] = None


class ItemStreamOptions(requests.Model):
    include_obfuscation: Annotated[bool | None, accepted("nothing is padded")] = None


_SCORES = "message.output_text.logprobs"
Included = Literal[
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results", "message.input_image.image_url", "message.output_text.logprobs",
    "reasoning.encrypted_content", "web_search_call.action.sources", "web_search_call.results",
]  # fmt: skip


class ResponsesRequest(requests.LabelledRequest):
    """``/v1/responses``."""

    model: Label | None = Field(None, description="the open one if null")  # type: ignore[assignment]
    input: TextOr[requests.Text, Items]
    instructions: requests.Text | None = None
    max_output_tokens: Count | None = None
    previous_response_id: Label | None = Field(None, description="continues this response")
    store: bool | None = Field(None, description="true if not given")
    tools: Tools | None = Field(None, description="the model is offered functions only")
    tool_choice: Word | Annotated[FunctionItem | AllowedItem, BY_TYPE] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = Field(None, description="its `format` is that of `response_format`")
    background: Annotated[Literal[False] | None, accepted("answers come at once")] = None
    background_options: Annotated[None, Refused("answers come at once")] = None
    access_programs: Annotated[None, Refused("the server has no programs")] = None
    client_metadata: Annotated[Json | None, requests.LABEL] = None
    context_management: Annotated[None, Refused("a conversation is read whole")] = None
    conversation: Annotated[None, Refused("use previous_response_id")] = None
    image: Annotated[None, Refused("answers are text")] = None
    include: list[Included] | None = Field(None, description=f"only `{_SCORES}` works")
    max_tool_calls: Annotated[Count | None, accepted("it bounds tools that OpenAI runs")] = None
    moderation: Annotated[None, Refused("the server does not moderate")] = None
    personality: Annotated[None, Refused("the model has no such setting")] = None
    prompt: Annotated[None, Refused("no prompts are stored here; send its text")] = None
    reasoning: ReasoningConfig | None = None
    stream_options: ItemStreamOptions | None = None
    top_logprobs: requests.TopLogprobs | None = None
    truncation: Literal["disabled"] | None = Field(None, description="nothing is dropped silently")

    def functions(self) -> list[FunctionToolItem]:
        """The tools that the model may use."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionToolItem)]

    def chat(self, items: Sequence[Item]) -> requests.Conversation:
        """That of ``items``.  Raises ``RefusedError``."""
        messages = requests.with_system([self.instructions], messages_of(items))
        tools, choice = self.functions(), self.tool_choice
        if not tools and choice in ("none", "auto"):
            choice = None  # clients give it in any case
        policy = requests.tool_policy(tools, choice, self.parallel_tool_calls if tools else None)
        schema = schema_of(self.text.format if self.text is not None else None)
        effort = self.reasoning.effort if self.reasoning is not None else None
        return requests.Conversation(messages, policy, schema, effort)

    def options(self) -> requests.AnswerOptions:
        is_scored = self.top_logprobs is not None or _SCORES in (self.include or ())
        logprobs = (self.top_logprobs or 0) if is_scored else None
        return requests.AnswerOptions(self.sampling(), self.max_output_tokens, logprobs=logprobs)


def messages_of(items: Iterable[Item]) -> list[requests.ChatMessage]:
    """A call is of the assistant's message before it.  Raises ``RefusedError`` for no message."""
    messages, thoughts = list[requests.ChatMessage](), ""
    for item in items:
        if isinstance(item, Reasoning):
            thoughts = "".join(part.text for part in item.content or ())
            continue
        if isinstance(item, FunctionOutput):
            messages.append(said("tool", item.output, tool_call_id=item.call_id, name=item.name))
        elif isinstance(item, InputMessage):
            role = "system" if item.role == "developer" else item.role
            messages.append(said(role, item.content))
        elif not messages or messages[-1].role != "assistant":
            messages.append(said("assistant", None))
        last = messages[-1]
        if isinstance(last, requests.AssistantMessage):
            if isinstance(item, FunctionCall):
                call = requests.ToolCall.of(item.call_id, item.name, item.arguments)
                last.tool_calls = [*last.calls, call]
            if thoughts:
                last.reasoning_content, thoughts = thoughts, ""
    if not messages:
        raise RefusedError("input: holds no message", "input")
    return messages
