"""The site builds without a warning while its cells are not run, and has every public name."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest
from sphinx.util.inventory import InventoryFile

import msgd_jax
from tests.support.cells import code_cells

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    """The folder of the built site."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    # A notebook that was not run does not say in which language it is.
    unrun = ["-D", "nb_execution_mode=off", "-D", "suppress_warnings=myst-nb.lexer"]
    built = subprocess.run([*command, *unrun, str(DOCS), str(site)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return site


@pytest.fixture(scope="module")
def inventory(site) -> dict[str, str]:
    """Every documented name and the page it is on."""
    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {
        name: item.uri
        for kind, items in found.data.items()
        if kind.startswith("py:")
        for name, item in items.items()
    }


@pytest.mark.parametrize("name", msgd_jax.__all__)
def test_every_public_name_is_in_the_reference(name, inventory):
    module = importlib.import_module(f"msgd_jax.{name}")
    assert inventory[f"msgd_jax.{name}"].startswith("api/")
    for public in module.__all__:
        value = getattr(module, public)
        # A name that two modules share is described in one of them.
        homes = [
            f"msgd_jax.{other}.{public}"
            for other in msgd_jax.__all__
            if getattr(importlib.import_module(f"msgd_jax.{other}"), public, None) is value
        ]
        assert any(home in inventory for home in homes), f"msgd_jax.{name}.{public}"


@pytest.mark.parametrize(
    "page", ["index", "m_noise", "paper", "api/noise", "api/sde", "api/measure"]
)
def test_formulas_are_mathml_and_need_no_script(page, site):
    html = (site / f"{page}.html").read_text()
    assert html.count("<math ") >= 1
    assert not re.search(r"<script[^>]*(https?:|mathjax|katex)", html, re.I)


def test_the_pages_have_cells_and_each_compiles():
    cells = {
        f"{page.relative_to(DOCS)}, cell {i}": cell
        for page in PAGES
        for i, cell in enumerate(code_cells(page.read_text()))
    }
    assert len(cells) > 50
    for where, cell in cells.items():
        compile(cell, where, "exec")


def test_every_picture_says_what_it_shows():
    """Committed pictures, and those that cells draw, have a text for readers who cannot see them.

    A text of 60 letters is about one sentence; shorter ones were titles.
    """
    for page in [
        *PAGES,
        *DOCS.parent.glob("*.md"),
        *DOCS.parent.glob("experiments/results/**/*.md"),
    ]:
        text = page.read_text()
        for alternative in re.findall(r"!\[((?:\\.|[^\]])*)\]\(", text):
            assert len(alternative) > 60, f"{page}: {alternative}"
        for cell in re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```", text, re.S | re.M):
            if "plt.subplots" in cell or re.search(r"records\.(curves|trace)\(", cell):
                assert "    alt: " in cell, f"{page}: {cell}"
