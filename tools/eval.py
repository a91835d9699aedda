"""``slotmoe eval``: how well a model predicts text, and what its quantization cost."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slotmoe.tools.options import open_runtime, runtime_options

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime
    from slotmoe.offload.study.evaluate import Evaluation, Text


@click.command(name="eval")
@click.argument("model", metavar="MODEL")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE",
    help="UTF-8 text to score; repeatable.",
)
@click.option(
    "--reference",
    metavar="SRC",
    help="Compare with this model: the unquantized checkpoint folder, 'sample', or an export.",
)
@click.option(
    "--method",
    type=click.Choice(["strided", "llama.cpp"]),
    default="strided",
    show_default=True,
    help="strided scores every token once; llama.cpp the second half of each window, as its perplexity tool does.",
)
@click.option(
    "--window", type=int, metavar="N", help="Positions that one pass reads. [default: --context]"
)
@click.option(
    "--stride",
    type=int,
    metavar="N",
    help="Tokens from one window's begin to the next one's. [default: --window - 1]",
)
@click.option(
    "--worst",
    type=click.IntRange(0, 1000),
    default=10,
    show_default=True,
    metavar="N",
    help="Show the N worst tokens.",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "torch"]),
    default="auto",
    help="torch rounds no activations, several times slower on a CPU: the cost of the weights alone.",
)
@runtime_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    texts: tuple[Path, ...],
    reference: str | None,
    method: str,
    window: int | None,
    stride: int | None,
    worst: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Score text with MODEL: bits per byte and perplexity, and with --reference the mean KL
    divergence in nats, how often both put the same token first, and the tokens whose predictions
    differ most.

    A text is read in windows, each of them begun with the beginning-of-sentence token if the model
    has one.  By default they follow each other and every token is scored once.  A smaller --stride
    gives tokens more context: --window 4096 --stride 1024 lets all but the first window's see at
    least 3071 positions, for four times the work.

    To compare with llama.cpp's `perplexity -c 512 -f FILE`, pass --method llama.cpp --window 512:
    the same tokens are scored, in the same contexts.  Its KL divergence is ours but for its 16-bit
    storage of the reference.  Perplexity counts by token, so compare it only between models with
    the same tokenizer; bits per byte has no such limit.

    With --reference both models are open at once, within --ram (or --vram).  A checkpoint must fit
    whole, in its own precision; an export as reference needs no more than half of the budget.

    \b
    Examples:
      slotmoe eval lite-export --text book.txt slotmoe eval lite-export --text a.txt --text b.txt
      --reference DeepSeek-V2-Lite-Chat --window 1024 slotmoe eval lite-export --text page.txt
      --reference DeepSeek-V2-Lite-Chat --kernels torch slotmoe eval lite-nf4 --text book.txt
      --reference lite-bf16 --ram 12GiB --json slotmoe eval lite-export --text wiki.test.raw
      --method llama.cpp --window 512
    """
    from slotmoe.offload.study.evaluate import Evaluation, windows_of

    window = options["context"] = _window(model, window, options["context"])
    read = _read(model, reference, texts)
    windows = [windows_of(text, method, window, stride) for text in read]
    started = time.perf_counter()
    with ExitStack() as stack:
        other = None
        if reference is not None:
            other = stack.enter_context(_open_reference(reference, options))
            options |= _left_beside(other, options)
        runtime = stack.enter_context(_open_beside(model, options, other, as_json))
        evaluation = Evaluation(runtime, other, worst)
        try:
            _run(evaluation, read, windows, model, as_json)
        except KeyboardInterrupt:
            if not as_json and any(one.tokens for one in evaluation.files.values()):
                print("slotmoe: stopped; so far:", file=sys.stderr)
                _print(evaluation.report(), sys.stderr)
            raise
        settings = {
            "model": model,
            "reference": reference,
            "method": method,
            "window": window,
            "stride": stride,
        }
        stats = runtime.stats()
        settings |= {
            "windows": sum(map(len, windows)),
            "kernels": stats["kernels"],
            "threads": runtime.threads,
        }
        report = {
            **evaluation.report(),
            "seconds": time.perf_counter() - started,
            "settings": settings,
            "memory": stats["memory"],
        }
    print(json.dumps(report)) if as_json else _print(report, sys.stdout)


def _window(model: str, window: int | None, context: int) -> int:
    """Positions of a window: as asked, within --context if that was given too, and within what the
    model can."""
    from slotmoe.errors import PlanError
    from slotmoe.model.config import read_config
    from slotmoe.offload.runtime import resolve_model

    limit = read_config(resolve_model(model) / "config.json").max_position_embeddings
    given = (
        click.get_current_context().get_parameter_source("context")
        != click.core.ParameterSource.DEFAULT
    )
    if window is None:
        return context if given else min(context, limit)
    if window > limit:
        raise PlanError(
            f"--window {window} is beyond {limit}, the model's max_position_embeddings: lower --window"
        )
    if given and window > context:
        raise PlanError(
            f"--window {window} is beyond --context {context}: raise --context or lower --window"
        )
    return window


def _read(model: str, reference: str | None, paths: tuple[Path, ...]) -> list[Text]:
    """The texts as MODEL's tokens, once it is known that the reference reads them alike."""
    from slotmoe.model.config import read_config
    from slotmoe.model.tokenizer import Tokenizer
    from slotmoe.offload.runtime import resolve_model
    from slotmoe.offload.study.evaluate import Text, check_same_vocabulary

    folders = [resolve_model(one) for one in (model, reference) if one is not None]
    configs = [read_config(folder / "config.json") for folder in folders]
    tokenizers = [
        Tokenizer(folder, config.bos_token_id)
        for folder, config in zip(folders, configs, strict=True)
    ]
    read = [[Text.read(path, tokenizer) for path in paths] for tokenizer in tokenizers]
    if reference is not None:
        check_same_vocabulary(
            folders[0], folders[1], (configs[0].vocab_size, configs[1].vocab_size), *read
        )
    return read[0]


