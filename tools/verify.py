"""``slotmoe verify``: every checksum of an export."""

import time
from pathlib import Path

import click

from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json
from slotmoe.offload import model_cache
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import byte_bars


@click.command(name="verify")
@click.argument("export", metavar="EXPORT", type=Path, shell_complete=options.model_names)
@options.JSON
def command(export: Path, as_json: bool) -> int:
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
        export = model_cache.export_named(str(export)) or export
    if not model_cache.is_export(export):
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
