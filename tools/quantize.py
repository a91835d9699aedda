"""``slotmoe quantize``: a checkpoint in, from a folder or from the hub; an export out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from slotmoe.tools.options import REVISION, is_on_hub

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
@click.option(
    "--calibrate",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="TEXT",
    help="Train the predictor of experts on this UTF-8 text file, repeatable; with DST finished already, that alone.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Threads that quantize. [default: all cores]",
)
@REVISION
@click.option(
    "--keep-source",
    is_flag=True,
    help="Keep what is downloaded from the hub, as a checkpoint folder DST.source.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an export at DST, or start anew after a run with other options.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the export.")
def command(
    source: str, destination: Path, texts: tuple[Path, ...], as_json: bool, **options: Any
) -> None:
    """Quantize SRC (a checkpoint folder in Hugging Face's DeepSeek-V2 format, a hub id or 'sample')
    into the export DST.

    Routed experts become NF4 (4.25 bits a weight).  The source is streamed: memory stays small
    however large the model. Interrupted or killed, the same command resumes where it stopped; DST
    appears only when it is complete.  Where DST is this export already, its checksums are compared,
    and what is damaged is made again.

    A hub id (owner/model) is downloaded one weight file at a time, each removed when it is
    quantized: beyond the export that takes the disk of two of them.  Token, endpoint and cache are
    huggingface_hub's (HF_TOKEN, HF_ENDPOINT, HF_HOME).

    --calibrate reads text like what the model will read and write, and learns which experts a token
    will use before it starts.  Where experts don't fit in memory, they are then read earlier.
    100,000 tokens (half a megabyte) do well.

    \b
    Examples:
      slotmoe quantize DeepSeek-V2-Lite-Chat lite-export slotmoe quantize
      deepseek-ai/DeepSeek-V2-Chat v2-export --resident nf4 --workers 8 slotmoe quantize
      deepseek-ai/DeepSeek-V2-Lite lite-export --revision main --keep-source slotmoe quantize
      DeepSeek-V2-Lite-Chat lite-export --calibrate letters.txt --calibrate manual.txt
    """
    report = _quantize(source, destination, texts, as_json, **options)
    if texts:
        report["calibration"] = _calibrate(destination, texts, as_json)
    if as_json:
        print(json.dumps(report))
        return
    print(f'Run it: slotmoe run {destination} "Your prompt"', file=sys.stderr)


def _check_source(folder: Path, texts: tuple[Path, ...]) -> None:
    """What can be said about the source and the calibration texts before hours of work, not
    after."""
    from slotmoe.errors import ConfigError
    from slotmoe.model.config import read_config

    if (folder / "slotmoe.json").is_file():
        raise ConfigError(f"{folder}: is an export already; SRC must be the original checkpoint")
    config = read_config(folder / "config.json")
    if config.unknown_keys:
        print(
            f"slotmoe: {folder / 'config.json'}: keys that are not known here are ignored: {', '.join(config.unknown_keys)}",
            file=sys.stderr,
        )
    if texts:
        from slotmoe.model.tokenizer import Tokenizer
        from slotmoe.offload.study.calibrate import read_tokens

        read_tokens(texts, Tokenizer(folder, config.bos_token_id))


def _quantize(
    source: str,
    destination: Path,
    texts: tuple[Path, ...],
    quiet: bool,
    revision: str | None,
    keep_source: bool,
    overwrite: bool,
    **options: Any,
) -> dict[str, Any]:
    from slotmoe.offload.ingest.hub import quantize_from_hub
    from slotmoe.offload.ingest.quantize import quantize
    from slotmoe.offload.plan.memory import format_size
    from slotmoe.offload.runtime import resolve_model
    from slotmoe.tools.progress import byte_bars

    def notify(text: str) -> None:
        if not quiet:
            print(f"slotmoe: {text}", file=sys.stderr)

    started, on_hub = time.perf_counter(), is_on_hub(source, revision)
    if not on_hub:
        folder = resolve_model(source, revision)
        _check_source(folder, texts)
    try:
        with byte_bars("Downloading", "Quantizing", f"Checking {destination}", quiet=quiet) as (
            arriving,
            progress,
            checking,
        ):
            options |= {
                "overwrite": overwrite,
                "progress": progress,
                "checking": checking,
                "notify": notify,
            }
            if on_hub:
                options |= {
                    "keep_source": keep_source,
                    "arriving": arriving,
                    "ready": lambda folder: _check_source(folder, texts),
                }
                manifest = quantize_from_hub(source, revision or "main", destination, **options)
            else:
                manifest = quantize(folder, destination, **options)
    except KeyboardInterrupt:
        print(
            f"\nslotmoe: stopped; run the same command again to resume from {destination}.partial",
            file=sys.stderr,
        )
        raise
    report = _report(manifest, destination, time.perf_counter() - started)
    if not quiet:
        print(
            f"{destination}: {format_size(report['bytes'])} in {report['seconds']:.1f} s",
            end="",
            file=sys.stderr,
        )
        print(
            f" (experts {format_size(report['expert_bytes'])}, resident {format_size(report['resident_bytes'])})",
            file=sys.stderr,
        )
        _print_errors(report)
    return report


def _calibrate(destination: Path, texts: tuple[Path, ...], quiet: bool) -> dict[str, Any]:
    from slotmoe.offload.plan.memory import format_size
    from slotmoe.offload.study.calibrate import calibrate
    from slotmoe.tools.progress import byte_progress

    started = time.perf_counter()
    try:
        with byte_progress("Calibrating", quiet) as progress:
            found = calibrate(destination, texts, progress)
    except KeyboardInterrupt:
        print(
            f"\nslotmoe: stopped; {destination} is a whole export, calibrated as before",
            file=sys.stderr,
        )
        raise
    found["seconds"] = time.perf_counter() - started
    if not quiet:
        print(
            f"Calibrated on {found['tokens']} tokens in {found['seconds']:.1f} s ({format_size(found['bytes'])})",
            file=sys.stderr,
        )
        for name, text in (
            ("token", "before a token starts"),
            ("layer", "one MoE layer ahead"),
            ("popular", "by popularity alone"),
        ):
            if name in found["recall"]:
                shares = ", ".join(
                    f"{share:.1%} by {n}"
                    for n, share in zip(found["guesses"], found["recall"][name], strict=True)
                )
                print(f"  experts named {text}: {shares} guesses a layer", file=sys.stderr)
    return found


def _report(manifest: dict[str, Any], destination: Path, seconds: float) -> dict[str, Any]:
    files = manifest["files"]
    sizes = {"bytes": sum(entry["bytes"] for entry in files.values())}
    sizes["expert_bytes"] = sum(
        entry["bytes"] for name, entry in files.items() if name.startswith("experts/")
    )
    sizes["resident_bytes"] = files["resident.safetensors"]["bytes"]
    cost = {key: manifest["quantization"]["report"][key] for key in ("bits_per_weight", "families")}
    return {
        "export": str(destination),
        **sizes,
        "seconds": seconds,
        "quantization": manifest["quantization"]["resident"],
        **cost,
    }


def _print_errors(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="What quantization cost: RMS error as a share of the weights' RMS",
        box=SIMPLE,
        pad_edge=False,
    )
    for column in ("tensors", "as", "million", "bits", "error", "worst layer"):
        table.add_column(
            column, justify="left" if column in ("tensors", "as") else "right", no_wrap=True
        )
    for row in report["families"]:
        worst = (
            ""
            if row["worst_layer"] is None
            else f"{row['by_layer'][str(row['worst_layer'])]:.3%} in {row['worst_layer']}"
        )
        error = f"{row['relative_rms_error']:.3%}" if row["relative_rms_error"] else "0"
        table.add_row(
            row["family"],
            row["stored"],
            f"{row['weights'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.3f}",
            error,
            worst,
        )
    table.add_section()
    total = sum(row["weights"] for row in report["families"])
    table.add_row(
        "all, with padding", "", f"{total / 1e6:.2f}", f"{report['bits_per_weight']:.3f}", "", ""
    )
    Console(stderr=True).print(table)
