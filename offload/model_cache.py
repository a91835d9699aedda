"""The exports in the cache folder, how they are removed, and where a MODEL lies.  Without torch.

An export that was made there is called after its source's content or commit.  People give the short
name, which is without: ``model`` of ``owner--model-COMMIT-VERSION`` and of ``model-KEY``.
"""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from slotmoe import model, system
from slotmoe.errors import ConfigError, ExportError
from slotmoe.offload.machine import cache_folder, check_removed, read_note

SAMPLE = Path(model.__file__).parent / "sample"
_MANIFEST = "slotmoe.json"  # as slotmoe.quant.export.layout has it, which imports torch
_UNFINISHED = (".partial", ".download", ".replaced")
_KEYED = re.compile(r"(?:([\w.-]+?)--)?(.+?)(?:\.gguf)?-[0-9a-f]{12}(?:-\d+\w*)?")


@dataclass(frozen=True)
class Cached:
    """A folder of the cache: ``bytes`` on disk, seconds since 1970 when it was last ``used``, and
    the folder or hub id that it is of, as far as that is noted.  ``short`` is what to call it."""

    name: str
    short: str
    source: str | None
    bytes: int
    used: float
    finished: bool


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/model``; ``folder/model.gguf`` is a file."""
    part = r"[A-Za-z0-9][\w.-]{0,95}"
    return not name.endswith(".gguf") and re.fullmatch(f"{part}/{part}", name) is not None


def is_export(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file() and not folder.name.endswith(_UNFINISHED)


def is_model(folder: Path) -> bool:
    """Whether it looks like an export or a checkpoint."""
    return is_export(folder) or (folder / "config.json").is_file()


def locate(
    model: str | Path,
    revision: str | None = None,
    notify: Callable[[str], object] = str,
    is_source: bool = False,
) -> Path | None:
    """The path of a ``MODEL``: first an export, a checkpoint folder or a GGUF file there, then
    ``sample``, then what has the name in the cache folder, unless it ``is_source``, the SRC of an
    export; None for a hub id.  ``notify`` gets a line where that may surprise.  ``ConfigError``."""
    name, path, on_hub = str(model), Path(model), is_hub_id(str(model))
    is_path = path.is_file() or is_model(path)
    if revision is not None and (is_path or not on_hub):
        problem = f"revision {revision} is of a model on the hub, but this is here"
        raise ConfigError(f"{name}: {problem}; leave out --revision")
    if is_path:
        if on_hub and not is_export(path):
            notify(f"{name} is a folder here, so it is not looked up on the hub")
        elif name in library() and not is_source:
            notify(f"{name} is here, so the one of the cache folder is not used")
        return path
    if name == "sample":
        return SAMPLE
    if not is_source and path.name == name and (named := export_named(name)) is not None:
        if name not in (named.name, short_name(named)):
            notify(f"{name} is {short_name(named)}, in {named.parent}")
        return named
    if path.exists():
        neither = f"{_MANIFEST} (an export) nor config.json (a checkpoint)"
        raise ConfigError(f"{path}: holds neither {neither}")
    if not on_hub:
        raise ConfigError(f"{path}: {_meant(path, is_source)}")
    return None


def _meant(path: Path, is_source: bool) -> str:
    """What to say of a path where nothing is."""
    from slotmoe.offload.plan.advice import HUB, geometry_key

    if (hub := HUB.get(geometry_key(str(path)))) is not None:
        return f"is a geometry, without weights; {hub} has some, slotmoe synth makes random ones"
    there: dict[str, str | None] = {}
    if path.name == str(path):
        there = dict.fromkeys(["sample", *([] if is_source else library())])
        there |= {hub.partition("/")[2]: hub for hub in HUB.values()}
    with suppress(OSError):
        there |= {each.name: str(each) for each in path.parent.iterdir() if is_model(each)}
    if near := get_close_matches(path.name, there, 1):  # the folder alone is no likeness
        return f"no such folder; did you mean {there[near[0]] or near[0]}?"
    known = "MODEL is a path, a name that slotmoe list shows, a hub id or 'sample'"
    known = "SRC is a checkpoint folder, a GGUF file, a hub id or 'sample'" if is_source else known
    return f"no such folder or file; {known}"


def short_name(export: Path) -> str:
    match = _KEYED.fullmatch(export.name)
    return export.name if match is None else match[2]


def library(cache: Path | None = None) -> dict[str, Path]:
    """The exports in the cache folder by short name, or by the folders' where several have it."""
    with suppress(ConfigError, OSError):
        folders = [*filter(is_export, sorted((cache or cache_folder()).iterdir()))]
        shorts = Counter(map(short_name, folders))
        return {f.name if shorts[short_name(f)] > 1 else short_name(f): f for f in folders}
    return {}


