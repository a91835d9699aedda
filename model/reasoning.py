"""The marks of reasoning before an answer, and what takes an answer apart at them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
# gpt-oss writes messages with headers that name a channel (https://github.com/openai/harmony).
CHANNEL, MESSAGE, CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
_START, _END = "<|start|>", "<|end|>"
_ENDS = (_START, _END, "<|call|>", "<|return|>")  # of a message
_HARMONY = (CHANNEL, MESSAGE, CONSTRAIN, *_ENDS)
CALLED, TAKES = f"{CHANNEL}commentary to=functions.", f" {CONSTRAIN}json{MESSAGE}"


@dataclass(frozen=True)
class ReasoningMarks:
    """The marks of one model's reasoning; ``shown`` are those that are tokens, by id.  ``header``
    begins the message behind it, and ``text`` is the rest of that header if the message is text,
    where answers are several messages."""

    begin: str
    end: str
    shown: Mapping[int, str]
    header: str = ""
    text: str = ""

    def is_begun(self, prompt: str) -> bool | None:
        """Whether a prompt has the first mark already, so that the answer begins behind it; None
        where it has the last one, so that the answer has no reasoning."""
        end = prompt.rstrip()
        if self.header:
            last = end.rpartition(_START)[2]
            return last.endswith(self.begin) or (None if MESSAGE in last else False)
        return None if end.endswith(self.end) else end.endswith(self.begin)


def reasoning_of(
    template: str | None, token_id: Callable[[str], int | None]
) -> ReasoningMarks | None:
    """The marks that ``template`` has; None for a model that answers at once."""
    for begin, end in _MARKS:
        if template is not None and end in template:
            ids = {token_id(mark): mark for mark in (begin, end)}
            return ReasoningMarks(begin, end, {id_: m for id_, m in ids.items() if id_ is not None})
    ids = {token_id(mark): mark for mark in _HARMONY}
    if template is not None and CHANNEL in template and None not in ids:
        shown = {id_: mark for id_, mark in ids.items() if id_ is not None}
        begin, text = (f"{CHANNEL}{channel}{MESSAGE}" for channel in ("analysis", "final"))
        return ReasoningMarks(begin, _END, shown, f"{_START}assistant", text)
    return None


class Splitter:
    """Takes an answer's text as it comes apart, without the whitespace around the marks.
    ``is_begun`` where the prompt has the first mark, None where all is text."""

    def __init__(self, reasoning: ReasoningMarks | None, is_begun: bool | None):
        self._marks, self._held = reasoning, ""
        has_none = reasoning is None or is_begun is None
        self._place = "text" if has_none else "thought" if is_begun else "start"
        self._trims = self.is_thinking  # until the next character that is no whitespace

    @property
    def is_thinking(self) -> bool:
        return self._place == "thought"

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """What of the reasoning and what of the answer itself ``text`` makes certain."""
        self._held += text
        thought, marks = "", self._marks
        if self._place == "start" and marks is not None:
            bare = self._held.lstrip()
            if not is_last and marks.begin.startswith(bare):
                return "", ""
            self._place = "text"
            if bare.startswith(marks.begin):
                self._place, self._trims = "thought", True
                self._held = bare[len(marks.begin) :]
        if self._place == "thought" and marks is not None:
            thought, mark, rest = self._held.partition(marks.end)
            if not mark:
                reached = 0 if is_last else overlap(thought, marks.end)
                thought = thought[: len(thought) - reached]
            thought = thought.rstrip()
            self._held = rest if mark else self._held[len(thought) :]
            thought = self._trimmed(thought)
            if mark:
                self._place, self._trims = "text", True
        if self._place != "text":
            return thought, ""
        text, self._held = self._held, ""
        return thought, self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text


class Messages(Splitter):
    """The same of an answer in gpt-oss's format, several messages with headers.  What they write to
    the channel ``analysis`` or to tools of their own is reasoning.  A call of a function is passed
    on as ``CALLED``, its name, ``TAKES`` and its arguments.  The rest is text.  ``is_begun`` is
    None where the prompt has the header of a text."""

    def __init__(self, is_begun: bool | None):
        super().__init__(None, None)
        self._place = "text" if is_begun is None else "thought" if is_begun else "header"
        self._begun = {self._place}

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        self._held += text
        found = dict.fromkeys(("thought", "text", "call"), "")
        while self._place != "header" or MESSAGE in self._held:
            if self._place == "header":
                header, _, self._held = self._held.partition(MESSAGE)
                name = re.search(r"\bto=functions\.([^\s<]+)", header)
                is_thought = " to=" in header or f"{CHANNEL}analysis" in header
                self._place = "call" if name else "thought" if is_thought else "text"
                again = self._place in self._begun
                found[self._place] += f"{CALLED}{name[1]}{TAKES}" if name else "\n\n" * again
                self._begun.add(self._place)
            begins = [at for mark in _ENDS if (at := self._held.find(mark)) >= 0]
            reached = 0 if is_last else max(overlap(self._held, mark) for mark in _ENDS)
            end = min(begins, default=len(self._held) - reached)
            found[self._place] += self._held[:end]
            self._held = self._held[end:]
            if not begins and not is_last:
                break
            self._place, self._held = "header", self._held.partition("|>")[2]
        return found["thought"], found["text"] + found["call"]


def splitter_of(reasoning: ReasoningMarks | None, is_begun: bool | None) -> Splitter:
    """What takes the reasoning off an answer's text."""
    if reasoning is not None and reasoning.header:
        return Messages(is_begun)
    return Splitter(reasoning, is_begun)


def overlap(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``mark``."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
