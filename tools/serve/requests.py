"""Requests of OpenAI's API, checked field by field; and what a request of any API comes to: a
``Conversation`` in the words of OpenAI's chat.

A field is honoured, or it is harmless and marked ``accepted``, or the request is refused.  The
table of all of them is docs/api-fields.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import dropwhile
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, Tag, model_validator

from slotmoe.jsonfile import Json
from slotmoe.model.generate import Sampling
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import BY_TYPE, Refused, accepted, at_most, by_kind
from slotmoe.tools.serve.fields import Model as Model  # for the requests of other modules too
from slotmoe.tools.serve.rules import Rule, Schema

MAX_ANSWERS = 16  # in one request
MAX_TOOLS = 128
MAX_MESSAGES = 4096
_SAMPLING_FIELDS = {field.name for field in fields(Sampling)} - {"logit_bias"}
# JSON has one kind of number: 2.0 is the integer 2.
Whole = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)
Count = Annotated[int, Field(ge=1), Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole]
Id = Annotated[int, Field(ge=0, lt=1 << 31), Whole]
TopK = Annotated[Id | None, BeforeValidator(lambda k: None if k == -1 else k)]  # -1 is off
Text = Annotated[str, Field(max_length=1 << 22)]
Label = Annotated[str, Field(max_length=512)]
Description = Annotated[str, Field(max_length=1 << 16)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]  # of a function
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
T = TypeVar("T")
L = TypeVar("L")
TextOr = Annotated[
    Annotated[T, Tag("text")] | Annotated[L, Tag("list")],
    by_kind(lambda value: {str: "text", list: "list"}.get(type(value)), "text nor a list"),
]
Labels = Annotated[dict[str, Label], Field(max_length=16), at_most(16, "labels")]


@dataclass(frozen=True)
class AnswerOptions:
    """How each of ``choices`` answers to a prompt is made: with the settings of ``sampling`` in
    place of the server's own, at most ``limit`` tokens (None for as many as the context holds),
    ended by a string of ``stop`` or a token of ``ends``, with the log-probabilities of so many of
    the likeliest ids beside each token's (``logprobs``, and ``prompt_logprobs`` for those of the
    prompt, None for none at all).  It has ``least`` tokens before a token may end it; if it
    ``goes_on``, no end-of-sentence token does."""

    sampling: Json
    limit: int | None
    stop: tuple[str, ...] = ()
    choices: int = 1
    logprobs: int | None = None
    least: int = 0
    goes_on: bool = False
    ends: tuple[int, ...] = ()
    prompt_logprobs: int | None = None


LABEL = accepted("a label")
CACHED = accepted("every prefix is cached")
TIER = accepted("there is one tier")
REPLAYED = accepted("the model does not see it")
EFFORT = "`none` switches reasoning off; DeepSeek-V4 also has `max`"
NO_SETTING = accepted("the model has no such setting")
DESCRIBED = accepted("a tool is described at once, by its schema")
_REPLAYED = accepted("clients send back what others added")


class TextPart(Model):
    type: Literal["text"]
    text: Text
    cache_control: Annotated[Json | None, CACHED] = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: object) -> object:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of type {kind[:40]!r} can't be read: the model reads text")
        return part


Content: TypeAlias = TextOr[Text, list[TextPart]]


class CalledFunction(Model):
    name: Name
    arguments: Text  # JSON
    parsed_arguments: Annotated[object, _REPLAYED] = None
    provider_specific_fields: Annotated[Json | None, _REPLAYED] = None


class ToolCall(Model):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int | None, accepted("the order is known")] = None
    provider_specific_fields: Annotated[Json | None, _REPLAYED] = None

    @classmethod
    def of(cls, id_: str, name: str, arguments: str) -> "ToolCall":
        function = CalledFunction.model_construct(name=name, arguments=arguments)
        return ToolCall.model_construct(id=id_, function=function)


_NAMED = accepted("no template uses it")
REMINDER = "latest_reminder"  # the role of messages that DeepSeek-V4 alone knows


class Message(Model):
    content: Content | None = None
    id: Annotated[Label | None, _REPLAYED] = None

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @property
    def calls(self) -> list[ToolCall]:
        return []

    @property
    def thoughts(self) -> str:
        return ""


class PlainMessage(Message):
    content: Content
    role: Annotated[
        Literal["system", "developer", "user", "latest_reminder"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]
    name: Annotated[Label | None, _NAMED] = None


class InsertedMessage(PlainMessage):
    """The system's in the midst of a conversation: it stays where it is, whatever the template."""


