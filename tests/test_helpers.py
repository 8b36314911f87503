"""What the other tests rely on."""

import re

import pytest

from tests.helpers.errors import mentions


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["line 2", "a.csv", "model.lr", -1, "'5-6'"], True),
        ([10, "Line 2"], True),
        (["model.l"], False),
        ([1], True),
        ([0], False),
        (["lines"], False),
        (["csv", "tsv"], False),
    ],
)
def test_keys_and_values_are_found_whole_and_in_any_order(words: list, found: bool) -> None:
    assert bool(re.search(mentions(*words), "Line 2 of a.csv:\nmodel.lr is -1, not 10 or '5-6'")) == found
