"""Reasoning is taken off the answer however the text arrives."""

import pytest

from slotmoe.model.tokenizer import ReasoningMarks, Splitter, reasoning_of, splitter_of

MARKS = ReasoningMarks("<think>", "</think>", {})
HARMONY = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>")
IDS = {token: number for number, token in enumerate((*HARMONY, "<|return|>"))}
MESSAGES = reasoning_of("{{ '<|channel|>' }}", IDS.get)


def split(text, is_begun, width, marks=MARKS):
    splitter = splitter_of(marks, is_begun)
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

# Messages of gpt-oss as openai-harmony 0.0.8 takes them apart; calls come in one spelling.
HM, OK, AGAIN = "analysis<|message|>Hm", "final<|message|>Ok.", "<|end|><|start|>assistant"
CALLED = '<|channel|>commentary to=functions.go <|constrain|>json<|message|>{"a": 1}'
MESSAGE_CASES = [
    (f"<|channel|>{HM}{AGAIN}<|channel|>{OK}<|return|>", False, ("Hm", "Ok.")),
    (f"<|channel|>{HM} 1 < 2{AGAIN}{CALLED}<|call|>", False, ("Hm 1 < 2", CALLED)),
    (
        ' to=functions.go<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        False, ("", CALLED),
    ),
    (
        f"<|channel|>commentary<|message|>First{AGAIN}{CALLED}",
        False, ("", f"First{CALLED}"),
    ),
    (
        f"<|channel|>{HM}{AGAIN}<|channel|>analysis to=python code<|message|>1+1<|call|>",
        False, ("Hm\n\n1+1", ""),
    ),
    (f"<|channel|>{OK}{AGAIN}<|channel|>final<|message|>So", False, ("", "Ok.\n\nSo")),
    ("more</end|><|en", True, ("more</end|><|en", "")),
    (f"more{AGAIN}<|channel|>{OK}", True, ("more", "Ok.")),
    ("Ok. a <| b", None, ("", "Ok. a <| b")),
    ("<|channel|>analysis", False, ("", "")),
]  # fmt: skip


@pytest.mark.parametrize("width", [1, 3, 1000])
def test_reasoning_is_split_off(width):
    for text, is_begun, wanted in CASES:
        assert split(text, is_begun, width) == wanted
    for text, is_begun, wanted in MESSAGE_CASES:
        assert split(text, is_begun, width, MESSAGES) == wanted


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
