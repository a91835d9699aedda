"""Grammars of answers that follow a JSON schema or call functions, by llguidance."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.child import COMPILER
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.formats import INDEX, is_text
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.requests import Rule, ToolPolicy

MAX_CALLS = 32  # in one answer
_MAX_SCHEMA = 1 << 16  # characters
_MAX_SCHEMAS = 1 << 18  # characters of all of a request's functions together
# Of all tokens (3 s and 250 MB in llguidance's tables; Kimi K2 has 1.2 million), of an id without.
_MAX_CHARACTERS, _UNUSED = 3 << 20, 6
_NOTES = {"description", "title", "default", "examples", "$schema", "$comment"}
_TEXT_KEYS = {"type", *_NOTES}
_TAGGED_KEYS = {"properties", "required", "additionalProperties", "$defs", "definitions"}
_TAGGED_KEYS |= _TEXT_KEYS
_ANYTHING = "(?s:.*)"
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")  # schemas by any names
_OF_VALUES = ("const", "enum", "default", "examples")  # which are no schemas
# Keywords that several schemas of one object, or schemas of other names than the listed, have.
_SHARED = {"allOf", "if", "dependentSchemas", "dependencies"}
_OF_OTHERS = {"additionalProperties", "patternProperties", "propertyNames"}
# What regular languages don't have: look-around, word boundaries, references to groups.
_IRREGULAR = re.compile(r"\(\?<?[=!]|(?<!\\)(?:\\\\)*\\[bB1-9]")
# A mask counts remainders, of multiples that are combined those of their least common multiple: of
# divisors of this never more than it can.
_MULTIPLES = 9000
# Beyond so many llguidance follows no answer, which it finds out in time that grows by the square.
_MOST_OPTIONAL = 500
# Free whitespace lets a model go on with blanks for ever; most were taught one after each sign.
_SPACING = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}
# What a mask of a stranger's grammar may cost, some 10 ms: of the items of a row, which stand for
# ways to read a text, the time is a cube.  Those of a schema can only be many, not ambiguous.
_ITEMS, _ITEMS_OF_SCHEMAS = (250, 10_000), (2000, 50_000)
# And what regular expressions may cost: a thousand are up to 0.7 ms.  The first mask has more.
_FUEL, _FUEL_OF_CHARACTER = 100_000, 3  # schemas that list many properties need 1.7
# What of an answer is without a choice is encoded as a whole, by each mask anew: of schemas, of
# regular expressions and choices so many bytes, none of grammars, which repeat repetitions.
_FORCED, _UNFORCED = 8192, '%llguidance {"no_forcing": true}\n'


def _refusal(where: str, problem: str, status: int = 400) -> RefusedError:
    """Of a request's field or tool."""
    return RefusedError(f"{where}: {problem}", re.sub("^tool .*", "tools", where), status)


class _Schema(NamedTuple):
    """One of a request: its ``text`` in a grammar, and what was left out of it already."""

    text: str
    where: str
    is_strict: bool
    unheld: list[str]

    def relaxed(self, is_wrong: bool, told: list[str]) -> list[str]:
        """What can't be held of it, with what the compiler ``told``.  Raises ``RefusedError``, also
        for anything that can't where it ``is_strict``."""
        if is_wrong:
            problem = (told[0].partition("JSON schema: ")[2] or told[0]).partition("\n   1 |")[0]
            raise _refusal(self.where, f"the schema can't be followed ({problem[:200]})")
        unheld = (*self.unheld, *told)
        if self.is_strict and unheld:
            problem = f"no answer can be held to {unheld[0][:200]!r}"
            advice = "and the schema is strict; leave out one or the other"
            raise _refusal(self.where, f"{problem}, {advice}")
        return [f"{self.where}: {keyword}".replace('"', "") for keyword in unheld]


