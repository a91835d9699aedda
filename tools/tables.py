"""What is drawn on a terminal: tables, and progress bars on stderr for all that takes over two
seconds."""

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.console
from rich import box, progress
from rich.console import ConsoleOptions, RenderableType, RenderHook
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from slotmoe.errors import informs, visible
from slotmoe.model.config import Config
from slotmoe.offload.plan.precision import Fit, code_of, groups_of
from slotmoe.sizes import format_size
from slotmoe.tools.screen import commanded, guard_streams

if TYPE_CHECKING:
    from slotmoe.offload.engine.requests import Stream

_DRAWN = 2  # times a second; drawing takes time from the model
_QUICK_SECONDS = 0.5  # of a prompt that needs no line
Row = Sequence[RenderableType]
Update = Callable[[int, int], None]


class Console(rich.console.Console):
    """Draws with codes of its own; none comes out of a text, nor is that markup."""

    def __init__(self, stderr: bool = False):
        stream = commanded(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def push_render_hook(self, hook: RenderHook) -> None:
        super().push_render_hook(hook)
        guard_streams()  # meanwhile rich takes codes in what others print for its own


def table(
    columns: Sequence[str], rows: Iterable[Row], title: str = "", left: Container[int] = (0,)
) -> Table:
    """A plain table; the columns whose indices are in ``left`` are flush left, the others right.
    On too narrow a terminal, lists."""
    rows, plain = [*rows], Table(title=title or None, title_justify="left", box=box.SIMPLE)
    plain.min_width = len(title) or None
    plain.pad_edge, plain.collapse_padding, plain.show_edge = False, True, False
    for number, column in enumerate(columns):
        plain.add_column(column, justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        plain.add_row(*row)
    console = Console()
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, plain).maximum <= console.width:
        return plain
    lists = Table.grid(padding=(0, 2))
    lists.title, lists.title_justify = plain.title, "left"
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            lists.add_row(column.replace("\n", " "), cell)
        lists.add_row()
    return lists


def fit_table(config: Config, fit: Fit) -> Table:
    """What ``fit`` gives each kind of tensor, by thirds of the depth."""
    kinds = {"routed experts": [" and ".join(dict.fromkeys(fit.codecs.names().values()))] * 3}
    for (kind, third), (name, *_) in groups_of(config).items():
        code = code_of(name, fit.resident).replace("none", "bf16")
        kinds.setdefault(kind, [""] * 3)[third] = code
    title = f"{format_size(fit.nbytes)}, expected to lose {fit.loss:.2g} nats a token"
    rows = [(kind, *codes) for kind, codes in kinds.items()]
    return table(("tensors", "early", "middle", "late layers"), rows, title, range(4))


class _Bars(progress.Progress):
    """Bars with some ``columns``, and while there is none a line of ``text``."""

    def __init__(self, *columns: progress.ProgressColumn, quiet: bool, text: str = ""):
        self.text, console = text, Console(stderr=True)
        columns = (progress.BarColumn(), *columns, progress.TimeRemainingColumn())
        words = "{task.description}"
        if console.width < 60:  # these have no room for a bar
            columns, words = (), f"{{task.percentage:>3.0f}}% {words}"
        described = progress.TextColumn(words, markup=False)
        super().__init__(described, *columns, console=console, refresh_per_second=_DRAWN)
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
        yield informs(lambda: bars.advance(task))


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
            yield tuple(informs(updater(text)) for text in texts)
        finally:
            bars.text = ""


def wait_reading(stream: "Stream") -> None:
    """Wait for ``stream``'s first token; on a terminal a line says what is read or compiled."""
    if stream.wait(_QUICK_SECONDS):
        return
    from slotmoe.quant.backends.base import COMPILES

    total = len(stream.request.prompt)
    with Console(stderr=True).status("", refresh_per_second=_DRAWN) as line:
        while not stream.wait(1 / _DRAWN):
            done = f"reading {stream.request.read:,} of {total:,} tokens"
            if COMPILES.running:
                done = f"compiling the GPU's kernels, once: {COMPILES.count}"
            line.update(done)
