"""The pages have the tables that ``scripts/tables.py`` makes of the code."""

import pytest

from scripts.tables import PAGES, written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_tables_are_what_the_code_says(page):
    assert page.read_text() == written(page.read_text()), "run python -m scripts.tables"
