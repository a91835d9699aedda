"""``slotmoe quantize``: a checkpoint folder in, an export out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

RESIDENT_CHOICES = ("auto", "bf16", "int8", "nf4")


@click.command(name="quantize")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--resident",
    type=click.Choice(RESIDENT_CHOICES),
    default="auto",
    help="Precision of everything but the routed experts. auto is int8; bf16 keeps the source's; nf4 is the smallest.",
)
@click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Threads that quantize. [default: all cores]")
@click.option("--overwrite", is_flag=True, help="Replace an export at DST, or start anew after a run with other options.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the export.")
def command(source: str, destination: Path, resident: str, workers: int | None, overwrite: bool, as_json: bool) -> None:
    """Quantize the checkpoint folder SRC (Hugging Face's DeepSeek-V2 format, or 'sample') into the export DST.

    Routed experts become NF4 (4.25 bits a weight).  The source is streamed: memory stays small however large the model.
    Interrupted or killed, the same command resumes where it stopped; DST appears only when it is complete.

    \b
    Examples:
      slotmoe quantize DeepSeek-V2-Lite-Chat lite-export
      slotmoe quantize DeepSeek-V2-Chat v2-export --resident nf4 --workers 8
    """
    from model.config import read_config
    from offload.plan import format_size
    from offload.quantize import quantize
    from offload.runtime import resolve_model
    from slotmoe import ConfigError
    from tools.progress import byte_progress

    folder = resolve_model(source)
    if (folder / "slotmoe.json").is_file():
        raise ConfigError(f"{folder}: is an export already; SRC must be the original checkpoint")
    if unknown := read_config(folder / "config.json").unknown_keys:
        print(f"slotmoe: {folder / 'config.json'}: keys that are not known here are ignored: {', '.join(unknown)}", file=sys.stderr)
    started = time.perf_counter()
    try:
        with byte_progress(f"Quantizing {source}", quiet=as_json) as progress:
            manifest = quantize(folder, destination, resident=resident, workers=workers, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        print(f"\nslotmoe: stopped; run the same command again to resume from {destination}.partial", file=sys.stderr)
        raise
    report = _report(manifest, destination, time.perf_counter() - started)
    if as_json:
        print(json.dumps(report))
        return
    print(f"{destination}: {format_size(report['bytes'])} in {report['seconds']:.1f} s", end="", file=sys.stderr)
    print(f" (experts {format_size(report['expert_bytes'])}, resident {format_size(report['resident_bytes'])})", file=sys.stderr)
    print(f'Run it: slotmoe run {destination} "Your prompt"', file=sys.stderr)


def _report(manifest: dict[str, Any], destination: Path, seconds: float) -> dict[str, Any]:
    files = manifest["files"]
    sizes = {"bytes": sum(entry["bytes"] for entry in files.values())}
    sizes["expert_bytes"] = sum(entry["bytes"] for name, entry in files.items() if name.startswith("experts/"))
    sizes["resident_bytes"] = files["resident.safetensors"]["bytes"]
    return {"export": str(destination), **sizes, "seconds": seconds, "quantization": manifest["quantization"]["resident"]}
