"""The exports in the cache folder: what is there, and how it is removed.  Without torch."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

from slotmoe import model
from slotmoe.errors import ConfigError, ExportError
from slotmoe.jsonfile import Json
from slotmoe.offload.shared_files import read_note, take_lock

SAMPLE = Path(model.__file__).parent / "sample"
_MANIFEST = "slotmoe.json"  # as slotmoe.quant.export.layout has it, which imports torch
_UNFINISHED = (".partial", ".download", ".replaced")


@dataclass(frozen=True)
class Cached:
    """A folder of the cache: ``bytes`` on disk, seconds since 1970 when it was last ``used``, and
    the folder or hub id that it is of, as far as that is noted."""

    name: str
    source: str | None
    bytes: int
    used: float
    finished: bool


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/model``; ``folder/model.gguf`` is a file."""
    part = r"[A-Za-z0-9][\w.-]{0,95}"
    return not name.endswith(".gguf") and re.fullmatch(f"{part}/{part}", name) is not None


def is_export(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def mark_used(folder: Path) -> None:
    """Note that the export was used now, as the time of its folder."""
    with suppress(OSError):  # a read-only cache serves as well
        os.utime(folder)


def listing(cache: Path) -> list[Cached]:
    """What the cache holds, last used first; work that was not finished is listed too."""
    if not cache.is_dir():
        return []
    sources, found = dict(_sources(cache)), []
    for path in cache.iterdir():
        finished = is_export(path)
        if path.is_symlink() or not (finished or path.name.endswith(_UNFINISHED)):
            continue
        if path.is_dir():
            plain = path.name if finished else path.name.rpartition(".")[0]
            source = sources.get(plain) or _hub_id(plain)
            used = path.stat().st_mtime
            found.append(Cached(path.name, source, _bytes(path), used, finished))
    return sorted(found, key=lambda cached: -cached.used)


def remove(cache: Path, wanted: str) -> list[Cached]:
    """Remove what is called ``wanted``, or is of that hub id, that folder, or of ``sample``, and
    return it.  Raises ``ConfigError`` if there is none, ``ExportError`` if another process is
    writing it."""
    there, folder = listing(cache), Path(wanted)
    if wanted == "sample" and not folder.is_dir():
        folder = SAMPLE
    meant = {wanted, str(folder.resolve())}
    meant |= {export for export, source in _sources(cache) if source in meant}
    chosen = [cached for cached in there if {cached.name, cached.source} & meant]
    if not chosen:
        names = [name for cached in there for name in (cached.name, cached.source) if name]
        near = get_close_matches(wanted, names, 1)
        hint = f"did you mean {near[0]}?" if near else "slotmoe list shows what there is"
        raise ConfigError(f"{cache}: holds no {wanted!r}; {hint}")
    for cached in chosen:
        path = cache / cached.name
        try:
            os.close(take_lock(path, os.O_RDONLY | os.O_DIRECTORY, 0))
        except BlockingIOError:
            problem = "another process is writing it; wait for it to finish, or stop it"
            raise ExportError(f"{path}: {problem}") from None
        gone = path
        if cached.finished:  # so that a kill leaves no half of an export under its name
            gone = path.with_name(f"{path.name}.replaced")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
        shutil.rmtree(gone)
        for note in _notes(cache, cached.name):
            note.unlink(missing_ok=True)
    return chosen


def facts(cached: Cached) -> Json:
    """The same for JSON."""
    return asdict(cached) | {"used": timestamp(cached.used)}


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 writes them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _sources(cache: Path) -> list[tuple[str, str]]:
    """The noted folders, each behind the name of its export; folders of the same content share
    one."""
    values = map(read_note, sorted(cache.glob("*.source.json")))
    return [(str(about.get("export")), str(about.get("source"))) for about in values]


def _hub_id(name: str) -> str | None:
    """``owner/model`` of what ``slotmoe.offload.ingest.hub.hub_export`` calls
    ``owner--model-COMMIT-VERSION``."""
    owner, separator, rest = name.partition("--")
    model = rest.rsplit("-", 2)[0]
    return f"{owner}/{model}" if separator and model else None


def _notes(cache: Path, export: str) -> Iterator[Path]:
    """Notes that lead to ``export``: of checkpoint folders, and of a hub id's revisions."""
    for note in list(cache.glob("*.json")):
        values = read_note(note)
        commit = str(values.get("commit", ""))[:12]
        owner_model = note.name.rpartition("@")[0]
        if values.get("export") == export or (commit and f"{owner_model}-{commit}-" in export):
            yield note


def _bytes(folder: Path) -> int:
    """Bytes that the folder takes on disk; files with several names count once."""
    seen = {}
    for path in folder.rglob("*"):
        with suppress(OSError):  # it may go while this looks
            status = path.lstat()
            seen[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(seen.values())
