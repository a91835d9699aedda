"""Tables for a terminal."""

from collections.abc import Container, Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

Row = Sequence[RenderableType]


def table(
    columns: Sequence[str],
    rows: Iterable[Row],
    title: str | None = None,
    left: Container[int] = (0,),
    sums: Iterable[Row] = (),
) -> Table:
    """A plain table, with the ``sums`` apart below its ``rows``; the columns whose indices are in
    ``left`` are flush left, the others right.  Where the terminal is too narrow, its rows as
    lists."""
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
