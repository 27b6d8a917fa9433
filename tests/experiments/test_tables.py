"""Tables are compared with tables that were written by hand."""

import markdown_it
import pytest

from experiments.tables import markdown_table, text_table


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


@pytest.mark.parametrize(
    ("padded", "expected"),
    [
        (False, ["| name | |", "|---|---|", "| a | 1,000 |", "|  | 1 |"]),
        (True, ["| name |       |", "|------|-------|", "| a    | 1,000 |", "|      | 1     |"]),
    ],
)
def test_markdown_is_as_written_out_by_hand_and_read_as_a_table(padded, expected):
    """A parser of Markdown finds the cells of the table."""
    table = markdown_table(["name", ""], [["a", "1,000"], ["", "1"]], padded=padded)
    assert table.splitlines() == expected
    tokens = markdown_it.MarkdownIt().enable("table").parse(table)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert cells == ["name", "", "a", "1,000", "", "1"]


def test_a_line_of_markdown_with_another_number_of_cells_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["name", "n"], [["a"]])
