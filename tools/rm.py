"""``slotmoe rm``: remove exports from the cache folder, or named sessions."""

import sys
from typing import Any

import click

from slotmoe.errors import one_line
from slotmoe.offload import model_cache
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import library
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show


@click.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, shell_complete=options.completing(library))
@options.flag("--sessions", "NAME are sessions of slotmoe chat and run.")
@options.flag("--all is_all", "With --sessions: remove all of them, and what unnamed texts left.")
@options.SESSION_DIR
@options.flag("-y --yes", "Ask nothing.")
@options.JSON
def command(
    names: tuple[str, ...], sessions: bool, is_all: bool, as_json: bool, **given: Any
) -> int:
    """Remove exports from the cache folder: NAME is one that slotmoe list shows, or what it is of:
    a folder, a hub id, sample. If one NAME is unknown or in use, none is removed.

    On a terminal it asks first, in a script not. What slotmoe run made is made again when needed: a
    folder is quantized anew, a model on the hub downloaded. A session's messages are gone for good.

    \b
    Examples:
      slotmoe rm DeepSeek-V2-Lite-Chat
      slotmoe rm deepseek-ai/DeepSeek-V2-Lite-Chat
      slotmoe rm --sessions plans
      slotmoe rm --sessions --all
    """
    if bool(names) == is_all or (is_all and not sessions):
        raise click.UsageError("needs NAME, or --sessions --all")
    if sessions:
        from slotmoe.offload.sessions import names as of_sessions  # takes a second: torch

    folder = given["session_dir"] if sessions else cache_folder()
    chosen = [] if sessions else model_cache.find(folder, names)
    removed = [export.name for export in chosen] or [*dict.fromkeys(names)]
    if is_all:
        removed = [session.name for session in of_sessions.listing(folder)]
    size = "" if sessions else f", {format_size(sum(export.bytes for export in chosen))}"
    called = one_line(", ".join(removed) or f"{folder}: unnamed texts")
    asks = not given["yes"] and sys.stdin.isatty() and sys.stderr.isatty()
    if asks and not click.confirm(f"Remove {called}{size}?", err=True):
        return 1
    freed = of_sessions.remove(folder, removed) if sessions else model_cache.remove(folder, chosen)
    if as_json:
        where = "sessions" if sessions else "cache"
        print(json_of({where: str(folder), "removed": removed, "bytes": freed}))
    else:
        show(f"{called}: removed, {format_size(freed)} are free again")
    return 0
