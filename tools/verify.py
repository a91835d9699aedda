"""``slotmoe verify``: compare every checksum of an export."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click


@click.command(name="verify")
@click.argument("export", metavar="EXPORT", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with what is wrong with which file.",
)
def command(export: Path, as_json: bool) -> int:
    """Check every checksum of EXPORT: of each file, its header, its tensors and its expert records.

    Says what to do about each bad file, and exits with 1 if there is one.  A damaged export is
    repaired by the command that made it: slotmoe quantize SRC EXPORT makes only the bad files
    again, to the same bytes.

    \b
    Examples:
      slotmoe verify lite-export
      slotmoe verify lite-export --json
    """
    from slotmoe.errors import ExportError
    from slotmoe.offload.plan.memory import format_size
    from slotmoe.quant.export.layout import MANIFEST
    from slotmoe.quant.export.validate import read_manifest
    from slotmoe.quant.export.verify import damaged_files
    from slotmoe.tools.progress import byte_progress

    started = time.perf_counter()
    if not (export / MANIFEST).exists():
        raise ExportError(
            f"{export}: holds no {MANIFEST}, so it is no finished export (slotmoe quantize SRC DST makes one)"
        )
    manifest: dict[str, Any] = {"files": {}}
    try:
        manifest = read_manifest(export)
        with byte_progress(f"Checking {export}", as_json) as progress:
            damaged = damaged_files(export, manifest, progress)
    except ExportError as problem:
        damaged = {MANIFEST: str(problem).removeprefix(f"{export / MANIFEST}: ")}
    advice = {name: _advice(name, export, manifest) for name in damaged}
    size, seconds = (
        sum(entry["bytes"] for entry in manifest["files"].values()),
        time.perf_counter() - started,
    )
    if as_json:
        bad = [
            {"file": name, "problem": wrong, "advice": advice[name]}
            for name, wrong in damaged.items()
        ]
        print(
            json.dumps(
                {
                    "export": str(export),
                    "ok": not bad,
                    "files": len(manifest["files"]),
                    "bytes": size,
                    "seconds": seconds,
                    "bad": bad,
                }
            )
        )
        return int(bool(damaged))
    for name, wrong in damaged.items():
        print(f"{export / name}: {wrong}\n  {advice[name]}")
    if damaged:
        print(
            f"slotmoe: {len(damaged)} of {len(manifest['files']) + (MANIFEST in damaged)} files are bad",
            file=sys.stderr,
        )
        return 1
    print(
        f"{export}: all {len(manifest['files'])} files are right ({format_size(size)} in {seconds:.1f} s)"
    )
    return 0


def _advice(name: str, export: Path, manifest: dict[str, Any]) -> str:
    from slotmoe.quant.export.layout import MANIFEST, is_predictor

    made_of = manifest.get("source")
    source = made_of if isinstance(made_of, dict) else {}
    if name == MANIFEST:
        return f"without it nothing can be checked: make the export again with slotmoe quantize SRC {export} --overwrite"
    if is_predictor(name):
        return f"train it again: slotmoe quantize SRC {export} --calibrate TEXT"
    if not source.get("files"):
        return f"these are random weights: make them again with slotmoe synth GEOMETRY {export} --overwrite"
    return f"slotmoe quantize SRC {export} makes it again, and no other file; SRC is {str(source.get('name'))[:80]}, its folder or hub id"
