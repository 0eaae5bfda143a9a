"""Numbers and their words."""

from moerge_ext.files.counting import counted


def test_one_is_no_plural():
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]