def export_named(wanted: str) -> Path | None:
    """The export in the cache folder with that name, or else the only one that has it, in any
    case, as a part of its own.  Raises ``ConfigError`` where several have."""
    exports, part = library(), wanted.lower()
    found = [name for name, path in exports.items() if wanted in (name, path.name)]
    found = found or [name for name, path in exports.items() if part in short_name(path).lower()]
    if len(found) > 1:
        raise ConfigError(f"{wanted}: may be any of {', '.join(found)}; give one of them")
    return exports[found[0]] if found else None


def mark_used(folder: Path) -> None:
    """Note that the export was used now, as the time of its folder."""
    with suppress(OSError):  # a read-only cache serves as well
        os.utime(folder)


def listing(cache: Path) -> list[Cached]:
    """What the cache holds, last used first; work that was not finished is listed too."""
    if not cache.is_dir():
        return []
    sources, found = dict(_sources(cache)), []
    names = {path: name for name, path in library(cache).items()}
    for path in cache.iterdir():
        finished, is_folder = is_export(path), path.is_dir() and not path.is_symlink()
        if is_folder and (finished or path.name.endswith(_UNFINISHED)):
            plain = path.name if finished else path.name.rpartition(".")[0]
            source, used = sources.get(plain) or _hub_id(plain), path.stat().st_mtime
            short = names.get(path, path.name)
            found.append(Cached(path.name, short, source, _bytes(path), used, finished))
    return sorted(found, key=lambda cached: -cached.used)


def find(cache: Path, wanted: Sequence[str]) -> list[Cached]:
    """What has those names, or is of those hub ids, folders, or of ``sample``.  Raises
    ``ConfigError`` if one of them is not there, or is a short name of several."""
    there, chosen = listing(cache), dict[str, Cached]()
    for name in wanted:
        folder = SAMPLE if name == "sample" and not Path(name).is_dir() else Path(name)
        meant = {name, str(folder.resolve())}
        meant |= {export for export, source in _sources(cache) if source in meant}
        found = [cached for cached in there if {cached.name, cached.source} & meant]
        found = found or [cached for cached in there if cached.short == name]
        if not found:
            names = [name for c in there for name in (c.short, c.name, c.source) if name]
            near = get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else "slotmoe list shows what there is"
            raise ConfigError(f"{cache}: holds no {name!r}; {hint}")
        chosen |= {cached.name: cached for cached in found}
    return [*chosen.values()]


def remove(cache: Path, chosen: Sequence[Cached]) -> int:
    """Remove these.  Returns the bytes freed.  Raises ``ExportError``, and removes nothing, if
    another process writes one, and ``OSError`` behind all others if one can't be removed."""
    freed, left = 0, list[OSError]()
    with ExitStack() as locks:
        for cached in chosen:
            path = cache / cached.name
            try:
                lock = system.take_lock(path, 0, folder=True)
            except BlockingIOError:
                problem = "another process is writing it; wait for it to finish, or stop it"
                raise ExportError(f"{path}: {problem}") from None
            locks.callback(os.close, lock)
        for cached in chosen:
            gone = path = cache / cached.name
            try:
                if cached.finished:  # so that a kill leaves no half of an export under its name
                    gone = path.with_name(f"{path.name}.replaced")
                    shutil.rmtree(gone, ignore_errors=True)
                    system.move(path, gone)
                system.patiently(shutil.rmtree, gone)
                for note in _notes(cache, cached.name):
                    system.patiently(note.unlink, True)
            except OSError as problem:
                problem.filename = gone / problem.filename
                left.append(problem)
            freed += cached.bytes - sum(map(_bytes, {path, gone}))
    check_removed(left, freed)
    return freed


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 writes them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _sources(cache: Path) -> list[tuple[str, str]]:
    """The noted folders, each behind its export's name; folders of the same content share one."""
    values = map(read_note, sorted(cache.glob("*.source.json")))
    return [(str(about.get("export")), str(about.get("source"))) for about in values]


def _hub_id(name: str) -> str | None:
    """``owner/model`` of what ``hub_place`` calls ``owner--model-COMMIT-VERSION``."""
    match = _KEYED.fullmatch(name)
    return f"{match[1]}/{match[2]}" if match is not None and match[1] else None


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
            seen[status.st_dev, status.st_ino] = system.bytes_on_disk(path)
    return sum(seen.values())