class AssistantMessage(Message):
    """Clients send back what they got, and what they added to it."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    name: Annotated[Label | None, _NAMED] = None
    refusal: Annotated[None, Refused("the server makes none")] = None
    annotations: Annotated[list[Json] | None, _REPLAYED] = None
    audio: Annotated[None, Refused("the model reads text")] = None
    function_call: Annotated[None, Refused("use tool_calls")] = None
    parsed: Annotated[object, _REPLAYED] = None
    reasoning_content: Text | None = Field(None, description="where the template uses it")
    reasoning: Text | None = Field(None, description="`reasoning_content` by another name")
    reasoning_details: Annotated[list[Json] | None, accepted("`reasoning` has the text")] = None
    provider_specific_fields: Annotated[Json | None, _REPLAYED] = None

    @property
    def calls(self) -> list[ToolCall]:
        return self.tool_calls or []

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""

    @model_validator(mode="after")
    def _is_not_empty(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant message has neither content nor tool_calls")
        return self


class ToolMessage(Message):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: CallId
    name: Name | None = None  # of its function


class FailedToolMessage(ToolMessage):
    """A result that only Anthropic's API can mark as an error."""


ChatMessage: TypeAlias = PlainMessage | AssistantMessage | ToolMessage


def said(role: str, content: object, **about: Any) -> ChatMessage:
    """What a message of another API comes to, whose fields were checked there."""
    kinds: dict[str, type[ChatMessage]] = {"assistant": AssistantMessage, "tool": ToolMessage}
    return kinds.get(role, PlainMessage).model_construct(role=role, content=content, **about)


def with_system(texts: Iterable[str | None], messages: list[ChatMessage]) -> list[ChatMessage]:
    """``messages`` with those of the system's that are first as one, which begins with ``texts``:
    some templates use only one, before all others."""
    rest = list(dropwhile(lambda message: message.role == "system", messages))
    first = [message.text for message in messages[: len(messages) - len(rest)]]
    text = "\n\n".join(text for text in (*texts, *first) if text)
    return [said("system", text), *rest] if text else rest


class Function(Model):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: Name
    description: Description | None = None
    parameters: Json | None = None
    strict: bool | None = None  # no keyword of the schema may be relaxed

    @property
    def schema_of_arguments(self) -> Json:
        """An object's; without ``parameters`` it is empty.  Raises ``RefusedError``."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        if self.parameters.get("type", "object") != "object":
            problem = "the schema of the arguments has to be of type 'object'"
            raise RefusedError(f"tool {self.name!r}: {problem}", "tools")
        return {**self.parameters, "type": "object"}


class FunctionTool(Model):
    type: Literal["function"]
    function: Function


class FunctionName(Model):
    name: Name


class FunctionChoice(Model):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Model):
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Model):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Word: TypeAlias = Literal["none", "auto", "required"]
Choice: TypeAlias = Word | Annotated[FunctionChoice | AllowedChoice, BY_TYPE]


class GenerationRequest(Model):
    """Fields of the requests of all APIs.  null is the same as leaving a field out."""

    model: Label
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0 is greedy")
    top_k: TopK = Field(None, description="-1 and 0 switch it off")
    stream: bool | None = None

    def sampling(self, *bias: tuple[int, float]) -> Json:
        """Arguments of ``Sampling``, of those that are given."""
        given = self.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
        if self.top_p == 0:
            given |= {"temperature": 0.0, "top_p": 1.0}
        return {**given, "logit_bias": bias}


class LabelledRequest(GenerationRequest):
    """With OpenAI's fields that say nothing about an answer."""

    user: Annotated[Label | None, LABEL] = None
    metadata: Annotated[Labels | None, LABEL] = None
    safety_identifier: Annotated[Label | None, LABEL] = None
    service_tier: Annotated[Label | None, TIER] = None
    prompt_cache_key: Annotated[Label | None, CACHED] = None
    prompt_cache_options: Annotated[Json | None, CACHED] = None
    prompt_cache_retention: Annotated[Label | None, CACHED] = None


