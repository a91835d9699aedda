"""Answers that follow a JSON schema, or call functions with arguments that do: llguidance says
which tokens may come next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.forms import Calling, RefusedError
from slotmoe.tools.serve.tool_calls import Dialect

MAX_CALLS = 32  # in one answer
_MAX_SCHEMA, _MAX_SCHEMAS = (
    1 << 16,
    1 << 18,
)  # characters of one and of all of a request's functions together
# Without free whitespace a model can't go on with blanks for ever; one after each sign is what most
# models were taught.
_SPACING = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}


class Mask:
    """``slotmoe.model.answer.Grammar`` of one answer."""

    def __init__(self, matcher: LLMatcher, size: int):
        self._matcher, self._size = matcher, size  # the size of the tokenizer

    def allowed(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConfigError(
                "the JSON schema leaves nothing that could come next, or takes too much work to tell; make it simpler"
            )
        return torch.from_numpy(
            np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        )

    def consume(self, chosen: int) -> bool:
        self._matcher.consume_token(chosen)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
    """Makes grammars for one model."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], dialect: Dialect):
        self._source, self._eos, self._dialect = tokenizer, eos_token_ids, dialect

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(
            self._source.to_json(), n_vocab=self._source.size, eos_token=list(self._eos)
        )

    def compile(
        self, schema: dict[str, Any] | None, calling: Calling | None
    ) -> Callable[[], Mask] | None:
        """What makes a mask for each answer that has to follow ``schema``, if one is given, or to
        call functions; None where all is free.  Raises ``RefusedError``."""
        if schema is None and calling is None:
            return None
        content = (
            None if schema is None else self._json(schema, "response_format", "response_format")
        )
        grammar = f"start: {content}" if calling is None else self._calls(calling, content)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RefusedError(
                f"the schemas can't be followed together ({matcher.get_error()[:200]})"
            )
        return lambda: Mask(matcher.deep_copy(), self._source.size)

    def _calls(self, calling: Calling, content: str | None) -> str:
        """The grammar of an answer that is calls, or free where they are not forced: text, then
        perhaps calls."""
        form = self._dialect.format
        arguments = dict[str, str]()
        for one in calling.tools:
            arguments[one.name] = self._json(one.schema, f"tool {one.name!r}", "tools")
            if sum(map(len, arguments.values())) > _MAX_SCHEMAS:
                raise RefusedError(
                    f"the schemas of the tools have more than {_MAX_SCHEMAS} characters together",
                    413,
                    "tools",
                )
        opening, more = (
            self._literal(form.opening),
            f"({self._literal(form.joint)} call){{0,{MAX_CALLS - 1}}}",
        )
        calls = f"call {'' if calling.single else more} {self._literal(form.closing)}"
        rules = [
            f"call: {self._literal(form.head)} ({' | '.join(f'f{i}' for i in range(len(calling.allowed)))})"
        ]
        for index, one in enumerate(calling.allowed):
            rules.append(
                f"f{index}: {self._literal(one.name + form.middle)} {arguments[one.name]} {self._literal(form.tail)}"
            )
        if calling.forced:
            return "\n".join([f"start: {opening} {calls}", *rules])
        if content is not None:
            return "\n".join([f"start: content | {opening} {calls}", f"content: {content}", *rules])
        anything = "(?s:.*)"
        rules.append(f"TEXT: /{anything}/ & ~/{anything}{re.escape(form.opening)}{anything}/")
        if self._dialect.is_native:
            return "\n".join([f"start: TEXT ({opening} {calls})?", *rules])
        return "\n".join(
            [
                f"start: TEXT | opened {calls}",
                f"opened[lazy]: /{anything}{re.escape(form.opening)}/",
                *rules,
            ]
        )

    def _literal(self, text: str) -> str:
        """``text`` in a grammar; tokens of the dialect are tokens there, which no text can
        spell."""
        ids = {token: one for one, token in self._dialect.shown.items()}
        parts = re.split(f"({'|'.join(map(re.escape, ids)) or '(?!)'})", text)
        return " ".join(
            f"<[{ids[one]}]>" if one in ids else json.dumps(one) for one in parts if one
        )

    def _json(self, schema: dict[str, Any], where: str, param: str) -> str:
        """``schema`` in a grammar.  Raises ``RefusedError``."""
        try:
            text = json.dumps({**schema, "x-guidance": _SPACING})
        except (RecursionError, ValueError):
            raise RefusedError(f"{where}: the schema is nested too deeply", param=param) from None
        if len(text) > _MAX_SCHEMA:
            raise RefusedError(
                f"{where}: the schema has more than {_MAX_SCHEMA} characters", 413, param
            )
        if "x-guidance" in schema:
            raise RefusedError(
                f"{where}: the schema has the unknown keyword 'x-guidance'", param=param
            )
        try:
            problem = LLMatcher.validate_grammar(f"start: %json {text}", self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:  # a warning too: it tells of something that would be ignored
            reason = problem.partition("JSON schema: ")[2] or problem
            raise RefusedError(
                f"{where}: the schema can't be followed ({reason.partition(chr(10) + '   1 |')[0][:200]})",
                param=param,
            )
        return f"%json {text}"
