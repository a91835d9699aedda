"""``slotmoe rm``: remove exports from the cache folder."""

import json
from typing import Any

import click

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import Cached, listing, remove
from slotmoe.offload.plan.memory import format_size
from slotmoe.tools.options import JSON
from slotmoe.tools.screen import visible


def _names(ctx: Any, parameter: Any, incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [cached.name for cached in listing(cache_folder()) if cached.name.startswith(incomplete)]


@click.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=_names)
@JSON
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Remove exports from the cache folder: NAME is one that slotmoe list shows, or the folder or
    hub id that it is of.

    What is removed is made again when it is needed: a folder is quantized anew, a model on the hub
    downloaded.

    \b
    Examples:
      slotmoe rm DeepSeek-V2-Lite-Chat-0f3a91c2d4e5
      slotmoe rm deepseek-ai/DeepSeek-V2-Lite-Chat
    """
    folder, gone = cache_folder(), list[Cached]()
    for name in names:
        gone += remove(folder, name)
    freed = sum(cached.bytes for cached in gone)
    if as_json:
        removed = [cached.name for cached in gone]
        print(json.dumps({"cache": str(folder), "removed": removed, "bytes": freed}))
    else:
        called = ", ".join(visible(cached.name) for cached in gone)
        print(f"{called}: removed, {format_size(freed)} are free again")
