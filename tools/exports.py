"""``slotmoe list``, ``rm``, ``verify`` and ``synth``: exports in the cache folder and elsewhere."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ExportError, one_line
from slotmoe.jsonfile import Json
from slotmoe.model.config import read_config
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import (
    export_named,
    find,
    is_export,
    library,
    listing,
    remove,
    timestamp,
)
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import default_codecs
from slotmoe.signals import Stopping
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.sessions import ago, described, session_facts, sessions_in
from slotmoe.tools.tables import byte_bars


@click.command(name="list")
@options.flag("--sessions", "Show the named sessions of slotmoe chat and run instead.")
@options.SESSION_DIR
@options.JSON
def list_command(as_json: bool, sessions: bool, session_dir: Path) -> None:
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
    cached = listing(folder)
    total = sum(export.bytes for export in cached)
    if as_json:
        exports = [asdict(export) | {"used": timestamp(export.used)} for export in cached]
        print(json_of({"cache": str(folder), "exports": exports, "bytes": total}))
    elif cached:
        show(f"{'size':>10}  {'last used':<14}  export")
        for export in cached:
            state = "" if export.finished else " (unfinished)"
            state += "" if export.source is None else f", of {export.source}"
            size, used = format_size(export.bytes), ago(export.used)
            show(f"{size:>10}  {used:<14}  {export.short}{state}")
        show(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")
    else:
        show(f"{folder}: holds no exports yet; slotmoe run MODEL makes them")


@click.command(name="rm")
@click.argument("names", metavar="NAME...", nargs=-1, shell_complete=options.completing(library))
@options.flag("--sessions", "NAME are sessions of slotmoe chat and run.")
@options.flag("--all is_all", "With --sessions: remove all of them, and what unnamed texts left.")
@options.SESSION_DIR
@options.flag("-y --yes", "Ask nothing.")
@options.JSON
def rm_command(
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
    folder = given["session_dir"] if sessions else cache_folder()
    chosen = [] if sessions else find(folder, names)
    removed = [export.name for export in chosen] or [*dict.fromkeys(names)]
    if is_all:
        removed = [session.name for session in sessions_in(folder)]
    size = "" if sessions else f", {format_size(sum(export.bytes for export in chosen))}"
    called = one_line(", ".join(removed) or f"{folder}: unnamed texts")
    asks = not given["yes"] and sys.stdin.isatty() and sys.stderr.isatty()
    if asks and not click.confirm(f"Remove {called}{size}?", err=True):
        return 1
    if sessions:
        from slotmoe.offload.sessions.names import remove as remove_sessions

        freed = remove_sessions(folder, removed)
    else:
        freed = remove(folder, chosen)
    if as_json:
        where = "sessions" if sessions else "cache"
        print(json_of({where: str(folder), "removed": removed, "bytes": freed}))
    else:
        show(f"{called}: removed, {format_size(freed)} are free again")
    return 0


@click.command(name="verify")
@click.argument("export", metavar="EXPORT", type=Path, shell_complete=options.model_names)
@options.JSON
def verify_command(export: Path, as_json: bool) -> int:
    """Check every checksum of EXPORT, a path or a name that slotmoe list shows: of each file, its
    header, its tensors and its expert records.

    Says what to do about each bad file, and exits with 1 for any. The command that made an export
    repairs it: slotmoe quantize SRC EXPORT makes only the bad files again, to the same bytes.

    \b
    Examples:
      slotmoe verify lite
      slotmoe verify lite --json
    """
    started = time.perf_counter()
    if not export.exists() and export.name == str(export):
        export = export_named(str(export)) or export
    if not is_export(export):
        problem = "holds no slotmoe.json, so it is no finished export"
        raise ExportError(f"{export}: {problem} (slotmoe quantize SRC DST makes one)")
    from slotmoe.quant.export.layout import MANIFEST
    from slotmoe.quant.export.manifest import UNLISTED, read_manifest, unlisted_files
    from slotmoe.quant.export.writer import damaged_files

    manifest: Json = {"files": {}}
    try:
        manifest = read_manifest(export)
        with byte_bars(f"Checking {export}", quiet=as_json) as (progress,):
            damaged = damaged_files(export, manifest, progress)
        damaged |= dict.fromkeys(unlisted_files(export, manifest), UNLISTED)
    except ExportError as problem:
        damaged = {MANIFEST: str(problem).removeprefix(f"{export / MANIFEST}: ")}
    bad = [
        {"file": name, "problem": problem, "advice": _advice(name, export, manifest)}
        for name, problem in damaged.items()
    ]
    files, seconds = manifest["files"], time.perf_counter() - started
    size = sum(entry["bytes"] for entry in files.values())
    if as_json:
        report = {"export": str(export), "ok": not bad, "files": len(files)}
        print(json_of({**report, "bytes": size, "seconds": seconds, "bad": bad}))
    elif bad:
        for entry in bad:
            show(f"{export / entry['file']}: {entry['problem']}", f"  {entry['advice']}")
        options.say(f"{len(bad)} of {len(damaged.keys() | files.keys())} files are bad")
    else:
        show(f"{export}: all {len(files)} files are right ({format_size(size)} in {seconds:.1f} s)")
    return int(bool(bad))


def _advice(name: str, export: Path, manifest: Json) -> str:
    from slotmoe.quant.export.layout import MANIFEST

    source = manifest.get("source")
    if name == MANIFEST:
        advice = f"make the export again with slotmoe quantize SRC {export} --overwrite"
        return f"without it nothing can be checked: {advice}"
    if name not in manifest["files"]:
        return "move it away; nothing reads it"
    if not isinstance(source, dict) or not source.get("files"):
        advice = f"make them again with slotmoe synth GEOMETRY {export} --overwrite"
        return f"these are random weights: {advice}"
    advice = f"slotmoe quantize SRC {export} makes it again, and no other file"
    return f"{advice}; SRC is {str(source.get('name'))[:80]}, its folder, file or hub id"


_SHARE_HELP = "Write N distinct expert layers and hard-link the others to them."


@click.command(name="synth")
@click.argument("geometry", metavar="GEOMETRY")
@click.argument("destination", metavar="[DST]", type=Path, required=False)
@options.RESIDENT
@options.codec_options
@options.KEEP_MTP
@options.option("--share-layers", "N", _SHARE_HELP, type=click.IntRange(1, 1000))
@options.flag("--overwrite", "Replace an export at DST.")
@options.JSON
def synth_command(geometry: str, destination: Path | None, as_json: bool, **given: Any) -> None:
    """Write an export of GEOMETRY with random weights to DST, or as GEOMETRY-random into the cache
    folder: its speed and memory are a real model's, its text is noise.

    GEOMETRY is a name that slotmoe plan knows, like v2-lite (16B), glm-4.7-flash (30B), v2 (236B)
    or v3 (671B), or the path of a config.json.

    \b
    Examples:
      slotmoe synth v2-lite                         9 GB, under a minute
      slotmoe bench v2-lite-random --ram 5GiB
      slotmoe synth v2 v2-random --share-layers 4   21 GB instead of 132
    """
    from slotmoe.offload.ingest.output_dir import make_cache
    from slotmoe.offload.ingest.synth import synthesize

    started, source = time.perf_counter(), geometry_path(geometry)
    given["codecs"] = options.expert_codecs(given) or default_codecs(read_config(source))
    shown: Path | str | None = destination
    if destination is None:
        shown = f"{Path(geometry.removesuffix('/config.json')).name}-random"
        make_cache(cache_folder())
        destination = cache_folder() / shown
    bars, stopping = byte_bars(f"Writing {geometry}", quiet=as_json), Stopping(lambda _: None)
    with bars as (progress,), stopping:

        def advance(done: int, total: int) -> None:
            stopping.check()  # what was written goes
            progress(done, total)

        manifest = synthesize(source, destination, progress=advance, **given)
    stopping.check()
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    seconds = time.perf_counter() - started
    if as_json:
        print(json_of({"export": str(destination), "bytes": size, "seconds": seconds}))
    else:
        made = f"{destination}: {format_size(size)} in {seconds:.1f} s"
        show(made, f"Measure it: slotmoe bench {shown}", err=True)
