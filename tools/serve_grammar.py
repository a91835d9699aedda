"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from model.tokenizer import Tokenizer
from slotmoe import ConfigError
from tools.serve_forms import RefusedError

_MAX_SCHEMA = 1 << 16  # characters


class JsonGrammar:
    """``model.answer.Grammar`` of one answer."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str):
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)

    def allowed(self) -> Tensor:
        mask = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            raise ConfigError("the JSON schema needs too much work for each token; make it simpler")
        return torch.frombuffer(bytearray(mask), dtype=torch.uint8) > 0

    def consume(self, chosen: int) -> bool:
        self._matcher.consume_token(chosen)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]):
        self._source, self._eos = tokenizer, eos_token_ids

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._source.to_json(), n_vocab=self._source.size, eos_token=list(self._eos))

    def compile(self, schema: dict[str, Any]) -> Callable[[], JsonGrammar]:
        """What makes a grammar for each answer that has to follow ``schema``.  Raises ``RefusedError``."""
        try:
            text = json.dumps(schema)
        except (RecursionError, ValueError):
            raise RefusedError("response_format: the schema is nested too deeply", param="response_format") from None
        if len(text) > _MAX_SCHEMA:
            raise RefusedError(f"response_format: the schema has more than {_MAX_SCHEMA} characters", 413, "response_format")
        try:
            # Without free whitespace a model can't go on with blanks for ever.
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:  # a warning too: it tells of something that would be ignored
            raise RefusedError(f"response_format: the schema can't be followed ({problem[:200]})", param="response_format")
        return lambda: JsonGrammar(self._tokenizer, grammar)
