"""Progress bars for everything that takes over two seconds, on stderr, and only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Update = Callable[[int, int], None]


def _bars(*columns: ProgressColumn, quiet: bool) -> Progress:
    console = Console(stderr=True)
    # Drawing takes time from the model.
    settings: Any = {"refresh_per_second": 2, "disable": quiet or not console.is_terminal}
    after = (*columns, TimeRemainingColumn())
    return Progress("{task.description}", BarColumn(), *after, console=console, **settings)


@contextmanager
def step_progress(text: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A callback behind a bar, to be called after each of ``total`` steps."""
    with _bars(MofNCompleteColumn(), quiet=quiet) as bars:
        task = bars.add_task(text, total=total)
        yield lambda: bars.advance(task)


@contextmanager
def byte_progress(text: str, quiet: bool = False) -> Iterator[Update]:
    """A callback ``(done bytes, total bytes)`` behind a bar that appears with its first call."""
    with byte_bars(text, quiet=quiet) as (update,):
        yield update


@contextmanager
def byte_bars(*texts: str, quiet: bool = False) -> Iterator[tuple[Update, ...]]:
    """One callback like ``byte_progress``'s for each text; their bars stand below each other."""
    bars = _bars(DownloadColumn(), TransferSpeedColumn(), quiet=quiet)

    def updater(text: str) -> Update:
        task = bars.add_task(text, total=None, visible=False, start=False)

        def update(done: int, total: int) -> None:
            bars.start_task(task)
            bars.update(task, completed=done, total=total, visible=True)

        return update

    with bars:
        yield tuple(updater(text) for text in texts)