@dataclass(eq=False)
class Mask:
    """``slotmoe.model.generate.Grammar`` of one answer.  It follows the matcher, if there is one.
    None of the ends ends it while more tokens are left, if anything else may come.  V is the
    tokenizer's size.  ``relaxed`` names the keywords of schemas that the answer need not follow.
    ``forces`` where what is without a choice is encoded as a whole."""

    _matcher: LLMatcher | None
    _size: int
    relaxed: Sequence[str] = ()
    forces: bool = True
    _left: int = 0
    _ends: Sequence[int] = ()

    def mask(self, least: int = 0, ends: Iterable[int] = ()) -> "Mask":
        """The same for another answer, of at ``least`` so many tokens, if this has not begun."""
        matcher = self._matcher.deep_copy() if self._matcher is not None else None
        known = [id_ for id_ in ends if id_ < self._size]
        return Mask(matcher, self._size, self.relaxed, self.forces, least, known)

    def allowed(self) -> Tensor:
        """bool [V].  Raises ``ConfigError``."""
        allowed_V = torch.ones(self._size, dtype=torch.bool)
        if self._matcher is not None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            forced = self._matcher.compute_ff_bytes() if self.forces else b""
            if self._matcher.is_error() or len(forced) > _FORCED:
                problem = "leaves nothing that could come next, or takes too much work to follow"
                raise ConfigError(f"the JSON schema or grammar {problem}; make it simpler")
            bits_V = np.unpackbits(bits, count=self._size, bitorder="little")
            allowed_V = torch.from_numpy(bits_V.view(np.bool_))
        if self._left <= 0:
            return allowed_V
        longer_V = allowed_V.clone()
        longer_V[self._ends] = False
        return longer_V if longer_V.any() else allowed_V

    def consume(self, chosen: int) -> bool:
        self._left -= 1
        if self._matcher is None:
            return False
        self._matcher.consume_token(chosen)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammars:
    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], dialect: Dialect):
        self._source, self._eos, self._dialect = tokenizer, list(eos_token_ids), dialect
        self._lock = Lock()

    @property
    def _tokenizer(self) -> LLTokenizer:
        """Raises ``RefusedError`` where the tokenizer is too large."""
        with self._lock:  # several would make it at once
            tables = self._tables
        if isinstance(tables, str):
            problem = "the tokenizer of this model can't hold an answer to a schema or a grammar"
            raise RefusedError(f"{problem}: {tables}; leave out schemas, grammars and tools")
        return tables

    @cached_property
    def _tables(self) -> LLTokenizer | str:
        """Of all tokens, or why there are none."""
        source = self._source
        characters = source.characters + _UNUSED * source.unused
        if characters > _MAX_CHARACTERS:
            return f"its tokens have {characters} characters, more than {_MAX_CHARACTERS}"
        try:
            return LLTokenizer(source.to_json(), n_vocab=source.size, eos_token=self._eos)
        except BaseException as problem:  # a panic of Rust is no Exception
            return f"{problem!r:.200}"

    @cached_property
    def _names(self) -> str:
        """What a grammar can name of the tokenizer."""
        ids = {self._source.spelling(id_): id_ for id_ in self._source.special}
        return json.dumps([self._source.size, ids, self._eos[0]])

    def compile(
        self, wanted: Rule | None, policy: ToolPolicy | None = None, is_thinking: bool | None = None
    ) -> Callable[[], Mask]:
        """Makes what an answer has to follow that is as ``wanted``, or calls functions, after its
        reasoning.  ``is_thinking`` where the prompt has begun the reasoning, None where there is
        none.  Raises ``RefusedError``, and so does what it gives, which takes as long again."""
        content, schemas, where = None, list[_Schema](), "response_format"
        tables, items, other = self._tokenizer, _ITEMS_OF_SCHEMAS, ("", "")
        if wanted is not None and wanted.kind == "json":
            content = self._json(wanted.rule, wanted.strict, where, schemas)
        elif wanted is not None:
            kind, text, where, _ = wanted
            content, items = "@wanted", _ITEMS
            other = kind, text if isinstance(text, str) else json.dumps(text)
            if len(other[1]) > _MAX_SCHEMA:
                raise _refusal(where, f"more than {_MAX_SCHEMA} characters", 413)
        marks = self._source.reasoning if is_thinking is not None else None
        header = "" if marks is None else self._literal(marks.text)  # before an answer's text
        content = f"{header} {content}" if content is not None else None
        grammar = f"answer: {content}"
        if policy is not None:
            grammar = self._calls(policy, content, header, schemas)
        grammar = f"start: {self._reasoning(is_thinking)}\n{grammar}"
        forces = other[0] != "grammar"
        rule = {"lark_grammar": grammar if forces else _UNFORCED + grammar}
        data = json.dumps([self._names, [it.text for it in schemas], *other, [rule]]).encode()
        where = where if wanted is not None else "tools"
        try:
            told, problem, whole, rules = json.loads(COMPILER.run(data, "its compiler"))
        except ConfigError as error:
            raise _refusal(where, f"can't be followed ({error}); make it simpler") from None
        names = [it.relaxed(*said) for it, said in zip(schemas, told, strict=True)]
        if problem:
            reason = problem.partition("\n   1 |")[0][:200]
            raise _refusal(where, f"the {other[0]} can't be followed ({reason})")

        def made() -> Mask:
            limits = LLParserLimits(
                initial_lexer_fuel=_FUEL + _FUEL_OF_CHARACTER * len(rules),
                step_lexer_fuel=_FUEL,
                max_items_in_row=items[0],
                step_max_items=items[1],
            )
            matcher = LLMatcher(tables, rules, log_level=0, limits=limits)
            if reason := (whole or matcher.get_error())[:200]:
                raise RefusedError(f"the schemas can't be followed together ({reason})")
            mask = Mask(matcher, self._source.size, [*chain.from_iterable(names)], forces)
            mask.allowed()  # here it holds nobody up
            return mask

        return made

    def _reasoning(self, is_thinking: bool | None) -> str:
        """The rule of the whole answer, and those of the reasoning before the answer proper."""
        marks = self._source.reasoning
        if marks is None or is_thinking is None:
            return "answer"
        rules = ["SPACE: /[ \\n]{0,2}/", f"thought[lazy]: /{_ANYTHING}{_escaped(marks.end)}/"]
        if marks.end in marks.shown.values():
            text = f"THOUGHT: {_text('', marks.end)}"
            rules[1:] = [f"thought: THOUGHT {self._literal(marks.end)}", text]
        thought = f"thought {self._literal(marks.header) or 'SPACE'}"
        if not is_thinking:
            thought = f"({self._literal(marks.begin)} {thought})?"
        return "\n".join([f"{thought} answer", *rules])

    def _calls(
        self, policy: ToolPolicy, content: str | None, header: str, schemas: list[_Schema]
    ) -> str:
        """The grammar of tool calls, or text and calls if not required, ``header`` before text;
        adds to ``schemas``."""
        marks, literal, size = self._dialect.format, self._literal, 0
        opening = literal(marks.opening)
        if marks.lead:
            opening = f"({literal(marks.lead)})? {opening}"
        more = f"({literal(marks.joint)} call){{0,{MAX_CALLS - 1}}}"
        calls = f"call {'' if policy.single or marks.single else more} {literal(marks.closing)}"
        names = " | ".join(f"f{index}" for index in range(len(policy.allowed)))
        rules = [f"call: {literal(marks.head)} ({names})"]
        write = self._json if marks.tagged is None else self._tagged
        for index, function in enumerate(policy.allowed):
            about = bool(function.strict), f"tool {function.name!r}", schemas
            arguments = write(function.schema_of_arguments, *about)
            if (size := size + len(arguments)) > _MAX_SCHEMAS:
                problem = f"have more than {_MAX_SCHEMAS} characters together"
                raise RefusedError(f"the schemas of the tools {problem}", "tools", 413)
            before, number, after = marks.middle.partition(INDEX)
            name = literal(function.name + before)
            if number:
                name += f" /[0-9]{{1,4}}/ {literal(after)}"
            rules.append(f"f{index}: {name} {arguments} {literal(marks.tail)}")
        if marks.tagged is not None:
            rules += self._value(marks.tagged[2])
        if policy.required:
            start = [f"answer: {opening} {calls}"]
        elif content is not None:
            start = [f"answer: content | {opening} {calls}", f"content: {content}"]
        else:
            before, token, rest = self._parts(marks.opening)
            rules.append(f"TEXT: {_text('', token)}")
            if marks.single:
                start = [f"answer: {header} TEXT | {opening} {calls}"]
            elif before:
                opened = f"OPENED: {_text(before, token)}"
                start = [f"answer: TEXT | OPENED {literal(rest)} {calls}", opened]
            elif self._dialect.is_native:
                start = [f"answer: TEXT ({opening} {calls})?"]
            else:
                opened = f"opened[lazy]: /{_ANYTHING}{_escaped(marks.opening)}/"
                start = [f"answer: TEXT | opened {calls}", opened]
        return "\n".join(start + rules)

    def _value(self, end: str) -> list[str]:
        """The rules of ``value``, a text with the ``end`` behind it."""
        before, token, rest = self._parts(end)
        if token not in self._dialect.shown.values():  # the text goes on to the first one
            return [f"value[lazy]: /{_ANYTHING}{_escaped(end)}/"]
        return [f"value: VALUE {self._literal(rest)}", f"VALUE: {_text(before, token)}"]

    def _parts(self, mark: str) -> tuple[str, str, str]:
        """What ``mark`` has before its token, if it has one, the token, and all from there on.  A
        text goes on to the token: a lexer takes the longest one."""
        token = next((token for token in self._dialect.shown.values() if token in mark), mark)
        before, _, _ = mark.partition(token)
        return before, token, mark.removeprefix(before)

    def _tagged(self, schema: Json, strict: bool, where: str, schemas: list[_Schema]) -> str:
        """The grammar of arguments that are tagged, in the order of their properties: text as it
        is, other values as JSON.  Raises ``RefusedError``."""
        marks, literal = self._dialect.format, self._literal
        tags, kinds = marks.tagged, marks.kinds or ("", "")
        assert tags is not None
        unheld = sorted(schema.keys() - _TAGGED_KEYS)
        parts, required = list[str](), schema.get("required", [])
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _refusal(where, "properties or required are malformed")
        for key, inner in properties.items():
            before, end = tags[0] + key + tags[1], literal(tags[2])
            text = f"{literal(before + kinds[0])} value"
            if not is_text(inner):
                given = {**definitions, **inner} if isinstance(inner, dict) else {}
                value = self._json(given, strict, f"{where}: {key}", schemas)
                value = f"{literal(before + kinds[1])} {value} {end}"
                if marks.kinds is not None and _takes_text(inner):
                    value += f" | {text}"
            elif values := [inner["const"]] if "const" in inner else inner.get("enum"):
                choices = " | ".join(literal(text) for text in values)
                value = f"{literal(before + kinds[0])} ({choices}) {end}"
            else:
                unheld += [f"{key}: {k}" for k in sorted(inner.keys() - _TEXT_KEYS)]
                value = text
            gap = f" {literal(marks.gap)}" if marks.gap else ""
            parts.append(f"(({value}){gap}){'' if key in required else '?'}")
        schemas.append(_Schema('""', where, strict, unheld))
        if marks.gap:
            parts = [literal(marks.gap), *parts, f"({literal(marks.gap)})?"]
        return " ".join(parts) or '""'

    def _literal(self, text: str) -> str:
        """``text`` in a grammar; marks that are tokens are tokens, which no text can spell."""
        reasoning = self._source.reasoning
        marks = {**self._dialect.shown, **(reasoning.shown if reasoning is not None else {})}
        ids = {token: id_ for id_, token in marks.items()}
        texts = re.split(f"({'|'.join(map(re.escape, ids)) or '(?!)'})", text)
        return " ".join(f"<[{ids[t]}]>" if t in ids else json.dumps(t) for t in texts if t)

    def _json(self, schema: Json, strict: bool, where: str, schemas: list[_Schema]) -> str:
        """``schema`` in a grammar; adds it to ``schemas``.  Raises ``RefusedError``."""
        unheld = list[str]()
        try:
            if len(json.dumps(schema)) > _MAX_SCHEMA:
                raise _refusal(where, f"the schema has more than {_MAX_SCHEMA} characters", 413)
            kept = _bounded(schema, unheld, closes=not _shares(schema))
        except RecursionError:
            raise _refusal(where, "the schema is nested too deeply") from None
        except ValueError as error:
            raise _refusal(where, f"the schema {error}") from None
        if "x-guidance" in schema:
            raise _refusal(where, "the schema has the unknown keyword 'x-guidance'")
        guidance = {**_SPACING, "lenient": not strict}
        text = f"%json {json.dumps({**kept, 'x-guidance': guidance})}"
        schemas.append(_Schema(text, where, strict, unheld))
        return text


