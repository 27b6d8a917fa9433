"""Tables in plain text, for a terminal, and in Markdown, for a page."""

from collections.abc import Sequence


def text_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1, gap: int = 2
) -> str:
    """A table in plain text, whose columns are as wide as their widest cell.

    Args:
        header: the names of the columns.
        lines: the cells of each line. The last cell of a line that has fewer cells than there are
            columns extends over the columns that it lacks.
        left: the number of columns that are aligned to the left; the others are to the right.
        gap: spaces between two columns.
    """
    whole = [line for line in (header, *lines) if len(line) == len(header)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(header))]
    for line in lines:  # The last cell of a short line may have any length.
        for i, cell in enumerate(line[:-1]):
            widths[i] = max(widths[i], len(cell))

    def placed(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        if len(line) < len(header):
            cells[-1] = line[-1]
        return (" " * gap).join(cells).rstrip()

    first = placed(header)
    return "\n".join([first, "-" * len(first), *map(placed, lines)])


def markdown_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], *, padded: bool = False
) -> str:
    """A table in Markdown.

    Args:
        header: the names of the columns, of which some may be empty.
        lines: the cells of each line, one per column.
        padded: whether cells are filled up to the width of their column, for readers of the source.

    Raises:
        ValueError: if a line has more or fewer cells than there are columns.
    """
    columns = list(zip(header, *lines, strict=True))
    widths = [max(map(len, column)) if padded else 0 for column in columns]

    def placed(line: Sequence[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        return "| " + " | ".join(cells) + " |"

    names = placed(header).replace("|  |", "| |")  # A column may have no name.
    rule = "|" + "|".join("-" * (max(width, 1) + 2) for width in widths) + "|"
    return "\n".join([names, rule, *map(placed, lines)])
