"""Tables for a terminal."""

from collections.abc import Container, Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table

Row = Sequence[RenderableType]


class _Fitting:
    """A table, or where it is too wide for the terminal its rows as lists."""

    def __init__(self, plain: Table, columns: Sequence[str], rows: Iterable[Row]):
        self._plain, self._columns, self._rows = plain, columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(max_width=10_000)
        if Measurement.get(console, wide, self._plain).maximum <= options.max_width:
            yield self._plain
            return
        lists = Table.grid(padding=(0, 2))
        lists.title, lists.title_justify = self._plain.title, "left"
        for row in self._rows:
            for column, cell in zip(self._columns, row, strict=True):
                lists.add_row(column.replace("\n", " "), cell)
            lists.add_row()
        yield lists


def table(
    columns: Sequence[str],
    rows: Iterable[Row],
    title: str | None = None,
    left: Container[int] = (0,),
    sums: Iterable[Row] = (),
) -> RenderableType:
    """A plain table, with the ``sums`` apart below its ``rows``; the columns whose indices are in
    ``left`` are flush left, the others right."""
    width, parts = None if title is None else len(title), ([*rows], [*sums])
    plain = Table(title=title, title_justify="left", box=box.SIMPLE, min_width=width)
    plain.pad_edge, plain.collapse_padding = False, True
    for number, column in enumerate(columns):
        plain.add_column(column, justify="left" if number in left else "right", no_wrap=True)
    for part in parts:
        plain.add_section()
        for row in part:
            plain.add_row(*row)
    return _Fitting(plain, columns, [*parts[0], *parts[1]])
