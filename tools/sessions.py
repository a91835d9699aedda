"""What commands do with sessions on disk: open the one that the options name, and list them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.offload.model_cache import timestamp
from slotmoe.sizes import parse_size

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime
    from slotmoe.offload.sessions.names import Listed, NamedSession


@contextmanager
def open_session(given: Json, kind: str) -> "Iterator[NamedSession | None]":
    """The session that ``session_options`` name, new or of the ``kind``, this process's alone
    meanwhile; None where they name none.  Raises ``ConfigError`` or ``PlanError``."""
    folder, name = given["session_dir"], given["session"]
    parse_size(given["session_limit"])  # before a model is loaded
    if given.get("resume"):
        if name is not None:
            raise ConfigError("--resume takes the latest session; leave it out to take --session")
        name = next((s.name for s in sessions_in(folder) if _kind(s) == "chat"), None)
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


def sessions_in(folder: Path) -> "list[Listed]":
    """The named sessions there, the one that was used last first."""
    from slotmoe.offload.sessions.names import listing

    return listing(folder)


def described(folder: Path) -> list[str]:
    """The lines of a table of the named sessions there."""
    sessions = sessions_in(folder)
    if not sessions:
        return [f"{folder}: holds no named sessions"]
    width, rows = max(len(session.name) for session in sessions), list[str]()
    for session in sessions:
        tokens = "" if session.saved is None else f", {len(session.saved.tokens):,} tokens"
        rows.append(f"{session.name:{width}}  {_kind(session)}{tokens}, {ago(session.used)}")
    return [*rows, f"{folder}: {len(sessions)}. slotmoe rm --sessions NAME removes one."]


def session_facts(folder: Path) -> Json:
    """The same for JSON."""
    shown = []
    for session in sessions_in(folder):
        tokens = None if session.saved is None else len(session.saved.tokens)
        facts = {"name": session.name, "kind": _kind(session), "tokens": tokens}
        shown.append(facts | {"used": timestamp(session.used)})
    return {"folder": str(folder), "sessions": shown}


def _kind(session: "Listed") -> str:
    return "damaged" if session.saved is None else session.saved.kind


def ago(used: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - used)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"
