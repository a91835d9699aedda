"""``slotmoe quantize``: a checkpoint becomes an export."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ConfigError, one_line
from slotmoe.jsonfile import Json
from slotmoe.model.checkpoint.gguf_metadata import files_of
from slotmoe.model.config import config_among
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import library, locate
from slotmoe.signals import Stopping, leave
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import Console, byte_bars, table

Paths = tuple[Path, ...]
_WORKERS = click.IntRange(1, 256)
_CALIBRATE_HELP = "Make codes of --codec lut that lose least on this UTF-8 text; repeatable."


@click.command(name="quantize")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", type=Path, required=False)
@options.precision_options
@options.option("--calibrate texts", "TEXT", _CALIBRATE_HELP, type=Path, multiple=True)
@options.KEEP_MTP
@options.option("--workers", "N", "Threads that quantize. [default: all cores]", type=_WORKERS)
@options.REVISION
@options.flag(
    "--keep-source", "Keep what is downloaded from the hub, as a checkpoint folder DST.source."
)
@options.flag(
    "--overwrite", "Replace an export at DST, or start anew after a run with other options."
)
@options.flag("--verbose", "Show what quantization cost, by kind of tensor.")
@options.JSON
def command(
    source: str, destination: Path | None, texts: Paths, verbose: bool, as_json: bool, **given: Any
) -> None:
    """Quantize SRC (a checkpoint folder in Hugging Face's DeepSeek-V2 format, a GGUF file, a hub id
    or 'sample') into the export DST, or without DST into the cache folder, where SRC and a name
    that slotmoe list shows find it from everywhere.

    Routed experts become codes of 4 bits, or with --bits of fewer.  The source is streamed: memory
    stays small however large the model. Interrupted or killed, the same command resumes where it
    stopped; DST appears only when it is complete.  Where DST is this export already, its checksums
    are compared, and what is damaged is made again.

    A hub id (owner/model) is downloaded one weight file at a time, each removed when it is
    quantized: beyond the export that takes the disk of two of them.  Token, endpoint and cache are
    huggingface_hub's (HF_TOKEN, HF_ENDPOINT, HF_HOME).

    Codes of --codec lut have levels that are learned from the model's own weights.

    --calibrate reads text like what the model will read and write.  Codes of --codec lut are made
    so that outputs on that text lose least: the text goes through the checkpoint layer by layer,
    which takes minutes to hours, said beforehand, and a killed run resumes at its layer.  Some
    12,000 tokens (60 kB) of it are read, evenly spread: give every kind of text that the model
    will meet, for other kinds lose more.  From the hub weight files then come layer by layer, and
    stay until no layer needs them.

    \b
    Examples:
      slotmoe quantize DeepSeek-V2-Lite-Chat lite
      slotmoe quantize DeepSeek-V2-Lite-Chat.Q8_0.gguf lite
      slotmoe quantize deepseek-ai/DeepSeek-V2-Chat --resident mixed --workers 8
      slotmoe quantize DeepSeek-V2-Lite-Chat lite --bits 3
      slotmoe quantize deepseek-ai/DeepSeek-V2-Lite lite --revision main --keep-source
      slotmoe quantize DeepSeek-V2-Lite-Chat lite --calibrate a.txt --calibrate b.txt
    """
    started = time.perf_counter()
    given["codecs"] = options.expert_codecs(given)
    manifest, destination = _quantize(source, destination, texts, as_json, given)
    report = _report(manifest, destination, time.perf_counter() - started)
    if as_json:
        print(json_of(report))
        return
    if verbose:
        _print_cost(report)
    sizes = (report[name] for name in ("bytes", "expert_bytes", "resident_bytes"))
    size, experts, resident = map(format_size, sizes)
    spent = f"{report['seconds']:.1f} s (experts {experts}, resident {resident})"
    made = f"{destination}: {size} in {spent}, {report['bits_per_weight']:.2f} bits a weight"
    names = {folder: name for name, folder in library().items()}
    name = names.get(destination, destination)
    show(made, f'Run it: slotmoe run {name} "Your prompt"', err=True)


def _check_source(folder: Path, texts: Paths, given: Json, quiet: bool) -> Json:
    """What ``quantize`` is to do with ``folder``: codes, and the texts in windows of token ids.
    Refuses what can't work before hours, not after."""
    if (folder / "slotmoe.json").is_file():
        raise ConfigError(f"{folder}: is an export already; SRC must be the original checkpoint")
    config = config_among(files_of(folder), folder)
    if config.unknown_keys:
        keys = ", ".join(config.unknown_keys)
        options.say(f"{folder / 'config.json'}: keys that are not known here are ignored: {keys}")
    for note in config.notes:
        options.say(f"{folder}: {note}")
    how = options.precision(given, config, texts, quiet)
    return how | {"calibration": calibration_windows(folder, texts) if texts else None}


