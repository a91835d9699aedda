"""Tables for a terminal."""

from collections.abc import Container, Iterable, Sequence

from rich import box
from rich.console import RenderableType
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
    ``left`` are flush left, the others right."""
    width = None if title is None else len(title)  # no line break in the title
    plain = Table(title=title, title_justify="left", box=box.SIMPLE, min_width=width)
    plain.pad_edge, plain.collapse_padding = False, True
    for number, column in enumerate(columns):
        plain.add_column(column, justify="left" if number in left else "right", no_wrap=True)
    for part in (rows, sums):
        plain.add_section()
        for row in part:
            plain.add_row(*row)
    return plain
