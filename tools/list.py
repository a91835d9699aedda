"""``slotmoe list``: the exports in the cache folder."""

import json
from typing import Any

import click

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import Cached, facts, listing
from slotmoe.sizes import format_size
from slotmoe.tools.options import JSON, SESSION_DIR, flag
from slotmoe.tools.screen import visible
from slotmoe.tools.sessions import ago, described, session_facts, session_folder


@click.command(name="list")
@flag("--sessions", "Show the named sessions of slotmoe chat and run instead.")
@SESSION_DIR
@JSON
def command(as_json: bool, sessions: bool, **options: Any) -> None:
    """Show what slotmoe run made of checkpoint folders, hub ids and the sample: the exports in
    $SLOTMOE_CACHE (default ~/.cache/slotmoe), the one that was used last first.

    \b
    Examples:
      slotmoe list
      slotmoe list --json
      slotmoe list --sessions
    """
    if sessions:
        place = session_folder(options)
        print(json.dumps(session_facts(place)) if as_json else described(place))
        return
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
        size, used = format_size(cached.bytes), ago(cached.used)
        print(visible(f"{size:>10}  {used:<14}  {_described(cached)}"))
    print(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")


def _described(cached: Cached) -> str:
    """The name, and what it is of."""
    name = cached.name if cached.finished else f"{cached.name} (unfinished)"
    return name if cached.source is None else f"{name}, of {cached.source}"