def calibration_windows(folder: Path, texts: Paths) -> list[list[int]]:
    """The texts in windows of token ids of the checkpoint ``folder``."""
    from slotmoe.offload.ingest.calibration import read_windows
    from slotmoe.offload.model_source import read_model

    config, tokenizer = read_model(folder)
    return read_windows(texts, tokenizer, config.max_position_embeddings)


def _quantize(
    source: str, destination: Path | None, texts: Paths, quiet: bool, given: Json
) -> tuple[Json, Path]:
    """The manifest of the export, and where it is."""
    revision, keep_source = given.pop("revision"), given.pop("keep_source")
    how = {name: given.pop(name) for name in ("resident", "codecs", *options.FITTING)}
    ready = partial(_check_source, texts=texts, given=how, quiet=quiet)
    folder = locate(source, revision, options.say, is_source=True)
    from slotmoe.offload.ingest.cached import cached_place, hub_place, quantize_from_hub
    from slotmoe.offload.ingest.quantize import quantize

    if folder is not None:
        given |= ready(folder)
    bars = ("Reading", "Downloading", "Quantizing", "Checking")
    again = f"run the same command again to resume in {destination or cache_folder()}"
    said = partial(leave, remark=f"; {one_line(again)}")  # after Ctrl-C
    with Stopping(said), byte_bars(*bars, quiet=quiet) as (reading, arriving, making, checking):
        given |= {"progress": making, "checking": checking, "notify": options.notifier(quiet)}
        if folder is not None:
            destination = destination or cached_place(folder, cache_folder(), reading)
            return quantize(folder, destination, **given), destination
        if destination is None:
            destination, revision = hub_place(source, revision, cache_folder())
        given |= {"keep_source": keep_source, "arriving": arriving, "ready": ready}
        return quantize_from_hub(source, revision or "main", destination, **given), destination


def _report(manifest: Json, destination: Path, seconds: float) -> Json:
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    experts = sum(sizes[name] for name in sizes if name.startswith("experts/"))
    report: Json = {"export": str(destination), "bytes": sum(sizes.values())}
    report |= {"expert_bytes": experts, "resident_bytes": sizes["resident.safetensors"]}
    report |= {"seconds": seconds, "quantization": manifest["quantization"]["resident"]}
    cost = manifest["quantization"]["report"]
    return report | {name: cost[name] for name in ("bits_per_weight", "families")}


def _print_cost(report: Json) -> None:
    rows, total = [], sum(family["weights"] for family in report["families"])
    for family in report["families"]:
        layer, error = family["worst_layer"], family["relative_rms_error"]
        worst = "" if layer is None else f"{family['by_layer'][str(layer)]:.3%} in {layer}"
        million, bits = f"{family['weights'] / 1e6:.2f}", f"{family['bits_per_weight']:.3f}"
        error = f"{error:.3%}" if error else "0"
        rows.append((family["family"], family["stored"], million, bits, error, worst))
    title = "What quantization cost: RMS error as a share of the weights' RMS"
    columns = ("tensors", "as", "million", "bits", "error", "worst layer")
    bits = f"{report['bits_per_weight']:.3f}"
    rows.append(("all, with padding", "", f"{total / 1e6:.2f}", bits, "", ""))
    Console(stderr=True).print(table(columns, rows, title, (0, 1)))
