"""Options that several commands share: where the model runs and within which budget."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from slotmoe.errors import ConfigError
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.policy import DEFAULT_POLICY, POLICIES
from slotmoe.offload.policy.hybrid import MODES
from slotmoe.tools.progress import byte_bars

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(names: str, metavar: str | None, help: str, **rest: Any) -> Decorator:
    """A click option; ``names`` are separated by spaces."""
    return click.option(*names.split(), metavar=metavar, help=help, **rest)


def flag(names: str, help: str) -> Decorator:
    return click.option(*names.split(), is_flag=True, help=help)


def integer(names: str, help: str, default: int | None = None) -> Decorator:
    return option(names, "N", help, type=int, default=default)


def choice(name: str, values: Sequence[str], default: str, help: str) -> Decorator:
    return click.option(name, type=click.Choice(values), default=default, help=help)


def count(names: str, default: int | None, help: str, least: int = 1) -> Decorator:
    """An option that takes a whole number of at least ``least``."""
    return option(names, "N", help, type=click.IntRange(least), default=default)


JSON = flag("--json as_json", "Print one JSON object.")
_RESIDENT = (
    "Precision of everything but the routed experts. auto is int8; bf16 keeps the source's; "
    "nf4 is the smallest."
)
RESIDENT = choice("--resident", ["auto", "bf16", "int8", "nf4"], "auto", _RESIDENT)
_MISSES = (
    "With a GPU, an expert that is in none of its slots is fetched, computed by the CPU, or either "
    "(hybrid). auto takes what slotmoe bench --calibrate has measured to be fastest, else fetch."
)
_REVISION = "Branch, tag or commit of a model on the hub. [default: main]"
REVISION = option("--revision", "REV", _REVISION)
_RUNTIME: list[Decorator] = [
    REVISION,
    choice("--device", ["auto", "cpu", "cuda"], "auto", "auto takes the GPU when there is one."),
    option("--ram", "SIZE", "RAM for the whole process, like 8GiB. [default: 90% of what is free]"),
    option("--vram", "SIZE", "GPU memory budget, like 20GiB. [default: 90% of what is free]"),
    integer("--context", "Positions of the KV cache. [default: 4096, or the model's limit]"),
    integer("--threads", "CPU threads. [default: physical cores]"),
    integer("--slots", "Keep at most N experts in memory. [default: all that fit the budget]"),
    choice("--cache-policy", list(POLICIES), DEFAULT_POLICY, "Which experts stay in memory."),
    choice("--misses", MODES, "auto", _MISSES),
    flag("--no-prefetch", "Read experts only when a gate has asked for them, never ahead."),
]
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
SAMPLING = ("temperature", "top_p", "top_k", "seed")  # arguments of ``Sampling``
_TRACE_HELP = "Record which experts were used, for later replay."
_TRACE = option("--trace", "FILE", _TRACE_HELP, type=NEW_FILE)
_CHAT = flag("--chat", "Send PROMPT through the model's chat template, as a user's message.")


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> list[Decorator]:
    greedy = "0 is greedy: always the likeliest token."
    likeliest = "Sample from the likeliest tokens that reach this probability."
    return [
        integer("-n --max-new-tokens", "Stop after N tokens.", max_new_tokens),
        option("--temperature", "N", greedy, default=temperature),
        option("--top-p", "N", likeliest, default=top_p),
        integer("--top-k", "Sample from the N likeliest tokens; 0 is all.", 0),
        integer("--seed", "Make sampling repeatable."),
    ]


def _adding(options: list[Decorator]) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


runtime_options = _adding(_RUNTIME)
"""Adds the options that ``open_runtime`` reads."""
generation_options = _adding([*_sampling(128, temperature=0.0, top_p=1.0), _CHAT, _TRACE])
"""Adds the options of a continuation: its length, the sampling, and the kind of its prompt."""
chat_options = _adding([*_sampling(1024, temperature=0.3, top_p=0.95), _TRACE])
"""Adds the options of a chat's answers, with the defaults that DeepSeek gives its chat models."""


def generation_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What ``Runtime.generate`` takes of ``generation_options``, removed from ``options``."""
    return {name: options.pop(name) for name in ("max_new_tokens", *SAMPLING, "chat")}


def require_extra(extra: str, *modules: str) -> None:
    """Raises ``ConfigError``, which says how to install the extra, unless all of its ``modules``
    are installed."""
    missing = ", ".join(name for name in modules if find_spec(name) is None)
    if missing:
        problem = f"this command needs libraries that are not installed ({missing})"
        raise ConfigError(f"{problem}: pip install 'slotmoe[{extra}]'")


def prompt_text(prompt: str) -> str:
    """The prompt, or stdin where it is ``-``.  Raises ``ConfigError``."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise ConfigError("stdin: the prompt is not valid UTF-8 text") from None


def is_on_hub(model: str, revision: str | None) -> bool:
    """Whether ``model`` is a hub id.  A folder of that name comes first, and a line on stderr says
    so.  Raises ``ConfigError``."""
    if not is_hub_id(model) or not Path(model).exists():
        return is_hub_id(model)
    if revision is not None:
        advice = "leave out --revision or call from elsewhere"
        raise ConfigError(f"{model}: is a folder here, which goes before the hub; {advice}")
    if not (Path(model) / "slotmoe.json").exists():
        say(f"{model} is a folder here, so it is not looked up on the hub")
    return False


def say(text: str) -> None:
    """Print a remark of the program on stderr."""
    click.echo(f"slotmoe: {text}", err=True)


def open_runtime(model: str, options: dict[str, Any], quiet: bool = False, **settings: Any) -> Any:
    """A ``Runtime`` for the command line's ``MODEL`` and runtime options, with a progress bar if it
    must quantize.  ``settings`` are more arguments of ``Runtime.open``."""
    from slotmoe.offload.loading import resolve_model
    from slotmoe.offload.runtime import Runtime

    notify: Callable[[str], None] = (lambda text: None) if quiet else say
    on_hub = is_on_hub(model, options["revision"])
    with byte_bars("Downloading", f"Quantizing {model}, once", quiet=quiet) as (arriving, progress):
        reporting = {"progress": progress, "arriving": arriving, "notify": notify} if on_hub else {}
        folder = resolve_model(model, options["revision"], **reporting)
        budgets = {name: options[name] for name in ("ram", "vram", "slots")}
        shared = runtime_arguments(options)
        runtime = Runtime.open(folder, progress=progress, **budgets, **shared, **settings)
    slow = runtime.plan.tier == "ram" and runtime.stats()["kernels"] == "torch"
    if slow and options.get("kernels") != "torch":
        problem = "the native kernels were not built at install (is there a C++ compiler?)"
        say(f"{problem}; torch is several times slower")
    return runtime


def runtime_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What ``Runtime.open`` takes of ``runtime_options``, without budgets."""
    names = ("device", "context", "threads", "cache_policy", "misses")
    shared = {name: options[name] for name in names}
    prefetch, kernels = not options["no_prefetch"], options.get("kernels", "auto")
    return {**shared, "prefetch": prefetch, "kernels": kernels}
