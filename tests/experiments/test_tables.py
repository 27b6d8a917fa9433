"""Tables of text against ones written out by hand."""

from experiments.tables import text_table


def test_columns_are_as_wide_as_their_widest_cell_and_short_lines_stand_as_they_are():
    table = text_table(["name", "n"], [["a", "10,000"], ["longer", "1"], ["b"]])
    assert table.splitlines() == [
        "name         n",
        "-" * 14,
        "a       10,000",
        "longer       1",
        "b",
    ]
    table = text_table(["run", "state", "n"], [["a", "a long remark"], ["bcde", "on", "1"]], left=2)
    assert table.splitlines()[2:] == ["a     a long remark", "bcde  on     1"]
