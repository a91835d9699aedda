"""What a client may ask of ``slotmoe serve``: the requests of OpenAI's and Anthropic's APIs,
checked field by field.

A field is honoured or the request is refused; none is ignored, except ``user`` and ``metadata``,
which are labels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slotmoe.model.generate import Sampling


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_CHOICES = 16
MAX_TOOLS = 128
WHOLE = BeforeValidator(_integral)
Id = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]
Text = Annotated[str, Field(max_length=1 << 22)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]  # of a function
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]


class RefusedError(Exception):
    """A request that is answered with an error: HTTP ``status``, and OpenAI's ``param`` and
    ``code``."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; ``schema`` is that of its arguments, an object's."""

    name: str
    description: str
    schema: dict[str, Any]

    def openai(self) -> dict[str, Any]:
        """As chat templates know it."""
        return {"name": self.name, "description": self.description, "parameters": self.schema}


@dataclass(frozen=True)
class Calling:
    """``tools`` are told to the model; it may call, or if ``forced`` has to, those of ``allowed``,
    only one if ``single``."""

    tools: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    forced: bool
    single: bool


@dataclass(frozen=True)
class Call:
    """A call that the model made: ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Result:
    """What a call, ``id``, gave; ``name`` is its function's, if it was told again."""

    id: str
    text: str
    failed: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Turn:
    """A message of a conversation, whichever API it came by; the role is ``system``, ``user``,
    ``assistant`` or ``tool``."""

    role: str
    text: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[Result, ...] = ()


class Form(BaseModel):
    """Base of all requests: no unknown fields, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Form):
    include_usage: bool = False


class Sampled(Form):
    """Fields that chat and plain completions share.  null is the same as leaving a field out."""

    model: Annotated[str, Field(max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = (
        None  # less would overflow logits
    )
    logit_bias: Bias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def sampling(self, vocabulary: int) -> Sampling:
        """How the ids below ``vocabulary`` are chosen.  Raises ``RefusedError``."""
        if self.stream_options is not None and not self.stream:
            raise RefusedError(
                "stream_options can only be given with stream: true", param="stream_options"
            )
        bias = []
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
                raise RefusedError(
                    f"logit_bias: {key!r:.40} is not a token id from 0 to {vocabulary - 1}",
                    param="logit_bias",
                )
            bias.append((int(key), value))
        return Sampling(
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=self.top_k or 0,
            seed=None if self.seed is None else self.seed % (1 << 63),
            min_p=self.min_p or 0.0,
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(bias),
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Form):
    type: Literal["text"]
    text: Text


class Message(Form):
    role: Literal["system", "developer", "user"]
    content: Text | list[TextPart]

    def turn(self) -> Turn:
        return Turn("system" if self.role == "developer" else self.role, joined(self.content))


class CalledFunction(Form):
    name: Name
    arguments: Text


class ToolCall(Form):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Form):
    """The fields of null are those that OpenAI's client sends back."""

    role: Literal["assistant"]
    content: Text | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    def turn(self) -> Turn:
        calls = tuple(
            Call(one.id, one.function.name, one.function.arguments) for one in self.tool_calls or ()
        )
        if self.content is None and not calls:
            raise RefusedError(
                "an assistant message has neither content nor tool_calls", param="messages"
            )
        return Turn("assistant", joined(self.content or ""), calls)


class ToolMessage(Form):
    role: Literal["tool"]
    tool_call_id: CallId
    name: Name | None = None
    content: Text | list[TextPart]

    def turn(self) -> Turn:
        return Turn(
            "tool", results=(Result(self.tool_call_id, joined(self.content), name=self.name),)
        )


class Function(Form):
    name: Name
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the arguments follow the schema in any case


class FunctionTool(Form):
    type: Literal["function"]
    function: Function

    def tool(self) -> Tool:
        return Tool(
            self.function.name,
            self.function.description or "",
            _arguments(self.function.name, self.function.parameters),
        )


class FunctionName(Form):
    name: Name


class FunctionChoice(Form):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Form):
    type: Literal["text", "json_object"]


class Schema(Form):
    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Form):
    type: Literal["json_schema"]
    json_schema: Schema


