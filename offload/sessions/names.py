"""Sessions that a user has named: a conversation's messages, or a text's tokens, in one small file.

What the model has computed of them is in the blocks, like everybody's.  The file lists the tokens
because that is how their blocks are found again: those of a session that is removed go with it.
"""

import base64
import json
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypedDict

from msgspec import Meta, Struct

from slotmoe.errors import ConfigError, refused
from slotmoe.jsonfile import Json, read_json, typed
from slotmoe.offload.machine import check_removed
from slotmoe.offload.sessions import blocks
from slotmoe.offload.sessions.blocks import BlockFolder, make_private
from slotmoe.quant.export.layout import checksum
from slotmoe.system import patiently, take_lock

_VERSION = 1
_DEVICES = r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))"  # that Windows opens in place of a file
_NAME = re.compile(_DEVICES + r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_BYTES = 64 << 20

_Message = TypedDict("_Message", {"role": str, "content": str})


class _File(Struct):
    version: Literal[1]
    checksum: str
    root: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z", description="32 hexadecimal digits")]
    tokens: str
    kind: Literal["chat", "text"]
    messages: Annotated[list[_Message], Meta(min_length=1, max_length=1 << 20)]
    forgotten: Annotated[int, Meta(ge=0, le=1 << 20)]


@dataclass(frozen=True)
class Saved:
    """What a session's file holds: the ``tokens`` that were computed, behind the ``root`` of the
    model that did; of a ``chat`` its ``messages``, of which the oldest ``forgotten`` exchanges are
    no longer sent, of a ``text`` one message of the role ``text``."""

    root: bytes
    tokens: list[int]
    kind: str
    messages: list[dict[str, str]]
    forgotten: int = 0


class Listed(NamedTuple):
    """A listed session: ``used`` in seconds since 1970, ``saved`` None where it is damaged."""

    name: str
    used: float
    saved: Saved | None


class NamedSession(AbstractContextManager["NamedSession"]):
    """The session ``name`` of ``folder``, this process's alone until it is closed.  ``saved`` is
    None for a new one.  Raises ``ConfigError`` where it can't be had, or its file is damaged."""

    def __init__(self, folder: Path, name: str):
        if not _NAME.fullmatch(name):
            expected = "expected up to 64 letters, digits and '.', '_' or '-'"
            raise ConfigError(f"session {name!r:.80}: is no name of a session, {expected}")
        self.folder, self.name = folder, name
        self.path = folder / "names" / f"{name}.json"
        make_private(folder)
        make_private(self.path.parent)
        self._lock = _lock(self.path.with_suffix(".lock"))
        try:
            self.saved = _load(self.path) if self.path.exists() else None
        except BaseException:
            os.close(self._lock)
            raise

    def save(self, saved: Saved) -> None:
        """Replace the file, whole or not at all.  Raises ``ConfigError``."""
        # In one value: a reader of JSON bounds how many there may be.
        tokens = base64.b64encode(blocks.packed(saved.tokens)).decode()
        values = {"version": _VERSION, **asdict(saved), "root": saved.root.hex(), "tokens": tokens}
        text = json.dumps({"checksum": _checksum(values), **values})
        with refused(self.path, ConfigError, "can't be written"):
            blocks.write_private(self.path, [text.encode()])
        self.saved = saved

    def __exit__(self, *raised: object) -> None:
        os.close(self._lock)


def listing(folder: Path) -> list[Listed]:
    """The named sessions of ``folder``, the one that was used last first."""
    listed = []
    for path in (folder / "names").glob("*.json"):
        with suppress(FileNotFoundError):  # removed meanwhile
            used, saved = path.stat().st_mtime, None
            with suppress(ConfigError):
                saved = _load(path)
            listed.append(Listed(path.stem, used, saved))
    return sorted(listed, key=lambda session: -session.used)


def remove(folder: Path, names: Sequence[str]) -> int:
    """Remove those sessions, and every block that no other named session lists: those of unnamed
    texts, computed again where needed, too.  Returns the bytes freed.  Raises ``ConfigError`` first
    where one is not there or in use, and ``OSError`` behind all if a file can't be removed."""
    freed, stuck = 0, list[OSError]()
    there = {session.name for session in listing(folder)}
    with refused(folder, ConfigError, "can't be written"), ExitStack() as opened:
        for name in names:
            if name not in there:
                advice = "slotmoe list --sessions shows what there is"
                raise ConfigError(f"{folder}: holds no session {name!r:.80}; {advice}")
            with suppress(_DamagedError):
                opened.enter_context(NamedSession(folder, name))
        for name in names:
            path = folder / "names" / f"{name}.json"
            try:
                patiently(path.unlink)
                patiently(path.with_suffix(".lock").unlink, True)
            except OSError as problem:
                stuck.append(problem)
        left = [session.saved for session in listing(folder) if session.saved is not None]
        wanted = [block for saved in left for block in blocks.chain(saved.root, saved.tokens)]
        if (folder / "blocks").is_dir():
            kept = BlockFolder(folder / "blocks", 1 << 62, lambda remark: None)
            freed, others = kept.sweep(wanted)
            stuck += others
    check_removed(stuck, freed)
    return freed


class _DamagedError(ConfigError):
    """A session's file that is not what was written."""


def _load(path: Path) -> Saved:
    """Raises ``_DamagedError``."""
    values = read_json(path, _MAX_BYTES, Json, _DamagedError)
    try:
        file = typed(values, _File)
        if file.checksum != _checksum(values):
            raise ValueError("its checksum is wrong")
        tokens = blocks.unpacked(base64.b64decode(file.tokens))
    except ValueError as problem:
        advice = f"slotmoe rm --sessions {path.stem} removes it"
        raise _DamagedError(f"{path}: is damaged ({problem}); {advice}") from None
    root = bytes.fromhex(file.root)
    return Saved(root, tokens, file.kind, values["messages"], file.forgotten)


def _checksum(values: Json) -> str:
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True).encode())


def _lock(path: Path) -> int:
    """A handle that holds the lock.  Raises ``ConfigError``."""
    try:
        return take_lock(path, 0)
    except BlockingIOError:
        reason = "is in use by another process; wait for that, or take another name"
        raise ConfigError(f"session {path.stem}: {reason}") from None
    except OSError as problem:
        raise ConfigError(f"{path}: can't be written ({problem.strerror})") from None
