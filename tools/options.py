"""Options that several commands share: where the model runs and within which budget."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import reduce
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from slotmoe.errors import ConfigError, naming
from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.model.sampling import RANGES
from slotmoe.offload.machine import cache_folder, device_index, total_memory
from slotmoe.offload.model_cache import is_model, library, locate
from slotmoe.offload.plan.precision import fitted
from slotmoe.offload.plan.speed import MODES
from slotmoe.offload.policy import DEFAULT, POLICIES, WITHOUT_KERNELS
from slotmoe.offload.policy.passes import DRAFTS
from slotmoe.quant.codecs.codec import DEFAULT_CODEC, EXPERT_CODECS, ExpertCodecs
from slotmoe.quant.shapes import RESIDENT_MODES
from slotmoe.sizes import format_size, parse_size
from slotmoe.tools.screen import HELP_ALL, show

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime
    from slotmoe.offload.sessions.names import NamedSession

Decorator = Callable[[Any], Any]  # adds an option to a command's function
MAX_PROMPT_BYTES = 32 << 20  # of a file or stdin; 163,840 tokens of English are less than 1 MB


def option(names: str, metavar: str | None, help: str, **rest: Any) -> Decorator:
    """A click option; ``names`` are separated by spaces."""
    if metavar == "SIZE" or rest.get("type") is NEW_FILE:
        rest["callback"] = _check_value
    return click.option(*names.split(), metavar=metavar, help=help, **rest)


def _check_value(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse what is no device, no size, or a new file in no folder."""
    if isinstance(value, str):
        (device_index if parameter.name == "device" else parse_size)(value)
    if isinstance(value, Path) and not value.parent.is_dir():
        raise click.BadParameter(f"{value}: its folder is not there")
    return value


def flag(names: str, help: str, **rest: Any) -> Decorator:
    return click.option(*names.split(), is_flag=True, help=help, **rest)


def choice(name: str, values: Sequence[str], default: Any, help: str, **rest: Any) -> Decorator:
    return click.option(name, type=click.Choice(values), default=default, help=help, **rest)


def count(names: str, default: int | None, help: str, least: int = 1, **rest: Any) -> Decorator:
    """An option that takes a whole number of at least ``least``."""
    return option(names, "N", help, type=click.IntRange(least), default=default, **rest)


