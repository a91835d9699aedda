"""Entry point of ``slotmoe``.  Commands are imported when they are called, so help is instant."""

import importlib
import signal
import sys
from typing import Any

import click

from slotmoe import __version__
from slotmoe.errors import DeviceError, DownloadError, SlotmoeError

_COMMANDS = {
    "run": "Continue a prompt with a model, streaming the text.",
    "chat": "Talk to a model, with history, commands and formatted answers.",
    "serve": "Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page.",
    "quantize": "Turn a checkpoint into a 4-bit export that loads fast.",
    "verify": "Check every checksum of an export.",
    "synth": "Write an export of a real geometry with random weights.",
    "plan": "Say whether a model fits, what goes where, and how fast it will be.",
    "bench": "Measure prefill and decode speed beside the machine's ceiling.",
    "eval": "Score text: bits per byte, perplexity, and divergence from a reference.",
    "profile": "Report where a run's memory and time go: charts, HTML, JSON.",
    "replay": "Compare expert cache policies and sizes on recorded routing.",
}


class LazyGroup(click.Group):
    """Imports a command from the module of its name when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"slotmoe.tools.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group("slotmoe", cls=LazyGroup, context_settings=_SETTINGS)
@click.version_option(__version__, "-V", "--version", prog_name="slotmoe")
def cli() -> None:
    """Run DeepSeek-V2 models that are far larger than your graphics card, or your RAM.

    \b
    Try it now, with the bundled sample model and no download:
      slotmoe run sample "It is a truth universally acknowledged, that"

    \b
    Then with a real checkpoint, from the hub or a folder in Hugging Face's format:
      slotmoe quantize deepseek-ai/DeepSeek-V2-Lite-Chat lite-export
      slotmoe run lite-export --chat "Why is the sky blue?"
      slotmoe chat lite-export
    """


def main(arguments: list[str] | None = None, group: click.Group = cli) -> Any:
    """Run the command line; exit codes: 0 done, 1 the work failed, 2 bad usage or input, 130
    interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = group.main(arguments, prog_name=group.name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SlotmoeError as problem:
        click.echo(f"slotmoe: {problem}", err=True)
        sys.exit(1 if isinstance(problem, DownloadError | DeviceError) else 2)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nslotmoe: interrupted", err=True)
        sys.exit(130)
    except OSError as problem:
        path = problem.filename or "input or output"
        click.echo(f"slotmoe: {path}: {problem.strerror or problem}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
