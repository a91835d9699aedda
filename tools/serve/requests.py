"""Requests of OpenAI's API, checked field by field; the conversation of any request in its form.

A field is honoured or the request is refused.  Only ``user``, a label, is ignored.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slotmoe.model.generate import Sampling
from slotmoe.tools.serve.errors import RefusedError

MAX_ANSWERS = 16  # in one request
MAX_TOOLS = 128
MAX_MESSAGES = 4096
_SAMPLING_FIELDS = {field.name for field in fields(Sampling)} - {"logit_bias"}


def _integer(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_integer)
Count = Annotated[int, Field(ge=1), Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=20), Whole]
Id = Annotated[int, Field(ge=0, lt=1 << 31), Whole]
Ids = Annotated[list[Id], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), Whole, AfterValidator(lambda s: s % 2**63)]
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, Field(max_length=1 << 22)]
Label = Annotated[str, Field(max_length=512)]
Description = Annotated[str, Field(max_length=1 << 16)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]  # of a function
CallId = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]


@dataclass(frozen=True)
class AnswerOptions:
    """How each of ``choices`` answers to a prompt is made: at most ``limit`` tokens (None for as
    many as the context holds), ended by a string of ``stop``, with the log-probabilities of so many
    of the likeliest ids beside each token's (``logprobs``, None for none at all)."""

    sampling: Sampling
    limit: int | None
    stop: tuple[str, ...]
    choices: int
    logprobs: int | None


class Model(BaseModel):
    """Base of all requests and their parts: no unknown fields, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Model):
    type: Literal["text"]
    text: Text


Content: TypeAlias = Text | list[TextPart]


class CalledFunction(Model):
    name: Name
    arguments: Text  # JSON


class ToolCall(Model):
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Model):
    content: Content | None = None

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @property
    def calls(self) -> list[ToolCall]:
        return []


class PlainMessage(Message):
    content: Content
    role: Annotated[
        Literal["system", "developer", "user"],
        AfterValidator(lambda role: "system" if role == "developer" else role),
    ]


class AssistantMessage(Message):
    """OpenAI's client sends the fields of null back."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @property
    def calls(self) -> list[ToolCall]:
        return self.tool_calls or []

    @model_validator(mode="after")
    def _is_not_empty(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant message has neither content nor tool_calls")
        return self


class ToolMessage(Message):
    """The result of a tool call."""

    failed: ClassVar[bool] = False
    role: Literal["tool"]
    content: Content
    tool_call_id: CallId
    name: Name | None = None  # of its function


class FailedToolMessage(ToolMessage):
    """A result that only Anthropic's API can mark as an error."""

    failed: ClassVar[bool] = True


ChatMessage: TypeAlias = PlainMessage | AssistantMessage | ToolMessage


class Function(Model):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: Name
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the arguments follow the schema in any case

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
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


class TextFormat(Model):
    type: Literal["text", "json_object"]


class Schema(Model):
    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: Schema


class GenerationRequest(Model):
    """Fields of the requests of both APIs.  null is the same as leaving a field out."""

    model: Label
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Id | None = None
    stream: bool | None = None


class StreamOptions(Model):
    include_usage: bool = False


class OpenAIRequest(GenerationRequest):
    needs: ClassVar = {"stream_options": "stream"}  # a field that has to be true
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS), Whole] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # Less than 0.01 would overflow logits.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Bias | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None

    def _options(self, vocabulary: int, limit: int | None, logprobs: int | None) -> AnswerOptions:
        for name, needed in self.needs.items():
            if getattr(self, name) is not None and not getattr(self, needed):
                raise RefusedError(f"{name} needs {needed}: true", name)
        bias = []
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
                problem = f"{key!r:.40} is not a token id from 0 to {vocabulary - 1}"
                raise RefusedError(f"logit_bias: {problem}", "logit_bias")
            bias.append((int(key), value))
        given: dict[str, Any] = self.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
        sampling = Sampling(**{"temperature": 1.0, **given}, logit_bias=tuple(bias))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return AnswerOptions(sampling, limit, stop, self.n or 1, logprobs)


_ByRole = Annotated[ChatMessage, Field(discriminator="role")]
Messages = Annotated[list[_ByRole], Field(min_length=1, max_length=MAX_MESSAGES)]


@dataclass(frozen=True)
class ToolPolicy:
    """All ``functions`` are described to the model; it may call those of ``allowed``, must call if
    ``required``, and calls once if ``single``."""

    functions: list[Function]
    allowed: list[Function]
    required: bool
    single: bool


class ChatRequest(OpenAIRequest):
    """``/v1/chat/completions``."""

    # Whether the answer goes on with the text of a last message of the assistant's.
    continues: ClassVar[bool] = False
    needs: ClassVar = {**OpenAIRequest.needs, "top_logprobs": "logprobs"}
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None

    def options(self, vocabulary: int) -> AnswerOptions:
        """For a tokenizer of ``vocabulary`` ids.  Raises ``RefusedError``."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedError("give max_tokens or max_completion_tokens, not both", "max_tokens")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._options(vocabulary, self.max_tokens or self.max_completion_tokens, logprobs)

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow; None for plain text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.definition
        wants_object = self.response_format and self.response_format.type == "json_object"
        return {"type": "object"} if wants_object else None

    def tool_policy(self) -> ToolPolicy | None:
        """Which functions the model may call; None for none.  Raises ``RefusedError``."""
        choice = self.tool_choice
        if not self.tools:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) not in (None, "none"):
                    raise RefusedError(f"{name} can only be given with tools", name)
        if not self.tools or choice == "none":
            return None
        if self.stop is not None:
            problem = "stop strings can't be given with tools: they could end a call in its middle"
            raise RefusedError(problem, "stop")
        functions = [tool.function for tool in self.tools]
        names = [function.name for function in functions]
        for name in names:
            if names.count(name) > 1:
                raise RefusedError(f"tool {name!r} is there twice", "tools")
        if not isinstance(choice, FunctionChoice):
            single = self.parallel_tool_calls is False
            return ToolPolicy(functions, functions, choice == "required", single)
        allowed = [f for f in functions if f.name == choice.function.name]
        if not allowed:
            problem = f"tool_choice: {choice.function.name!r} is none of the tools"
            raise RefusedError(problem, "tool_choice")
        return ToolPolicy(functions, allowed, required=True, single=True)


_SOME_PROMPTS = Field(min_length=1, max_length=MAX_ANSWERS)


class ContinuedChatRequest(ChatRequest):
    """A conversation that only Anthropic's API can ask to go on in the middle of a message."""

    continues: ClassVar[bool] = True


class CompletionRequest(OpenAIRequest):
    """``/v1/completions``."""

    prompt: Text | Ids | Annotated[list[Text], _SOME_PROMPTS] | Annotated[list[Ids], _SOME_PROMPTS]
    max_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Annotated[Literal[1], Whole] | None = None

    def options(self, vocabulary: int) -> AnswerOptions:
        """For a tokenizer of ``vocabulary`` ids.  Raises ``RefusedError``."""
        if self.max_tokens == 0 and not self.echo:
            raise RefusedError("max_tokens: 0 needs echo: true", "max_tokens")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise RefusedError("suffix can only be given with one prompt, as text", "suffix")
        if self.suffix is not None and self.echo:
            raise RefusedError("suffix and echo can't be given together", "echo")
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self._options(vocabulary, limit, self.logprobs)

    def prompts(self) -> list[Any]:
        """The prompts, as texts or as lists of token ids."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else [*self.prompt]
