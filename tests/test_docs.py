"""README, docs/ and the other pages say what is true: their Python runs, their commands, links and
named files exist, and the tables that code makes are what it makes."""

import os
import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from scripts import tables
from slotmoe.tools.cli import cli
from tests.support.forkserver import ROOT

PAGES = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
UNKNOWN = "$UNKNOWN"
QUICK = {"run": ["-n", "4"], "plan": []}
GEOMETRIES = ("sample", "v2", "v2-lite")


class Block(NamedTuple):
    name: str
    language: str
    text: str


def blocks(page):
    """The fenced blocks of a page; a fence that is not closed is an error."""
    opened, lines = None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (f"{page.relative_to(ROOT)}:{number}", line[3:].strip()), []
        else:
            yield Block(*opened, "\n".join(lines))
            opened = None
    assert opened is None, f"{page}:{opened}: this fence is never closed"


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def calls(text):
    """The arguments of every call of ``slotmoe`` in a shell text; what only a shell knows stays as
    a word with a ``$``."""
    text = re.sub(r"\$\([^)]*\)", UNKNOWN, text.replace("\\\n", " "))
    for line in re.findall(r"(?m)^(?:.*[ ;&|(/])?slotmoe +(.*)$", text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        yield [*takewhile(lambda word: not set(word) <= set("();<>|&"), lexer)]


SHELL = {"sh", "bash", "console", "shell"}
CALLS = [
    pytest.param(arguments, id=f"{block.name} {' '.join(arguments)}")
    for block in BLOCKS
    if block.language in SHELL
    for arguments in calls(block.text)
]
QUICK_CALLS = [
    call
    for call in CALLS
    for name, *words in call.values
    if name in QUICK and words and words[0] in (GEOMETRIES if name == "plan" else ("sample",))
]


@pytest.fixture
def in_a_folder(heavy, processes, sample_export, tmp_path, monkeypatch):
    """As in a user's, where no test has imported anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slotmoe.offload.engine.loading.process_bytes", lambda: 400 << 20)
    os.symlink(sample_export, "sample-export")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_blocks_run(block, in_a_folder):
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("arguments", QUICK_CALLS)
def test_quick_commands_run(arguments, in_a_folder):
    result = CliRunner().invoke(cli, [*arguments, *QUICK[arguments[0]]])
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output


def test_commands_exist_and_each_has_an_example(monkeypatch):
    """With such options, choices and arguments; the files need not be there."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(Path(value).name))
    shown, context = set(), click.Context(cli)
    for call in CALLS:
        name, *words = call.values[0]
        shown.add(name)
        command = cli.get_command(context, name)
        assert command, f"{call.id}: no such command"
        if UNKNOWN not in words:
            try:
                command.make_context(name, words, parent=context)
            except click.UsageError as problem:
                pytest.fail(f"{call.id}: {problem.message}")
    assert not {*cli.list_commands(context)} - shown


def test_tables_are_what_the_code_says(heavy):
    for page in tables.PAGES:
        assert page.read_text() == tables.written(page.read_text()), "python -m scripts.tables"


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"(?m)^#+ (.*)$", prose(page)):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_resolve():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if "://" in link:
                continue
            assert target.is_relative_to(ROOT) and target.exists(), f"{page}: links to {link}"
            assert not anchor or anchor in set(anchors(target)), f"{page}: no heading {link}"


def test_named_files_exist():
    folder = "(?:model|quant|offload|tools|bench|tests|campaigns|slotmoe|docs)"
    for page in PAGES:
        if page.parent.name == "decisions":  # these may name what is gone
            continue
        for name in set(re.findall(rf"(?<![\w./<([-]){folder}/[\w./*-]*", page.read_text())):
            there = next(ROOT.glob(name.rstrip("/.")), None)
            assert there, f"{page}: names {name}, which is not there"


def test_every_option_has_its_place():
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    texts = [page.read_text() for page in pages if page.parent.name != "decisions"]
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", "\n".join(texts)))
    context = click.Context(cli)
    commands = [cli, *(cli.get_command(context, name) for name in cli.list_commands(context))]
    options = {
        word for command in commands for parameter in command.params for word in parameter.opts
    }
    assert not {word for word in options if word.startswith("--")} - named
