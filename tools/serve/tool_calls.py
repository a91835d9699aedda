"""How a model is told of functions, how it writes calls of them, and how its text is taken apart
again.

DeepSeek-V2.5 was taught a format of its own, with tokens for it in its vocabulary and its chat
template; it is used where both are there.  Every other model gets a description in plain words and
writes calls as JSON between two tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from slotmoe.model.answer import overlap
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.tools.serve.forms import Call, Calling, RefusedError, Tool, Turn

_CALLS, _CALL, _SEP, _END_CALL, _END_CALLS = _TOKENS = tuple(
    f"<｜tool▁{name}｜>"  # as DeepSeek spells them
    for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
_OUTPUTS, _OUTPUT, _END_OUTPUT, _END_OUTPUTS = (
    f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "output▁begin", "output▁end", "outputs▁end")
)


@dataclass(frozen=True)
class CallFormat:
    """Calls as text: ``opening``, then ``head NAME middle ARGUMENTS tail`` for each with ``joint``
    between, then ``closing``."""

    opening: str
    head: str
    middle: str
    tail: str
    joint: str
    closing: str

    def written(self, calls: Sequence[Call]) -> str:
        """``calls`` as the model writes them."""
        if not calls:
            return ""
        each = [
            self.head + one.name + self.middle + (one.arguments or "{}") + self.tail
            for one in calls
        ]
        return self.opening + self.joint.join(each) + self.closing


PLAIN = CallFormat(
    "<tool_call>", '{"name": "', '", "arguments": ', "}</tool_call>", "\n<tool_call>", ""
)
# As the model card shows it: https://huggingface.co/deepseek-ai/DeepSeek-V2.5-1210, "Function
# calling".
NATIVE = CallFormat(
    _CALLS, f"{_CALL}function{_SEP}", "\n```json\n", f"\n```{_END_CALL}", "\n", _END_CALLS
)


class Dialect:
    """How the model of ``tokenizer`` and its template speaks of functions."""

    def __init__(self, tokenizer: Tokenizer):
        template, ids = tokenizer.template or "", [tokenizer.token_id(token) for token in _TOKENS]
        self._tokenizer = tokenizer
        self.is_native = _CALLS in template and None not in ids
        self._template_tells = self.is_native and re.search(r"\btools\b", template) is not None
        self.format = NATIVE if self.is_native else PLAIN
        self.shown = {
            one: token
            for one, token in zip(ids, _TOKENS, strict=True)
            if one is not None and self.is_native
        }

    def prompt(self, turns: list[Turn], calling: Calling | None) -> str:
        """The conversation through the model's template.  Raises ``RefusedError`` and
        ``ConfigError``."""
        turns, tools = paired(turns), calling.tools if calling is not None else ()
        if tools and not self._template_tells:
            turns = self._told(turns, tools)
        messages = self._native(turns) if self.is_native else self._plain(turns)
        described = (
            [{"type": "function", "function": one.openai()} for one in tools]
            if self._template_tells
            else None
        )
        return self._tokenizer.chat(
            messages, described, begun=self.is_native and turns[-1].role == "tool"
        )

    def reader(self, calling: Calling | None, schema: dict[str, Any] | None = None) -> Reader:
        """What takes an answer apart that may call, and follows ``schema`` where it does not."""
        return Reader(None if calling is None else self.format, either=schema is not None)

    def _told(self, turns: list[Turn], tools: Sequence[Tool]) -> list[Turn]:
        """``turns`` with the functions described at the end of the system message."""
        given = (
            turns[0].text
            if turns[0].role == "system"
            else "You are a helpful Assistant."
            if self.is_native
            else ""
        )
        rest = turns[1:] if turns[0].role == "system" else turns
        told = _native_description(tools) if self.is_native else _plain_description(tools)
        return [Turn("system", f"{given}\n\n{told}" if given else told), *rest]

    def _plain(self, turns: list[Turn]) -> list[dict[str, str]]:
        """Messages for a template that knows no functions: a user's message tells the results."""
        messages, names = [], dict[str, str]()
        for turn in turns:
            names |= {one.id: one.name for one in turn.calls}
            text = (
                turn.text
                + ("\n" if turn.text and turn.calls else "")
                + self.format.written(turn.calls)
            )
            for one in turn.results:
                failed = ' error="true"' if one.failed else ""
                text += f'<tool_response name="{names[one.id]}"{failed}>\n{one.text}\n</tool_response>\n'
            messages.append(
                {
                    "role": "user" if turn.results else turn.role,
                    "content": text.rstrip("\n") if turn.results else text,
                }
            )
        return messages

    def _native(self, turns: list[Turn]) -> list[dict[str, str]]:
        """Messages for DeepSeek-V2.5's template, which loses text beside calls, the end of a single
        call and the beginning of second results: calls, results and what follows them are one
        assistant's message."""
        end = self._tokenizer.eos_token
        messages: list[dict[str, str]] = []
        for before, turn in pairwise([Turn("system"), *turns]):
            text = turn.text + self.format.written(turn.calls)
            if turn.results:
                outputs = "\n".join(_OUTPUT + one.text + _END_OUTPUT for one in turn.results)
                messages[-1]["content"] += end + _OUTPUTS + outputs + _END_OUTPUTS
            elif before.results and turn.role == "assistant":
                messages[-1]["content"] += text
            else:
                messages.append({"role": turn.role, "content": text})
        return messages