def _open_reference(reference: str, options: dict[str, Any]) -> Runtime:
    """The reference: a checkpoint as it is, or an export in at most half of the budget."""
    from slotmoe.errors import PlanError
    from slotmoe.offload.machine import available_memory
    from slotmoe.offload.opening import FREE_SHARE
    from slotmoe.offload.plan.memory import parse_size
    from slotmoe.offload.runtime import Runtime, resolve_model
    from slotmoe.offload.study.evaluate import LOGITS_ROWS
    from slotmoe.offload.tiers.device import choose_device
    from slotmoe.quant.export.layout import MANIFEST

    is_export = (resolve_model(reference) / MANIFEST).is_file()
    sizes: dict[str, Any] = {
        name: options[name] and parse_size(options[name]) for name in ("ram", "vram")
    }
    if is_export:
        sizes["ram"] = (sizes["ram"] or int(available_memory() * FREE_SHARE)) // 2
        if (card := choose_device(options["device"])[0]) is not None:
            sizes["vram"] = (sizes["vram"] or int(card.memory().free * FREE_SHARE)) // 2
    chosen = {
        name: options[name] for name in ("device", "context", "threads", "cache_policy", "misses")
    }
    try:
        return Runtime.open(
            reference,
            **sizes,
            **chosen,
            prefetch=not options["no_prefetch"],
            quantize=is_export,
            logits_rows=LOGITS_ROWS,
        )
    except PlanError as problem:
        advice = (
            ""
            if is_export
            else "; or quantize it with --resident bf16 and give that export as the reference"
        )
        raise PlanError(f"the reference {reference} {problem}{advice}") from None


def _left_beside(reference: Runtime, options: dict[str, Any]) -> dict[str, Any]:
    """Budgets for the model beside an open reference, whose plan counts memory that it has not
    touched yet."""
    import psutil

    from slotmoe.offload.machine import available_memory
    from slotmoe.offload.plan.memory import parse_size

    tier = reference.plan.tier
    if tier == "vram":
        return (
            {}
            if options["vram"] is None
            else {"vram": max(1, parse_size(options["vram"]) - reference.plan.total)}
        )
    used = psutil.Process().memory_info().rss
    budget = (
        parse_size(options["ram"])
        if options["ram"] is not None
        else int(available_memory() * 0.9) + used
    )
    return {"ram": max(1, budget - max(0, reference.plan.total - used))}


def _open_beside(
    model: str, options: dict[str, Any], reference: Runtime | None, quiet: bool
) -> Runtime:
    from slotmoe.errors import PlanError
    from slotmoe.offload.plan.memory import format_size
    from slotmoe.offload.study.evaluate import LOGITS_ROWS

    try:
        runtime: Runtime = open_runtime(model, options, quiet, LOGITS_ROWS)
    except PlanError as problem:
        if reference is None:
            raise
        taken = format_size(reference.plan.total)
        raise PlanError(
            f"{model} beside the reference, which takes {taken}, {problem}; or evaluate without --reference"
        ) from None
    return runtime


def _run(
    evaluation: Evaluation, texts: list[Text], windows: list[Any], model: str, quiet: bool
) -> None:
    from slotmoe.tools.progress import byte_progress

    done, total = 0, sum(int(text.ends[-1]) for text in texts)
    with byte_progress(f"Evaluating {model}", quiet) as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        for text, cut in zip(texts, windows, strict=True):
            evaluation.run(text, cut, advance)


def _print(report: dict[str, Any], out: Any) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    compared, console = "kl_divergence" in report, Console(file=out)
    columns = ["text", "tokens", "bytes", "bits/byte", "perplexity"]
    columns += ["ref.", "KL, nats", "same top"] if compared else []
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "text" else "right")
    rows = [(Path(one["file"]).name, one) for one in report["files"]]
    for name, one in [*rows, ("all", report)] if len(rows) > 1 else rows:
        cells = [
            f"{one['tokens']}",
            f"{one['bytes']}",
            f"{one['bits_per_byte']:.4f}",
            f"{one['perplexity']:.3f}",
        ]
        if compared:
            cells += [
                f"{one['reference_bits_per_byte']:.4f}",
                f"{one['kl_divergence']:.5f}",
                f"{one['top1_agreement']:.2%}",
            ]
        table.add_row(_visible(name), *cells)
    console.print(table)
    if report.get("worst_tokens"):
        _print_worst(report["worst_tokens"], console)


def _print_worst(tokens: list[dict[str, Any]], console: Any) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text as Cell

    title = "Where predictions differ most (reference -> model)"
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("KL", "after", "token", "chance", "likeliest"):
        table.add_column(
            column, justify="right" if column in ("KL", "after", "chance") else "left", no_wrap=True
        )
    for one in tokens:
        context, token, wanted, found = (
            _visible(one[key]) for key in ("context", "token", "reference_top", "top")
        )
        chance = f"{one['reference_probability']:.2%} -> {one['probability']:.2%}"
        table.add_row(
            f"{one['kl_divergence']:.3f}",
            Cell(context[-30:]),
            Cell(token),
            chance,
            Cell(f"{wanted} -> {found}"),
        )
    console.print(table)


def _visible(text: str) -> str:
    """Text on one line, with nothing in it that a terminal obeys."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
