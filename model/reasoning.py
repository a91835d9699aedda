"""Reasoning before an answer: the marks that a model puts around it, and the text without them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))


@dataclass(frozen=True)
class Reasoning:
    """The marks of one model's reasoning; ``shown`` are those that are tokens, by id."""

    begin: str
    end: str
    shown: Mapping[int, str]

    def is_begun(self, prompt: str) -> bool | None:
        """Whether a prompt has the first mark already, so that the answer begins behind it; None
        where it has the last one, so that the answer has no reasoning."""
        end = prompt.rstrip()
        return None if end.endswith(self.end) else end.endswith(self.begin)


def reasoning_of(template: str | None, token_id: Callable[[str], int | None]) -> Reasoning | None:
    """The marks that ``template`` has; None for a model that answers at once."""
    for begin, end in _MARKS:
        if template is not None and end in template:
            ids = {token_id(mark): mark for mark in (begin, end)}
            return Reasoning(begin, end, {id_: m for id_, m in ids.items() if id_ is not None})
    return None


class Splitter:
    """Takes an answer's text as it comes apart, without the whitespace around the marks.
    ``is_begun`` where the prompt has the first mark, None where all is text."""

    def __init__(self, reasoning: Reasoning | None, is_begun: bool | None):
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


def overlap(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``mark``."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