class Chat(Sampled):
    """``/v1/chat/completions``."""

    messages: Annotated[
        list[Annotated[Message | AssistantMessage | ToolMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=4096),
    ]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None

    def turns(self) -> list[Turn]:
        """The conversation.  Raises ``RefusedError``."""
        return [one.turn() for one in self.messages]

    def calling(self) -> Calling | None:
        """Which functions the model may call; None for none.  Raises ``RefusedError``."""
        if not self.tools:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) not in (None, "none"):
                    raise RefusedError(f"{name} can only be given with tools", param=name)
            return None
        if self.tool_choice == "none":
            return None
        if self.stop is not None:
            raise RefusedError(
                "stop can't be given with tools: it could end a call in its middle", param="stop"
            )
        named = (
            self.tool_choice.function.name if isinstance(self.tool_choice, FunctionChoice) else None
        )
        return _calling(
            [one.tool() for one in self.tools],
            self.tool_choice == "required",
            named,
            self.parallel_tool_calls is False,
        )

    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow; None for plain text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.definition
        return (
            {"type": "object"}
            if self.response_format is not None and self.response_format.type == "json_object"
            else None
        )

    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as the context holds."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedError(
                "give max_tokens or max_completion_tokens, not both", param="max_tokens"
            )
        return self.max_tokens or self.max_completion_tokens

    def likeliest(self) -> int | None:
        """Of how many ids to tell the log-probability with each token; None for not even its
        own."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedError(
                "top_logprobs can only be given with logprobs: true", param="top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampled):
    """``/v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Annotated[Literal[1], WHOLE] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as text or as token ids.  Raises ``RefusedError``."""
        if self.max_tokens == 0 and not self.echo:
            raise RefusedError(
                "max_tokens: 0 can only be given with echo: true", param="max_tokens"
            )
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise RefusedError("suffix can only be given with one prompt, as text", param="suffix")
        if self.suffix is not None and self.echo:
            raise RefusedError("suffix and echo can't be given together", param="echo")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ToolUse(Form):
    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, Any]

    def call(self) -> Call:
        try:
            return Call(self.id, self.name, json.dumps(self.input, ensure_ascii=False))
        except RecursionError:
            raise RefusedError(
                "messages: an input is nested too deeply", param="messages"
            ) from None


class ToolResult(Form):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Text | list[TextPart] | None = None
    is_error: bool | None = None


class AnthropicMessage(Form):
    role: Literal["user", "assistant"]
    content: Text | list[Annotated[TextPart | ToolUse | ToolResult, Field(discriminator="type")]]

    def turns(self) -> list[Turn]:
        """The results of calls that it holds, then its text and the calls."""
        blocks = (
            [TextPart(type="text", text=self.content)]
            if isinstance(self.content, str)
            else self.content
        )
        text = joined([one for one in blocks if isinstance(one, TextPart)])
        calls = tuple(one.call() for one in blocks if isinstance(one, ToolUse))
        results = [
            Result(one.tool_use_id, joined(one.content or ""), bool(one.is_error))
            for one in blocks
            if isinstance(one, ToolResult)
        ]
        if (calls and self.role == "user") or (results and self.role == "assistant"):
            raise RefusedError(
                f"a message of the {self.role} can't hold such a block", param="messages"
            )
        found = [Turn("tool", results=(one,)) for one in results]
        return [*found, Turn(self.role, text, calls)] if text or calls or not found else found


class AnthropicTool(Form):
    type: Literal["custom"] | None = None
    name: Name
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    input_schema: dict[str, Any]

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", _arguments(self.name, self.input_schema))


class AnthropicChoice(Form):
    type: Literal["auto", "any", "none", "tool"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Form):
    user_id: Annotated[str, Field(max_length=512)] | None = None


class Messages(Form):
    """``/v1/messages`` of Anthropic's API."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    system: Text | list[TextPart] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31), WHOLE] | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None

    def turns(self) -> list[Turn]:
        """System prompt and conversation.  Raises ``RefusedError``."""
        system = [] if self.system is None else [Turn("system", joined(self.system))]
        return [*system, *(turn for one in self.messages for turn in one.turns())]

    def calling(self) -> Calling | None:
        """Which functions the model may call; None for none.  Raises ``RefusedError``."""
        choice = self.tool_choice or AnthropicChoice(type="auto")
        if (choice.type == "tool") != (choice.name is not None):
            raise RefusedError(
                "tool_choice: a name has to be given with the type 'tool', and only with it",
                param="tool_choice",
            )
        if not self.tools:
            if self.tool_choice is not None and choice.type != "none":
                raise RefusedError("tool_choice can only be given with tools", param="tool_choice")
            return None
        if choice.type == "none":
            return None
        if self.stop_sequences:
            raise RefusedError(
                "stop_sequences can't be given with tools: one could end a call in its middle",
                param="stop_sequences",
            )
        tools = [one.tool() for one in self.tools]
        return _calling(
            tools, choice.type == "any", choice.name, bool(choice.disable_parallel_tool_use)
        )

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=self.top_k or 0,
        )


def joined(content: str | list[TextPart]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _arguments(name: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments; without one it has none.  Raises ``RefusedError``."""
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise RefusedError(
            f"tool {name!r}: the schema of the arguments has to be of type 'object'", param="tools"
        )
    return {**schema, "type": "object"}


def _calling(tools: list[Tool], forced: bool, named: str | None, single: bool) -> Calling:
    names = [one.name for one in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RefusedError(f"tool {twice!r} is there twice", param="tools")
    if named is not None and named not in names:
        raise RefusedError(f"tool_choice: {named!r} is none of the tools", param="tool_choice")
    allowed = [one for one in tools if named is None or one.name == named]
    return Calling(
        tuple(tools), tuple(allowed), forced or named is not None, single or named is not None
    )
