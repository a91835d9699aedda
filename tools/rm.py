"""``slotmoe rm``: remove exports from the cache folder, or sessions."""

import json
from typing import Any

import click

from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import listing, remove
from slotmoe.sizes import format_size
from slotmoe.tools.options import JSON, SESSION_DIR, flag
from slotmoe.tools.screen import visible
from slotmoe.tools.sessions import session_folder, sessions_in


def _names(ctx: Any, parameter: Any, incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [cached.name for cached in listing(cache_folder()) if cached.name.startswith(incomplete)]


@click.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, shell_complete=_names)
@flag("--sessions", "NAME are sessions of slotmoe chat and run.")
@flag("--all all_sessions", "With --sessions: remove all of them, and what unnamed texts left.")
@SESSION_DIR
@JSON
def command(
    names: tuple[str, ...], sessions: bool, all_sessions: bool, as_json: bool, **options: Any
) -> None:
    """Remove exports from the cache folder: NAME is one that slotmoe list shows, or what it is of:
    a folder, a hub id, sample.

    What is removed is made again when it is needed: a folder is quantized anew, a model on the hub
    downloaded. A session's messages are gone for good.

    \b
    Examples:
      slotmoe rm DeepSeek-V2-Lite-Chat-0f3a91c2d4e5
      slotmoe rm deepseek-ai/DeepSeek-V2-Lite-Chat
      slotmoe rm --sessions plans
      slotmoe rm --sessions --all
    """
    if bool(names) == all_sessions or (all_sessions and not sessions):
        raise click.UsageError("needs NAME, or --sessions --all")
    names = tuple(dict.fromkeys(names))
    folder = session_folder(options) if sessions else cache_folder()
    if sessions:
        from slotmoe.offload.sessions.names import remove as remove_sessions

        removed = [s.name for s in sessions_in(folder)] if all_sessions else names
        freed = remove_sessions(folder, removed)
    else:
        gone = [cached for name in names for cached in remove(folder, name)]
        removed, freed = [cached.name for cached in gone], sum(cached.bytes for cached in gone)
    if as_json:
        where = "sessions" if sessions else "cache"
        print(json.dumps({where: str(folder), "removed": removed, "bytes": freed}))
    else:
        called = ", ".join(map(visible, removed)) or f"{folder}: unnamed texts"
        print(f"{called}: removed, {format_size(freed)} are free again")
