"""``python -m slotmoe.tools.bench NAME``: what only engineers of this project measure."""

import click

from slotmoe.tools.bench import (
    codes,
    decode,
    download,
    drafts,
    kernels,
    peer,
    quantize,
    recall,
    routing,
    serve,
)
from slotmoe.tools.cli import main


@click.group("python -m slotmoe.tools.bench", context_settings={"show_default": True})
def bench() -> None:
    """Run a benchmark.  The last line of its output is one JSON object."""


for command in (
    *(decode.depth, decode.engine, decode.profile, decode.gap, kernels.kernels, kernels.gpu),
    *(codes.codes, quantize.quantize, download.download, drafts.drafts, serve.serve, recall.recall),
    *(routing.routing, peer.peer),
):
    bench.add_command(command)

if __name__ == "__main__":
    main(group=bench)
