"""Grammars of answers that follow a JSON schema or call functions, by llguidance."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.model.generate import Grammar
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.requests import Schema, ToolPolicy
from slotmoe.tools.serve.schemas import relaxed

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


class Longer:
    """``slotmoe.model.generate.Grammar`` of an answer that none of ``ends`` ends before it has
    ``least`` tokens, if anything else may come; ``mask`` holds it besides."""

    def __init__(self, mask: Grammar | None, least: int, ends: Iterable[int], size: int):
        self._mask, self._left = mask, least
        self._all_V = torch.ones(size, dtype=torch.bool)
        self._ends = [id_ for id_ in ends if id_ < size]

    def allowed(self) -> Tensor:
        """bool [V].  Raises ``ConfigError``."""
        allowed_V = self._all_V if self._mask is None else self._mask.allowed()
        if self._left > 0:
            longer_V = allowed_V.clone()
            longer_V[self._ends] = False
            return longer_V if longer_V.any() else allowed_V
        return allowed_V

    def consume(self, chosen: int) -> bool:
        self._left -= 1
        return self._mask is not None and self._mask.consume(chosen)


@dataclass(frozen=True)
class Compiled:
    """What an answer has to follow; ``relaxed`` names the keywords of schemas that it need not."""

    matcher: LLMatcher
    size: int
    relaxed: list[str]

    def mask(self) -> Mask:
        """Of one answer."""
        return Mask(self.matcher.deep_copy(), self.size)


class Grammars:
    """Makes grammars for one model."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], dialect: Dialect):
        self._source, self._eos, self._dialect = tokenizer, list(eos_token_ids), dialect

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        size = self._source.size
        return LLTokenizer(self._source.to_json(), n_vocab=size, eos_token=self._eos)

    def compile(self, schema: Schema | None, policy: ToolPolicy | None) -> Compiled | None:
        """What an answer has to follow that follows ``schema``, or calls functions; None where the
        answer is free.  Raises ``RefusedError``."""
        if schema is None and policy is None:
            return None
        content, dropped, where = None, list[str](), "response_format"
        if schema is not None:
            strict = bool(schema.strict)
            content = self._json(schema.definition, strict, where, where, dropped)
        grammar = f"start: {content}"
        if policy is not None:
            grammar = self._calls(policy, content, self._arguments(policy, dropped))
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error()[:200]
            raise RefusedError(f"the schemas can't be followed together ({reason})")
        return Compiled(matcher, self._source.size, dropped)

    def _arguments(self, policy: ToolPolicy, dropped: list[str]) -> dict[str, str]:
        """The grammar of each function's arguments; adds to ``dropped``."""
        arguments = dict[str, str]()
        for function in policy.functions:
            where, schema = f"tool {function.name!r}", function.schema_of_arguments
            strict = bool(function.strict)
            arguments[function.name] = self._json(schema, strict, where, "tools", dropped)
            if sum(map(len, arguments.values())) > _MAX_SCHEMAS:
                problem = f"have more than {_MAX_SCHEMAS} characters together"
                raise RefusedError(f"the schemas of the tools {problem}", "tools", 413)
        return arguments

    def _calls(self, policy: ToolPolicy, content: str | None, arguments: dict[str, str]) -> str:
        """The grammar of tool calls, or of text and perhaps calls where they aren't required."""
        marks = self._dialect.format
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

    def _json(
        self, schema: dict[str, Any], strict: bool, where: str, param: str, dropped: list[str]
    ) -> str:
        """``schema`` in a grammar.  What can't be held is refused if ``strict``, else it is added
        to ``dropped``.  Raises ``RefusedError``."""
        try:
            size = len(json.dumps(schema))
            kept, unheld = relaxed(schema) if size <= _MAX_SCHEMA else (schema, [])
        except (RecursionError, ValueError):
            raise RefusedError(f"{where}: the schema is nested too deeply", param) from None
        if size > _MAX_SCHEMA:
            problem = f"the schema has more than {_MAX_SCHEMA} characters"
            raise RefusedError(f"{where}: {problem}", param, 413)
        if "x-guidance" in schema:
            raise RefusedError(f"{where}: the schema has the unknown keyword 'x-guidance'", param)
        text = json.dumps({**kept, "x-guidance": _SPACING})
        problem = self._problem(text)
        if problem and "oneOf" in problem:  # it can't tell that the schemas exclude each other
            unheld.append("oneOf")
            text = json.dumps({**kept, "x-guidance": {**_SPACING, "coerce_one_of": True}})
            problem = self._problem(text)
        if problem:
            raise RefusedError(f"{where}: the schema can't be followed ({problem})", param)
        if unheld and strict:
            problem = f"no answer can be held to {unheld[0][:200]!r}, and the schema is strict"
            raise RefusedError(f"{where}: {problem}; leave out one or the other", param)
        dropped += [f"{where}: {keyword}" for keyword in unheld]
        return f"%json {text}"

    def _problem(self, text: str) -> str:
        """Why llguidance can't follow a schema; empty if it can."""
        try:
            problem = LLMatcher.validate_grammar(f"start: %json {text}", self._tokenizer)
        except ValueError as error:
            problem = str(error)
        # A warning counts too: it names something that would be ignored.
        reason = problem.partition("JSON schema: ")[2] or problem
        return reason.partition("\n   1 |")[0][:200]
