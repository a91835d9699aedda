"""README, docs/ and the other pages say what is true: their Python runs, and their commands, links
and named files exist."""

import json
import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from slotmoe.tools.bench.__main__ import bench
from slotmoe.tools.cli import cli
from tests.support.pages import (
    BLOCKS,
    CALLS,
    PAGES,
    PYTHON,
    ROOT,
    SHELLS,
    UNKNOWN,
    name_of,
    slotmoe_arguments,
)

QUICK = {"run": ["-n", "4"], "profile": ["-n", "4", "-o", "report"], "plan": []}
GEOMETRIES = ("sample", "v2", "v2-lite")


def check_usage(arguments):
    """Raise ``click.UsageError`` if the command line has no such command, option or choice, or
    misses an argument."""
    context = click.Context(cli)
    command = cli.get_command(context, arguments[0])
    if command is None:
        raise click.UsageError(f"no command {arguments[0]!r}")
    inner = click.Context(command, parent=context, info_name=arguments[0])
    given = [word for word in arguments[1:] if word != UNKNOWN]
    values, rest, _ = command.make_parser(inner).parse_args(given)
    if rest:
        raise click.UsageError(f"too many arguments: {rest}")
    for parameter in command.params:
        value = values.get(parameter.name)
        missing = value is None or parameter.value_is_missing(value)
        if not (missing or isinstance(parameter.type, click.Path) or "$" in str(value)):
            parameter.type_cast_value(inner, value)
        if parameter.required and missing and UNKNOWN not in arguments:
            raise click.MissingParameter(ctx=inner, param=parameter)


QUICK_CALLS = [
    call
    for call in CALLS
    if len(call.values[0]) > 1
    and call.values[0][0] in QUICK
    and call.values[0][1] in (GEOMETRIES if call.values[0][0] == "plan" else ("sample",))
]


# Imports torch once; then each block runs in a fork, in a folder of its own.
BLOCKS_RUN = """
import json, os, sys, traceback
import torch
for folder, text in json.load(sys.stdin):
    os.chdir(folder)
    if not (child := os.fork()):
        os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(compile(text, folder, "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    with open("code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def blocks_run(sample_export, tmp_path_factory):
    """The folder of each block of Python, which has run there."""
    folders = {name_of(block): tmp_path_factory.mktemp("block") for block in PYTHON}
    for folder in folders.values():
        os.symlink(sample_export, folder / "sample-export")
    texts = [(str(folders[name_of(block)]), block.text) for block in PYTHON]
    subprocess.run(
        [sys.executable, "-c", BLOCKS_RUN], input=json.dumps(texts), text=True, check=True
    )
    return folders


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_blocks_run(block, blocks_run):
    folder = blocks_run[name_of(block)]
    assert (folder / "code").read_text() == "0", (folder / "errors").read_text()


@pytest.mark.parametrize("arguments", CALLS)
def test_commands_exist(arguments):
    check_usage(arguments)


@pytest.mark.parametrize("arguments", QUICK_CALLS)
def test_quick_commands_run(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [*arguments, *QUICK[arguments[0]]])
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output


@pytest.mark.parametrize(
    "wrong",
    [
        "slotmoe runn sample Hello",
        "slotmoe run sample Hello --temprature 1",
        "slotmoe run sample Hello again",
        "slotmoe run sample",
        "slotmoe eval sample",
        "slotmoe run sample Hello --device tpu",
        "slotmoe run sample Hello -n many",
        "cd somewhere && .venv/bin/slotmoe plan v2 --disk 2GB | cat > plan.txt  # a comment",
        "for r in a b; do\n  python -m slotmoe quantize sample out-$r --residents $r\ndone",
    ],
)
def test_wrong_commands_are_seen(wrong):
    (arguments,) = slotmoe_arguments(wrong)
    with pytest.raises(click.UsageError):
        check_usage(arguments)


def test_pages_have_what_is_tested():
    assert {block.language for block in BLOCKS} <= SHELLS | {"python", "text", "json"}
    assert len(PYTHON) >= 5
    assert len(CALLS) >= 30
    assert len(QUICK_CALLS) >= 3
    calls = [" ".join(call.values[0]) for call in CALLS]
    for command in cli.list_commands(click.Context(cli)):
        assert any(call.startswith(command) for call in calls), f"no example of {command}"


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"(?m)^#+ (.*)$", prose(page)):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    if "://" not in link
]


# Strict: once that page is there, these marks fail and go.


@pytest.mark.parametrize(
    ("page", "link"),
    [pytest.param(page, link, id=f"{page.relative_to(ROOT)}>{link}") for page, link in LINKS],
)
def test_links_resolve(page, link):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.is_relative_to(ROOT)
    assert target.exists(), f"{page}: links to {link}, which is not there"
    if anchor:
        assert anchor in set(anchors(target)), f"{page}: {name} has no heading #{anchor}"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name != "decisions"],  # these may name what is gone
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_named_files_exist(page):
    folder = "(?:model|quant|offload|tools|tests|slotmoe|docs)"
    for name in re.findall(rf"(?<![\w./<([-]){folder}/[\w./*-]*", page.read_text()):
        assert list(ROOT.glob(name.rstrip("/."))), f"{page}: names {name}, which is not there"
    named = set(re.findall(r"slotmoe\.tools\.bench ([a-z]+)", page.read_text()))
    assert named <= benchmarks()


def benchmarks():
    """Names of ``python -m slotmoe.tools.bench``'s commands."""
    return set(bench.commands)


def test_every_option_has_its_place():
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    texts = [page.read_text() for page in pages if page.parent.name != "decisions"]
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", "\n".join(texts)))
    context = click.Context(cli)
    commands = [cli, *(cli.get_command(context, name) for name in cli.list_commands(context))]
    options = {word for command in commands for one in command.params for word in one.opts}
    assert not {word for word in options if word.startswith("--")} - named


def test_every_benchmark_is_named():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert {name for name in benchmarks() if f"`{name}`" in text} == benchmarks()


def test_extras_exist():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n\n")[0]
    extras = set(re.findall(r"(?m)^(\w+) = \[", section))
    named = {
        extra
        for page in PAGES
        for extra in re.findall(r"(?:'\.|slotmoe)\[(\w+)\]", page.read_text())
    }
    assert named
    assert named <= extras


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("ARCHITECTURE.md", 200)])
def test_pages_are_short(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {
            (page.parent / link.partition("#")[0]).resolve() for p, link in LINKS if p == page
        }
        waiting += [
            target
            for target in targets
            if target.suffix == ".md" and target.exists() and target not in reached
        ]
        if page.name == "README.md" and ROOT / "docs" / "decisions" in targets:
            waiting += [path for path in PAGES if path.parent.name == "decisions"]
    assert not set(PAGES) - reached, "no link leads here"