SOME = Field(min_length=1, max_length=MAX_MESSAGES)
Messages = Annotated[list[Annotated[ChatMessage, Field(discriminator="role")]], SOME]
Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True)
class ToolPolicy:
    """The model may call those of ``allowed``, must call if ``required``, and calls once if
    ``single``.  All ``functions`` are described to it, the ``deferred`` ones in messages."""

    functions: Sequence[Function]
    allowed: Sequence[Function]
    required: bool
    single: bool
    deferred: frozenset[str] = frozenset()


def tool_policy(
    functions: Sequence[Function], choice: Model | str | None, parallel: bool | None = None
) -> ToolPolicy | None:
    """Which of ``functions`` the model may call; None for none.  The ``choice`` of any API is a
    word, a function's name, or some names and a word.  Raises ``RefusedError``."""
    given: Json = {"mode": choice or "auto", "tools": []}
    chosen, single = list[str](), parallel is False
    match choice.model_dump() if isinstance(choice, Model) else given:
        case {"function": {"name": name}} | {"type": "function" | "tool", "name": name}:
            chosen, mode, single = [name], "required", True
        case {"allowed_tools": {"mode": mode, "tools": tools}} | {"mode": mode, "tools": tools}:
            chosen = [tool.get("function", tool)["name"] for tool in tools]
    if not functions and choice is not None and mode != "none":
        raise RefusedError("tool_choice can only be given with tools", "tool_choice")
    if not functions and parallel is not None:
        name = "parallel_tool_calls"
        raise RefusedError(f"{name} can only be given with tools", name)
    if not functions or mode == "none":
        return None
    names = [function.name for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise RefusedError(f"tool {name!r} is there twice", "tools")
    for name in chosen:
        if name not in names:
            raise RefusedError(f"tool_choice: {name!r} is none of the tools", "tool_choice")
    allowed = [f for f in functions if not chosen or f.name in chosen]
    return ToolPolicy(functions, allowed, mode == "required", single)


class Templated(Model):
    """A conversation, and how the chat template writes it."""

    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = Field(None, description="if false, no answer is begun")
    continue_final_message: bool | None = Field(None, description="the answer goes on with it")
    chat_template_kwargs: Json | None = Field(None, description="variables of the template")

    def conversation(
        self,
        choice: Model | str | None = None,
        parallel: bool | None = None,
        wanted: Schema | Rule | None = None,
        effort: str | None = None,
    ) -> "Conversation":
        """Raises ``RefusedError``."""
        policy = tool_policy([tool.function for tool in self.tools or ()], choice, parallel)
        messages, extra = self.messages or [], dict(self.chat_template_kwargs or {})
        continues, name = bool(self.continue_final_message), "continue_final_message"
        if continues and self.add_generation_prompt:
            raise RefusedError(f"give add_generation_prompt or {name}, not both", name)
        if continues and (messages[-1].role != "assistant" or messages[-1].calls):
            raise RefusedError(f"{name}: the last message is no text of the assistant", name)
        if self.add_generation_prompt is False and not continues:
            extra["add_generation_prompt"] = False
        return Conversation(messages, policy, wanted, effort, continues, extra)


@dataclass(frozen=True)
class Conversation:
    """What a request comes to: the answer to ``messages`` may call functions as ``policy`` says
    (None for no calls) and follows ``wanted`` (None for plain text).  Where the template can switch
    reasoning, an ``effort`` of "none" switches it off and every other on (None for the model's own
    way); DeepSeek-V4 reasons most at "max".  The answer is a new message, or it ``continues`` the
    text of the last one.  The template gets ``extra`` variables."""

    messages: list[ChatMessage]
    policy: ToolPolicy | None = None
    wanted: Schema | Rule | None = None
    effort: str | None = None
    continues: bool = False
    extra: Json | None = None
