"""Function calling: its prompts, and the parser of what a model writes.

DeepSeek-V2.5 was trained on a format of its own, with tokens for it in its vocabulary and its chat
template; that format is used where both are there.  Every other model gets a description in plain
words and writes tool calls as JSON between two tags.
"""

import json
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

from slotmoe.model.generate import overlap
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.requests import (
    AssistantMessage,
    ChatMessage,
    Function,
    PlainMessage,
    ToolCall,
    ToolMessage,
    ToolPolicy,
)

_NAMES = "calls_begin call_begin sep call_end calls_end "
_NAMES += "outputs_begin output_begin output_end outputs_end"
_CALLS, _CALL, _SEP, _END_CALL, _END_CALLS, _OUTPUTS, _OUTPUT, _END_OUTPUT, _END_OUTPUTS = (
    f"<\uff5ctool\u2581{name}\uff5c>" for name in _NAMES.replace("_", "\u2581").split()
)
_TOKENS = (_CALLS, _CALL, _SEP, _END_CALL, _END_CALLS)  # that a model writes
_UNCALLED = "a result answers no call of the message before it"
Turn: TypeAlias = tuple[PlainMessage | AssistantMessage, list[ToolMessage]]


@dataclass(frozen=True)
class CallFormat:
    """Tool calls as text: ``opening``, ``head NAME middle ARGUMENTS tail`` of all calls joined by
    ``joint``, ``closing``."""

    opening: str
    head: str
    middle: str
    tail: str
    joint: str
    closing: str

    def write(self, calls: list[ToolCall]) -> str:
        """``calls`` as the model writes them."""
        functions = [call.function for call in calls]
        texts = [
            self.head + function.name + self.middle + (function.arguments or "{}") + self.tail
            for function in functions
        ]
        return self.opening + self.joint.join(texts) + self.closing if texts else ""


PLAIN = CallFormat(
    "<tool_call>", '{"name": "', '", "arguments": ', "}</tool_call>", "\n<tool_call>", ""
)
# As the model card shows it: https://huggingface.co/deepseek-ai/DeepSeek-V2.5-1210, "Function
# calling".
NATIVE = CallFormat(
    _CALLS, f"{_CALL}function{_SEP}", "\n```json\n", f"\n```{_END_CALL}", "\n", _END_CALLS
)


class Dialect:
    """The format that a model was trained on, by its tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer):
        template, ids = tokenizer.template or "", [tokenizer.token_id(token) for token in _TOKENS]
        self._tokenizer = tokenizer
        self.is_native = _CALLS in template and None not in ids
        self._template_has_tools = self.is_native and bool(re.search(r"\btools\b", template))
        self.format = NATIVE if self.is_native else PLAIN
        # Special tokens that appear in the text of an answer with tool calls.
        pairs = zip(ids, _TOKENS, strict=True)
        self.shown = {id_: t for id_, t in pairs if id_ is not None and self.is_native}

    def prompt(
        self, messages: list[ChatMessage], policy: ToolPolicy | None, continues: bool = False
    ) -> str:
        """The conversation as text for the model; the answer ``continues`` the last message, or it
        is a new one.  Raises ``RefusedError``, ``ConfigError``."""
        turns, described = with_results(messages), None
        functions = policy.functions if policy is not None else []
        written = self._native(turns) if self.is_native else self._plain(turns)
        if self._template_has_tools:
            described = [{"type": "function", "function": _described(f)} for f in functions]
        elif functions:
            self._describe(functions, written)
        begun = continues or (self.is_native and bool(turns[-1][1]))
        return self._tokenizer.chat(written, described, begun=begun)

    def _describe(self, functions: list[Function], written: list[dict[str, str]]) -> None:
        """Describe the functions at the end of the system message of ``written``."""
        system = "You are a helpful Assistant." if self.is_native else ""
        if written[0]["role"] == "system":
            system = written.pop(0)["content"]
        text = _native_description(functions) if self.is_native else _plain_description(functions)
        content = f"{system}\n\n{text}" if system else text
        written.insert(0, {"role": "system", "content": content})

    def _plain(self, turns: list[Turn]) -> list[dict[str, str]]:
        """For a template that knows no functions: results are in a message of the user."""
        written = list[dict[str, str]]()
        for message, results in turns:
            text = message.text + ("\n" if message.text and message.calls else "")
            text += self.format.write(message.calls)
            written.append({"role": message.role, "content": text})
            responses = []
            for call, result in zip(message.calls, results, strict=True):
                error = ' error="true"' if result.failed else ""
                tag = f'tool_response name="{call.function.name}"{error}'
                responses.append(f"<{tag}>\n{result.text}\n</tool_response>")
            if responses:
                written.append({"role": "user", "content": "\n".join(responses)})
        return written

    def _native(self, turns: list[Turn]) -> list[dict[str, str]]:
        """Calls, results and what follows them as one message of the assistant: DeepSeek-V2.5's
        template itself loses text beside calls and parts of calls and results."""
        written, goes_on = list[dict[str, str]](), False
        for message, results in turns:
            text = message.text + self.format.write(message.calls)
            if results:
                outputs = "\n".join(_OUTPUT + result.text + _END_OUTPUT for result in results)
                text += self._tokenizer.eos_token + _OUTPUTS + outputs + _END_OUTPUTS
            if goes_on and message.role == "assistant":
                written[-1]["content"] += text
            else:
                written.append({"role": message.role, "content": text})
            goes_on = bool(results)
        return written


def with_results(messages: list[ChatMessage]) -> list[Turn]:
    """Each message with the results of its calls, in the order of the calls.  Raises
    ``RefusedError`` where they don't match."""
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, ToolMessage):
            turns.append((message, []))
        elif turns:
            turns[-1][1].append(message)
        else:
            raise RefusedError(f"messages: {_UNCALLED}", "messages")
    return [(message, _in_order(message.calls, results)) for message, results in turns]


