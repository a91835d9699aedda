"""``slotmoe chat`` on a terminal: a prompt with history, and answers as Markdown."""

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from slotmoe.errors import visible
from slotmoe.signals import Stopping, leave
from slotmoe.system import terminal_mode
from slotmoe.tools.tables import Console

Status = Callable[[], str]
_PAUSE = 30  # times as long as a drawing took passes until the next one


class Terminal:
    """Has the methods of ``Pipe``.  ``status`` gives the line below the prompt and an answer."""

    def __init__(
        self, history: Path, commands: list[str], status: Status, console: Console | None = None
    ):
        self._console, self._status = console or Console(), status
        self._unanswered = ""  # what was read last, until some of the answer to it is shown
        self._draft = ""  # what the next prompt begins with
        self._view: View | None = None  # of the latest answer
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=self._history(history),
            multiline=True,
            enable_open_in_editor=True,
            key_bindings=_keys(),
            completer=WordCompleter(commands, sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
            bottom_toolbar=status,
        )

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Ctrl-C between answers does nothing; what ends the process restores the terminal."""
        restore = terminal_mode()

        def end(number: int) -> None:
            if number != signal.SIGINT:
                restore()
                leave(number)

        with Stopping(end, once=False):
            yield

    def read(self) -> str | None:
        while True:
            draft, self._draft = self._draft, ""
            try:
                self._unanswered = line = self._session.prompt(default=draft)
                return line
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    self.say("Ctrl-D or /exit leaves, /help lists the commands")
            except EOFError:
                return None

    def show(self, answer: Generator[str, None, None]) -> None:
        """The answer as it comes.  What is typed meanwhile does not show in the middle of it; the
        next prompt has it."""
        with contextlib.ExitStack() as stack:
            stack.callback(terminal_mode(echo=False))
            stack.enter_context(contextlib.closing(answer))
            self._view = View(self._console, self._status)
            with self._view.live, contextlib.closing(self._view):
                for piece in answer:
                    self._unanswered = ""
                    self._view.add(piece)

    def think(self, text: str) -> None:
        """Reasoning, above the answer."""
        if self._view is not None:
            self._view.think(text)

    def say(self, *lines: str) -> None:
        """A remark, below what was answered so far."""
        if self._view is not None:
            self._view.close()
        self._console.print(Text("\n".join(lines), style="dim italic"))

    def fail(self, problem: BaseException) -> None:
        """Print it; the message is offered again unless some of its answer was shown."""
        if isinstance(problem, KeyboardInterrupt):
            self.say("stopped")
        else:
            self._console.print(Text(str(problem), style="red"))
        self._draft = self._unanswered

    def _history(self, path: Path) -> History:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as problem:
            reason = f"can't keep the history there ({problem.strerror}); it ends with this chat"
            self.say(f"{path}: {reason}")
            return InMemoryHistory()
        return _SavedHistory(str(path))


class _SavedHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):  # a full disk must not end the chat
            super().store_string(string)


class View:
    """An answer on its way: finished Markdown blocks stay on the terminal; ``live`` redraws the end
    of the unfinished block and the status line below them.  Drawing takes time from the model
    (highlighting code 0.5 ms a line): the longer it takes the less often it is done."""

    def __init__(self, console: Console, status: Status):
        self._console, self._status = console, status
        self._block, self._thought, self._printed = "", "", False
        self._drawn: list[list[Segment]] = []
        self._next_drawing = 0.0
        self.live = Live(
            get_renderable=self.render, console=console, transient=True, redirect_stdout=False
        )

    def think(self, text: str) -> None:
        """Print each line of the reasoning when it has ended."""
        *lines, self._thought = (self._thought + visible(text)).split("\n")
        for line in lines:
            self._console.print(Text(line, style="dim"))
            self._printed = True

    def add(self, text: str) -> None:
        if self._thought:
            self.think("\n")
        self._block += visible(text)
        if "\n" in text:
            end = finished(self._block)
            done, self._block = self._block[:end], self._block[end:]
            self._print(done)

    def close(self) -> None:
        """Print what is unfinished as if it were finished."""
        self.add("")
        rest, self._block = self._block, ""
        self._print(rest)

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        self._next_drawing = 0.0
        if self._printed:
            self._console.print()
        self._console.print(markdown(text))
        self._printed = True

    def render(self) -> Segments:
        """The end of the unfinished block, and the status line."""
        started = time.perf_counter()
        if started >= self._next_drawing:
            self._drawn = self._draw()
            self._next_drawing = started + _PAUSE * (time.perf_counter() - started)
        status = Segment(self._status()[: self._console.width - 1], self._console.get_style("dim"))
        lines = [*self._drawn, [status]]
        return Segments(segment for line in lines for segment in [*line, Segment.line()])

    def _draw(self) -> list[list[Segment]]:
        """The last lines of the unfinished block that fit above the status line."""
        room = max(self._console.height - 2, 1)
        source = self._block.splitlines(keepends=True)
        if len(source) > room:
            source = [*source[: self._block.startswith(("```", "~~~"))], *source[-room:]]
        if not source:
            return []
        lines = self._console.render_lines(markdown("".join(source)), pad=False)
        return [*([[]] if self._printed else []), *lines][-room:]


def markdown(text: str) -> Markdown:
    """``text`` for a terminal: addresses are shown, not hidden behind other words."""
    rendered = Markdown(text, hyperlinks=False)
    for token in rendered.parsed:
        for child in token.children or ():
            if child.type == "softbreak":  # models mean the ends of their lines, as in a poem
                child.type = "hardbreak"
    return rendered


def finished(text: str) -> int:
    """How many characters of ``text`` are Markdown blocks that no later line can change."""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    tokens = Markdown("".join(lines)).parsed
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
    return sum(map(len, lines[: starts[-1]])) if starts else 0


def _keys() -> KeyBindings:
    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
