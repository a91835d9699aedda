"""``python -m slotmoe.tools.bench NAME``: what only engineers of this project measure."""

from importlib import import_module

import click

from slotmoe.tools.cli import main

_MODULES = "decode kernels codes quantize download drafts serve recall".split()


@click.group("python -m slotmoe.tools.bench", context_settings={"show_default": True})
def bench() -> None:
    """Run a benchmark.  The last line of its output is one JSON object."""


for name in _MODULES:
    for command in vars(import_module(f"slotmoe.tools.bench.{name}")).values():
        if isinstance(command, click.Command):
            bench.add_command(command)

if __name__ == "__main__":
    main(group=bench)