def _in_order(calls: list[ToolCall], results: list[ToolMessage]) -> list[ToolMessage]:
    ids, answered = [call.id for call in calls], [result.tool_call_id for result in results]
    if sorted(ids) != sorted(answered):
        missing = next((id_ for id_ in ids if id_ not in answered), None)
        problem = _UNCALLED if missing is None else f"call {missing!r:.80} has no result"
        raise RefusedError(f"messages: {problem}", "messages")
    names = {call.id: call.function.name for call in calls}
    for result in results:
        if result.name not in (None, names[result.tool_call_id]):
            problem = f"the result for {result.tool_call_id!r:.80} has the name of another function"
            raise RefusedError(f"messages: {problem}", "messages")
    return sorted(results, key=lambda result: ids.index(result.tool_call_id))


def _described(function: Function) -> dict[str, Any]:
    about = {"name": function.name, "description": function.description or ""}
    return {**about, "parameters": function.schema_of_arguments}


def _plain_description(functions: list[Function]) -> str:
    lines = "\n".join(json.dumps(_described(f), ensure_ascii=False) for f in functions)
    return (
        f"You can call these functions:\n{lines}\n\n"
        'To call one, write <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>, where the '
        "arguments follow the function's parameters, a JSON schema. To call several, write each on "
        "a line of its own. Write nothing after calls; their results follow in <tool_response>. If "
        "no function is needed, answer in plain text."
    )


def _native_description(functions: list[Function]) -> str:
    blocks = []
    for function in functions:
        text = json.dumps(_described(function), ensure_ascii=False, indent=4)
        blocks.append(f"- `{function.name}`:\n```json\n{text}\n```")
    heading = "## Tools\n\n### Function\n\nYou have the following functions available:"
    return heading + "\n\n" + "\n".join(blocks)


@dataclass(frozen=True)
class ContentDelta:
    """What is added to an answer: text, or to the tool call of index ``call`` its ``name`` as it
    begins, text of its arguments, or that it is ``complete``."""

    text: str = ""
    call: int | None = None
    name: str | None = None
    complete: bool = False


class Reader:
    """Parses an answer as it arrives: text, then tool calls in ``call_format``.  Without a format
    all is text; where ``either``, it is tool calls from its first character on, or text; where
    calls are ``required``, a beginning of their format is never text."""

    def __init__(
        self, call_format: CallFormat | None, either: bool = False, required: bool = False
    ):
        self._format, self._either = call_format, either
        self._unread, self._in_text = "", not required
        self._deltas = self._parse()
        self.calls = 0  # that are complete

    def feed(self, text: str) -> list[ContentDelta]:
        """The deltas that ``text`` completes."""
        self._unread += text
        return list(iter(self._deltas.__next__, None))

    def end(self) -> list[ContentDelta]:
        """What was held back, at the end of the answer."""
        return [ContentDelta(self._unread)] if self._unread and self._in_text else []

    def _parse(self) -> Iterator[ContentDelta | None]:
        """The deltas, and None where more text has to arrive."""
        marks = self._format
        while marks is None or (
            self._either and not self._unread.startswith(marks.opening[: len(self._unread)])
        ):
            yield from self._text(len(self._unread))
            yield None
        while (position := self._unread.find(marks.opening)) < 0:
            yield from self._text(len(self._unread) - overlap(self._unread, marks.opening))
            yield None
        yield from self._text(position)
        self._in_text = False
        yield from self._skip(marks.opening)
        while True:
            yield from self._skip(marks.head)
            name = yield from self._skip(marks.middle)
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
        before, _, self._unread = self._unread.partition(literal)
        return before

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
    """One delta for the text and for each tool call of a whole answer."""
    parts = []
    for _, group in groupby(deltas, key=lambda delta: delta.call):
        first, *others = group
        text = "".join(delta.text for delta in (first, *others))
        parts.append(replace(first, text=text, complete=any(d.complete for d in others)))
    return parts


def parse_arguments(text: str) -> dict[str, Any] | None:
    """A complete call's arguments; None if they can't be sent on."""
    try:
        arguments: dict[str, Any] = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # huge numbers, half a surrogate, too many levels
        return None
    return arguments
