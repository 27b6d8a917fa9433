"""The cells of a page, read by patterns and not by the parser that the site uses."""

import re


def code_cells(text: str) -> list[str]:
    """The code of each cell of a page, in order, without the options above it."""
    cells = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", text, re.S | re.M)
    return [
        # Options are lines such as ":tags: [...]", or YAML between two lines of dashes.
        re.sub(r"\A(?:(:.*\n)+|---\n(?s:.*?)^---\n)", "", cell, flags=re.M).strip()
        for cell in cells
    ]
