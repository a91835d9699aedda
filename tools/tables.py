"""Tables for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

Rows = Iterable[Sequence[RenderableType]]


def table(columns: Sequence[str], rows: Rows, title: str | None = None, left: Any = (0,)) -> Table:
    """A plain table; the columns whose indices are in ``left`` are flush left, the others right."""
    width = None if title is None else len(title)  # no line break in the title
    plain = Table(title=title, title_justify="left", box=box.SIMPLE, min_width=width)
    plain.pad_edge, plain.collapse_padding = False, True
    for number, column in enumerate(columns):
        plain.add_column(column, justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        plain.add_row(*row)
    return plain
