"""README, docs/ and the other pages say what is true: their Python runs, and their commands, links
and named files exist."""

import os
import re

import click
import pytest
from click.testing import CliRunner

from bench.__main__ import bench
from slotmoe.tools.cli import cli
from tests.support.pages import CALLS, PAGES, PYTHON, ROOT, UNKNOWN, name_of

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


@pytest.fixture
def in_a_folder(heavy, processes, sample_export, tmp_path, monkeypatch):
    """As in a user's, where no test has imported anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slotmoe.offload.engine.loading.process_bytes", lambda: 400 << 20)
    os.symlink(sample_export, "sample-export")


@pytest.mark.parametrize("block", PYTHON, ids=name_of)
def test_python_blocks_run(block, in_a_folder):
    exec(compile(block.text, name_of(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("arguments", QUICK_CALLS)
def test_quick_commands_run(arguments, in_a_folder):
    result = CliRunner().invoke(cli, [*arguments, *QUICK[arguments[0]]])
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output


def test_commands_exist():
    for call in CALLS:
        try:
            check_usage(*call.values)
        except click.UsageError as problem:
            pytest.fail(f"{call.id}: {problem.message}")


def test_pages_have_what_is_tested():
    assert len(PYTHON) >= 5 and len(CALLS) >= 30 and len(QUICK_CALLS) >= 3
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


def test_links_resolve():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    for page, link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT)
        assert target.exists(), f"{page}: links to {link}, which is not there"
        if anchor:
            assert anchor in set(anchors(target)), f"{page}: {name} has no heading #{anchor}"


def test_named_files_exist():
    folder = "(?:model|quant|offload|tools|bench|tests|campaigns|slotmoe|docs)"
    for page in PAGES:
        if page.parent.name == "decisions":  # these may name what is gone
            continue
        for name in set(re.findall(rf"(?<![\w./<([-]){folder}/[\w./*-]*", page.read_text())):
            there = next(ROOT.glob(name.rstrip("/.")), None)
            assert there, f"{page}: names {name}, which is not there"
        named = set(re.findall(r"python -m bench ([a-z]+)", page.read_text()))
        assert named <= set(bench.commands)


def test_every_option_has_its_place():
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    texts = [page.read_text() for page in pages if page.parent.name != "decisions"]
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", "\n".join(texts)))
    context = click.Context(cli)
    commands = [cli, *(cli.get_command(context, name) for name in cli.list_commands(context))]
    options = {word for command in commands for one in command.params for word in one.opts}
    assert not {word for word in options if word.startswith("--")} - named
