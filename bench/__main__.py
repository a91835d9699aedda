"""``python -m bench NAME``: what only engineers of this project measure."""

from importlib import import_module

import click

from slotmoe.tools.cli import main


@click.group("python -m bench", context_settings={"show_default": True})
def bench() -> None:
    """Run a benchmark.  The last line of its output is one JSON object."""


for name in ("codes", "decode", "kernels", "replay", "serve"):
    for command in vars(import_module(f"bench.{name}")).values():
        if isinstance(command, click.Command):
            bench.add_command(command)

if __name__ == "__main__":
    main(group=bench)
