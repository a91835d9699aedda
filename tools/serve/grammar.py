"""Grammars of answers that follow a JSON schema or call functions, by llguidance."""

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
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.requests import ToolPolicy

MAX_CALLS = 32  # in one answer
_MAX_SCHEMA = 1 << 16  # characters
_MAX_SCHEMAS = 1 << 18  # characters of all of a request's functions together
# Without free whitespace a model can't go on with blanks for ever; one after each sign is what most
# models were taught.
_SPACING = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}


class Mask:
    """``slotmoe.model.generate.Grammar`` of one answer; V is the size of the tokenizer."""

    def __init__(self, matcher: LLMatcher, size: int):
        self._matcher, self._size = matcher, size

    def allowed(self) -> Tensor:
        """bool [V].  Raises ``ConfigError``."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            problem = "leaves nothing that could come next, or takes too much work to follow"
            raise ConfigError(f"the JSON schema {problem}; make it simpler")
        allowed_V = np.unpackbits(bits, count=self._size, bitorder="little")
        return torch.from_numpy(allowed_V.view(np.bool_))

    def consume(self, chosen: int) -> bool:
        self._matcher.consume_token(chosen)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
    """Makes grammars for one model."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], dialect: Dialect):
        self._source, self._eos, self._dialect = tokenizer, list(eos_token_ids), dialect

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        size = self._source.size
        return LLTokenizer(self._source.to_json(), n_vocab=size, eos_token=self._eos)

    def compile(
        self, schema: dict[str, Any] | None, policy: ToolPolicy | None
    ) -> Callable[[], Mask] | None:
        """Makes the mask of an answer that has to follow ``schema``, or to call functions; None
        where the answer is free.  Raises ``RefusedError``."""
        if schema is None and policy is None:
            return None
        where = "response_format"
        content = None if schema is None else self._json(schema, where, where)
        grammar = f"start: {content}" if policy is None else self._calls(policy, content)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error()[:200]
            raise RefusedError(f"the schemas can't be followed together ({reason})")
        return lambda: Mask(matcher.deep_copy(), self._source.size)

    def _calls(self, policy: ToolPolicy, content: str | None) -> str:
        """The grammar of tool calls, or of text and perhaps calls where they aren't required."""
        marks, arguments = self._dialect.format, dict[str, str]()
        for function in policy.functions:
            where = f"tool {function.name!r}"
            arguments[function.name] = self._json(function.schema_of_arguments, where, "tools")
            if sum(map(len, arguments.values())) > _MAX_SCHEMAS:
                problem = f"have more than {_MAX_SCHEMAS} characters together"
                raise RefusedError(f"the schemas of the tools {problem}", "tools", 413)
        opening, literal = self._literal(marks.opening), self._literal
        more = f"({literal(marks.joint)} call){{0,{MAX_CALLS - 1}}}"
        calls = f"call {'' if policy.single else more} {literal(marks.closing)}"
        names = " | ".join(f"f{index}" for index in range(len(policy.allowed)))
        rules = [f"call: {literal(marks.head)} ({names})"]
        for index, function in enumerate(policy.allowed):
            name = literal(function.name + marks.middle)
            rules.append(f"f{index}: {name} {arguments[function.name]} {literal(marks.tail)}")
        anything, mark = "(?s:.*)", re.escape(marks.opening)
        if policy.required:
            start = [f"start: {opening} {calls}"]
        elif content is not None:
            start = [f"start: content | {opening} {calls}", f"content: {content}"]
        else:
            rules.append(f"TEXT: /{anything}/ & ~/{anything}{mark}{anything}/")
            if self._dialect.is_native:
                start = [f"start: TEXT ({opening} {calls})?"]
            else:
                start = [f"start: TEXT | opened {calls}", f"opened[lazy]: /{anything}{mark}/"]
        return "\n".join(start + rules)

    def _literal(self, text: str) -> str:
        """``text`` in a grammar; the dialect's tokens are tokens, which no text can spell."""
        ids = {token: id_ for id_, token in self._dialect.shown.items()}
        texts = re.split(f"({'|'.join(map(re.escape, ids)) or '(?!)'})", text)
        return " ".join(f"<[{ids[t]}]>" if t in ids else json.dumps(t) for t in texts if t)

    def _json(self, schema: dict[str, Any], where: str, param: str) -> str:
        """``schema`` in a grammar.  Raises ``RefusedError``."""
        try:
            text = json.dumps({**schema, "x-guidance": _SPACING})
        except (RecursionError, ValueError):
            raise RefusedError(f"{where}: the schema is nested too deeply", param) from None
        if len(text) > _MAX_SCHEMA:
            problem = f"the schema has more than {_MAX_SCHEMA} characters"
            raise RefusedError(f"{where}: {problem}", param, 413)
        if "x-guidance" in schema:
            raise RefusedError(f"{where}: the schema has the unknown keyword 'x-guidance'", param)
        try:
            problem = LLMatcher.validate_grammar(f"start: %json {text}", self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:  # a warning too: it names something that would be ignored
            reason = problem.partition("JSON schema: ")[2] or problem
            reason = reason.partition("\n   1 |")[0][:200]
            raise RefusedError(f"{where}: the schema can't be followed ({reason})", param)
        return f"%json {text}"