def paired(turns: list[Turn]) -> list[Turn]:
    """``turns`` with the results of a message's calls as one turn, in the order of the calls.

    Raises ``RefusedError`` where a call has no result right after it, or a result no call of its
    name.
    """
    found: list[Turn] = []
    for turn in turns:
        if found and found[-1].results and turn.results:
            found[-1] = replace(found[-1], results=found[-1].results + turn.results)
        else:
            found.append(turn)
    for index, (before, turn) in enumerate(pairwise([Turn("system"), *found, Turn("user")])):
        calls, given = [one.id for one in before.calls], [one.id for one in turn.results]
        if sorted(calls) != sorted(given):
            missing = next((one for one in calls if one not in given), None)
            what = (
                "a result answers no call of the message before it"
                if missing is None
                else f"call {missing!r:.80} has no result"
            )
            raise RefusedError(f"messages: {what}", param="messages")
        names = {one.id: one.name for one in before.calls}
        wrong = next((one for one in turn.results if one.name not in (None, names[one.id])), None)
        if wrong is not None:
            raise RefusedError(
                f"messages: the result for {wrong.id!r:.80} has the name of another function",
                param="messages",
            )
        if given:
            found[index] = replace(
                turn, results=tuple(sorted(turn.results, key=lambda one: calls.index(one.id)))
            )
    return found


def _plain_description(tools: Sequence[Tool]) -> str:
    functions = "\n".join(json.dumps(one.openai(), ensure_ascii=False) for one in tools)
    return (
        f"You can call these functions:\n{functions}\n\n"
        'To call one, write <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>, where the arguments follow the '
        "function's parameters, a JSON schema. To call several, write each on a line of its own. Write nothing after calls; "
        "their results follow in <tool_response>. If no function is needed, answer in plain text."
    )


def _native_description(tools: Sequence[Tool]) -> str:
    functions = "\n".join(
        f"- `{one.name}`:\n```json\n{json.dumps(one.openai(), ensure_ascii=False, indent=4)}\n```"
        for one in tools
    )
    return f"## Tools\n\n### Function\n\nYou have the following functions available:\n\n{functions}"


@dataclass(frozen=True)
class Part:
    """A piece of an answer: text of it, or, where ``call`` is the number of a call, its ``name`` as
    it begins, text of its arguments, or that it is ``complete``."""

    text: str = ""
    call: int | None = None
    name: str | None = None
    complete: bool = False


class Reader:
    """Takes an answer apart as it arrives: text, then calls in ``form``, to which the grammar holds
    it.  Without a form all is text; where ``either``, it is calls from its first character on or
    never."""

    def __init__(self, form: CallFormat | None, either: bool = False):
        self._form, self._either = form, either
        self._kept, self._said = (
            "",
            True,
        )  # what has arrived and not been told; whether that is text
        self._parts = self._read()
        self.calls = 0

    def feed(self, text: str) -> list[Part]:
        """What ``text`` brought."""
        self._kept += text
        return list(iter(self._parts.__next__, None))

    def end(self) -> list[Part]:
        """What was held back, at the end of the answer."""
        return [Part(self._kept)] if self._kept and self._said else []

    def _read(self) -> Iterator[Part | None]:
        """The parts, and None where more has to arrive."""
        form = self._form
        while form is None or (
            self._either and not self._kept.startswith(form.opening[: len(self._kept)])
        ):
            yield from self._tell(len(self._kept))
            yield None
        while (position := self._kept.find(form.opening)) < 0:
            yield from self._tell(len(self._kept) - overlap(self._kept, form.opening))
            yield None
        yield from self._tell(position)
        self._said = False
        yield from self._past(form.opening)
        while True:
            yield from self._past(form.head)
            name = yield from self._past(form.middle)
            yield Part(call=self.calls, name=name)
            yield from self._arguments()
            yield from self._past(form.tail)
            yield Part(call=self.calls, complete=True)
            self.calls += 1
            yield from self._past(form.joint)

    def _tell(self, count: int) -> Iterator[Part]:
        said, self._kept = self._kept[:count], self._kept[count:]
        if said:
            yield Part(said)

    def _past(self, literal: str) -> Generator[None, None, str]:
        """Wait for ``literal`` and drop it; what came before it."""
        while (position := self._kept.find(literal)) < 0:
            yield None
        before, self._kept = self._kept[:position], self._kept[position + len(literal) :]
        return before

    def _arguments(self) -> Iterator[Part | None]:
        """One JSON object, to the brace that closes it."""
        depth, quoted, escaped = 0, False, False
        while True:
            for count, character in enumerate(self._kept, 1):
                if quoted:
                    quoted, escaped = escaped or character != '"', not escaped and character == "\\"
                elif character == '"':
                    quoted = True
                else:
                    depth += (character == "{") - (character == "}")
                    if depth == 0:
                        piece, self._kept = self._kept[:count], self._kept[count:]
                        yield Part(piece, call=self.calls)
                        return
            if self._kept:
                yield Part(self._kept, call=self.calls)
                self._kept = ""
            yield None


def collected(parts: list[Part]) -> tuple[str, list[tuple[str, str, bool]]]:
    """Text, and name, arguments and completeness of each call, of a whole answer."""
    text = "".join(part.text for part in parts if part.call is None)
    calls = []
    for index in range(len({part.call for part in parts} - {None})):
        own = [part for part in parts if part.call == index]
        calls.append((own[0].name or "", "".join(part.text for part in own), own[-1].complete))
    return text, calls


def arguments_of(text: str) -> dict[str, Any] | None:
    """A complete call's arguments; None if they can't be sent on: numbers too long or large, half a
    surrogate, too many levels."""
    try:
        arguments: dict[str, Any] = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return arguments
