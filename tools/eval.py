"""``slotmoe eval``: how well a model predicts text, and what its quantization cost."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slotmoe.errors import ConfigError, PlanError, one_line
from slotmoe.jsonfile import Json
from slotmoe.offload.machine import available_memory, process_bytes
from slotmoe.offload.model_cache import is_export
from slotmoe.offload.plan.memory import share_of
from slotmoe.signals import Stopping
from slotmoe.sizes import format_size, parse_size
from slotmoe.tools import options
from slotmoe.tools.options import choice, count, option
from slotmoe.tools.screen import json_of
from slotmoe.tools.tables import Console, byte_bars, table

if TYPE_CHECKING:
    from slotmoe.offload.devices.device import DeviceMemory
    from slotmoe.offload.evaluate import Evaluation, Text, Window
    from slotmoe.offload.runtime import Runtime

# Rows of float32 in memory at once: two pieces of 128, and the float64 ones of a step, twice.
_LOGITS_ROWS = 384
_TEXT_HELP = "UTF-8 text to score; repeatable."
_REFERENCE = "Compare with this model: the unquantized checkpoint folder, 'sample', or an export."
_KERNELS_HELP = "torch, several times slower on CPUs, rounds no activations: the cost of weights."


@click.command(name="eval", cls=options.Command)
@options.MODEL
@option("--text texts", "FILE", _TEXT_HELP, type=options.EXISTING, multiple=True, required=True)
@option("--reference", "SRC", _REFERENCE)
@count("--window", None, "Positions that one pass reads. [default: --context]")
@count("--stride", None, "Tokens from a window's begin to the next. [default: --window - 1]")
@choice("--kernels", ["auto", "torch"], "auto", _KERNELS_HELP)
@options.open_options
@options.JSON
def command(
    model: str, texts: tuple[Path, ...], reference: str | None, as_json: bool, **given: Any
) -> None:
    """Score text with MODEL: bits per byte and perplexity, and with --reference the mean KL
    divergence in nats, and how often both put the same token first.

    A text is read in windows, each of them begun with the beginning-of-sentence token if the model
    has one.  By default they follow each other and every token is scored once.  A smaller --stride
    gives tokens more context: --window 4096 --stride 1024 lets all but the first window's see at
    least 3071 positions, for four times the work.

    Perplexity counts by token, so compare it only between models with the same tokenizer; bits per
    byte has no such limit.

    With --reference both models are open at once, within --ram (or --vram).  A checkpoint must fit
    whole, in its own precision; an export as reference needs no more than half of the budget.

    \b
    Examples:
      slotmoe eval lite --text book.txt
      slotmoe eval lite --text a.txt --reference DeepSeek-V2-Lite-Chat --window 1024
      slotmoe eval lite --text a.txt --reference DeepSeek-V2-Lite-Chat --kernels torch
      slotmoe eval lite-nf4 --text a.txt --text b.txt --reference lite-bf16 --ram 12GiB --json
    """
    from slotmoe.offload.devices.cuda import choose_device
    from slotmoe.offload.engine.loading import Options, check_options
    from slotmoe.offload.evaluate import Evaluation, read_texts, windows_of
    from slotmoe.offload.ingest.cached import resolve_model

    stride, other = given["stride"], None
    asked = {name: given[name] for name in ("ram", "vram", "slots", "experts_dirs")}
    asked |= options.runtime_arguments(given)
    device, _ = choose_device(asked.pop("device"))
    ready = partial(check_options, Options(**asked), device)
    folder = resolve_model(model, given["revision"], ready=ready)
    window = given["context"] = _window(folder, given["window"], given["context"])
    beside = None if reference is None else resolve_model(reference)
    read = read_texts(texts, folder, beside)
    windows = [windows_of(text, window, stride) for text in read]
    started = time.perf_counter()
    with ExitStack() as stack:
        if beside is not None:
            other = stack.enter_context(_open_reference(beside, device.memory(), given))
        runtime = stack.enter_context(_open_beside(other, model, as_json, given))
        evaluation = Evaluation(runtime, other)
        _run(evaluation, read, windows, f"Evaluating {model}", as_json)
        stats, seconds = runtime.stats(), time.perf_counter() - started
        settings = {"model": model, "reference": reference, "window": window}
        settings |= {"stride": stride, "windows": sum(map(len, windows))}
        settings |= {"kernels": stats["kernels"], "threads": runtime.threads}
        report = {**evaluation.report(), "seconds": seconds, "settings": settings}
        report["memory"] = stats["memory"]
    print(json_of(report)) if as_json else _print(report)


def _window(folder: Path, window: int | None, context: int | None) -> int:
    """Positions of a window, within --context and the model's limit."""
    from slotmoe.offload.model_source import read_model

    limit = read_model(folder)[0].max_position_embeddings
    if window is None:
        return min(4096, limit) if context is None else context
    if window > limit:
        allowed = f"{limit}, the model's max_position_embeddings"
        raise PlanError(f"--window {window} is beyond {allowed}: lower --window")
    if context is not None and window > context:
        advice = "lower --window, or raise --context"
        raise PlanError(f"--window {window} is beyond --context {context}: {advice}")
    return window


