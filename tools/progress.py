"""Progress bars for everything that takes over two seconds, on stderr, and only on a terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import RenderableType
from rich.text import Text

from slotmoe.tools.tables import Console

Update = Callable[[int, int], None]


class _Bars(progress.Progress):
    """Bars with some ``columns``, and while there is none a line of ``text``."""

    def __init__(self, *columns: progress.ProgressColumn, quiet: bool, text: str = ""):
        self.text, console = text, Console(stderr=True)
        columns = (progress.BarColumn(), *columns, progress.TimeRemainingColumn())
        words = "{task.description}"
        if console.width < 60:  # these have no room for a bar
            columns, words = (), f"{{task.percentage:>3.0f}}% {words}"
        described = progress.TextColumn(words, markup=False)
        # Drawing takes time from the model.
        super().__init__(described, *columns, console=console, refresh_per_second=2)
        self.disable = quiet or not console.is_terminal

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.text and not any(task.visible and not task.finished for task in self.tasks):
            yield Text(self.text, style="dim")
        yield from super().get_renderables()


@contextmanager
def step_progress(text: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A callback behind a bar, to be called after each of ``total`` steps."""
    with _Bars(progress.MofNCompleteColumn(), quiet=quiet) as bars:
        task = bars.add_task(text, total=total)
        yield lambda: bars.advance(task)


@contextmanager
def byte_bars(*texts: str, quiet: bool = False, waiting: str = "") -> Iterator[tuple[Update, ...]]:
    """For each text a callback ``(done bytes, total bytes)`` behind a bar that appears with its
    first call.  The line ``waiting`` stands there while none of them moves."""
    columns = progress.DownloadColumn(), progress.TransferSpeedColumn()

    def updater(text: str) -> Update:
        task = bars.add_task(text, total=None, visible=False, start=False)

        def update(done: int, total: int) -> None:
            bars.start_task(task)
            bars.update(task, completed=done, total=total, visible=True)

        return update

    with _Bars(*columns, quiet=quiet, text=waiting) as bars:
        try:
            yield tuple(updater(text) for text in texts)
        finally:
            bars.text = ""
