"""The pages have the tables that ``scripts/tables.py`` makes of the code."""

import re

import pytest

from scripts.tables import PAGES, TABLES, written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_tables_are_what_the_code_says(page):
    assert page.read_text() == written(page.read_text()), "run python -m scripts.tables"


def test_every_table_has_its_page():
    named = [
        name for page in PAGES for name in re.findall("<!-- table: (.*) -->", page.read_text())
    ]
    assert sorted(named) == sorted(TABLES)
