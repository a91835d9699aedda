"""README, docs/ and the other pages: their code blocks, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHELLS = {"sh", "bash", "console", "shell"}
UNKNOWN = "$UNKNOWN"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks(page):
    """The fenced blocks of a page; a fence that is not closed is an error."""
    opened, lines = None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (number, line[3:].strip()), []
        else:
            yield Block(page, *opened, "\n".join(lines))
            opened = None
    assert opened is None, f"{page}:{opened}: this fence is never closed"


def name_of(block):
    return f"{block.page.relative_to(ROOT)}:{block.line}"


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in SHELLS]


def commands(text):
    """The simple commands of a shell text, as lists of words.

    What only a shell knows, a variable or a substitution, stays as a word with a ``$``.
    """
    text = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    text = re.sub(r"\$\([^)]*\)", UNKNOWN, text)
    text = re.sub(r"[<>]+ *[^\s;]+", "", text)  # redirections
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    for word in lexer:
        if set(word) <= set(";&|()\n"):
            yield words
            words = []
        elif words or (word not in ("$", "do", "then") and not re.match(r"\w+=", word)):
            words.append(word)
    yield words


def slotmoe_arguments(text):
    """The arguments of every call of ``slotmoe`` in a shell text."""
    for words in commands(text):
        if words and Path(words[0]).name == "slotmoe":
            yield words[1:]
        elif words[1:3] == ["-m", "slotmoe"]:
            yield words[3:]


CALLS = [
    pytest.param(arguments, id=f"{name_of(block)} {' '.join(arguments)}")
    for block in SHELL
    for arguments in slotmoe_arguments(block.text)
]
