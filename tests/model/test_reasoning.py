"""Reasoning is taken off the answer however the text arrives."""

import json

import pytest

from slotmoe.model.reasoning import ReasoningMarks, Splitter, reasoning_of, splitter_of
from tests.support.forkserver import ROOT

MARKS = ReasoningMarks("<think>", "</think>", {})
HARMONY = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>")
IDS = {token: number for number, token in enumerate((*HARMONY, "<|return|>"))}
MESSAGES = reasoning_of("{{ '<|channel|>' }}", IDS.get)


def split(text, is_begun, width, marks=MARKS):
    splitter = splitter_of(marks, is_begun)
    parts = [splitter.feed(text[i : i + width]) for i in range(0, len(text), width)]
    parts.append(splitter.feed("", is_last=True))
    return tuple("".join(column) for column in zip(*parts, strict=True))


# A text, how its prompt began, and what is reasoning and answer; ``messages`` are gpt-oss', as
# openai-harmony 0.0.8 takes them apart, with calls in one spelling.
CASES = json.loads((ROOT / "tests" / "data" / "reasoning.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_reasoning_is_split_off(width):
    for kind, marks in (("marks", MARKS), ("messages", MESSAGES)):
        for text, is_begun, wanted in CASES[kind]:
            assert [*split(text, is_begun, width, marks)] == wanted, text


def test_text_comes_at_once():
    splitter = Splitter(MARKS, False)
    said = {"<think>": "", "Hm": "Hm", " so": " so", "</thi": "", "nk>": "", "\n": ""}
    assert [splitter.feed(piece) for piece in said] == [(text, "") for text in said.values()]
    assert [splitter.feed(piece) for piece in ("Yes", ".")] == [("", "Yes"), ("", ".")]
    assert Splitter(None, False).feed("<think>Hm") == ("", "<think>Hm")
    assert Splitter(MARKS, None).feed("<think>Hm") == ("", "<think>Hm")


def test_template_names_the_marks():
    ids = {"[THINK]": 7, "[/THINK]": 8}
    wanted = ReasoningMarks("[THINK]", "[/THINK]", {7: "[THINK]", 8: "[/THINK]"})
    assert reasoning_of("a [/THINK] b", ids.get) == wanted
    assert reasoning_of("<think> is never closed", ids.get) is None
    assert reasoning_of(None, ids.get) is None
    assert reasoning_of("{{ '<|channel|>' }}", ids.get) is None
    for end, is_begun in (
        ("assistant", False), ("assistant<|channel|>analysis<|message|>", True),
        ("assistant<|channel|>final<|message|>Yes, ", None),
    ):  # fmt: skip
        assert MESSAGES.is_begun(f"<|start|>user<|message|>Hi<|end|><|start|>{end}") is is_begun
    begun = reasoning_of("{{ '<think>' }}</think>", ids.get)
    assert begun.is_begun("User: Hi <think>\n") and begun.is_begun("<think></think>\n") is None
    assert begun.is_begun("User: Hi") is False
