"""``slotmoe list``: the exports in the cache folder."""

from dataclasses import asdict
from pathlib import Path

import click

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import listing, timestamp
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.sessions import ago, described, session_facts


@click.command(name="list")
@options.flag("--sessions", "Show the named sessions of slotmoe chat and run instead.")
@options.SESSION_DIR
@options.JSON
def command(as_json: bool, sessions: bool, session_dir: Path) -> None:
    """Show the exports in $SLOTMOE_CACHE (default ~/.cache/slotmoe), by the names that stand for
    them in every command: what slotmoe run made of checkpoint folders, hub ids and the sample, and
    what slotmoe quantize and synth wrote there. The one that was used last is first.

    \b
    Examples:
      slotmoe list
      slotmoe list --json
      slotmoe list --sessions
    """
    if sessions:
        print(json_of(session_facts(session_dir))) if as_json else show(*described(session_dir))
        return
    folder = cache_folder()
    found = listing(folder)
    total = sum(cached.bytes for cached in found)
    if as_json:
        exports = [asdict(cached) | {"used": timestamp(cached.used)} for cached in found]
        print(json_of({"cache": str(folder), "exports": exports, "bytes": total}))
    elif found:
        show(f"{'size':>10}  {'last used':<14}  export")
        for cached in found:
            size, used = format_size(cached.bytes), ago(cached.used)
            state = "" if cached.finished else " (unfinished)"
            of = "" if cached.source is None else f", of {cached.source}"
            show(f"{size:>10}  {used:<14}  {cached.short}{state}{of}")
        show(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")
    else:
        show(f"{folder}: holds no exports yet; slotmoe run MODEL makes them")
