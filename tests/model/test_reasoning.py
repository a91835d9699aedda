"""Reasoning is taken off the answer however the text arrives."""

import pytest

from slotmoe.model.tokenizer import ReasoningMarks, Splitter, reasoning_of

MARKS = ReasoningMarks("<think>", "</think>", {})


def split(text, is_begun, width):
    splitter = Splitter(MARKS, is_begun)
    parts = [splitter.feed(text[i : i + width]) for i in range(0, len(text), width)]
    parts.append(splitter.feed("", is_last=True))
    return tuple("".join(column) for column in zip(*parts, strict=True))


CASES = [
    ("<think>\nHm. a < b\n\n</think>\n\nYes.\n", False, ("Hm. a < b", "Yes.\n")),
    ("\nHm </thin k>\n</think>\n\nYes </think>", True, ("Hm </thin k>", "Yes </think>")),
    ("Yes <think>no</think>", False, ("", "Yes <think>no</think>")),
    ("\n <think></think>Yes", False, ("", "Yes")),
    ("<think>Hm </thi", False, ("Hm </thi", "")),
    ("still thinking", True, ("still thinking", "")),
    ("<thi", False, ("", "<thi")),
    ("  Yes", False, ("", "  Yes")),
    ("", True, ("", "")),
]


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_reasoning_is_split_off(width):
    for text, is_begun, wanted in CASES:
        assert split(text, is_begun, width) == wanted


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
    begun = reasoning_of("{{ '<think>' }}</think>", ids.get)
    assert begun.is_begun("User: Hi <think>\n") and begun.is_begun("<think></think>\n") is None
    assert begun.is_begun("User: Hi") is False