def _is_cheap(multiple: object) -> bool:
    """Whether ``multipleOf`` may be this number."""
    try:
        number = Decimal(str(multiple)).normalize()
        digits = int("".join(map(str, number.as_tuple().digits)))
        is_small = number != number.to_integral_value() or number <= _MULTIPLES
        return is_small and _MULTIPLES % digits == 0
    except (ArithmeticError, ValueError):
        return False


def _bounded(schema: Json, dropped: list[str], closes: bool) -> Json:
    """``schema`` without what no mask can hold at a bounded cost; names it in ``dropped``.  If it
    ``closes``, an object that lists its properties gets no others, unless it speaks of them: a
    model that may invent names goes on inventing, and programs rarely take them.  Raises
    ``RecursionError``, ``ValueError``."""

    def child(value: object) -> object:
        return _bounded(value, dropped, closes) if isinstance(value, dict) else value

    kept, is_open = Json(), False
    for name, value in schema.items():
        if name in _OF_NAMES and isinstance(value, dict):
            kept[name] = {}
            for key, inner in value.items():
                if name == "patternProperties" and _IRREGULAR.search(key):
                    dropped.append(f"{name}.{key}")
                    is_open = True
                else:
                    kept[name][key] = child(inner)
        elif not _can_be_held(name, value):
            dropped.append(name)
        elif name in _OF_VALUES:
            kept[name] = value
        else:
            kept[name] = [*map(child, value)] if isinstance(value, list) else child(value)
    if is_open:  # names of a pattern that is dropped stay possible
        kept.pop("additionalProperties", None)
    listed, required = kept.get("properties"), kept.get("required", [])
    if isinstance(listed, dict) and isinstance(required, list):
        needed = {*map(str, required)}
        if len(listed.keys() - needed) > _MOST_OPTIONAL:
            raise ValueError(f"has more than {_MOST_OPTIONAL} optional properties")
        speaks = bool(_OF_OTHERS & schema.keys()) or schema.get("unevaluatedProperties", False)
        if closes and needed <= listed.keys() and speaks is False:
            kept["additionalProperties"] = False
    return kept


