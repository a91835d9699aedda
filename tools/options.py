"""Options that several commands share: where the model runs and within which budget."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ConfigError
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.policy.cache import DEFAULT_POLICY, POLICIES
from slotmoe.offload.policy.hybrid import MODES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

REVISION = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a model on the hub. [default: main]"
)
_RUNTIME = [
    REVISION,
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        help="auto takes the GPU when there is one.",
    ),
    click.option(
        "--ram",
        metavar="SIZE",
        help="RAM budget for the whole process, like 8GiB. [default: 90% of what is free]",
    ),
    click.option(
        "--vram",
        metavar="SIZE",
        help="GPU memory budget, like 20GiB. [default: 90% of what is free]",
    ),
    click.option(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="Positions of the KV cache. [default: 4096, or the model's limit]",
    ),
    click.option("--threads", type=int, metavar="N", help="CPU threads. [default: physical cores]"),
    click.option(
        "--slots",
        type=int,
        metavar="N",
        help="Keep at most N experts in memory. [default: all that fit the budget]",
    ),
    click.option(
        "--cache-policy",
        type=click.Choice(list(POLICIES)),
        default=DEFAULT_POLICY,
        show_default=True,
        help="Which experts stay in memory.",
    ),
    click.option(
        "--misses",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="With a GPU, an expert that is in none of its slots is fetched, computed by the CPU, or either (hybrid). auto takes what "
        "slotmoe bench --calibrate has measured to be fastest, else fetch.",
    ),
    click.option(
        "--no-prefetch",
        is_flag=True,
        help="Read experts only when a gate has asked for them, never ahead.",
    ),
]


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> list[Decorator]:
    return [
        click.option(
            "-n",
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            show_default=True,
            metavar="N",
            help="Stop after N tokens.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=temperature,
            show_default=True,
            help="0 is greedy: always the likeliest token.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=top_p,
            show_default=True,
            help="Sample from the likeliest tokens that reach this probability.",
        ),
        click.option(
            "--top-k",
            type=int,
            default=0,
            metavar="N",
            help="Sample from the N likeliest tokens. [default: 0, all]",
        ),
        click.option("--seed", type=int, metavar="N", help="Make sampling repeatable."),
    ]


_TRACE = click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Record which experts were used, for later replay.",
)
_GENERATION: list[Decorator] = [
    *_sampling(max_new_tokens=128, temperature=0.0, top_p=1.0),
    click.option(
        "--chat",
        is_flag=True,
        help="Send PROMPT through the model's chat template, as a user's message.",
    ),
    _TRACE,
]
_CHAT: list[Decorator] = [*_sampling(max_new_tokens=1024, temperature=0.3, top_p=0.95), _TRACE]


def generation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of what is generated: how long, by which sampling, from which kind of
    prompt."""
    for option in reversed(_GENERATION):
        function = option(function)
    return function


def chat_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of how a chat's answers are generated; the defaults are those that DeepSeek
    gives its chat models."""
    for option in reversed(_CHAT):
        function = option(function)
    return function


def require_extra(extra: str, *modules: str) -> None:
    """Raises ``ConfigError``, which says how to install the extra, unless all of its ``modules``
    are installed."""
    missing = ", ".join(name for name in modules if importlib.util.find_spec(name) is None)
    if missing:
        raise ConfigError(
            f"this command needs libraries that are not installed ({missing}): "
            f"pip install 'slotmoe[{extra}]'"
        )


def prompt_text(prompt: str) -> str:
    """The prompt of the command line: itself, or stdin where it is ``-``.  Raises
    ``ConfigError``."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise ConfigError("stdin: the prompt is not valid UTF-8 text") from None


def runtime_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that ``open_runtime`` reads."""
    for option in reversed(_RUNTIME):
        function = option(function)
    return function


def is_on_hub(model: str, revision: str | None) -> bool:
    """Whether ``model`` is a hub id; a folder of that name goes first, and is said to.  Raises
    ``ConfigError``."""
    if not is_hub_id(model) or not Path(model).exists():
        return is_hub_id(model)
    if revision is not None:
        raise ConfigError(
            f"{model}: is a folder here, which goes before the hub; leave out --revision or call from elsewhere"
        )
    if not (Path(model) / "slotmoe.json").exists():
        click.echo(
            f"slotmoe: {model} is a folder here, so it is not looked up on the hub", err=True
        )
    return False


def open_runtime(
    model: str,
    options: dict[str, Any],
    quiet: bool = False,
    logits_rows: int = 1,
    sequences: int = 1,
) -> Any:
    """A ``Runtime`` for the command line's ``MODEL`` and runtime options, with a progress bar if it
    must quantize."""
    from slotmoe.model.config import read_config
    from slotmoe.offload.runtime import Runtime, resolve_model
    from slotmoe.tools.progress import byte_bars

    def notify(text: str) -> None:
        if not quiet:
            click.echo(f"slotmoe: {text}", err=True)

    on_hub = is_on_hub(model, options["revision"])
    with byte_bars("Downloading", f"Quantizing {model}, once", quiet=quiet) as (arriving, progress):
        reporting = {"progress": progress, "arriving": arriving, "notify": notify} if on_hub else {}
        folder = resolve_model(model, options["revision"], **reporting)
        context = options["context"]
        source = click.get_current_context().get_parameter_source("context")
        if source == click.core.ParameterSource.DEFAULT:
            context = min(context, read_config(folder / "config.json").max_position_embeddings)
        runtime = Runtime.open(
            folder,
            device=options["device"],
            vram=options["vram"],
            ram=options["ram"],
            context=context,
            threads=options["threads"],
            cache_policy=options["cache_policy"],
            prefetch=not options["no_prefetch"],
            slots=options["slots"],
            kernels=options.get("kernels", "auto"),
            logits_rows=logits_rows,
            sequences=sequences,
            progress=progress,
            misses=options["misses"],
        )
    if (
        runtime.plan.tier == "ram"
        and runtime.stats()["kernels"] == "torch"
        and options.get("kernels") != "torch"
    ):
        click.echo(
            "slotmoe: the native kernels were not built at install (is there a C++ compiler?); torch is several times slower",
            err=True,
        )
    return runtime
