"""``slotmoe chat``: a conversation with a model, on a terminal or through pipes."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from slotmoe.errors import ConfigError, SlotmoeError
from slotmoe.tools.options import chat_options, open_runtime, runtime_options

if TYPE_CHECKING:
    from slotmoe.tools.chat.conversation import Conversation

COMMANDS = {
    "/reset": "begin anew; the system message stays",
    "/system [TEXT]": "say, or set, how the model should behave; 'off' removes it",
    "/save [FILE]": "write the conversation as JSON; without FILE to where it was saved or loaded last",
    "/load FILE": "go on with a saved conversation",
    "/regenerate": "another answer to your last message (needs a temperature above 0 to differ)",
    "/stats": "speed, expert cache, disk, memory and context",
    "/help": "this list",
    "/exit": "leave, as does Ctrl-D",
}
KEYS = (
    "Enter sends, Alt-Enter or Ctrl-J begins a new line. Ctrl-C stops an answer, or drops what was typed.",
    "Up and down walk through what was typed earlier, Ctrl-R searches it, Ctrl-X Ctrl-E opens an editor.",
    "A message that starts with a slash is sent with two.",
)


class Face(Protocol):
    """Where messages come from and answers go to."""

    def read(self) -> str | None:
        """The next message or command; None at the end."""

    def show(self, answer: Generator[str, None, None]) -> None:
        """The answer to what was read last, as it comes."""

    def say(self, text: str) -> None:
        """A remark of the program's."""

    def fail(self, problem: BaseException) -> None:
        """What was read last could not be done, or was interrupted."""


class Pipe:
    """Messages from the lines of stdin, answers to stdout, the rest to stderr; what fails ends the
    chat."""

    def __init__(self) -> None:
        self._lines = 0

    def read(self) -> str | None:
        for line in sys.stdin.buffer:
            self._lines += 1
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise ConfigError(f"stdin: line {self._lines} is not valid UTF-8 text") from None
            if text:
                return text
        return None

    def show(self, answer: Generator[str, None, None]) -> None:
        for piece in answer:
            print(piece, end="", flush=True)
        print(flush=True)

    def say(self, text: str) -> None:
        click.echo(f"slotmoe: {text}", err=True)

    def fail(self, problem: BaseException) -> None:
        raise problem


@click.command(name="chat")
@click.argument("model", metavar="MODEL")
@click.option("--system", metavar="TEXT", help="How the model should behave.")
@chat_options
@runtime_options
def command(
    model: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    trace: str | None,
    **options: Any,
) -> None:
    """Talk to MODEL, which is what it is for slotmoe run; its tokenizer must have a chat template.

    /help lists the commands.  Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves.
    When the context is full, the oldest exchanges are no longer seen by the model; the system
    message stays.  What was typed is kept in $SLOTMOE_CACHE/chat_history (default
    ~/.cache/slotmoe).

    Without a terminal each line of stdin is one message or command; answers go to stdout,
    everything else to stderr, and a line that fails ends it.

    \b
    Examples:
      slotmoe chat sample slotmoe chat lite-export --ram 6GiB --context 16384 --system "Answer in
      one sentence." printf '%s\\n' "Why is the sky blue?" "And at dusk?" /stats | slotmoe chat
      lite-export --seed 1
    """
    from slotmoe.model.generate import Sampling
    from slotmoe.tools.chat.conversation import Conversation

    sampling = Sampling(temperature, top_p, top_k, seed)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    with open_runtime(model, options) as runtime:
        face: Face
        conversation = Conversation(
            runtime, lambda text: face.say(text), max_new_tokens, sampling, system
        )
        if trace is not None:
            runtime.trace(trace)
        if sys.stdin.isatty() and sys.stdout.isatty():
            from slotmoe.offload.machine import cache_folder
            from slotmoe.tools.chat.terminal import Terminal

            face = Terminal(
                cache_folder() / "chat_history",
                [name.split()[0] for name in COMMANDS],
                conversation.status,
            )
            face.say(
                f"{model}, {runtime.context:,} tokens of context. /help lists the commands, Ctrl-D leaves."
            )
        else:
            face = Pipe()
        talk(conversation, face)


def talk(conversation: Conversation, face: Face) -> None:
    """Answer messages and do commands until there are no more, or one says to leave."""
    while (line := face.read()) is not None:
        try:
            if not line.startswith("/"):
                face.show(conversation.answer(line))
            elif line.startswith("//"):
                face.show(conversation.answer(line[1:]))
            elif not _perform(conversation, face, *line.split(maxsplit=1)):
                return
        except (SlotmoeError, OSError, KeyboardInterrupt) as problem:
            face.fail(problem)


def _perform(conversation: Conversation, face: Face, command: str, argument: str = "") -> bool:
    """Do a command; False if it says to leave.  Raises ``ConfigError``."""
    argument = argument.strip()
    if command == "/reset":
        conversation.reset()
        face.say("a new conversation")
    elif command == "/system":
        if argument:
            conversation.set_system(None if argument == "off" else argument)
        face.say(
            "there is no system message"
            if conversation.system is None
            else f"system message: {conversation.system}"
        )
    elif command == "/save":
        path = Path(argument) if argument else conversation.file
        if path is None:
            raise ConfigError("/save: needs the name of a file, as in /save talk.json")
        conversation.save(path)
        face.say(f"{len(conversation.exchanges)} exchanges are in {conversation.file}")
    elif command == "/load":
        if not argument:
            raise ConfigError("/load: needs the name of a file, as in /load talk.json")
        conversation.load(Path(argument))
        face.say(f"{len(conversation.exchanges)} exchanges from {conversation.file}")
    elif command == "/regenerate":
        face.show(conversation.regenerate())
    elif command == "/stats":
        _say_stats(conversation, face)
    elif command == "/help":
        width = max(map(len, COMMANDS))
        face.say(
            "\n".join([*(f"{name:{width}}  {text}" for name, text in COMMANDS.items()), *KEYS])
        )
    elif command in ("/exit", "/quit"):
        return False
    else:
        raise ConfigError(
            f"{command}: no such command; /help lists them, and a message that starts with a slash is sent with //"
        )
    return True


def _say_stats(conversation: Conversation, face: Face) -> None:
    from slotmoe.tools.run import summary

    sent = len(conversation.exchanges) - conversation.forgotten
    face.say(f"latest answer: {conversation.status()}")
    face.say(f"since the start: {summary(conversation.runtime.stats())}")
    face.say(f"{sent} of {len(conversation.exchanges)} exchanges are seen by the model")
