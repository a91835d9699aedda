"""``slotmoe synth``: an export of a geometry with random weights."""

import time
from pathlib import Path
from typing import Any

import click

from slotmoe.model.config import read_config
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.signals import Stopping
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import byte_bars

_SHARE_HELP = "Write N distinct expert layers and hard-link the others to them."


@click.command(name="synth")
@click.argument("geometry", metavar="GEOMETRY")
@click.argument("destination", metavar="[DST]", type=Path, required=False)
@options.precision_options
@options.KEEP_MTP
@options.option("--share-layers", "N", _SHARE_HELP, type=click.IntRange(1, 1000))
@options.flag("--overwrite", "Replace an export at DST.")
@options.JSON
def command(geometry: str, destination: Path | None, as_json: bool, **given: Any) -> None:
    """Write an export of GEOMETRY with random weights to DST, or as GEOMETRY-random into the cache
    folder: its speed and memory are a real model's, its text is noise.

    GEOMETRY is a name that slotmoe plan knows, like v2-lite (16B), glm-4.7-flash (30B), v2 (236B)
    or v3 (671B), or the path of a config.json.

    \b
    Examples:
      slotmoe synth v2-lite                         9 GB, under a minute
      slotmoe bench v2-lite-random --ram 5GiB
      slotmoe synth v2 v2-random --share-layers 4   21 GB instead of 132
    """
    from slotmoe.offload.ingest.output_dir import make_cache
    from slotmoe.offload.ingest.synth import synthesize

    started, source = time.perf_counter(), geometry_path(geometry)
    given["codecs"] = options.expert_codecs(given)
    given |= options.precision(given, read_config(source), quiet=as_json)
    shown: Path | str | None = destination
    if destination is None:
        shown = f"{Path(geometry.removesuffix('/config.json')).name}-random"
        make_cache(cache_folder())
        destination = cache_folder() / shown
    bars, stopping = byte_bars(f"Writing {geometry}", quiet=as_json), Stopping(lambda _: None)
    with bars as (progress,), stopping:

        def advance(done: int, total: int) -> None:
            stopping.check()  # what was written goes
            progress(done, total)

        manifest = synthesize(source, destination, progress=advance, **given)
    stopping.check()
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    seconds = time.perf_counter() - started
    if as_json:
        print(json_of({"export": str(destination), "bytes": size, "seconds": seconds}))
    else:
        made = f"{destination}: {format_size(size)} in {seconds:.1f} s"
        show(made, f"Measure it: slotmoe bench {shown}", err=True)
