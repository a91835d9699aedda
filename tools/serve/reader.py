"""Parses what a model writes as it arrives: reasoning, text, and tool calls."""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from slotmoe.jsonfile import Json
from slotmoe.model.tokenizer import Splitter, overlap
from slotmoe.tools.serve.formats import INDEX, CallFormat


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
        name, written, tail = "", 0, marks.tail
        is_named = bool(marks.middle)
        if is_named:
            name = yield from self._skip(marks.middle)
            yield ContentDelta("{", call=self.calls, name=name)
        while True:
            while tags[0] not in self._unread and tail not in self._unread:
                yield None
            begins = {self._unread.find(mark): mark for mark in (tags[0], tail)}
            mark = begins[min(position for position in begins if position >= 0)]
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
            comma = ", " if written else ""
            written += 1
            text = f"{comma}{json.dumps(key, ensure_ascii=False)}: {shown}"
            yield ContentDelta(text, call=self.calls)

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
