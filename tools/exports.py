"""``slotmoe list``, ``rm``, ``verify``, ``synth`` and ``quantize``: exports in the cache folder and
elsewhere."""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ConfigError, ExportError, one_line
from slotmoe.jsonfile import Json
from slotmoe.model.checkpoint.gguf_metadata import files_of
from slotmoe.model.config import config_among, read_config
from slotmoe.offload import model_cache
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import library, locate, timestamp
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.signals import Stopping, leave
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import json_of, show
from slotmoe.tools.tables import Console, byte_bars, table

Paths = tuple[Path, ...]
_WORKERS = click.IntRange(1, 256)
_CALIBRATE_HELP = "Make codes of --codec lut that lose least on this UTF-8 text; repeatable."


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
        return _list_sessions(session_dir, as_json)
    folder = cache_folder()
    cached = model_cache.listing(folder)
    total = sum(export.bytes for export in cached)
    if as_json:
        exports = [asdict(export) | {"used": timestamp(export.used)} for export in cached]
        print(json_of({"cache": str(folder), "exports": exports, "bytes": total}))
    elif cached:
        show(f"{'size':>10}  {'last used':<14}  export")
        for export in cached:
            state = "" if export.finished else " (unfinished)"
            state += "" if export.source is None else f", of {export.source}"
            size, used = format_size(export.bytes), _ago(export.used)
            show(f"{size:>10}  {used:<14}  {export.short}{state}")
        show(f"{folder}: {format_size(total)}. slotmoe rm NAME removes one.")
    else:
        show(f"{folder}: holds no exports yet; slotmoe run MODEL makes them")


def _list_sessions(folder: Path, as_json: bool) -> None:
    """The named sessions there, the one that was used last first."""
    from slotmoe.offload.sessions.names import listing

    sessions, facts, rows = listing(folder), list[Json](), list[str]()
    width = max((len(session.name) for session in sessions), default=0)
    for name, used, saved in sessions:
        kind, tokens = ("damaged", None) if saved is None else (saved.kind, len(saved.tokens))
        facts.append({"name": name, "kind": kind, "tokens": tokens, "used": timestamp(used)})
        count = "" if tokens is None else f", {tokens:,} tokens"
        rows.append(f"{name:{width}}  {kind}{count}, {_ago(used)}")
    rows.append(f"{folder}: {len(sessions)}. slotmoe rm --sessions NAME removes one.")
    if as_json:
        print(json_of({"folder": str(folder), "sessions": facts}))
    else:
        show(*(rows if sessions else [f"{folder}: holds no named sessions"]))


def _ago(used: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, time.time() - used)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"


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
    if sessions:
        from slotmoe.offload.sessions import names as of_sessions  # takes a second: torch

    folder = given["session_dir"] if sessions else cache_folder()
    chosen = [] if sessions else model_cache.find(folder, names)
    removed = [export.name for export in chosen] or [*dict.fromkeys(names)]
    if is_all:
        removed = [session.name for session in of_sessions.listing(folder)]
    size = "" if sessions else f", {format_size(sum(export.bytes for export in chosen))}"
    called = one_line(", ".join(removed) or f"{folder}: unnamed texts")
    asks = not given["yes"] and sys.stdin.isatty() and sys.stderr.isatty()
    if asks and not click.confirm(f"Remove {called}{size}?", err=True):
        return 1
    freed = of_sessions.remove(folder, removed) if sessions else model_cache.remove(folder, chosen)
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


_SHARE_HELP = "Write N distinct expert layers and hard-link the others to them."


@click.command(name="synth")
@click.argument("geometry", metavar="GEOMETRY")
@click.argument("destination", metavar="[DST]", type=Path, required=False)
@options.precision_options
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
    given["codecs"] = options.expert_codecs(given)
    given |= options.precision(given, read_config(source), quiet=as_json)
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
def quantize_command(
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