def completing(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """For the shell's completion: the ``names`` that begin with what was typed."""
    return lambda ctx, parameter, typed: [name for name in names() if name.startswith(typed)]


class Rare(click.Option):
    """An option that ``--help-all`` shows and ``--help`` does not."""


class Command(click.Command):
    """A command that groups its options, and looks for its models before a library is loaded."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.info_name != "plan":  # which knows more names
            for model in filter(None, map(ctx.params.get, ("model", "reference"))):
                locate(model, ctx.params["revision"] if model == ctx.params["model"] else None, say)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in (*_GROUPS, "Options")}
        for parameter in self.get_params(ctx):
            is_shown = HELP_ALL in ctx.meta or not isinstance(parameter, Rare)
            record = parameter.get_help_record(ctx) if is_shown else None
            if record is None or not isinstance(parameter, click.Option):
                continue
            name = str(parameter.name)
            title = next((it for it, names in _GROUPS.items() if name in names.split()), "Options")
            groups[title].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records, col_max=min(30, formatter.width // 2))
        if HELP_ALL not in ctx.meta:
            formatter.write(f"\nRarer options: slotmoe {ctx.info_name} {HELP_ALL}\n")


_GROUPS = {  # title -> the parameters' names
    "Text": (
        "file text chat system max_new_tokens temperature top_p top_k min_p repetition_penalty "
        "seed stop"
    ),
    "Sessions on disk": "session resume session_dir session_limit",
    "Where it runs, and in how much memory": (
        "device ram vram context threads slots cache_policy misses no_prefetch draft kernels "
        "experts_dirs"
    ),
}
JSON = flag("--json as_json", "Print one JSON object.")
VERBOSE = flag("--verbose", "Say more on stderr: device, prefill, expert cache, disk.")
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)


def _adding(*options: Decorator) -> Decorator:
    return lambda function: reduce(lambda it, add: add(it), reversed(options), function)


_RESIDENT = (
    "Precision of everything but the routed experts. auto is int8; bf16 keeps the source's; int6, "
    "int5 and mixed have 6, 5 and 4 bits where they cost little, else int8; nf4 is smaller and far "
    "less exact."
)
_CODEC = (
    "Codes of routed experts: lut has learned levels and a scale for each 32 weights of a row, nf4 "
    f"is bitsandbytes' with one for each 64. [default: {DEFAULT_CODEC}]"
)
_BITS = (
    "Bits of a routed expert's codes, to which scales add a quarter, or an eighth to 2; halves "
    "have one more for down than for gate and up; nf4 has 4 only. [default: 4]"
)
_FIT = "Choose the bits of each kind of tensor that lose least in an export of this size."
_KL = "Choose them to lose at most so many nats a token in the fewest bytes."
_FOR_GPU = "With --fit or --kl: only codes that the kernels for GPUs multiply."
codec_options = _adding(
    choice("--codec", ["lut", "nf4"], None, _CODEC),
    choice("--bits", [bits for codec, bits in EXPERT_CODECS if codec == "lut"], None, _BITS),
)
_KEEP_MTP = "Keep the head that predicts one token more (a layer and experts), for --draft mtp."
KEEP_MTP = flag("--keep-mtp", _KEEP_MTP)


def expert_codecs(given: Json) -> ExpertCodecs | None:
    """What ``codec_options`` say, removed from ``given``, if anything.  Raises ``ConfigError``."""
    codec, bits = given.pop("codec"), given.pop("bits")
    if codec is None and bits is None:
        return None
    codecs = EXPERT_CODECS.get((codec or "lut", bits or "4"))
    if codecs is None:
        raise ConfigError(f"--codec {codec} has no {bits} bits: give --codec lut, or --bits 4")
    return codecs


FITTING = ("fit", "kl", "for_gpu")  # without which ``precision`` is as asked
precision_options = _adding(
    choice("--resident", ["auto", *RESIDENT_MODES], "auto", _RESIDENT),
    codec_options,
    option("--fit", "SIZE", _FIT),
    option("--kl", "NATS", _KL, type=click.FloatRange(0, min_open=True)),
    flag("--for-gpu", _FOR_GPU, cls=Rare),
)


def precision(given: Json, config: Config, texts: Sequence[Path] = (), quiet: bool = False) -> Json:
    """``resident`` and ``codecs`` that ``FITTING``, which go from ``given``, choose of a model,
    which is shown unless ``quiet``; else as they are there.  Raises ``ConfigError``."""
    how = {name: given[name] for name in ("resident", "codecs")}
    size, loss, triton = map(given.pop, FITTING)
    if size is None and loss is None:
        return how
    if how["resident"] != "auto" or None not in (size, loss):
        raise ConfigError("--fit, --kl and --resident are three ways to choose bits: give one")
    goal = {"size": parse_size(size)} if size else {"loss": loss}
    fit = fitted(config, **goal, codecs=how["codecs"], calibrated=bool(texts), triton=triton)
    if not quiet:
        from slotmoe.tools.tables import Console, fit_table  # rich

        Console(stderr=True).print(fit_table(config, fit))
    return {"resident": fit.resident, "codecs": fit.codecs}


REVISION = option("--revision", "REV", "Branch, tag, commit on the hub. [default: main]", cls=Rare)
_DEVICE = "auto takes the GPU when there is one; of several, cuda:N that number in CUDA's order."
_MISSES = (
    "With a GPU, an expert that is in none of its slots is fetched, computed by the CPU, or either "
    "(hybrid). auto takes what is fastest by bandwidths that the first opening measures."
)
_EXPERTS_DIR = "Read from this copy of an export's experts, on another drive, too; repeatable."
_SLOTS = "Keep at most N experts in memory. [default: all that fit the budget]"
_DRAFT = (
    "Tokens that may come next are computed with those that do, as many as pay; the text is the "
    "same to the bit. ngram drafts what followed earlier in the text, mtp what the head expects "
    "that quantize --keep-mtp has kept; auto is ngram on a CPU with native kernels, else off."
)
_MTP = "mtp counts the head that predicts one token more, as quantize --keep-mtp keeps it."
_NAMED = {"callback": _check_value, "shell_complete": completing(lambda: ("auto", "cpu", "cuda"))}
_PLANNED = (
    REVISION,
    option("--device", "auto|cpu|cuda|vulkan[:N]", _DEVICE, default="auto", **_NAMED),
    option("--ram", "SIZE", "RAM for the whole process, like 8GiB. [default: 90% of what is free]"),
    option("--vram", "SIZE", "GPU memory budget, like 20GiB. [default: 90% of what is free]"),
    count("--context", None, "Positions of the KV cache. [default: 4096, or the model's limit]"),
    count("--threads", None, "CPU threads. [default: the physical cores it may use]", cls=Rare),
    count("--slots", None, _SLOTS, cls=Rare),
    choice("--misses", MODES, "auto", _MISSES, cls=Rare),
    option("--experts-dir experts_dirs", "DIR", _EXPERTS_DIR, multiple=True, cls=Rare),
    flag("--no-prefetch", "Read experts only when a gate has asked, never ahead.", cls=Rare),
)
# What ``slotmoe plan`` reckons with.
plan_options = _adding(*_PLANNED, choice("--draft", ["off", "mtp"], "off", _MTP, cls=Rare))
# What ``open_runtime`` reads of any command; then what acts where tokens are decoded, and chosen.
_STAY = f"Which experts stay. [default: {DEFAULT}, {WITHOUT_KERNELS} without native kernels]"
_POLICY = choice("--cache-policy", [*POLICIES], None, _STAY, cls=Rare)
open_options = _adding(*_PLANNED, _POLICY)
runtime_options = _adding(open_options, choice("--draft", DRAFTS, "auto", _DRAFT, cls=Rare))


def runtime_arguments(given: Json) -> Json:
    """What ``Runtime.open`` takes of ``runtime_options`` for any model, without budgets."""
    names = ("device", "context", "threads", "cache_policy", "misses")
    arguments = {"prefetch": not given["no_prefetch"], "kernels": given.get("kernels", "auto")}
    return arguments | {name: given[name] for name in names}


_GREEDY = "0 is greedy: always the likeliest token."
_MODELS = "[default: the model's own]"
_LIKELIEST = "Sample from the likeliest tokens that reach this probability."
_TOP_K = f"Sample from the N likeliest tokens; 0 is all. {_MODELS}"
_MIN_P = f"Drop tokens less likely than N times the likeliest. {_MODELS}"
_REPETITION = f"Divide the logits of tokens that are there already; 1 is off. {_MODELS}"


def setting(name: str, help: str, **rest: Any) -> Decorator:
    """An option of sampling, in the range that ``Sampling`` has."""
    least, most, is_open = RANGES[name]
    if name in ("top_k", "seed"):
        kind: Any = click.IntRange(int(least), None if most == inf else int(most))
    else:
        kind = click.FloatRange(least, most, min_open=is_open)
    return option(f"--{name.replace('_', '-')}", "N", help, type=kind, **rest)


_SAMPLING = {
    "temperature": setting("temperature", f"{_GREEDY} {_MODELS}"),
    "top_p": setting("top_p", f"{_LIKELIEST} {_MODELS}"),
    "top_k": setting("top_k", _TOP_K, cls=Rare),
    "min_p": setting("min_p", _MIN_P, cls=Rare),
    "repetition_penalty": setting("repetition_penalty", _REPETITION, cls=Rare),
    "seed": setting("seed", "Make sampling repeatable."),
}
SAMPLING = tuple(_SAMPLING)  # arguments of ``Runtime.generate``
OWN = tuple(name for name in SAMPLING if name != "seed")  # settings that a model has its own of
SYSTEM = option("--system", "TEXT", "How the model should behave; with slotmoe run it sets --chat.")
_CHAT = flag("--chat", "Send PROMPT through the model's chat template, as a user's message.")
_TRACE = option(
    "--trace", "FILE", "Record the experts used (docs/benchmarks.md).", type=NEW_FILE, cls=Rare
)
_NEW_TOKENS = 128  # of a continuation; a chat's answer ends by itself
_STOP = "Stop after N tokens."
_STOP_OR_END = f"{_STOP} [default: {_NEW_TOKENS}; with --chat the answer's end]"


def _text_options(length: int | None, help: str, *others: Decorator, **own: Decorator) -> Decorator:
    sampling = ((_SAMPLING | own)[name] for name in SAMPLING)
    stop = option("--stop", "TEXT", "End before this text; may be repeated.", multiple=True)
    return _adding(count("-n --max-new-tokens", length, help), *sampling, stop, *others)


_GREEDILY = {"temperature": setting("temperature", _GREEDY, default=0.0)}
# Of continuations, measurements (whose length no model decides), chats, and a server's defaults.
generation_options = _text_options(None, _STOP_OR_END, _CHAT, _TRACE, **_GREEDILY)
workload_options = _text_options(_NEW_TOKENS, _STOP, _CHAT, _TRACE, **_GREEDILY)
chat_options = _text_options(1024, _STOP, _TRACE)
sampling_options = _adding(*(_SAMPLING[name] for name in OWN))
_SESSION = (
    "Keep this text or conversation on disk under a name, and go on with what is there; its "
    "messages and what the model computed of them can be read by this user."
)
_SESSION_DIR = "Folder of the sessions. [default: $SLOTMOE_CACHE/sessions]"
_SESSION_LIMIT = "Most bytes of latents there; what was unused for longest goes first."
_SESSIONS: Json = {"default": lambda: cache_folder() / "sessions", "show_default": False}
SESSION_DIR = option("--session-dir", "DIR", _SESSION_DIR, type=Path, cls=Rare, **_SESSIONS)
SESSION_LIMIT = option("--session-limit", "SIZE", _SESSION_LIMIT, default="8GiB", cls=Rare)
# What ``open_session`` reads.
session_options = _adding(option("--session", "NAME", _SESSION), SESSION_DIR, SESSION_LIMIT)
# For ``prompt_text``, which asks for it unless there is a file, or something on stdin.
PROMPT = click.argument("prompt", metavar="PROMPT", required=False)


def generation_arguments(given: Json) -> Json:
    """What ``Runtime.generate`` takes of ``generation_options``, removed from ``given``."""
    arguments = {name: given.pop(name) for name in ("max_new_tokens", *SAMPLING, "stop", "chat")}
    if arguments["max_new_tokens"] is None and not arguments["chat"]:
        arguments["max_new_tokens"] = _NEW_TOKENS
    return arguments


def prompt_text(prompt: str | None, file: Path | None = None) -> str:
    """The prompt, ``file``'s text, or stdin for ``-`` and where something is piped in.  Raises
    ``UsageError``, ``ConfigError``."""
    ctx = click.get_current_context()
    if prompt is not None and file is not None:
        raise click.UsageError("PROMPT and --file are both given: choose one", ctx)
    if prompt is not None and prompt != "-":
        return prompt
    missing = prompt is None and file is None
    if not (missing and sys.stdin.isatty()):
        opened = nullcontext(sys.stdin.buffer) if file is None else open(file, "rb")
        with naming(file or "stdin"), opened as source:
            text = decoded(source.read(MAX_PROMPT_BYTES + 1), f"{file or 'stdin'}: the prompt")
        if text or not missing:
            return text
    raise click.UsageError("Missing argument 'PROMPT'.", ctx)


def decoded(data: bytes, what: str) -> str:
    """UTF-8 text.  Raises ``ConfigError``, also for more than ``MAX_PROMPT_BYTES``."""
    if len(data) > MAX_PROMPT_BYTES:
        most = f"{MAX_PROMPT_BYTES >> 20} MiB; no context holds that, shorten it"
        raise ConfigError(f"{what} has more than {most}")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not valid UTF-8 text") from None


def model_names(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Completes MODEL: sample, exports by name, models by path, and folders that may hold some."""
    from slotmoe.offload.plan.advice import GEOMETRIES

    names = dict.fromkeys(GEOMETRIES if ctx.info_name == "plan" else ["sample"]) | library()
    found = {name: CompletionItem(name) for name in names if name.startswith(typed)}
    folder, _, begin = typed.rpartition("/")
    with suppress(OSError):
        for path in sorted(Path(folder or ("/" if typed[:1] == "/" else ".")).iterdir()):
            if path.name.startswith(begin) and is_model(path):
                name = f"{typed.removesuffix(begin)}{path.name}"
                found[name] = CompletionItem(name)
    return [*found.values()] or [CompletionItem(typed, type="dir")]


MODEL = click.argument("model", metavar="MODEL", shell_complete=model_names)


def open_runtime(model: str, given: Json, quiet: bool = False, **settings: int) -> "Runtime":
    """A ``Runtime`` for the command line's ``MODEL`` and runtime options, with a progress bar if it
    must quantize.  ``settings`` are more arguments of ``Runtime.open``."""
    notify = notifier(quiet)
    if given["ram"] is not None and parse_size(given["ram"]) > (total := total_memory()):
        # The rest of the plan may still fit.
        notify(f"--ram {given['ram']} is more than this machine has ({format_size(total)})")
    from slotmoe.tools.tables import byte_bars  # rich: commands without a bar start without it

    texts = "Downloading", f"Reading {model}, once", f"Quantizing {model}, once"
    with byte_bars(*texts, quiet=quiet, waiting=f"loading {model}…") as (arriving, reading, making):
        from slotmoe.offload.runtime import Runtime  # takes a second: torch

        told: Json = {"progress": making, "reading": reading, "arriving": arriving}
        names = "ram", "vram", "slots", "draft", "experts_dirs", "revision"
        arguments = {name: given[name] for name in names if name in given}
        arguments |= runtime_arguments(given) | settings
        runtime = Runtime.open(model, notify=notify, **told, **arguments)
    slow = runtime.plan.tier == "ram" and runtime.stats()["kernels"] == "torch"
    if slow and given.get("kernels") != "torch":
        problem = "the native kernels were not built at install (is there a C++ compiler?)"
        say(f"{problem}; torch is up to 200 times slower. slotmoe doctor says what is missing")
    return runtime


@contextmanager
def open_session(given: Json, kind: str) -> "Iterator[NamedSession | None]":
    """The session that ``session_options`` name, new or of the ``kind``, this process's alone
    meanwhile; None where they name none.  Raises ``ConfigError`` or ``PlanError``."""
    folder, name = given["session_dir"], given["session"]
    if name is None and not given.get("resume"):
        yield None
        return
    from slotmoe.offload.sessions.names import NamedSession, listing

    if given.get("resume"):
        if name is not None:
            raise ConfigError("--resume takes the latest session; leave it out to take --session")
        chats = [it.name for it in listing(folder) if it.saved and it.saved.kind == "chat"]
        if not chats:
            raise ConfigError(f"{folder}: holds no conversation to resume; begin with --session")
        name = chats[0]
    with NamedSession(folder, name) as session:
        if session.saved is not None and session.saved.kind != kind:
            advice = "slotmoe run goes on with texts, with --chat and in slotmoe chat with chats"
            raise ConfigError(f"session {name}: is a {session.saved.kind}; {advice}")
        yield session


def go_on(
    session: "NamedSession | None", runtime: "Runtime", limit: str, notify: Callable[[str], None]
) -> None:
    """Let the runtime keep its texts where the session is, if any, within ``limit``, and say so."""
    if session is None:
        return
    runtime.keep_in(session.folder, limit, notify)
    assert runtime.sessions is not None
    remark = f"new, kept in {session.folder}"
    if session.saved is not None:
        remark = f"{len(session.saved.tokens):,} tokens"
        if session.saved.root != runtime.sessions.root():
            remark += " of another model or version, so its text is read anew"
    notify(f"session {session.name}: {remark}")


def say(*lines: str) -> None:
    """Print a remark of the program on stderr."""
    show(f"slotmoe: {lines[0]}", *lines[1:], err=True)


def notifier(quiet: bool) -> Callable[[str], None]:
    """``say``, or what says nothing."""
    return (lambda text: None) if quiet else say


def libraries(extra: str) -> dict[str, bool]:
    """Those of an extra of this package, and whether each is there."""
    from importlib import metadata  # takes a while

    told = re.compile(rf"([\w.-]+)[^;]*; extra == ['\"]{extra}['\"]$")
    found = filter(None, map(told.match, metadata.requires("slotmoe") or ()))
    return {match[1]: find_spec(match[1]) is not None for match in found}


def require_extra(extra: str) -> None:
    """Raises ``ConfigError``, with how to install the extra, if one of its libraries is missing."""
    missing = ", ".join(name for name, is_there in libraries(extra).items() if not is_there)
    if missing:
        problem = f"this command needs libraries that are not installed ({missing})"
        raise ConfigError(f"{problem}: pip install 'slotmoe[{extra}]'")
