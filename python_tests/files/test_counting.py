"""Numbers and their words."""

from moerge_ext.files.counting import counted
from moerge_ext.files.listing import at_rows, listed


def test_one_is_no_plural():
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]


def test_what_is_left_out_of_a_list_is_no_plural_of_one():
    assert [listed("abcde"[:n], "module") for n in (3, 4, 5)] == [
        "a, b, c", "a, b, c and 1 more module", "a, b, c and 2 more modules",
    ]  # fmt: skip
    assert (listed("abcd"), at_rows([4]), at_rows(range(5))) == (
        "a, b, c and 1 more", "row 4 (from 0)", "rows 0, 1, 2 and 2 more (from 0)",
    )  # fmt: skip