def _open_reference(reference: Path, memory: DeviceMemory | None, given: Json) -> Runtime:
    """The reference: a checkpoint as it is, or an export in at most half of the budget, which is
    of the device's ``memory`` too if it has its own."""
    from slotmoe.offload.runtime import Runtime

    quantize = is_export(reference)
    ram, vram = (given[name] and parse_size(given[name]) for name in ("ram", "vram"))
    if quantize:
        ram = (ram or share_of(available_memory())) // 2
        if memory is not None:
            vram = (vram or share_of(memory.free)) // 2
    shared = options.runtime_arguments(given) | {"kernels": "auto", "logits_rows": _LOGITS_ROWS}
    try:
        return Runtime.open(reference, ram=ram, vram=vram, quantize=quantize, **shared)
    except PlanError as problem:
        advice = "; or quantize it with --resident bf16 and give that export as the reference"
        advice = "" if quantize else advice
        raise PlanError(f"the reference {reference} {problem}{advice}") from None


def _open_beside(reference: Runtime | None, model: str, quiet: bool, given: Json) -> Runtime:
    """The model, in what an open reference leaves: its plan counts memory not touched yet."""
    if reference is None:
        return options.open_runtime(model, given, quiet, logits_rows=_LOGITS_ROWS)
    planned, vram, ram = reference.plan.total, given["vram"], given["ram"]
    if reference.plan.tier == "ram":
        used = process_bytes()
        budget = share_of(available_memory()) + used if ram is None else parse_size(ram)
        ram = max(1, budget - max(0, planned - used))
    elif vram is not None:
        vram = max(1, parse_size(vram) - planned)
    left = given | {"ram": ram, "vram": vram}
    try:
        return options.open_runtime(model, left, quiet, logits_rows=_LOGITS_ROWS)
    except PlanError as problem:
        beside = f"the reference, which takes {format_size(planned)}"
        advice = "or evaluate without --reference"
        raise PlanError(f"{model} beside {beside}, {problem}; {advice}") from None


def _run(
    evaluation: Evaluation, texts: list[Text], windows: list[list[Window]], title: str, quiet: bool
) -> None:
    before, total = 0, sum(text.ends[-1] for text in texts)
    engines = [it.engine for it in (evaluation.runtime, evaluation.reference) if it is not None]

    def stop(_: int) -> None:
        for engine in engines:
            engine.stop()

    with byte_bars(title, quiet=quiet) as (progress,), Stopping(stop) as stopping:
        try:
            for text, cut in zip(texts, windows, strict=True):
                for done in evaluation.run(text, cut):
                    progress(before + done, total)
                before += text.ends[-1]
        except ConfigError:
            if not stopping.number:
                raise
    if stopping.number and not quiet and any(it["tokens"] for it in evaluation.files.values()):
        options.say("stopped; so far:")
        _print(evaluation.report(), stderr=True)
    stopping.check()


_COLUMNS = {  # title -> key of the report and its format
    "tokens": ("tokens", "{}"),
    "bytes": ("bytes", "{}"),
    "bits/byte": ("bits_per_byte", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "ref.": ("reference_bits_per_byte", "{:.4f}"),
    "KL, nats": ("kl_divergence", "{:.5f}"),
    "same top": ("top1_agreement", "{:.2%}"),
}


def _print(report: Json, stderr: bool = False) -> None:
    console = Console(stderr)
    columns = {title: shown for title, shown in _COLUMNS.items() if shown[0] in report}
    rows = [(Path(file["file"]).name, file) for file in report["files"]]
    if len(rows) > 1:
        rows.append(("all", report))
    cells = [
        [one_line(name), *(shown.format(row[key]) for key, shown in columns.values())]
        for name, row in rows
    ]
    console.print(table(["text", *columns], cells))
