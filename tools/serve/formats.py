"""The formats in which models write tool calls, a table, and parsing of what they write as it
arrives: reasoning, text, and tool calls.

A row is used where the tokenizer has a token for each of its ``marks`` and the chat template has
``spelled`` and not ``unspelled``.  Every other model gets ``PLAIN`` and a description in words.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import msgspec

from slotmoe.jsonfile import Json
from slotmoe.model.reasoning import Splitter, overlap
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.requests import Call, Function

INDEX = "{index}"


@dataclass(frozen=True)
class CallFormat:
    """Tool calls as text: ``opening``, ``head NAME middle ARGUMENTS tail`` of all calls joined by
    ``joint``, ``closing``.  In ``middle`` may be the ``INDEX`` of the call in the conversation.

    Arguments are JSON, or as ``tagged`` says what is before, between and behind the key and the
    value of each: text as it is, other values as JSON.  Behind the key may be of which of these two
    ``kinds`` the value is, else the schema decides.  A ``gap`` is around each argument, and a
    ``lead`` between text and calls, which belongs to neither.  A template that is ``structured``
    gets calls and results as such, with ``object_arguments`` or their JSON; others get ``outputs``:
    before all results, before and behind each, behind all.  ``heading`` and ``hint`` are around
    functions that no template describes.
    """

    opening: str
    head: str
    middle: str
    tail: str
    joint: str
    closing: str
    marks: tuple[str, ...] = ()
    spelled: tuple[str, ...] = ()
    unspelled: tuple[str, ...] = ()
    tagged: tuple[str, str, str] | None = None
    kinds: tuple[str, str] | None = None
    gap: str = ""
    lead: str = ""
    structured: bool = True
    object_arguments: bool = False
    numbered_ids: bool = False  # a call's id is spelled for the model
    single: bool = False  # a message has one call, and no text of its own
    outputs: tuple[str, str, str, str] = ("", "", "", "")
    heading: str = "## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
    hint: str = ""

    def write(self, calls: list[Call]) -> str:
        """``calls`` as the model writes them, of a format with JSON and without an index."""
        texts = [
            self.head + call.name + self.middle + (call.arguments or "{}") + self.tail
            for call in calls
        ]
        return self.opening + self.joint.join(texts) + self.closing if texts else ""


# As ``formats.json`` has them by name, in the order in which a model's is looked for.  They are as
# their templates write them; NATIVE is DeepSeek's oldest, also as its model card shows it:
# https://huggingface.co/deepseek-ai/DeepSeek-V2.5-1210, "Function calling".  Those of V3.2 and V4
# are as their folder ``encoding`` has them, HARMONY as ``slotmoe.model.reasoning.Messages`` passes
# gpt-oss' calls on.
_TABLE = Path(__file__).with_suffix(".json").read_bytes()
FORMATS = msgspec.json.decode(_TABLE, type=dict[str, CallFormat])
PLAIN = FORMATS["PLAIN"]


def format_of(tokenizer: Tokenizer) -> CallFormat:
    """The format that a model was trained on, as far as its tokenizer and template show it."""
    template = tokenizer.template or ""
    for row in FORMATS.values():
        is_spelled = all(text in template for text in row.spelled)
        is_other = any(text in template for text in row.unspelled)
        has_tokens = all(tokenizer.token_id(mark) is not None for mark in row.marks)
        if row is not PLAIN and is_spelled and has_tokens and not is_other:
            return row
    return PLAIN


def is_text(schema: object) -> bool:
    """Whether a tagged argument of this schema is written as it is, without quotes."""
    if not isinstance(schema, dict):
        return False
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def text_arguments(function: Function) -> frozenset[str]:
    """Keys of the tagged arguments that are text."""
    properties = function.schema_of_arguments.get("properties", {})
    return frozenset(key for key, schema in properties.items() if is_text(schema))


def described(function: Function) -> Json:
    about = {"name": function.name, "description": function.description or ""}
    return {**about, "parameters": function.schema_of_arguments}


def describe(call_format: CallFormat, functions: Sequence[Function]) -> str:
    """Functions for a model whose template does not describe them."""
    is_plain = call_format is PLAIN
    indent, texts = None if is_plain else 4, list[str]()
    for function in functions:
        text = json.dumps(described(function), ensure_ascii=False, indent=indent)
        texts.append(text if is_plain else f"- `{function.name}`:\n```json\n{text}\n```")
    return call_format.heading + "\n".join(texts) + call_format.hint


@dataclass(frozen=True)
class ContentDelta:
    """What is added to an answer: text, perhaps of its ``reasoning``; or to the tool call of index
    ``call`` its ``name`` as it begins, text of its arguments, or that it is ``complete``."""

    text: str = ""
    call: int | None = None
    name: str | None = None
    complete: bool = False
    reasoning: bool = False

    @property
    def kind(self) -> str:
        return "reasoning" if self.reasoning else "text" if self.call is None else "call"


class Reader:
    """Parses an answer as it arrives: text, then tool calls in ``call_format``.  Without a format
    all is text; where ``either``, it is tool calls from its first character on, or text; where
    calls are ``required``, a beginning of their format is never text.  ``splitter`` takes the
    reasoning off; ``texts`` are the tagged arguments of each function that are text."""

    def __init__(
        self,
        call_format: CallFormat | None,
        either: bool = False,
        required: bool = False,
        splitter: Splitter | None = None,
        texts: Mapping[str, frozenset[str]] | None = None,
    ):
        self._format, self._either, self._texts = call_format, either, texts or {}
        self.splitter = splitter or Splitter(None, None)
        self._unread, self._in_text = "", not required
        self._deltas = self._parse()
        self.calls = 0  # that are complete

    def feed(self, text: str, is_last: bool = False) -> list[ContentDelta]:
        """The deltas that ``text`` completes."""
        thought, text = self.splitter.feed(text, is_last)
        self._unread += text
        thoughts = [ContentDelta(thought, reasoning=True)] if thought else []
        return thoughts + list(iter(self._deltas.__next__, None))

    def end(self) -> list[ContentDelta]:
        """What was held back, at the end of the answer."""
        deltas = self.feed("", is_last=True)
        if self._unread and self._in_text:
            deltas.append(ContentDelta(self._unread))
        return deltas

    def _parse(self) -> Iterator[ContentDelta | None]:
        """The deltas, and None where more text has to arrive."""
        marks = self._format
        openings = () if marks is None else (marks.lead + marks.opening, marks.opening)
        if self._either:
            while not self._unread.startswith(openings) and any(
                mark.startswith(self._unread) for mark in openings
            ):
                yield None
            marks = marks if self._unread.startswith(openings) else None
        while marks is None:
            yield from self._text(len(self._unread))
            yield None
        while (position := self._unread.find(marks.opening)) < 0:
            held = max(overlap(self._unread, mark) for mark in openings)
            yield from self._text(len(self._unread) - held)
            yield None
        before = self._unread[:position].removesuffix(marks.lead)
        yield from self._text(len(before))
        self._in_text = False
        yield from self._skip(marks.opening)
        while True:
            yield from self._skip(marks.head)
            if marks.tagged is not None:
                yield from self._tagged(marks, marks.tagged)
            else:
                before, _, after = marks.middle.partition(INDEX)
                name = yield from self._skip(before)
                yield from self._skip(after)
                yield ContentDelta(call=self.calls, name=name)
                yield from self._arguments()
                yield from self._skip(marks.tail)
            yield ContentDelta(call=self.calls, complete=True)
            self.calls += 1
            yield from self._skip(marks.joint)

    def _text(self, count: int) -> Iterator[ContentDelta]:
        text, self._unread = self._unread[:count], self._unread[count:]
        if text:
            yield ContentDelta(text)

    def _skip(self, literal: str) -> Generator[None, None, str]:
        """The text before ``literal``, which is dropped."""
        while literal not in self._unread:
            yield None
        before, self._unread = self._unread.split(literal, 1) if literal else ("", self._unread)
        return before

    def _tagged(
        self, marks: CallFormat, tags: tuple[str, str, str]
    ) -> Iterator[ContentDelta | None]:
        """Name and arguments of a call, to its tail."""
        name, comma, tail = "", "", marks.tail
        is_named = bool(marks.middle)
        if is_named:
            name = yield from self._skip(marks.middle)
            yield ContentDelta("{", call=self.calls, name=name)
        while True:
            while not (there := [mark for mark in (tail, tags[0]) if mark in self._unread]):
                yield None
            mark = min(there, key=self._unread.find)
            between = yield from self._skip(mark)
            if not is_named:
                name, is_named = between.strip(), True
                yield ContentDelta("{", call=self.calls, name=name)
            if mark == tail:
                yield ContentDelta("}", call=self.calls)
                return
            key = yield from self._skip(tags[1])
            is_text = key in self._texts.get(name, ())
            if marks.kinds is not None:
                kind = yield from self._skip(marks.kinds[0][-1])
                is_text = marks.kinds[0].startswith(kind)
            value = yield from self._skip(tags[2])
            shown = json.dumps(value, ensure_ascii=False) if is_text else value
            text = f"{comma}{json.dumps(key, ensure_ascii=False)}: {shown}"
            yield ContentDelta(text, call=self.calls)
            comma = ", "

    def _arguments(self) -> Iterator[ContentDelta | None]:
        """One JSON object, to the brace that closes it."""
        depth, quoted, escaped = 0, False, False
        while True:
            for count, character in enumerate(self._unread, 1):
                if quoted:
                    quoted, escaped = escaped or character != '"', not escaped and character == "\\"
                elif character == '"':
                    quoted = True
                else:
                    depth += (character == "{") - (character == "}")
                    if depth == 0:
                        text, self._unread = self._unread[:count], self._unread[count:]
                        yield ContentDelta(text, call=self.calls)
                        return
            if self._unread:
                yield ContentDelta(self._unread, call=self.calls)
                self._unread = ""
            yield None


def joined(deltas: Iterable[ContentDelta]) -> list[ContentDelta]:
    """One delta for the reasoning, for the text and for each tool call of a whole answer."""
    parts = []
    for _, group in groupby(deltas, key=lambda delta: (delta.call, delta.reasoning)):
        first, *others = group
        text = "".join(delta.text for delta in (first, *others))
        parts.append(replace(first, text=text, complete=any(d.complete for d in others)))
    return parts


def parse_arguments(text: str) -> Json | None:
    """A complete call's arguments; None if they can't be sent on."""
    try:
        arguments: Json = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # huge numbers, half a surrogate, too many levels
        return None
    return arguments
