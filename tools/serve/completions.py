"""Requests of ``/v1/completions``, checked field by field."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, Tag

from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.fields import by_kind
from slotmoe.tools.serve.requests import (
    MAX_ANSWERS,
    AnswerOptions,
    Ids,
    Limit,
    OpenAIRequest,
    Text,
    TopLogprobs,
    Whole,
)


def _prompt_kind(value: object) -> str | None:
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


_SOME_PROMPTS = Field(min_length=1, max_length=MAX_ANSWERS)


class CompletionRequest(OpenAIRequest):
    """``/v1/completions``."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Text], _SOME_PROMPTS, Tag("texts")]
        | Annotated[list[Ids], _SOME_PROMPTS, Tag("lists")],
        by_kind(_prompt_kind, "text, token ids nor a list of either"),
    ] = Field(description="text, token ids, or up to 16 of either")
    max_tokens: Limit | None = Field(None, description="16 if not given; 0 needs `echo`")
    logprobs: TopLogprobs | None = Field(None, description="the likeliest tokens in each place")
    echo: bool | None = Field(None, description="the prompt comes first")
    suffix: Text | None = Field(None, description="if the tokenizer has tokens for it")
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
        return self.options_with(vocabulary, limit, self.logprobs)

    def prompts(self) -> Sequence[str | list[int]]:
        """Texts or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
