"""``slotmoe profile``: where a run's memory and time go."""

import tempfile
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ConfigError, refused
from slotmoe.tools import options
from slotmoe.tools.options import flag, option
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import Console

_FOLDER_HELP = "Folder of the report; an earlier report there is replaced."


@click.command(name="profile", cls=options.Command)
@options.MODEL
@click.argument("prompt", required=False)
@options.workload_options
@options.runtime_options
@option("-o --output", "DIR", _FOLDER_HELP, type=Path, default=Path("slotmoe-profile"))
@flag("--warm", "Fill the expert slots first, as after a long run; predictions are for that state.")
@options.JSON
def command(model: str, prompt: str | None, output: Path, as_json: bool, **given: Any) -> None:
    """Run MODEL on PROMPT or a built-in text, and report memory and time by component.

    The folder gets report.html (one file, opens offline), its charts as PNG, and profile.json:
    memory over time against the budget, the time of a token by component, expert use, hit rate and
    prefetch accuracy by layer, bytes by tier, and the plan's prediction beside what was measured.
    Ctrl-C ends the run early; what was
    measured until then is still written.

    \b
    Examples:
      slotmoe profile sample
      slotmoe profile lite --ram 5GiB -n 64 -o lite-5gib
      slotmoe profile lite --ram 5GiB --warm --json > steady.json
      slotmoe profile lite "$(cat notes.txt)" --context 8192 --json > profile.json
    """
    from slotmoe.tools.profile.report import overview, run, write_report  # imports torch

    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    advice = "; choose another folder with -o"
    with refused(output, ConfigError, "can't write a report there", advice):
        tempfile.TemporaryFile(dir=there).close()
    report, stopping = run(model, prompt, as_json, given)
    write_report(report, output)
    page = output / "report.html"
    if stopping.number:
        options.say(f"{page} has what was measured until then, and says so")
    stopping.check()
    if as_json:
        print(json_of(report))
    else:
        Console().print(overview(report))
        show(f"Report: {page}")
