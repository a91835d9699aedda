"""What commands do with sessions on disk: open the one that the options name, and list them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.sizes import parse_size

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime
    from slotmoe.offload.sessions.names import NamedSession


@contextmanager
def open_session(given: Json, kind: str) -> "Iterator[NamedSession | None]":
    """The session that ``session_options`` name, new or of the ``kind``, this process's alone
    meanwhile; None where they name none.  Raises ``ConfigError`` or ``PlanError``."""
    folder, name = given["session_dir"], given["session"]
    parse_size(given["session_limit"])  # before a model is loaded
    if given.get("resume"):
        if name is not None:
            raise ConfigError("--resume takes the latest session; leave it out to take --session")
        name = next((it["name"] for it in sessions_in(folder) if it["kind"] == "chat"), None)
        if name is None:
            raise ConfigError(f"{folder}: holds no conversation to resume; begin with --session")
    if name is None:
        yield None
        return
    from slotmoe.offload.sessions.names import NamedSession

    with NamedSession(folder, name) as session:
        if session.saved is not None and session.saved.kind != kind:
            advice = "slotmoe run goes on with texts, with --chat and in slotmoe chat with chats"
            raise ConfigError(f"session {name}: is a {session.saved.kind}; {advice}")
        yield session


def go_on(
    session: "NamedSession | None", runtime: "Runtime", limit: str, notify: Callable[[str], None]
) -> None:
    """Let the runtime keep its texts where the session is, if any, within ``limit``, and say so."""
    if session is None:
        return
    runtime.keep_in(session.folder, limit, notify)
    assert runtime.sessions is not None
    remark = f"new, kept in {session.folder}"
    if session.saved is not None:
        remark = f"{len(session.saved.tokens):,} tokens"
        if session.saved.root != runtime.sessions.root():
            remark += " of another model or version, so its text is read anew"
    notify(f"session {session.name}: {remark}")


def sessions_in(folder: Path) -> list[Json]:
    """The named sessions there, the one that was used last first: ``name``, ``kind``, ``used`` in
    seconds since 1970, how many ``tokens``, which is None of a damaged one."""
    from slotmoe.offload.sessions.names import listing

    sessions = list[Json]()
    for name, used, saved in listing(folder):
        kind, tokens = ("damaged", None) if saved is None else (saved.kind, len(saved.tokens))
        sessions.append({"name": name, "kind": kind, "tokens": tokens, "used": used})
    return sessions


def described(folder: Path, sessions: list[Json]) -> list[str]:
    """The lines of a table of the named sessions there."""
    if not sessions:
        return [f"{folder}: holds no named sessions"]
    width, rows = max(len(session["name"]) for session in sessions), list[str]()
    for it in sessions:
        tokens = "" if it["tokens"] is None else f", {it['tokens']:,} tokens"
        rows.append(f"{it['name']:{width}}  {it['kind']}{tokens}, {ago(it['used'])}")
    return [*rows, f"{folder}: {len(sessions)}. slotmoe rm --sessions NAME removes one."]


def ago(used: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - used)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"
