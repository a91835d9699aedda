"""Requests of all APIs, checked field by field, and what each comes to: a ``Conversation``.

A field that the server honours is checked.  One that it knows, and that would change the answer if
it were ignored, is refused.  Every other is ignored; docs/api-fields.md has the table.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from itertools import dropwhile
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from slotmoe.jsonfile import Json
from slotmoe.model.sampling import Sampling
from slotmoe.tools.serve.errors import TEXTS, RefusedError

MAX_ANSWERS = 16  # in one request
MAX_TOOLS = 1024
MAX_ITEMS = 4096  # of a list that has no other bound
_SAMPLING_FIELDS = {field.name for field in fields(Sampling)} - {"logit_bias"}
# Told of the names in a request that no field has.
ignored: ContextVar[Callable[[Iterable[str]], None]] = ContextVar("ignored")


def at_most(count: int, what: str) -> BeforeValidator:
    """Of an object with any keys: pydantic counts them only when it has checked all."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"has {len(value)} {what}, more than {count}")
        return value

    return BeforeValidator(check)


def by_kind(kind: Callable[[object], str | None], expected: str) -> Discriminator:
    """Tells the members of a union apart, so that an error names what is wrong in the one that was
    meant; without a member, it says what was ``expected``."""
    message = f"is neither {expected}"
    return Discriminator(kind, custom_error_type="kind", custom_error_message=message)


# JSON has one kind of number: 2.0 is the integer 2.
Whole = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)
Count = Annotated[int, Field(ge=1), Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole]
Id = Annotated[int, Field(ge=0, lt=1 << 31), Whole]
TopK = Annotated[Id | None, BeforeValidator(lambda k: None if k == -1 else k)]  # -1 is off
Text = Annotated[str, Field(max_length=1 << 22)]
Label = Annotated[str, Field(max_length=512)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]  # of a function
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Source = Annotated[str, Field(min_length=1, max_length=1 << 14)]  # of a grammar
Description = Annotated[str, Field(max_length=1 << 16)]
T = TypeVar("T")
L = TypeVar("L")
TextOr = Annotated[
    Annotated[T, Tag("text")] | Annotated[L, Tag("list")],
    by_kind(lambda value: {str: "text", list: "list"}.get(type(value)), "text nor a list"),
]

Labels = Annotated[dict[str, Label], Field(max_length=16), at_most(16, "labels")]


