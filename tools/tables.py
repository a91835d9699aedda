"""What is drawn on a terminal."""

import sys
from collections.abc import Container, Iterable, Sequence

import rich.console
from rich import box
from rich.console import ConsoleOptions, RenderableType, RenderHook
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

from slotmoe.errors import visible
from slotmoe.tools.screen import commanded, guard_streams

Row = Sequence[RenderableType]


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
    columns: Sequence[str],
    rows: Iterable[Row],
    title: str | None = None,
    left: Container[int] = (0,),
    sums: Iterable[Row] = (),
) -> Table:
    """A plain table, with the ``sums`` apart below its ``rows``; the columns whose indices are in
    ``left`` are flush left, the others right.  On too narrow a terminal, lists."""
    width, parts = None if title is None else len(title), ([*rows], [*sums])
    plain = Table(title=title, title_justify="left", box=box.SIMPLE, min_width=width)
    plain.pad_edge, plain.collapse_padding = False, True
    for number, column in enumerate(columns):
        plain.add_column(column, justify="left" if number in left else "right", no_wrap=True)
    for part in parts:
        plain.add_section()
        for row in part:
            plain.add_row(*row)
    console = Console()
    wide = console.options.update(max_width=10_000)
    if Measurement.get(console, wide, plain).maximum <= console.width:
        return plain
    lists = Table.grid(padding=(0, 2))
    lists.title, lists.title_justify = title, "left"
    for row in (*parts[0], *parts[1]):
        for column, cell in zip(columns, row, strict=True):
            lists.add_row(column.replace("\n", " "), cell)
        lists.add_row()
    return lists
