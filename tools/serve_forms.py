"""What a client may ask of ``slotmoe serve``: the requests of OpenAI's and Anthropic's APIs, checked field by field.

A field is honoured or the request is refused; none is ignored, except ``user`` and ``metadata``, which are labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from model.generate import Sampling


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_CHOICES = 16
WHOLE = BeforeValidator(_integral)
Id = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]
Text = Annotated[str, Field(max_length=1 << 22)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE]
Bias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]


class RefusedError(Exception):
    """A request that is answered with an error: HTTP ``status``, and OpenAI's ``param`` and ``code``."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


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
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # less would overflow logits
    logit_bias: Bias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def sampling(self, vocabulary: int) -> Sampling:
        """How the ids below ``vocabulary`` are chosen.  Raises ``RefusedError``."""
        if self.stream_options is not None and not self.stream:
            raise RefusedError("stream_options can only be given with stream: true", param="stream_options")
        bias = []
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
                raise RefusedError(f"logit_bias: {key!r:.40} is not a token id from 0 to {vocabulary - 1}", param="logit_bias")
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
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": joined(self.content)}


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

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    @field_validator("tools", "tool_choice", mode="before")
    @classmethod
    def no_tools(cls, value: Any) -> Any:
        """Say why, not only that."""
        if value not in (None, [], "none"):
            raise ValueError("this server has no tool calls: the models' templates have none; describe the answer with response_format")
        return value

    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to follow; None for plain text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.definition
        return {"type": "object"} if self.response_format is not None and self.response_format.type == "json_object" else None

    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as the context holds."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedError("give max_tokens or max_completion_tokens, not both", param="max_tokens")
        return self.max_tokens or self.max_completion_tokens

    def likeliest(self) -> int | None:
        """Of how many ids to tell the log-probability with each token; None for not even its own."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedError("top_logprobs can only be given with logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampled):
    """``/v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Annotated[Literal[1], WHOLE] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as text or as token ids.  Raises ``RefusedError``."""
        if self.echo and self.logprobs is not None:
            raise RefusedError("echo with logprobs is not supported: the log-probabilities of a prompt are not kept", param="echo")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise RefusedError("suffix can only be given with one prompt, as text", param="suffix")
        if self.suffix is not None and self.echo:
            raise RefusedError("suffix and echo can't be given together", param="echo")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class AnthropicMessage(Form):
    role: Literal["user", "assistant"]
    content: Text | list[TextPart]


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

    def plain(self) -> list[dict[str, str]]:
        """System prompt and messages as chat templates know them."""
        system = [] if self.system is None else [{"role": "system", "content": joined(self.system)}]
        return [*system, *({"role": one.role, "content": joined(one.content)} for one in self.messages)]

    def sampling(self) -> Sampling:
        return Sampling(temperature=_given(self.temperature, 1.0), top_p=_given(self.top_p, 1.0), top_k=self.top_k or 0)


def joined(content: str | list[TextPart]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
