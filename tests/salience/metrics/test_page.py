"""The page of the metrics is made from the tests' own parametrization."""

from __future__ import annotations

from integration.salience.page import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m integration.salience.page`"
