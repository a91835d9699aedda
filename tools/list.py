"""``slotmoe list``: the exports in the cache folder, or the named sessions."""

import time
from dataclasses import asdict
from pathlib import Path

import click

from slotmoe.jsonfile import Json
from slotmoe.offload import model_cache
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import timestamp
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show


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
        return _list_sessions(session_dir, as_json)
    folder = cache_folder()
    cached = model_cache.listing(folder)
    total = sum(export.bytes for export in cached)
    if as_json:
        exports = [asdict(export) | {"used": timestamp(export.used)} for export in cached]
        print(json_of({"cache": str(folder), "exports": exports, "bytes": total}))
    elif cached:
        show(f"{'size':>10}  {'last used':<14}  export")
        for export in cached:
            state = "" if export.finished else " (unfinished)"
            state += "" if export.source is None else f", of {export.source}"
            size, used = format_size(export.bytes), _ago(export.used)
            show(f"{size:>10}  {used:<14}  {export.short}{state}")
        show(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")
    else:
        show(f"{folder}: holds no exports yet; slotmoe run MODEL makes them")


def _list_sessions(folder: Path, as_json: bool) -> None:
    """The named sessions there, the one that was used last first."""
    from slotmoe.offload.sessions.names import listing

    sessions, facts, rows = listing(folder), list[Json](), list[str]()
    width = max((len(session.name) for session in sessions), default=0)
    for name, used, saved in sessions:
        kind, tokens = ("damaged", None) if saved is None else (saved.kind, len(saved.tokens))
        facts.append({"name": name, "kind": kind, "tokens": tokens, "used": timestamp(used)})
        count = "" if tokens is None else f", {tokens:,} tokens"
        rows.append(f"{name:{width}}  {kind}{count}, {_ago(used)}")
    rows.append(f"{folder}: {len(sessions)}. slotmoe rm --sessions NAME removes one.")
    if as_json:
        print(json_of({"folder": str(folder), "sessions": facts}))
    else:
        show(*(rows if sessions else [f"{folder}: holds no named sessions"]))


def _ago(used: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - used)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"
