"""Tables that are wider than a screen become several."""

from benchmarks.markdown import narrow_tables, paragraphs, table

FIRST = ("row", ["a", "bb"])


def test_a_table():
    assert table(["x", "y"], [["1", "2"], ["3", "4"]]) == "| x | y |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"


def test_what_fits_is_one_table():
    groups = [[("x", ["1", "2"])], [("y", ["3", "4"]), ("z", ["5", "6"])]]
    assert narrow_tables(FIRST, groups) == (
        "| row | x | y | z |\n|---|---|---|---|\n| a | 1 | 3 | 5 |\n| bb | 2 | 4 | 6 |"
    )


def test_a_group_that_does_not_fit_goes_to_the_next_table_as_a_whole():
    groups = [[("x", ["1", "2"])], [("y", ["3", "4"]), ("z", ["5", "6"])]]
    one = narrow_tables(FIRST, groups, width=len("| row | x | y | z |"))
    assert one.count("row") == 1
    two = narrow_tables(FIRST, groups, width=len("| row | x | y | z |") - 1)
    assert two.split("\n\n") == [
        "| row | x |\n|---|---|\n| a | 1 |\n| bb | 2 |",
        "| row | y | z |\n|---|---|---|\n| a | 3 | 5 |\n| bb | 4 | 6 |",
    ]
    assert narrow_tables(FIRST, groups, width=1) == two


def test_columns_without_a_cell_are_left_out():
    assert "empty" not in narrow_tables(FIRST, [[("x", ["1", ""]), ("empty", ["", ""])]])
    assert narrow_tables(FIRST, [[("empty", ["", ""])]]) == ""


def test_paragraphs_are_those_with_a_text():
    assert paragraphs("a", "", "b") == "a\n\nb"
