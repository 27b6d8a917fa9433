"""A reader can run the pages: their first line installs all that their cells import."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import nbformat
import pytest
from packaging.requirements import Requirement

from docs import pages
from tests.support.cells import code_cells

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNNABLE = dict(pages.runnable())
# These pages show the records of a checkout, and say so.
OF_RECORDS = {"paper", "scaling"}

# What modules of the library need beyond what comes with it.
NEEDED_BY = {"streaming": "grain", "flax_nnx": "flax"}


def names(requirements: list[str]) -> set[str]:
    """The names of the distributions that are required."""
    return {Requirement(entry).name for entry in requirements}


def imported(script: str) -> set[str]:
    """The distributions that a script imports, in functions too, but for the standard library.

    A module of no distribution, such as "docs", has its own name.
    """
    modules = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
            if node.module == "msgd_jax":
                modules |= {
                    NEEDED_BY[alias.name] for alias in node.names if alias.name in NEEDED_BY
                }
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    modules -= set(sys.stdlib_module_names) | {"msgd_jax"}
    known = importlib.metadata.packages_distributions()
    return {known.get(module, [module])[0] for module in modules}


def missing(text: str) -> set[str]:
    """The distributions that the cells of a page import and its first line does not install."""
    installed = names(PROJECT["dependencies"])
    for entry in map(Requirement, pages.requirements(text) or []):
        installed.add(entry.name)
        for extra in entry.extras:
            installed |= names(PROJECT["optional-dependencies"][extra])
    return imported(pages.script(text)) - installed


def test_every_page_with_cells_says_what_it_needs():
    with_cells = {
        str(path.relative_to(pages.DOCS).with_suffix(""))
        for path in pages.DOCS.rglob("*.md")
        if "_build" not in path.parts and "{code-cell}" in path.read_text()
    }
    assert with_cells - OF_RECORDS == set(RUNNABLE)
    assert {name for name in RUNNABLE if name.startswith("tutorials/")} == {
        f"tutorials/{path.stem}" for path in (pages.DOCS / "tutorials").glob("*.md")
    }


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_first_line_installs_what_the_cells_import_and_no_more(name):
    text = RUNNABLE[name]
    assert missing(text) == set()
    used = imported(pages.script(text))
    for entry in map(Requirement, pages.requirements(text) or []):
        assert entry.name == "msgd-jax" or entry.name in used, entry
        for extra in entry.extras:
            assert used & names(PROJECT["optional-dependencies"][extra]), extra


PAGE = """# A page

    pip install 'msgd-jax[flax]' matplotlib

```{code-cell} ipython3
import flax, scipy.stats, matplotlib.pyplot as plt
SECOND
```
"""


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        ("import os", set()),
        ("from docs import records", {"docs"}),
        ("from experiments.paper import panels", {"experiments"}),
        ("if True:\n    import sklearn.datasets", {"scikit-learn"}),
        ("import diffrax", {"diffrax"}),
        ("from msgd_jax import flax_nnx, loss, streaming", {"grain"}),
    ],
)
def test_what_is_missing_is_found(second, wanted):
    assert missing(PAGE.replace("SECOND", second)) == wanted


def test_a_page_without_a_first_line_is_not_one_to_run():
    assert pages.requirements(PAGE.replace("    pip", "    uv pip")) is None


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_notebook_has_the_cells_of_the_page(name):
    """It has the first line of the page too, and neither directives nor links to other pages."""
    book = pages.as_notebook(RUNNABLE[name])
    nbformat.validate(book)
    code = [cell.source.strip() for cell in book.cells if cell.cell_type == "code"]
    texts = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert code == code_cells(RUNNABLE[name]) != []
    assert "    pip install " in book.cells[0].source
    assert not re.search(r"```\{|\]\((?!http)[^)]*\.md", texts)


def test_a_cell_that_is_to_raise_does_not_end_the_script():
    cell = "```{code-cell} ipython3\n:tags: [raises-exception]\n\nraise ValueError('wanted')\n```"
    exec(pages.script(f"# A page\n\n{cell}\n"), {})
    with pytest.raises(AssertionError):
        exec(pages.script(f"# A page\n\n{cell.replace('raise V', 'V')}\n"), {})
