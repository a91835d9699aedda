"""``slotmoe list``: the exports in the cache folder."""

import json
import time

import click

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import Cached, facts, listing
from slotmoe.offload.plan.memory import format_size
from slotmoe.tools.options import JSON
from slotmoe.tools.screen import visible

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"))


@click.command(name="list")
@JSON
def command(as_json: bool) -> None:
    """Show what slotmoe run made of checkpoint folders, hub ids and the sample: the exports in
    $SLOTMOE_CACHE (default ~/.cache/slotmoe), the one that was used last first.

    \b
    Examples:
      slotmoe list
      slotmoe list --json
    """
    folder = cache_folder()
    found = listing(folder)
    total = sum(cached.bytes for cached in found)
    if as_json:
        exports = [facts(cached) for cached in found]
        print(json.dumps({"cache": str(folder), "exports": exports, "bytes": total}))
        return
    if not found:
        print(f"{folder}: holds no exports yet; slotmoe run MODEL makes them")
        return
    print(f"{'size':>10}  {'last used':<14}  export")
    for cached in found:
        size, used = format_size(cached.bytes), _ago(cached.used)
        print(visible(f"{size:>10}  {used:<14}  {_described(cached)}"))
    print(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")


def _described(cached: Cached) -> str:
    """The name, and what it is of."""
    name = cached.name if cached.finished else f"{cached.name} (unfinished)"
    return name if cached.source is None else f"{name}, of {cached.source}"


def _ago(used: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - used)
    for size, unit in _UNITS:
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"