def _can_be_held(name: str, value: object) -> bool:
    if name == "pattern" and isinstance(value, str):
        return _IRREGULAR.search(value) is None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value != 0
    return name != "multipleOf" or not is_number or _is_cheap(value)


def _shares(value: object) -> bool:
    """Whether several schemas may list an object's properties."""
    if isinstance(value, list):
        return any(map(_shares, value))
    if not isinstance(value, dict):
        return False
    others = _SHARED | ({"$ref", "anyOf", "oneOf"} if "properties" in value else set())
    return bool(others & value.keys()) or any(map(_shares, value.values()))


def _text(end: str, never: str) -> str:
    """The regular expression of text with this ``end`` that does ``never`` hold a mark."""
    return f"/{_ANYTHING}{_escaped(end)}/ & ~/{_ANYTHING}{_escaped(never)}{_ANYTHING}/"


def _escaped(text: str) -> str:
    """``text`` in a regular expression of a grammar."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


def _takes_text(schema: object) -> bool:
    """Whether any text is a value of this schema, among others."""
    schemas: object = [schema]
    if isinstance(schema, dict) and schema.keys() - _NOTES == {"anyOf"}:
        schemas = schema["anyOf"]
    for inner in schemas if isinstance(schemas, list) else ():
        if inner is True:
            return True
        types = inner.get("type", "string") if isinstance(inner, dict) else None
        if isinstance(types, str | list) and "string" in types and not inner.keys() - _TEXT_KEYS:
            return True
    return False
