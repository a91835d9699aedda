"""The commands of ``slotmoe``.  They are imported when they are called, so help is instant."""

import contextlib
import importlib
import io
import os
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from typing import NoReturn

import click

from slotmoe import __version__, system
from slotmoe.errors import ConfigError, DeviceError, DownloadError, SlotmoeError
from slotmoe.tools.screen import HELP_ALL, guard_streams, show

_COMMANDS = {
    "run": "Continue a prompt with a model, streaming the text.",
    "chat": "Talk to a model, with history, commands and formatted answers.",
    "serve": "Serve a model over HTTP: OpenAI's, Anthropic's and Ollama's APIs, and a page.",
    "launch": "Start Claude Code or Codex with a model that is served for it.",
    "quantize": "Turn a checkpoint into a 4-bit export that loads fast.",
    "verify": "Check every checksum of an export.",
    "synth": "Write an export of a real geometry with random weights.",
    "plan": "Say whether a model fits, what goes where, and how fast it will be.",
    "bench": "Measure prefill and decode speed beside the machine's ceiling.",
    "eval": "Score text: bits per byte, perplexity, and divergence from a reference.",
    "profile": "Report where a run's memory and time go: charts, HTML, JSON.",
    "list": "Show the exports in the cache folder: their sizes, and when they were used.",
    "rm": "Remove exports from the cache folder.",
    "doctor": "Say what this machine has, what is missing, and how to get it.",
}
_MODULES = {"launch": "serve"}  # of commands whose module has another name
_ELSEWHERE = {  # options of llama.cpp, Ollama and vLLM -> those of slotmoe
    **dict.fromkeys(("-c", "--ctx-size", "--num-ctx", "--max-model-len"), "--context"),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-memory-utilization"), "--vram"),
    **dict.fromkeys(("--n-predict", "--num-predict", "--max-tokens"), "--max-new-tokens"),
    "-t": "--threads",
}
_START = """\
Run DeepSeek-V2 models that are far larger than your GPU's memory, or your RAM.

\b
Now, with the bundled sample model and without a download:
  slotmoe run sample "It is a truth universally acknowledged, that" --temperature 0.7

\b
Then a real model, from the hub or a folder in Hugging Face's format:
  slotmoe doctor                         what this machine has, and what is missing
  slotmoe plan v2-lite                   will it fit, and how fast will it be?
  slotmoe run deepseek-ai/DeepSeek-V2-Lite-Chat --chat "Why is the sky blue?"
  slotmoe chat DeepSeek-V2-Lite-Chat
"""  # click leaves lines as they are behind \b
_MORE = "\nslotmoe --help lists all commands, slotmoe COMMAND --help has examples."


class LazyGroup(click.Group):
    """Imports a command from the module of its name when it is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if HELP_ALL in args:
            ctx.meta[HELP_ALL] = True
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, ["--help" if arg == HELP_ALL else arg for arg in args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"slotmoe.tools.{_MODULES.get(cmd_name, cmd_name)}")
        commands = [it for it in vars(module).values() if isinstance(it, click.Command)]
        return next(command for command in commands if command.name == cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name, _COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "slotmoe --help lists them"
            raise click.UsageError(f"there is no command {name!r:.60}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
_SETTINGS["auto_envvar_prefix"] = "SLOTMOE"  # SLOTMOE_CHAT_RAM is chat's --ram
if (width := get_terminal_size().columns) < 52:  # click would write 50 columns
    _SETTINGS["terminal_width"] = width


@click.group(
    "slotmoe", cls=LazyGroup, help=_START, context_settings=_SETTINGS, invoke_without_command=True
)
@click.version_option(__version__, "-V", "--version", prog_name="slotmoe")
@click.option("--traceback", is_flag=True, help="Show where an internal error comes from.")
@click.pass_context
def cli(ctx: click.Context, traceback: bool) -> None:
    ctx.ensure_object(dict)["traceback"] = traceback
    if ctx.invoked_subcommand is None:
        click.echo(_START.replace("\b\n", "") + _MORE)


def main(arguments: list[str] | None = None, group: click.Group = cli) -> NoReturn:
    """Exit codes: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted."""
    _open_streams()
    state = dict[str, object]()
    try:
        try:
            os.getcwd()
        except FileNotFoundError:  # where MKL, for one, would end the process
            raise ConfigError("the folder that this runs in was removed; cd to another") from None
        code = group.main(arguments, prog_name=group.name, standalone_mode=False, obj=state)
        sys.stdout.flush()  # or Python fails to, when no handler is left
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as problem:
        _meant(problem, arguments or sys.argv[1:]).show()
        sys.exit(2)
    except (Exception, KeyboardInterrupt) as problem:
        line, code = _ending(problem, bool(state.get("traceback")))
        show(f"slotmoe: {line}", err=True)
        sys.exit(code)


def _meant(problem: click.ClickException, words: list[str]) -> click.ClickException:
    """The same with the option that is meant: one that begins so, or is called so elsewhere."""
    option = getattr(problem, "option_name", None)
    if isinstance(problem, click.BadParameter):  # click takes -ngl for -n gl
        option = next((word for word in words if word in _ELSEWHERE and word[:2] == "-n"), None)
    ctx = getattr(problem, "ctx", None)
    if option is None or ctx is None:
        return problem
    known = [name for parameter in ctx.command.params for name in parameter.opts]
    meant = [name for name in known if name.startswith(option) and len(option) > 3]
    meant += [name for name in [_ELSEWHERE.get(option)] if name in known]
    said = f"No such option: {option}; did you mean {' or '.join(meant)}?"
    return click.UsageError(said, ctx) if meant else problem


def _ending(problem: BaseException, is_traced: bool) -> tuple[str, int]:
    """What a user is told of an error, and the exit code.  If it ``is_traced``, a fault of the
    program's has its traceback printed: nobody else wants that."""
    text = str(problem)
    match problem:
        case DownloadError() | DeviceError():
            return text, 1
        case SlotmoeError():
            return text, 2
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", 130  # click has ended the line
        case OSError():
            # Python would fail once more to write what stdout still holds.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if problem.args == system.NO_READER and problem.filename is None:
                sys.exit(1)  # as click does elsewhere
            return f"{problem.filename or 'stdin or stdout'}: {problem.strerror or problem}", 1
        case ImportError():  # of a library that the system can't map, say
            advice = "memory is short, or the installation incomplete"
            return f"can't load what it needs ({SlotmoeError(text[:400])}): {advice}", 1
    if isinstance(problem, MemoryError) or "can't allocate memory" in text:  # as torch says it
        return "out of memory; end other programs, or lower --ram", 1
    if "can't start new thread" in text:  # as Python says it
        return "out of threads; lower --threads, or raise the limit (ulimit -u)", 1
    if is_traced:
        traceback.print_exc()
    text = f"{type(problem).__name__}: {SlotmoeError(text[:400])}"  # without what a terminal obeys
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    advice = "slotmoe --traceback COMMAND shows where; please report it"
    return f"internal error ({text}; {place}); {advice}", 1


def _open_streams() -> None:
    """Give what was closed a place to go, and characters that stdout can't show a spelling.

    A file that is opened later would else get a closed stream's number, and its writing."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    guard_streams()
