"""Pages whose code a reader can run: what they need, their cells as a script and as a notebook.

The first line of such a page, below its title, is the command that installs what its cells import.
"""

import os
import pathlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

import nbformat
from myst_nb.core.read import read_myst_markdown_notebook
from sphinx.util.parallel import make_chunks

from tests.support.effort import QUICKLY

DOCS = pathlib.Path(__file__).parent

# A page that compares the bits of several programs: they are compiled as users' are.
OPTIMIZED = ("tutorials/many_devices",)

# Pages that run for about as long as they compile, or tell speeds.
SOME_EFFORT = ("start", "tutorials/momentum_and_schedules", "tutorials/transformer")
SOME_EFFORT_FLAGS = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"

# What is in the environment for every page: a user's own flags are heard.
_FLAGS = os.environ.get("XLA_FLAGS", "")

_INSTALL = re.compile(r"^# .+\n\n    pip install (.+)\n", re.M)
_NOTE = """
The cells below need this and no more. You can also download the page as a
<a href="{name}.ipynb" download>notebook</a>. Until msgd-jax is in a package index, install it
[from a checkout]({start}#install).
"""


def requirements(text: str) -> list[str] | None:
    """What the first line of a page installs, or None for a page without such a line."""
    found = _INSTALL.search(text)
    return shlex.split(found[1]) if found else None


def runnable() -> Iterator[tuple[str, str]]:
    """The name of each page that readers can run, as "tutorials/sde", and its text."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if "_build" not in path.parts and requirements(text) is not None:
            yield str(path.relative_to(DOCS).with_suffix("")), text


def cells(text: str) -> list[Any]:
    """The cells of a page, of code and of text."""
    return read_myst_markdown_notebook(text).cells


def script(text: str) -> str:
    """The code of a page in order, as a reader would paste it into one file."""
    parts = []
    for cell in cells(text):
        if cell.cell_type == "code":
            raises = "raises-exception" in cell.metadata.get("tags", [])
            parts.append(_expected_to_raise(cell.source) if raises else cell.source)
    return "\n\n".join(parts) + "\n"


def _expected_to_raise(source: str) -> str:
    body = textwrap.indent(source, "    ")
    end = "except Exception as error:\n    print(error)\nelse:\n    raise AssertionError"
    return f"try:\n{body}\n{end}"


def as_notebook(text: str) -> Any:
    """A page as a notebook without outputs, its text without what only the site can show."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    for i, cell in enumerate(cells(text)):
        if cell.cell_type == "code":
            made = nbformat.v4.new_code_cell(cell.source)
            tags = cell.metadata.get("tags", [])
            made.metadata["tags"] = [tag for tag in tags if tag == "raises-exception"]
        else:
            # Links between pages lead nowhere outside the site, nor do its directives.
            plain = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)\s]+\)", r"\1", cell.source)
            plain = re.sub(
                r"^```\{[a-z]+\}(?s:.*?)^```", "*(The page shows a file here.)*", plain, flags=re.M
            )
            made = nbformat.v4.new_markdown_cell(plain)
        made["id"] = f"cell-{i}"  # otherwise random
        book.cells.append(made)
    return book


def deal(app: Any, env: Any, docnames: list[str]) -> None:
    """Orders the pages so that two processes have about as much to run.

    Sphinx gives each process a part of the list, and in the order of names one part would have
    nearly all pages that take long. Pages with more lines of code take longer.
    """
    part = len(make_chunks(docnames, app.parallel)[0]) if docnames else 0
    texts = {name: pathlib.Path(env.doc2path(name)).read_text() for name in docnames}
    lines = {
        name: script(text).count("\n") for name, text in texts.items() if "{code-cell}" in text
    }
    dealt: tuple[list[str], list[str]] = ([], [])
    work = [0, 0]
    for name in sorted(lines, key=lambda name: (-lines[name], name)):
        free = [i for i in (0, 1) if len(dealt[i]) < part] or [1]
        least = min(free, key=work.__getitem__)
        dealt[least].append(name)
        work[least] += lines[name]
    first, second = dealt
    others = [name for name in docnames if name not in lines]
    space = max(part - len(first), 0)
    docnames[:] = [*first, *others[:space], *second, *others[space:]]


def add_note(app: Any, docname: str, source: list[str]) -> None:
    """Says below the first line of a page what it is for, and where the notebook is."""
    del app
    depth = docname.count("/")
    note = _NOTE.format(name=docname.rpartition("/")[2], start="../" * depth + "start.md")
    source[0] = _INSTALL.sub(lambda found: found[0] + note, source[0], count=1)


def set_effort(app: Any, docname: str, source: list[str]) -> None:
    """Lets XLA make little effort with the programs of a page, where that shows nothing else.

    Most take longer to compile than to run. The page's own process, started next, inherits this.
    """
    del app, source
    little = docname not in OPTIMIZED + SOME_EFFORT
    flags = [_FLAGS]
    if docname in SOME_EFFORT:
        flags.append(SOME_EFFORT_FLAGS)
    if docname not in OPTIMIZED:
        flags.append(QUICKLY)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1" if little else "0"
    os.environ["XLA_FLAGS"] = " ".join(flags)


def write_notebooks(app: Any, exception: Exception | None) -> None:
    """Puts the notebooks beside their pages."""
    if exception is None and app.builder.format == "html":
        for name, text in runnable():
            target = pathlib.Path(app.outdir, f"{name}.ipynb")
            nbformat.write(as_notebook(text), target)


def setup(app: Any) -> dict[str, bool]:
    """Registers the functions above."""
    app.connect("env-before-read-docs", deal)
    app.connect("source-read", add_note)
    app.connect("source-read", set_effort)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
