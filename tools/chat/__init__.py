"""``slotmoe chat``: a conversation with a model, on a terminal or through pipes."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.offload.machine import cache_folder
from slotmoe.system import terminal_mode
from slotmoe.tools import options
from slotmoe.tools.options import MAX_PROMPT_BYTES, open_runtime, open_session

if TYPE_CHECKING:
    from slotmoe.tools.chat.conversation import Dialogue
    from slotmoe.tools.chat.terminal import Terminal

COMMANDS = {
    "/reset": "begin anew; the system message stays",
    "/system [TEXT]": "show, or set, how the model should behave; 'off' removes it",
    "/regenerate": "another answer to your last message (needs a temperature above 0 to differ)",
    "/stats": "speed, expert cache, disk, memory and context",
    "/help": "this list",
    "/exit": "leave, as does Ctrl-D",
}
KEYS = """\
Enter sends, Alt-Enter or Ctrl-J begins a new line. Ctrl-C stops an answer, or drops what was typed.
Up and down walk through what was typed earlier, Ctrl-R searches it, Ctrl-X Ctrl-E opens an editor.
A message that starts with a slash is sent with two."""


class Pipe:
    """A ``Terminal`` of lines: stdin to stdout, the rest to stderr; what fails ends the chat."""

    _lines = 0

    def read(self) -> str | None:
        """The next message or command; None at the end."""
        while line := sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1):
            self._lines += 1
            if text := options.decoded(line, f"stdin: line {self._lines}").strip():
                return text
        return None

    def show(self, answer: Iterator[str]) -> None:
        """Print the answer to what was read last, as it comes."""
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)

    def think(self, text: str) -> None:
        """Print reasoning."""
        print(text, end="", flush=True, file=sys.stderr)

    say = staticmethod(options.say)
    talking = nullcontext

    def fail(self, problem: BaseException) -> None:
        """What was read last could not be done, or was interrupted."""
        raise problem


Frontend: TypeAlias = "Pipe | Terminal"


@click.command(name="chat", cls=options.Command)
@options.MODEL
@options.SYSTEM
@options.chat_options
@options.session_options
@options.flag("--resume", "Go on with the conversation that was kept last.")
@options.runtime_options
def command(
    model: str, system: str | None, max_new_tokens: int, trace: Path | None, **given: Any
) -> None:
    """Talk to MODEL, which is what it is for slotmoe run; its tokenizer must have a chat template.

    /help lists the commands.  Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves.
    A model's reasoning is shown dimmed, on stderr without a terminal, and is not kept.
    When the context is full, the oldest exchanges are no longer seen by the model; the system
    message stays.  What was typed is kept in $SLOTMOE_CACHE/chat_history (default
    ~/.cache/slotmoe).  With --session the conversation is kept on disk too, and goes on where it
    ended without being read again; see docs/sessions.md.

    Without a terminal each line of stdin is one message or command; answers go to stdout,
    everything else to stderr, and a line that fails ends it.

    \b
    Examples:
      slotmoe chat sample
      slotmoe chat lite --ram 6GiB --context 16384 --system "Answer in one sentence."
      slotmoe chat lite --session plans
      slotmoe chat lite --resume
      printf '%s\\n' "Why is the sky blue?" /stats | slotmoe chat lite --seed 1
    """
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        options.require_extra("chat")
    loading = ExitStack()
    if on_terminal:
        loading.callback(terminal_mode(echo=False))
    with loading, open_session(given, "chat") as session, open_runtime(model, given) as runtime:
        from slotmoe.tools.chat.conversation import Dialogue  # takes a second: torch

        runtime.warm(wait=False)
        sampling = runtime.sampling.with_given(**{name: given[name] for name in options.SAMPLING})
        conversation = Dialogue(
            runtime, max_new_tokens, sampling, system=system, session=session, stop=given["stop"]
        )
        if trace is not None:
            runtime.trace(trace)
        frontend: Frontend = Pipe()
        if on_terminal:
            from slotmoe.tools.chat.terminal import Terminal

            names = [usage.split()[0] for usage in COMMANDS]
            frontend = Terminal(cache_folder() / "chat_history", names, conversation.status)
            context = f"{runtime.context:,} tokens of context"
            frontend.say(f"{model}, {context}. /help lists the commands, Ctrl-D leaves.")
        options.go_on(session, runtime, given["session_limit"], frontend.say)
        loading.close()  # the first prompt has what was typed
        with frontend.talking():
            talk(conversation, frontend)


def talk(conversation: "Dialogue", frontend: Frontend) -> None:
    """Answer messages and do commands until there are no more, or one says to leave."""
    conversation.notify, conversation.think = frontend.say, frontend.think
    while (line := frontend.read()) is not None:
        try:
            if not line.startswith("/") or line.startswith("//"):
                frontend.show(conversation.answer(line.removeprefix("/")))
            elif line.split()[0] in ("/exit", "/quit"):
                return
            else:
                _perform(conversation, frontend, *line.split(maxsplit=1))
        except (SlotmoeError, OSError, KeyboardInterrupt) as problem:
            frontend.fail(problem)


def _perform(conversation: "Dialogue", frontend: Frontend, command: str, rest: str = "") -> None:
    """Do a command.  Raises ``ConfigError``."""
    argument = rest.strip()
    if command == "/reset":
        conversation.reset()
        frontend.say("a new conversation")
    elif command == "/system":
        if argument:
            conversation.set_system(None if argument == "off" else argument)
        text = conversation.system
        said = "there is no system message" if text is None else f"system message: {text}"
        frontend.say(*said.split("\n"))
    elif command == "/regenerate":
        frontend.show(conversation.regenerate())
    elif command == "/stats":
        from slotmoe.tools.run import summary

        total = len(conversation.exchanges)
        frontend.say(f"latest answer: {conversation.status()}")
        frontend.say(f"since the start: {summary(conversation.runtime.stats())}")
        frontend.say(f"{total - conversation.forgotten} of {total} exchanges are seen by the model")
    elif command == "/help":
        width = max(map(len, COMMANDS))
        frontend.say(*(f"{u:{width}}  {text}" for u, text in COMMANDS.items()), *KEYS.split("\n"))
    else:
        advice = "/help lists them, and a message that starts with a slash is sent with //"
        raise ConfigError(f"{command}: no such command; {advice}")