def _bound_lists(schema: object) -> None:
    """Have every list in pydantic's ``schema`` end at its first error and at a bound."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
            schema.setdefault("max_length", MAX_ITEMS)
        schema = [*schema.values()]
    for value in schema if isinstance(schema, list | tuple) else ():
        _bound_lists(value)


class Fields(BaseModel):
    """Base of all requests and their parts: no silent conversion, no NaN, and a bound on what an
    error costs: each list is checked to its first.  A field of ``refused``, in ``errors.json``, may
    only be null, or an empty list; ``inside`` is the request's field that has it."""

    model_config = {"extra": "ignore", "strict": True, "allow_inf_nan": False}
    refused: ClassVar[Mapping[str, str]] = {}
    inside: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.refused = {**cls.refused, **TEXTS["refused"].get(cls.__name__, {})}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        _bound_lists(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _look(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        for name, reason in cls.refused.items():
            if data.get(name) not in (None, []):
                place = f"{cls.inside}: " if cls.inside else ""
                problem = f"{place}{name} is not supported by this server: {reason}"
                raise RefusedError(problem, cls.inside or name)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if more := data.keys() - known - cls.refused.keys():
            ignored.get(lambda _: None)(more)
        return data


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


class GenerationRequest(Fields):
    """Fields of the requests of all APIs.  null is the same as leaving a field out."""

    model: Label | None = Field(None, description="the open one if null")
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


class Rule(NamedTuple):
    """What an answer follows: a JSON schema (``json``), a ``regex``, a ``grammar`` as Lark or
    llama.cpp write it, or a ``choice`` of texts.  No keyword of a ``strict`` schema is left out."""

    kind: Literal["json", "regex", "grammar", "choice"]
    rule: Any
    param: str = "response_format"
    strict: bool = False


class JsonSchema(Fields):
    definition: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(JsonSchema):
    """The schema of a ``json_schema`` is an object by itself in the chat, and in line elsewhere;
    llama.cpp's ``json_object`` may have one too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    name: Label | None = None


def rule_of(form: ResponseFormat | None) -> Rule | None:
    """Raises ``RefusedError``."""
    if form is None:
        return None
    given = form.json_schema or form
    if given.definition is not None:
        return Rule("json", given.definition, strict=bool(given.strict))
    if form.type == "json_schema":
        raise RefusedError("the schema of a format is missing", "response_format")
    return Rule("json", {"type": "object"}) if form.type == "json_object" else None


class TextPart(Fields):
    """Of a message; the name of its type depends on the API."""

    type: Literal["text", "input_text", "output_text", "reasoning_text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: object) -> object:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and not kind.endswith("text"):
            raise ValueError(f"a part of type {kind[:40]!r} can't be read: the model reads text")
        return part


Content: TypeAlias = TextOr[Text, list[TextPart]]


def readable(part: object) -> object:
    """A part of a tool's result, or what is said in place of one that no model here reads: the
    result is sent again with each later request."""
    match part:
        case {"type": "document", "source": {"type": "text" | "content"}}:
            return part
        case {"type": str(kind)} if found := re.search("image|audio|file|document", kind):
            return {"type": "text", "text": f"[{found[0]} left out: this model reads text]"}
    return part


Result: TypeAlias = TextOr[Text, list[Annotated[TextPart, BeforeValidator(readable)]]]


def text_of(content: str | Iterable[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


@dataclass
class Call:
    """A call of a function; the arguments are JSON."""

    id: str
    name: str
    arguments: str


@dataclass
class Message:
    """Of a conversation, in OpenAI's roles.  The assistant's may have ``calls`` and ``thoughts``; a
    tool's is the result of the call ``call_id``, which may have ``failed``.  One of the system's
    that is ``inserted`` stays where it is, whatever the template."""

    role: str
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    thoughts: str = ""
    call_id: str = ""
    name: str | None = None  # of the function that has this result
    failed: bool = False
    inserted: bool = False


EFFORT = "`none` switches reasoning off; DeepSeek-V4 also has `max`"
REMINDER = "latest_reminder"  # the role of messages that DeepSeek-V4 alone knows


class Thinking(Fields):
    """Anthropic's and DeepSeek's switch of reasoning."""

    type: Literal["disabled", "enabled", "adaptive", "between_tools"]

    def effort(self, wanted: str | None) -> str | None:
        """With the effort that is ``wanted`` beside it."""
        return {"disabled": "none", "enabled": wanted or "high"}.get(self.type)


class FunctionName(Fields):
    name: Name


class CalledFunction(FunctionName):
    arguments: Text  # JSON


class ToolCall(Fields):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Fields):
    """Clients send back what they got, and what they added to it."""

    inside = "messages"
    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    name: Label | None = None
    reasoning_content: Text | None = Field(None, description="where the template uses it")
    reasoning: Text | None = Field(None, description="`reasoning_content` by another name")
    prefix: bool | None = Field(None, description="of the last: the answer goes on with it")

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, message: object) -> object:
        match message:
            case {"role": "tool", "content": [*parts], **others}:
                return {**others, "role": "tool", "content": [*map(readable, parts)]}
        return message

    @model_validator(mode="after")
    def _is_whole(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            of_calls = " nor tool_calls" if self.role == "assistant" else ""
            word = "neither" if of_calls else "no"
            raise ValueError(f"a message of the {self.role} has {word} content{of_calls}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the tool has no tool_call_id")
        return self

    @property
    def message(self) -> Message:
        message = Message("system" if self.role == "developer" else self.role)
        message.text = text_of(self.content)
        if self.role == "assistant":
            given = self.tool_calls or ()
            message.calls = [Call(c.id, c.function.name, c.function.arguments) for c in given]
            message.thoughts = self.reasoning_content or self.reasoning or ""
        elif self.role == "tool":
            message.call_id, message.name = self.tool_call_id or "", self.name
        return message


def with_system(texts: Iterable[str | None], messages: list[Message]) -> list[Message]:
    """``messages`` with those of the system's that are first as one, which begins with ``texts``:
    some templates use only one, before all others."""
    rest = list(dropwhile(lambda message: message.role == "system", messages))
    first = [message.text for message in messages[: len(messages) - len(rest)]]
    text = "\n\n".join(text for text in (*texts, *first) if text)
    return [Message("system", text), *rest] if text else rest


class Function(FunctionName):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

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


class FunctionTool(Fields):
    type: Literal["function"]
    function: Function


@dataclass(frozen=True)
class ToolPolicy:
    """The model may call those of ``allowed``, must call if ``required``, and calls once if
    ``single``.  ``functions`` are described to it before all messages, others in them."""

    functions: Sequence[Function]
    allowed: Sequence[Function]
    required: bool
    single: bool


def tool_policy(
    functions: Sequence[Function], choice: object, parallel: bool | None = None
) -> ToolPolicy | None:
    """Which of ``functions`` the model may call; None for none.  The ``choice`` of any API is a
    word, a function's name, or some names and a word.  Raises ``RefusedError``."""
    chosen, single = list[object](), parallel is False
    match choice:
        case None | "none" | "auto" | "required":
            mode = str(choice or "auto")
        case {"function": {"name": name}} | {"type": "function" | "tool" | "custom", "name": name}:
            chosen, mode, single = [name], "required", True
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as tools},
        } | {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": [_, *_] as tools,
        }:
            for tool in tools:
                match tool:
                    case {"function": {"name": name}} | {"name": name}:
                        chosen.append(name)
                    case _:
                        chosen.append(None)
        case _:
            raise RefusedError("tool_choice is none that this server knows", "tool_choice")
    if not functions and choice is not None and mode != "none":
        raise RefusedError("tool_choice can only be given with tools", "tool_choice")
    if not functions and parallel is not None:
        name = "parallel_tool_calls"
        raise RefusedError(f"{name} can only be given with tools", name)
    if not functions or mode == "none":
        return None
    names = set[str]()
    for function in functions:
        if function.name in names:
            raise RefusedError(f"tool {function.name!r} is there twice", "tools")
        names.add(function.name)
    for name in chosen:
        if not isinstance(name, str) or name not in names:
            raise RefusedError(f"tool_choice: {name!r:.80} is none of the tools", "tool_choice")
    allowed = [f for f in functions if not chosen or f.name in chosen]
    return ToolPolicy(functions, allowed, mode == "required", single)


SOME = Field(min_length=1, max_length=MAX_ITEMS)
Messages = Annotated[list[ChatMessage], SOME]
Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True)
class Conversation:
    """What a request comes to: the answer to ``messages`` may call functions as ``policy`` says
    (None for no calls) and follows ``wanted`` (None for plain text).  Where the template can switch
    reasoning, an ``effort`` of "none" switches it off and every other on (None for the model's own
    way); DeepSeek-V4 reasons most at "max".  The answer is a new message, or it ``continues`` the
    text of the last one.  The template gets ``extra`` variables."""

    messages: list[Message]
    policy: ToolPolicy | None = None
    wanted: Rule | None = None
    effort: str | None = None
    continues: bool = False
    extra: Json | None = None
